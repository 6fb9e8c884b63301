"""Latency of forward passes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from factorformer.planning.evidence.times import interleaved


def latency(models: Sequence[nn.Module], inputs: Mapping[str, Tensor], repeats: int = 15) -> list[float]:
    """Median milliseconds of a forward pass of each model on the same inputs.

    Passes are interleaved, so that whatever else the machine does meets all models alike.

    Args:
        models: put into evaluation mode; they stay on their devices.
        inputs: keyword arguments of the models.
        repeats: passes of each model that count; one more before them does not.
    """
    devices = [next(model.eval().parameters()).device for model in models]
    gpu = next((device for device in devices if device.type == "cuda"), None)
    runs: list[Callable[[], object]] = []
    for model, device in zip(models, devices, strict=True):
        placed = {name: value.to(device) for name, value in inputs.items()}
        runs.append(lambda model=model, placed=placed: model(**placed))
    times = interleaved(runs, repeats + 1, device=gpu)[1:]
    return [statistics.median(column) for column in zip(*times, strict=True)]
