"""How long a forward pass takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def latency(models: Sequence[nn.Module], inputs: Mapping[str, Tensor], repeats: int = 15) -> list[float]:
    """Median milliseconds of a forward pass of each model on the same inputs.

    The models take turns (A B A B ...), so whatever else the machine does meanwhile meets all of them alike.

    Args:
        models: put into evaluation mode; they stay on their devices.
        inputs: keyword arguments of the models.
        repeats: passes of each model that count; one more before them does not.
    """
    times: list[list[float]] = [[] for _ in models]
    placed = []
    for model in models:
        device = next(model.eval().parameters()).device
        placed.append({name: value.to(device) for name, value in inputs.items()})
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for model, arguments, record in zip(models, placed, times, strict=True):
                _synchronize()
                started = time.perf_counter()
                model(**arguments)
                _synchronize()
                record.append(1000 * (time.perf_counter() - started))
    return [statistics.median(record[1:]) for record in times]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
