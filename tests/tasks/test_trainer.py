"""What is done around a training ends with it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from factorformer.errors import MethodError
from factorformer.tasks.finetuning import TrainingSettings
from factorformer.tasks.healing import HealingSettings
from factorformer.tasks.trainer import in_full_precision, seeded


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), float(torch.rand(()))


def test_seeds_are_those_of_a_block_alone() -> None:
    with seeded(1):
        first = draw()
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    with seeded(1):
        assert draw() == first
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert after == before


def test_precision_returns_to_every_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2), nn.BatchNorm1d(2).half(), nn.Linear(2, 2).half())
    model[3].weight = model[3].bias = None
    model[3].weight = model[0].weight  # tied
    model[0].register_buffer("table", torch.zeros(2))
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    restore = in_full_precision(model)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert model[3].weight is model[0].weight
    model[1].register_parameter("factor", nn.Parameter(torch.zeros(2)))
    model[0].register_parameter("factor", nn.Parameter(torch.zeros(2)))
    model[0].weight.grad = torch.zeros(2, 2)
    restore()
    found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert found == kinds | {"0.factor": torch.bfloat16, "1.factor": torch.float32}
    assert model[3].weight is model[0].weight
    assert model[0].weight.grad is None


def test_settings_that_cannot_be() -> None:
    nan, inf = float("nan"), float("inf")
    for name, values in {
        "epochs": (0, -1, nan, inf),
        "learning_rate": (-1e-4, nan, inf),
        "batch_size": (0, -1),
        "warmup": (-0.1, 1.0, nan),
        "weight_decay": (-1, nan, inf),
    }.items():
        for value in values:
            with pytest.raises(MethodError, match=f"{name.replace('_', ' ')} has to be .* got {value}"):
                TrainingSettings(**{name: value})
    TrainingSettings(learning_rate=0, warmup=0, weight_decay=0)
    for minutes in (0, -1, nan, inf):
        with pytest.raises(MethodError, match=f"minutes has to be .* got {minutes}"):
            HealingSettings(minutes=minutes)
    with pytest.raises(MethodError, match=r"learning rate has to be .* got None"):
        TrainingSettings(learning_rate=None)
