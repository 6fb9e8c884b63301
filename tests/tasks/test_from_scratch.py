"""Settings of a training from scratch, its checkpoints, and the random numbers that it draws."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from factorformer.errors import MethodError, OutputError
from factorformer.tasks.checkpoints import check_same_run, last_checkpoint, locked, step_of
from factorformer.tasks.from_scratch import ScratchSettings


def test_settings_out_of_range_are_refused() -> None:
    wrong = {
        "epochs": (0.0, -1.0, math.inf, math.nan),
        "learning_rate": (-1e-3, math.nan),
        "warmup": (-0.1, 1.0, math.nan),
        "label_smoothing": (1.0,),
        "adam_beta2": (1.0,),
        "clip": (0.0,),
        "steps": (0, -1),
        "batch_size": (0,),
        "points": (0,),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(MethodError, match=f"{name.replace('_', ' ')} has to be .* got {value}"):
                dataclasses.replace(ScratchSettings(), **{name: value})
    assert ScratchSettings(warmup=0.0, label_smoothing=0.0).warmup == 0.0


def checkpoint(output: Path, step: int, *, complete: bool = True) -> Path:
    folder = output / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}" if complete else '{"global_st')
    return folder


def test_looking_for_checkpoints_deletes_nothing(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "missing") is None
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, complete=False)
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert last_checkpoint(tmp_path) == newest
    assert step_of(newest) == 10
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_of_an_unknown_run_are_not_gone_on_with(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    with pytest.raises(OutputError, match=r"run\.json"):
        check_same_run(tmp_path, {"seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_lock_keeps_a_second_process_out(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "lock"
    with locked(lock):
        with pytest.raises(OutputError, match="another process"), locked(lock):
            pytest.fail("both are in")
        assert lock.exists()
    with locked(lock):
        pass
    assert list((tmp_path / "new").iterdir()) == []
