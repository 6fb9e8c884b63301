"""Run a worker on two processes that train together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def two_processes(worker: str, folder: Path) -> tuple[Any, Any]:
    """What each process of `python -m torch.distributed.run tests/hf/WORKER.py FOLDER` saved as FOLDER/rank-N.pt."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = [*launcher, *place, str(ROOT / "tests" / "hf" / f"{worker}.py"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second
