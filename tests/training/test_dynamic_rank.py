"""Dynamic ranks in a plain loop: schedule, competition, budget, and models of every kind."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tests import tiny
from torch import Tensor
from transformers import PreTrainedModel

import factorformer
from factorformer.errors import (
    CheckpointError,
    DataError,
    FactorformerError,
    FactorformerWarning,
    MethodError,
    ModelError,
    OutputError,
)
from factorformer.hf.attachment import attach_all
from factorformer.layers.nn import FactorizedMatrix
from factorformer.planning import Plan
from factorformer.report import inventory
from factorformer.structures import LowRank
from factorformer.training.dynamic_rank import DynamicRank, DynamicRankSettings, compete
from factorformer.training.rank_history import RankHistory
from factorformer.training.units import DenseUnits, FactorUnits

QUICK = DynamicRankSettings(warmup=0.1, final=0.3, interval=1, importance_interval=1)
STEPS = 10


def loss_of(model: PreTrainedModel, inputs: tiny.Inputs) -> Tensor:
    outputs = model(**inputs)
    value = outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
    return (value.float() - 1).square().mean()


def learn(
    model: PreTrainedModel,
    ranks: DynamicRank,
    inputs: tiny.Inputs,
    *,
    first: int = 0,
    last: int = STEPS,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """A plain loop."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    for done in range(first, last):
        loss_of(model, inputs).backward()
        ranks.before_step(done, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        ranks.after_step(done + 1, STEPS, optimizer)
    return optimizer


def started(
    name: str = "bert", method: str = "rankdyna_plain", settings: DynamicRankSettings = QUICK, **options: Any
) -> tuple[PreTrainedModel, Plan, DynamicRank]:
    case = tiny.MODELS[name]
    model = case.build()
    plan = factorformer.plan(model, method, options.pop("ratio", case.ratio), options.pop("scope", "blocks"))
    calibration = None if method == "rankdyna_plain" else [case.inputs()]
    return model, plan, DynamicRank(model, plan, calibration, settings, changed=attach_all, **options)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_model_meets_its_budget_and_loads_as_an_ordinary_one(name: str, tmp_path: Path) -> None:
    case = tiny.MODELS[name]
    model, plan, ranks = started(name)
    optimizer = learn(model, ranks, case.inputs())
    ranks.finish(optimizer)
    assert ranks.finished
    assert inventory(model).ratio == pytest.approx(plan.ratio, rel=0.02)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    model.save_pretrained(tmp_path)
    loaded = case.auto.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, found = (m.eval()(**case.inputs())[0] for m in (model, loaded))
    assert torch.equal(expected, found)
    assert any(isinstance(module, FactorizedMatrix) for module in loaded.modules())


@pytest.mark.parametrize("method", ["rankdyna", "rankdyna_fisher", "dynamic_kronecker", "dynamic_dense_sparse"])
def test_units_of_every_structure_compete(method: str) -> None:
    model, plan, ranks = started("bert", method)
    full = list(ranks.history.full)
    optimizer = learn(model, ranks, tiny.text())
    ranks.finish(optimizer)
    found = inventory(model)
    assert found.ratio == pytest.approx(plan.ratio, rel=0.02)
    assert {type(entry.spec) for entry in found.factorized} == {type(entry.spec) for entry in plan.factorized}
    assert len(set(ranks.history.final)) > 1, "all matrices have the same size: nothing has competed"
    assert sum(ranks.history.final) < sum(full)
    assert torch.isfinite(loss_of(model, tiny.text()))


def test_a_large_model_meets_its_budget_within_a_percent() -> None:
    """Where one unit is far less than a hundredth of the budget, that is what is promised."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    large = tf.BertModel(tf.BertConfig(**{**tiny._ENCODER, **sizes})).eval()
    for ratio in (1.3, 2.0, 5.0, 10.0):
        plan = factorformer.plan(large, "rankdyna_plain", ratio)
        model = copy.deepcopy(large)
        ranks = DynamicRank(model, plan, settings=QUICK)
        learn(model, ranks, tiny.text())
        assert inventory(model).ratio == pytest.approx(ratio, rel=0.01), ratio
        assert min(ranks.history.final) >= 1


@pytest.mark.parametrize("ratio", [4.2, 5.0, 8.0])
def test_in_int8_matrices_that_stay_whole_take_a_byte_a_value(ratio: float, tmp_path: Path) -> None:
    """Counted as floats, the next matrix to become whole would leave a part of the budget unused."""
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=tiny.VOCABULARY, n_positions=24, n_embd=128, n_layer=2, n_head=4, eos_token_id=2)
    model = tf.GPT2LMHeadModel(config).eval()
    inputs = {"input_ids": tiny.text()["input_ids"]}
    plan = factorformer.plan(model, "rankdyna_plain", ratio, int8=True)
    ranks = DynamicRank(model, plan, settings=QUICK)
    optimizer = learn(model, ranks, inputs)
    names = [entry.matrix.name for entry in plan.factorized]
    whole = [name for name, count in zip(names, ranks.history.final, strict=True) if count == 128]
    assert whole
    assert len(whole) < len(names)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for name in whole for p in _parameters(model, name))
    learn(model, ranks, inputs, optimizer=optimizer)  # they are trained on, rounded in products
    entries = {entry.matrix.name: entry for entry in inventory(model).entries}
    assert all(entries[name].spec is None for name in whole), "as large as ever"
    ranks.save(tmp_path)
    again = tf.GPT2LMHeadModel(model.config).eval()
    resumed = DynamicRank(again, plan, settings=QUICK, resume_from=tmp_path)
    assert resumed.finished
    assert again.load_state_dict(model.state_dict()).missing_keys == []
    for found in (model, again):
        factorformer.quantize(found)
        assert inventory(found).ratio == pytest.approx(ratio, rel=0.01)
        assert all(_layer(found, name).quantized and _layer(found, name).spec.kind == "dense" for name in whole)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def _layer(model: PreTrainedModel, name: str) -> FactorizedMatrix:
    module = model.get_submodule(name)
    assert isinstance(module, FactorizedMatrix)
    return module


def _parameters(model: PreTrainedModel, name: str) -> list[torch.nn.Parameter]:
    return [factor for factor in _layer(model, name).factors.values() if isinstance(factor, torch.nn.Parameter)]


def test_ranks_only_fall_on_a_cubic_way_and_are_recorded() -> None:
    settings = dataclasses.replace(QUICK, warmup=0.2, final=0.4)
    model, _, ranks = started(settings=settings)
    counts = []
    optimizer = None
    for done in range(STEPS):
        optimizer = learn(model, ranks, tiny.text(), first=done, last=done + 1, optimizer=optimizer)
        counts.append([units.count for units in ranks.units])
    history = ranks.history
    assert counts[:2] == [history.full] * 2, "units were removed in warm-up"
    assert history.steps == [3, 4, 5, 6]
    assert history.ranks == counts[2:6]
    assert counts[6:] == [counts[5]] * 4, "units were removed in the final phase"
    for before, after in itertools.pairwise(counts):
        assert all(new <= old for old, new in zip(before, after, strict=True))
    removed = [sum(history.full) - sum(row) for row in history.ranks]
    shares = [1 - (1 - step / 4) ** 3 for step in (1, 2, 3, 4)]
    assert [count / removed[-1] for count in removed] == pytest.approx(shares, abs=0.1)
    assert all(len(scores) == len(history.layers) for scores in history.scores)


def test_the_most_important_units_per_byte_stay() -> None:
    model, _, ranks = started()
    learn(model, ranks, tiny.text(), last=1)  # before the first removal
    scores = [torch.rand(units.count) for units in ranks.units]
    for units, score in zip(ranks.units, scores, strict=True):
        units.importance.average = score
    sizes = [units.unit_bytes() for units in ranks.units]
    assert len(set(sizes)) > 1
    kept = compete(ranks.units, scores, ranks.budget)
    worth = [score / size for score, size in zip(scores, sizes, strict=True)]
    least = min(float(w[k].min()) for w, k in zip(worth, kept, strict=True) if len(k) > 1)
    for values, chosen in zip(worth, kept, strict=True):
        gone = torch.ones(len(values), dtype=torch.bool)
        gone[chosen] = False
        assert not gone.any() or values[gone].max() <= least
    spent = sum(units.bytes(len(k)) for units, k in zip(ranks.units, kept, strict=True))
    assert 0.97 * ranks.budget <= spent <= ranks.budget


def test_no_matrix_loses_its_last_unit() -> None:
    model, _, ranks = started(ratio=6)
    learn(model, ranks, tiny.text(), last=1)
    for place, units in enumerate(ranks.units):
        units.importance.average = torch.full((units.count,), 1e-6 + (place > 0))
    ranks.finish()
    assert ranks.history.final[0] == 1
    assert ranks.history.steps[-1] == 1
    assert isinstance(model.get_submodule(ranks.history.layers[0]), FactorizedMatrix)


def test_tied_embeddings_shrink_as_one() -> None:
    model, plan, ranks = started("gpt2", scope="all", ratio=6)
    tied = [units for units in ranks.units if units.matrix.aliases]
    assert len(tied) == 1
    optimizer = learn(model, ranks, tiny.text())
    ranks.finish(optimizer)
    modules = [model.get_submodule(name) for name in (tied[0].matrix.name, *tied[0].matrix.aliases)]
    assert all(isinstance(module, FactorizedMatrix) for module in modules)
    assert modules[0].get_parameter("weight") is modules[1].get_parameter("weight")
    assert modules[0].spec == modules[1].spec
    assert inventory(model, "all").ratio == pytest.approx(plan.ratio, rel=0.05)


def test_matrices_are_dense_until_factors_are_smaller() -> None:
    model, _, ranks = started(ratio=1.5)
    kinds = set()
    optimizer = None
    for done in range(STEPS):
        optimizer = learn(model, ranks, tiny.text(), first=done, last=done + 1, optimizer=optimizer)
        for units in ranks.units:
            largest = max(s.rank for s in LowRank.candidates(units.matrix.shape, torch.float32))
            assert isinstance(units, DenseUnits) == (units.count > largest)
            kinds.add(type(units))
    assert kinds == {DenseUnits, FactorUnits}


def test_a_training_that_is_too_short_still_meets_the_budget() -> None:
    model, plan, ranks = started()
    learn(model, ranks, tiny.text(), last=3)
    assert not ranks.finished
    ranks.finish()
    assert inventory(model).ratio == pytest.approx(plan.ratio, rel=0.02)


def finals_and_shares(plan: Plan, ranks: DynamicRank) -> tuple[dict[str, int], dict[str, int]]:
    """Units that matrices end with, and those they have in the plan."""
    finals = dict(zip(ranks.history.layers, ranks.history.final, strict=True))
    return finals, {entry.matrix.name: entry.spec.units for entry in plan.factorized if entry.spec is not None}


@pytest.mark.parametrize("method", ["rankdyna_plain", "dynamic_kronecker"])
@pytest.mark.parametrize("zeros", [False, True], ids=["none", "zeros"])
def test_matrices_that_the_loss_does_not_reach_keep_their_share(method: str, zeros: bool) -> None:
    """Nothing is known of them, which is not to say that they do not matter; others meet the budget of both."""
    model, plan, ranks = started("bert", method)
    idle = "bert.encoder.layer.1"
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def steps() -> None:
        for done in range(STEPS):
            loss_of(model, tiny.text()).backward()
            for parameter in model.get_submodule(idle).parameters():
                parameter.grad = torch.zeros_like(parameter) if zeros else None
            ranks.before_step(done, STEPS)
            optimizer.step()
            optimizer.zero_grad()
            ranks.after_step(done + 1, STEPS, optimizer)

    with pytest.warns(FactorformerWarning, match=f"6 of 12.*{idle}"):
        steps()
    finals, shares = finals_and_shares(plan, ranks)
    assert {name: rank for name, rank in finals.items() if name.startswith(idle)} == {
        name: units for name, units in shares.items() if name.startswith(idle)
    }
    assert any(finals[name] != shares[name] for name in finals), "nothing has competed"
    assert inventory(model).ratio == pytest.approx(plan.ratio, rel=0.03)


def encoder_alone(model: PreTrainedModel) -> Tensor:
    return (model.get_encoder()(input_ids=tiny.text()["input_ids"]).last_hidden_state - 1).square().mean()


def states_alone(model: PreTrainedModel) -> Tensor:
    return (model(**tiny.text()).last_hidden_state - 1).square().mean()


@pytest.mark.parametrize(
    ("model", "scope", "loss", "idle"),
    [
        (tiny.MODELS["t5"].build, "blocks", encoder_alone, "decoder."),
        (lambda: tf.BertModel(tiny.MODELS["bert"].build().config), "all", states_alone, "pooler."),
    ],
    ids=["encoder of T5", "unused pooler"],
)
def test_parts_that_a_training_does_not_use(
    model: Callable[[], PreTrainedModel], scope: Any, loss: Callable[[PreTrainedModel], Tensor], idle: str
) -> None:
    trained = model()
    plan = factorformer.plan(trained, "rankdyna_plain", 2, scope)
    ranks = DynamicRank(trained, plan, None, QUICK, changed=attach_all)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    for done in range(3):
        loss(trained).backward()
        ranks.before_step(done, 3)
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(FactorformerWarning, match=idle):
        ranks.finish(optimizer)
    finals, shares = finals_and_shares(plan, ranks)
    unused = {name for name in shares if name.startswith(idle)}
    assert unused
    assert {name: finals[name] for name in unused} == {name: shares[name] for name in unused}
    assert any(finals[name] != shares[name] for name in finals)
    assert inventory(trained, scope).ratio == pytest.approx(plan.ratio, rel=0.03)
    assert all(parameter.isfinite().all() for parameter in trained.parameters())


def test_a_rare_expert_keeps_what_its_tokens_are_worth() -> None:
    """One that a step in ten reaches loses as much as a tenth of its importance, not all of it between two tokens."""

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.rare = torch.nn.Linear(32, 32, bias=False), torch.nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor, rare: bool) -> Tensor:
            return (self.rare if rare else self.often)(x)

    for zeros in (False, True):
        model = Experts()
        with torch.no_grad():
            model.often.weight.copy_(torch.diag(torch.linspace(1, 2, 32)))
            model.rare.weight.copy_(10 * model.often.weight)
        plan = factorformer.plan(model, "rankdyna_plain", 4, "all")
        ranks = DynamicRank(model, plan, None, DynamicRankSettings(warmup=0.9, final=0, importance_interval=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0)
        for done in range(60):
            model(torch.eye(32), rare=done % 10 == 0).square().sum().backward()
            for parameter in model.parameters() if zeros else ():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            ranks.before_step(done, 60)
            optimizer.zero_grad()
        often, rare = (units.importance.values for units in ranks.units)
        assert often is not None
        assert rare is not None
        torch.testing.assert_close(rare, often * 100 * 6 / 54, rtol=1e-3, atol=1e-3)
        ranks.finish(optimizer)
        assert ranks.units[1].count >= ranks.units[0].count


def test_matrices_that_calibration_does_not_reach_are_named() -> None:
    model = tiny.MODELS["t5"].build()
    plan = factorformer.plan(model, "rankdyna", 2)
    encoder = model.get_encoder()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.encoder, self.decoder = model, encoder, model.get_decoder()

        def forward(self, input_ids: Tensor) -> Any:
            return self.encoder(input_ids)

    with pytest.warns(FactorformerWarning, match="decoder.*not reached.*the weight alone"):
        DynamicRank(Encoder(), plan, [{"input_ids": tiny.text()["input_ids"]}], QUICK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    model = tiny.MODELS["bert"].build().to(dtype)
    plan = factorformer.plan(model, "rankdyna_plain", 2)
    ranks = DynamicRank(model, plan, settings=QUICK)
    learn(model, ranks, tiny.text(), optimizer=torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert inventory(model).ratio == pytest.approx(plan.ratio, rel=0.02)


def test_a_checkpoint_holds_all_that_resuming_needs(tmp_path: Path) -> None:
    """In a plain loop, and in another process as far as objects are concerned."""
    model, plan, ranks = started("bert", "rankdyna")
    optimizer = learn(model, ranks, tiny.text(), last=4)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = {"model": state, "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "training.pt")
    ranks.save(tmp_path)
    kinds = [type(units) for units in ranks.units]
    assert len(set(kinds)) == 2, "the checkpoint is to hold dense and factorized matrices"
    learn(model, ranks, tiny.text(), first=4, optimizer=optimizer)

    again = tiny.MODELS["bert"].build(seed=3)
    resumed = DynamicRank(again, plan, settings=QUICK, resume_from=tmp_path)
    loaded = torch.load(tmp_path / "training.pt", weights_only=True)
    again.load_state_dict(loaded["model"])
    restored = torch.optim.AdamW(again.parameters(), lr=1e-3)
    restored.load_state_dict(loaded["optimizer"])
    assert [type(units) for units in resumed.units] == kinds
    learn(again, resumed, tiny.text(), first=4, optimizer=restored)
    assert resumed.history == ranks.history
    expected = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert RankHistory.load(tmp_path) is not None


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    model, plan, _ = started()
    with pytest.raises(CheckpointError, match="cannot resume dynamic ranks from"):
        DynamicRank(model, plan, resume_from=tmp_path)
    (tmp_path / "dynamic_rank.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot resume dynamic ranks from"):
        DynamicRank(model, plan, resume_from=tmp_path)
    _, _, other = started("gpt2")
    other.save(tmp_path)
    with pytest.raises(CheckpointError, match="other matrices"):
        DynamicRank(model, plan, resume_from=tmp_path)
    _, _, same = started()
    same.save(tmp_path)
    smaller = factorformer.plan(model, "rankdyna_plain", 3)
    for options in ({"plan": smaller}, {"settings": DynamicRankSettings(ema_decay=0.5)}):
        with pytest.raises(CheckpointError, match="same plan and settings"):
            DynamicRank(model, **{"plan": plan, "settings": QUICK, **options}, resume_from=tmp_path)
    name = same.units[-1].matrix.name
    same.units[-1].basis = same.units[-1].basis[:, :-1]
    same.save(tmp_path)
    before = [id(p) for p in model.parameters()]
    with pytest.raises(CheckpointError, match=f"tensors.* layer '{name}'"):
        DynamicRank(model, plan, settings=QUICK, resume_from=tmp_path)
    assert [id(p) for p in model.parameters()] == before
    with pytest.raises(OutputError, match="cannot write"):
        same.save(tmp_path / "missing")


def test_what_cannot_be_done_is_said_before_anything_changes() -> None:
    case = tiny.MODELS["bert"]
    model = case.build()
    plan = factorformer.plan(model, "rankdyna_plain", 2)
    name = plan.factorized[0].matrix.name

    def refused(kind: type[FactorformerError], message: str, model: PreTrainedModel = model, **options: Any) -> None:
        before = [id(p) for p in model.parameters()]
        with pytest.raises(kind, match=message):
            DynamicRank(model, options.pop("plan", plan), **options)
        assert [id(p) for p in model.parameters()] == before

    refused(DataError, "'rankdyna' needs calibration data", plan=dataclasses.replace(plan, method="rankdyna"))
    refused(ModelError, "does not fit.*no matrix", model=tiny.MODELS["gpt2"].build())
    model.get_submodule(name).requires_grad_(False)
    refused(ModelError, f"layer '{name}' is frozen")
    model.get_submodule(name).requires_grad_(True)
    weight = model.get_submodule(name).get_parameter("weight")
    kept = weight.detach().clone()
    weight.data[0, 0] = float("nan")
    refused(ModelError, f"layer '{name}': the matrix holds NaN")
    weight.data.copy_(kept)
    small = factorformer.compress(copied := case.build(), plan)
    assert small.ratio > 1
    refused(ModelError, "is factorized already", model=copied)


def test_a_loop_that_forgets_the_gradients_is_told() -> None:
    model, _, ranks = started()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ModelError, match="no finite gradients were seen"):
        ranks.after_step(STEPS, STEPS, optimizer)
    with pytest.raises(ModelError, match="no finite gradients were seen"):
        ranks.finish()
    assert not hasattr(model.config, "quantization_config")


def test_an_optimizer_that_does_not_hold_a_matrix_is_refused_before_anything_changes() -> None:
    model, _, ranks = started()
    name = ranks.units[3].matrix.name
    others = [p for n, p in model.named_parameters() if n != f"{name}.weight"]
    before = [id(p) for p in model.parameters()]
    with pytest.raises(ModelError, match=rf"optimizer.*'{re.escape(name)}\.weight'"):
        learn(model, ranks, tiny.text(), optimizer=torch.optim.SGD(others, lr=0.1))
    assert [id(p) for p in model.parameters()] == before


@pytest.mark.parametrize("method", ["dynamic_kronecker", "dynamic_dense_sparse"])
def test_low_ratios_are_met_by_every_structure(method: str) -> None:
    """The start has room for a budget near the dense size."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = tf.BertModel(tf.BertConfig(**{**tiny._ENCODER, **sizes})).eval()
    plan = factorformer.plan(model, method, 1.1)
    ranks = DynamicRank(model, plan, [tiny.text()], QUICK)
    learn(model, ranks, tiny.text())
    assert inventory(model).ratio == pytest.approx(plan.ratio, rel=0.03)


def test_settings_are_checked() -> None:
    for options, message in (
        ({"warmup": 0.6, "final": 0.4}, "leave some between them"),
        ({"warmup": -0.1}, "leave some between them"),
        ({"interval": 0}, "interval"),
        ({"importance_interval": 0}, "importance_interval"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ):
        with pytest.raises(MethodError, match=message):
            DynamicRankSettings(**options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_shape_checks")
def test_a_history_is_read_back_or_refused(tmp_path: Path) -> None:
    assert RankHistory.load(tmp_path) is None
    history = RankHistory(["a", "b"], ["low_rank"] * 2, [4, 5])
    history.add(8, [3, 5], [0.5, 0.25])
    history.save(tmp_path)
    assert RankHistory.load(tmp_path) == history
    file = tmp_path / "factorformer_ranks.json"
    whole = file.read_text()
    wrong = [('"steps": [8]', '"steps": [8, 9]'), ("[4, 5]", "[0, 5]"), ("[4, 5]", '["4", 5]'), ("0.25", '"much"')]
    for damaged in ("{", "[]", '{"layers": []}', *(whole.replace(old, new) for old, new in wrong)):
        file.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"cannot read|no history of ranks|damaged history"):
            RankHistory.load(tmp_path)
