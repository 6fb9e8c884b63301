"""Dynamic ranks under the `Trainer`: accumulation, bfloat16, interrupted runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from tests import tiny
from tests.hf.dynamic_rank_worker import build, trainer
from tests.hf.straight_through_worker import examples
from torch import Tensor

import factorformer
from factorformer.errors import ModelError
from factorformer.layers.nn import FactorizedMatrix
from factorformer.report import inventory
from factorformer.tasks.finetuning import TrainingSettings, train
from factorformer.training.dynamic_rank import DynamicRank, DynamicRankSettings
from factorformer.training.rank_history import RankHistory

METHODS = ["rankdyna", "rankdyna_fisher", "dynamic_kronecker", "dynamic_dense_sparse"]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@dataclasses.dataclass
class Run:
    """A whole run of twelve steps, with a checkpoint after each."""

    model: tf.PreTrainedModel
    ranks: DynamicRank
    trainer: tf.Trainer
    folder: Path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("plain")
    model, ranks = build("rankdyna")
    running = trainer(model, ranks, folder, save_steps=1)
    running.train()
    return Run(model, ranks, running, folder)


def assert_resumes(
    whole: tf.PreTrainedModel, ranks: DynamicRank, checkpoint: Path, method: str, **options: Any
) -> None:
    """The checkpoint is taken between two removals."""
    assert [step for step in ranks.history.steps if step < 5]
    assert [step for step in ranks.history.steps if step > 5]
    again, resumed = build(method, checkpoint)
    running = trainer(again, resumed, checkpoint.parent / "again", save_steps=50, **options)
    running.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(whole.state_dict(), again.state_dict())
    assert resumed.history == ranks.history


def test_an_interrupted_run_ends_where_a_whole_one_does(plain: Run, tmp_path: Path) -> None:
    assert_resumes(plain.model, plain.ranks, plain.folder / "checkpoint-5", "rankdyna")
    for method in METHODS[1:]:
        whole, ranks = build(method)
        trainer(whole, ranks, tmp_path / method, save_steps=5).train()
        assert_resumes(whole, ranks, tmp_path / method / "checkpoint-5", method)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_that_accumulates_in_bfloat16_does_so_too(tmp_path: Path, method: str) -> None:
    options = {"gradient_accumulation_steps": 2, "bf16": True, "num_train_epochs": 6}
    whole, ranks = build(method)
    trainer(whole, ranks, tmp_path, save_steps=5, **options).train()
    assert_resumes(whole, ranks, tmp_path / "checkpoint-5", method, **options)


def test_the_result_is_an_ordinary_model_within_the_budget(plain: Run, tmp_path: Path) -> None:
    model, ranks = plain.model, plain.ranks
    found = inventory(model)
    assert found.ratio == pytest.approx(3, rel=0.01)
    model.save_pretrained(tmp_path / "saved")
    loaded = factorformer.load(tmp_path / "saved")
    assert_equal(model.state_dict(), loaded.state_dict())
    assert inventory(loaded).entries == found.entries
    held = {id(p) for group in plain.trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    history = RankHistory.load(plain.folder / "checkpoint-12")
    assert history == ranks.history
    assert [units.count for units in ranks.units] == history.final


def test_a_checkpoint_on_the_way_loads_as_a_model(plain: Run) -> None:
    """Some matrices are factorized by then, others are dense still."""
    loaded = factorformer.load(plain.folder / "checkpoint-4")
    linear = [module for name, module in loaded.named_modules() if "layer." in name and hasattr(module, "in_features")]
    assert len({isinstance(module, FactorizedMatrix) for module in linear}) == 2
    assert torch.isfinite(loaded.eval()(**tiny.text()).logits).all()


def test_data_parallel_wrappers_leave_the_matrices_alone() -> None:
    """They cannot follow parameters that change; when training is over, nothing of that is left on the model."""
    model, ranks = build("rankdyna")
    names = vars(model)["_ddp_params_and_buffers_to_ignore"]
    ignored = {id(model.get_parameter(name)) for name in names}
    assert ignored == {id(p) for units in ranks.units for p in units.parameters.values()}
    ranks.detach()
    assert "_ddp_params_and_buffers_to_ignore" not in vars(model)


def test_a_run_that_is_resumed_at_its_end_writes_loadable_checkpoints(plain: Run, tmp_path: Path) -> None:
    checkpoint = plain.folder / "checkpoint-10"
    again, resumed = build("rankdyna", checkpoint)
    assert resumed.finished
    trainer(again, resumed, tmp_path, save_steps=10).train(resume_from_checkpoint=str(checkpoint))
    assert inventory(factorformer.load(tmp_path / "checkpoint-12")).entries == inventory(plain.model).entries


def test_trainer_and_ranks_resume_together_or_not_at_all(plain: Run, tmp_path: Path) -> None:
    checkpoint = plain.folder / "checkpoint-2"  # everything is dense still
    fresh, unaware = build("rankdyna")
    running = trainer(fresh, unaware, tmp_path / "one", save_steps=50)
    with pytest.raises(ModelError, match="step 2, the dynamic ranks after step 0"):
        running.train(resume_from_checkpoint=str(checkpoint))
    again, resumed = build("rankdyna", checkpoint)
    with pytest.raises(ModelError, match="step 0, the dynamic ranks after step 2"):
        trainer(again, resumed, tmp_path / "two", save_steps=50).train()


@pytest.mark.parametrize("option", [{"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 50}])
def test_options_under_which_ranks_cannot_change_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    model, ranks = build("rankdyna")
    running = trainer(model, ranks, tmp_path, save_steps=50, **option)
    with pytest.raises(ModelError, match="load_best_model_at_end"):
        running.train()


def rows() -> datasets.Dataset:
    return datasets.Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in examples()])


def test_embeddings_that_shrink_are_trained_though_others_stay_frozen(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(tf.BertConfig(**tiny._ENCODER, num_labels=3))
    plan = factorformer.plan(model, "rankdyna_plain", 4, "all")
    ranks = DynamicRank(model, plan, settings=DynamicRankSettings(interval=1, importance_interval=1))
    assert ranks.holds(model.get_input_embeddings())
    train(model, tokenizer, rows(), TrainingSettings(epochs=3, batch_size=8), ranks=ranks)
    assert isinstance(model.get_input_embeddings(), FactorizedMatrix)
    assert inventory(model, "all").ratio == pytest.approx(plan.ratio, rel=0.02)


def test_a_training_that_is_interrupted_leaves_a_model_that_can_be_saved(
    tokenizer: tf.PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ranks = build("rankdyna")
    shrink = DynamicRank._shrink

    def interrupt(self: DynamicRank, left: float, *rest: Any) -> None:
        if left < 0.3:
            raise KeyboardInterrupt
        shrink(self, left, *rest)

    monkeypatch.setattr(DynamicRank, "_shrink", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, rows(), TrainingSettings(epochs=3, batch_size=8), ranks=ranks)
    model.save_pretrained(tmp_path)
    loaded = factorformer.load(tmp_path)
    assert_equal(model.state_dict(), loaded.state_dict())
    assert any(isinstance(module, FactorizedMatrix) for module in loaded.modules())
