"""Two processes that train together make the same of a model, and what one alone makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf import dynamic_rank_worker, straight_through_worker

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what each process has made: they are started once, which takes longer than their training."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = [*launcher, *place, str(ROOT / "tests" / "hf" / "two_processes.py"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def both(folder: Path, name: str) -> tuple[Any, Any]:
    first, second = (torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_straight_through(trained: Path) -> None:
    first, second = both(trained, "straight")
    assert_equal(first, second)
    before = straight_through_worker.build("dsformer")[0].state_dict()
    assert [name for name, old in before.items() if name.endswith("support") and not torch.equal(old, first[name])]


def test_dynamic_ranks(trained: Path, tmp_path: Path) -> None:
    first, second = both(trained, "ranks")
    assert_equal(first["model"], second["model"])
    assert first["history"] == second["history"]
    # Two batches of four are one of eight, if gradients are averaged; Adam would make much of a last bit.
    model, ranks = dynamic_rank_worker.build("rankdyna", dropout=0.0)
    dynamic_rank_worker.trainer(model, ranks, tmp_path / "one", save_steps=50, optim="sgd").train()
    assert ranks.history.ranks == first["history"]["ranks"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(first["model"][name], tensor, rtol=1e-3, atol=1e-4)
