"""Straight-through training under the `Trainer`: accumulation, bfloat16, interrupted runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from tests import tiny
from tests.hf.straight_through_worker import build, examples, trainer
from torch import Tensor

import factorformer
from factorformer.structures import DenseSparse
from factorformer.tasks.finetuning import TrainingSettings, train
from factorformer.training.straight_through import StraightThrough


def state(model: tf.PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Supports that are not what they were."""
    return [n for n, tensor in before.items() if n.endswith("support") and not torch.equal(tensor, after[n])]


@dataclasses.dataclass
class Run:
    """A whole run of twelve steps that left checkpoints on its way."""

    options: dict[str, Any]
    start: dict[str, Tensor]
    model: tf.PreTrainedModel
    folder: Path


def run(folder: Path, **options: Any) -> Run:
    model, straight = build("dsformer")
    start = state(model)
    trainer(model, straight, folder, save_steps=2, **options).train()
    return Run(options, start, model, folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("accumulated")
    return run(folder, gradient_accumulation_steps=2, bf16=True, num_train_epochs=6)


@pytest.mark.parametrize("cut", [4, 10], ids=["moving", "frozen"])
@pytest.mark.parametrize("whole", ["plain", "accumulated"])
def test_an_interrupted_run_ends_where_a_whole_one_does(
    tmp_path: Path, cut: int, whole: str, request: pytest.FixtureRequest
) -> None:
    found: Run = request.getfixturevalue(whole)
    model, straight = build("dsformer")
    trainer(model, straight, tmp_path, save_steps=50, **found.options).train(
        resume_from_checkpoint=str(found.folder / f"checkpoint-{cut}")
    )
    assert_equal(state(found.model), state(model))
    assert not [
        name for name in found.model.state_dict() if name.endswith(("shadow", "projection", "frozen", "moment"))
    ]


def test_supports_move_and_the_saved_model_is_an_ordinary_one(plain: Run, tmp_path: Path) -> None:
    model = plain.model
    assert moved(plain.start, state(model))
    model.save_pretrained(tmp_path / "saved")
    loaded = factorformer.load(tmp_path / "saved").eval()
    assert_equal(state(model), state(loaded))
    inputs = tiny.text()
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, loaded(**inputs).logits)


def test_a_checkpoint_on_the_way_loads_as_a_compressed_model(plain: Run) -> None:
    loaded = factorformer.load(plain.folder / "checkpoint-4")
    assert not [name for name in loaded.state_dict() if name.endswith(("shadow", "projection", "frozen", "moment"))]
    specs = [m.spec for m in loaded.modules() if isinstance(m, factorformer.FactorizedLinear)]
    assert all(isinstance(spec, DenseSparse) for spec in specs)
    assert torch.isfinite(loaded.eval()(**tiny.text()).logits).all()


def test_a_training_that_is_interrupted_leaves_plain_factors(
    tokenizer: tf.PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, straight = build("dsformer")
    names = [name for name in model.state_dict() if not name.endswith(("shadow", "projection", "frozen", "moment"))]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StraightThrough, "after_step", interrupt)
    rows = datasets.Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in examples()])
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, rows, TrainingSettings(epochs=1), straight=straight)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.bert.encoder.parameters())
