"""Factorized from scratch: new factors as large as the weights that they replace, in models that train and save."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import MODELS, logits
from torch import Tensor, nn
from transformers import PreTrainedModel

import factorformer
from factorformer import Plan
from factorformer.errors import ModelError
from factorformer.layers.dense import dense_weight
from factorformer.layers.nn import FactorizedMatrix
from factorformer.planning import Entry
from factorformer.structures import KroneckerSum, LowRank

RATIO = 3.0
RATIOS = {"vit": 2.5}  # patches and position tables stay dense
NAMES = ["bert", "gpt2", "llama", "llama-tied", "t5", "albert", "whisper", "vit", "modernbert"]
GENERATE = ["gpt2", "llama", "llama-tied", "t5"]


@functools.cache
def planned(name: str, method: str) -> Plan:
    return factorformer.plan(MODELS[name].build(), method, RATIOS.get(name, RATIO), scope="all")


def fresh(name: str, method: str = "shapeshifter") -> tuple[PreTrainedModel, Plan]:
    """A new model, and a plan that is made once for all of its kind: plans are frozen."""
    plan = planned(name, method)
    return MODELS[name].build(), plan


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def factorized(model: nn.Module) -> dict[str, FactorizedMatrix]:
    """Every factorized matrix once, by the name of its first module."""
    modules = {name: m for name, m in model.named_modules() if isinstance(m, FactorizedMatrix)}
    first: dict[int, str] = {}
    return {name: m for name, m in modules.items() if first.setdefault(id(m.weight), name) == name}


@pytest.mark.parametrize("method", ["shapeshifter", "svd"])
@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_carried_out_to_the_byte(name: str, method: str) -> None:
    model, plan = fresh(name, method)
    dense = sum(p.numel() for p in model.parameters())
    report = factorformer.initialize(model, plan)
    now = sum(p.numel() for p in model.parameters())
    assert (report.original.parameters, report.compressed.parameters) == (dense, now)
    assert (report.original.bytes, report.compressed.bytes) == (4 * dense, 4 * now)
    assert report.ratio == dense / now == pytest.approx(RATIOS.get(name, RATIO), rel=0.01)
    assert (report.method, report.scope, report.errors) == (method, "all", {})
    assert set(report.seconds) == {"initialize"}
    for entry in plan.factorized:
        for place in (entry.matrix.name, *entry.matrix.aliases):
            module = model.get_submodule(place)
            assert isinstance(module, FactorizedMatrix)
            assert module.spec == entry.spec
    assert len(factorized(model)) == len(plan.factorized)


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_keeps_its_mean_square(name: str) -> None:
    model, plan = fresh(name)
    others = {id(p) for p in model.parameters()}
    before = {e.matrix.name: dense_weight(model.get_submodule(e.matrix.name)).clone() for e in plan.factorized}
    factorformer.initialize(model, plan)
    for path, module in factorized(model).items():
        spec = module.spec
        assert isinstance(spec, KroneckerSum)
        assert all(tensor.is_contiguous() and tensor.requires_grad for tensor in module.factors.values())
        padded = spec.left[0] * spec.right[0], spec.left[1] * spec.right[1]
        # Exact where nothing is padded; the padding counts as well, and is a small part.
        mean_square = module.to_dense().square().mean().item()
        tolerance = 1e-4 if padded == module.shape else 0.1
        assert mean_square == pytest.approx(before[path].square().mean().item(), rel=tolerance)
        cosine = nn.functional.cosine_similarity(module.to_dense().flatten(), before[path].flatten(), 0)
        assert cosine.abs().item() < 0.4  # new, not fitted
    # Biases, norms and what stays dense are the very same tensors.
    new = {id(p) for module in factorized(model).values() for p in module.factors.values()}
    assert {id(p) for p in model.parameters()} - new < others


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "t5", "whisper"])
def test_tied_matrices_share_one_set_of_factors(name: str) -> None:
    model, plan = fresh(name)
    (tied,) = [entry.matrix for entry in plan.factorized if entry.matrix.aliases]
    factorformer.initialize(model, plan)
    modules = [model.get_submodule(place) for place in (tied.name, *tied.aliases)]
    assert len(modules) > 1
    for module in modules:
        assert isinstance(module, FactorizedMatrix)
        assert module.weight is modules[0].weight
        assert module.right is modules[0].right


@pytest.mark.parametrize("name", NAMES)
def test_predictions_start_as_large_as_those_of_the_dense_model(name: str) -> None:
    model, plan = fresh(name)
    dense = logits(model, MODELS[name].inputs())
    factorformer.initialize(model, plan)
    now = logits(model, MODELS[name].inputs())
    assert now.shape == dense.shape
    assert 0.5 < (now.std() / dense.std()).item() < 2


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    model, plan = fresh(name)
    factorformer.initialize(model, plan)
    model.save_pretrained(tmp_path)
    inputs = MODELS[name].inputs()
    for again in (factorformer.load(tmp_path), MODELS[name].auto.from_pretrained(tmp_path)):
        assert type(again) is type(model)
        assert {path: m.spec for path, m in factorized(again).items()} == {
            path: m.spec for path, m in factorized(model).items()
        }
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
        assert torch.equal(logits(again, inputs), logits(model, inputs))
    if name in GENERATE:
        prompt = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        models: list[Any] = [model, MODELS[name].auto.from_pretrained(tmp_path)]
        assert torch.equal(*[m.generate(**prompt, **options) for m in models])


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_it_trains(name: str) -> None:
    model, plan = fresh(name)
    factorformer.initialize(model, plan)
    inputs = MODELS[name].inputs()
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        targets = inputs.get("decoder_input_ids", inputs["input_ids"])
        loss = nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for path, module in factorized(model).items():
        if path != "bert.pooler.dense":
            assert not all(torch.equal(before[f"{path}.{factor}"], t) for factor, t in module.factors.items()), path


def test_the_same_seed_gives_the_same_model() -> None:
    states = []
    for seed in (1, 1, 2):
        model, plan = fresh("bert")
        torch.manual_seed(seed)
        factorformer.initialize(model, plan)
        states.append(state(model))
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_types_and_modes_stay(dtype: torch.dtype) -> None:
    model = MODELS["bert"].build().train()
    nn.Module.to(model, dtype)
    blocks = [model.get_submodule(f"bert.encoder.layer.{i}") for i in range(2)]
    blocks[0].requires_grad_(False)
    report = factorformer.initialize(model, factorformer.plan(model, "shapeshifter", RATIO))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {module.training for module in model.modules()} == {True}
    assert {p.requires_grad for p in blocks[0].parameters()} == {False}
    assert {p.requires_grad for p in blocks[1].parameters()} == {True}
    assert report.compressed.bytes == sum(2 * p.numel() for p in model.parameters())


def test_inside_of_another_module() -> None:
    inner, _ = fresh("bert")
    model = nn.Sequential(inner)
    factorformer.initialize(model, factorformer.plan(model, "shapeshifter", RATIO))
    assert factorized(inner)
    assert inner.config.quantization_config.layers  # it knows how to save itself


# Errors


def fails_unchanged(model: PreTrainedModel, plan: Plan, message: str) -> None:
    before, types = state(model), [type(module) for module in model.modules()]
    parameters = list(model.parameters())
    with pytest.raises(ModelError, match=message):
        factorformer.initialize(model, plan)
    assert [type(module) for module in model.modules()] == types
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert not hasattr(model.config, "quantization_config")
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor.nan_to_num(7), before[name].nan_to_num(7))


def test_a_plan_for_another_model() -> None:
    fails_unchanged(MODELS["roberta"].build(), fresh("bert")[1], r"does not fit.*'bert\.")


def test_a_plan_that_keeps_everything() -> None:
    model = MODELS["bert"].build()
    fails_unchanged(model, factorformer.plan(model, "shapeshifter", ratio=1), "nothing to compress")


def test_a_matrix_that_must_stay_dense() -> None:
    model = MODELS["mixtral"].build()
    plan = factorformer.plan(model, "svd", ratio=1.05)
    experts = next(entry.matrix for entry in plan.entries if "expert" in (entry.matrix.dense or ""))
    entry = Entry(dataclasses.replace(experts, dense=None), LowRank(4), "")
    fails_unchanged(model, dataclasses.replace(plan, entries=(entry,)), rf"'{re.escape(experts.name)}'.*expert weights")


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = MODELS["llama"].make()
    plan = factorformer.plan(model, "shapeshifter", RATIO)
    fails_unchanged(model, plan, r"'model\.embed_tokens'.*no initial values")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_weight_without_a_size(value: float) -> None:
    model, plan = fresh("bert")
    name = "bert.encoder.layer.1.output.dense"
    nn.init.constant_(model.get_submodule(name).get_parameter("weight"), value)
    fails_unchanged(model, plan, f"'{name}'.*no initial values.*from_config")


def test_a_model_that_is_compressed_already() -> None:
    model, plan = fresh("bert")
    factorformer.initialize(model, plan)
    with pytest.raises(ModelError, match="compressed already"):
        factorformer.initialize(model, plan)
