"""Hardware and versions recorded with every measurement."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from factorformer.kernels import variant


def processor() -> str:
    """The name of the processor, as far as the system knows it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Processor, cores, vector instructions as torch sees them, variant of our kernels, load, and GPU if any."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": variant(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
    }
