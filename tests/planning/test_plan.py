"""Plans: frozen, readable, and the same after JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
from tests.tiny import MODELS, text

import factorformer
from factorformer import Plan
from factorformer.errors import BudgetError, MethodError, ModelError
from factorformer.layers.matrix import Cost, Matrix, Scope
from factorformer.planning import Cause, Entry, left_dense
from factorformer.recipes import RECIPES
from factorformer.report import inventory
from factorformer.structures import KroneckerSum, LowRank


def a_plan(name: str = "bert", ratio: float = 2, scope: Scope = "blocks", **options: Any) -> Plan:
    return factorformer.plan(MODELS[name].build(), "svd", ratio=ratio, scope=scope, **options)


@functools.cache
def a_plan_in_json() -> str:
    return json.dumps(a_plan().to_dict())


def content_of_a_plan() -> dict[str, Any]:
    """A new dictionary at each call, of one plan."""
    return json.loads(a_plan_in_json())


@pytest.mark.usefixtures("no_shape_checks")  # checked on the plans below; planning takes a third of the time
@pytest.mark.parametrize("scope", get_args(Scope))
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixtral"])
def test_the_budget_is_met(name: str, scope: Scope) -> None:
    model = MODELS[name].build()
    for ratio in (1.5, 2, 2.5, 4):
        target = ratio
        try:
            plan = factorformer.plan(model, "svd", target, scope)
        except BudgetError as error:
            (near,) = re.findall(r"(?:ask for at most|the nearest is) ([0-9.]+)$", str(error))
            target = float(near)
            plan = factorformer.plan(model, "svd", target, scope)
        assert plan.original.bytes == pytest.approx(target * plan.compressed.bytes, rel=0.01), ratio
        assert plan.ratio == plan.original.bytes / plan.compressed.bytes
        assert all(entry.compressed.bytes <= entry.original.bytes for entry in plan.entries)
        assert plan.factorized == tuple(entry for entry in plan.entries if entry.spec is not None)
        assert plan.factorized


@pytest.mark.parametrize("scope", get_args(Scope))
@pytest.mark.parametrize("name", MODELS)
def test_everything_in_scope_is_counted_once(name: str, scope: Scope) -> None:
    model = MODELS[name].build()
    plan = factorformer.plan(model, "svd", ratio=MODELS[name].ratio, scope=scope)
    if scope == "all":
        assert plan.original.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
        assert plan.original.parameters == model.num_parameters()
    factorformer.compress(model, plan)
    if scope == "all":
        assert plan.compressed.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
        assert plan.compressed.parameters == model.num_parameters()


def test_flops_count_repeated_calls_of_shared_layers() -> None:
    plan = a_plan("albert")
    assert {entry.matrix.products for entry in plan.entries} == {2}
    values = sum(entry.matrix.shape[0] * entry.matrix.shape[1] for entry in plan.entries)
    assert plan.original.flops == 2 * 2 * values
    assert plan.original.parameters - plan.rest.parameters == values
    assert {entry.matrix.products for entry in a_plan("bert").entries} == {1}


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("bert", "albert", "gpt2", "llama", "t5"):
        model = MODELS[name].build()
        plan = factorformer.plan(model, "svd", ratio=2)
        tokens = 6
        inputs = {"input_ids": torch.arange(3, 3 + tokens)[None]}
        if name == "t5":
            inputs["decoder_input_ids"] = inputs["input_ids"]
        counted = []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter, torch.inference_mode():
                model(**inputs)
            counted.append(counter.get_total_flops())
            if len(counted) == 1:
                factorformer.compress(model, plan)
        # Attention scores and heads cost the same before and after; matrices account for the difference.
        assert counted[0] - counted[1] == tokens * (plan.original.flops - plan.compressed.flops)


def test_ties_are_counted_once_over_the_whole_model() -> None:
    for name in ("llama-tied", "t5", "bert"):
        plan = a_plan(name, 2, "all")
        tied = [entry for entry in plan.entries if entry.matrix.aliases]
        assert len(tied) == 1
        assert tied[0].matrix.lookups == tied[0].matrix.products == 1
        names = [n for entry in plan.entries for n in (entry.matrix.name, *entry.matrix.aliases)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("scope", get_args(Scope))
@pytest.mark.parametrize("name", ["bert", "albert", "t5", "mixtral"])
def test_json_round_trip(name: str, scope: Scope, tmp_path: Path) -> None:
    plan = a_plan(name, MODELS[name].ratio, scope)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    plan.save(str(tmp_path / "plan.json"))
    assert Plan.load(str(tmp_path / "plan.json")) == plan


def test_a_loaded_plan_gives_the_same_model(tmp_path: Path) -> None:
    one, other = MODELS["bert"].build(), MODELS["bert"].build()
    plan = factorformer.plan(one, "svd", ratio=2, scope="all")
    plan.save(tmp_path / "plan.json")
    factorformer.compress(one, plan)
    factorformer.compress(other, Plan.load(tmp_path / "plan.json"))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_plans_are_frozen() -> None:
    plan = a_plan()
    for owner, field in (
        (plan, "target"),
        (plan.entries[0], "spec"),
        (plan.entries[0].matrix, "name"),
        (plan.rest, "bytes"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, field, None)
    assert isinstance(plan.entries, tuple)
    assert hash(plan) == hash(Plan.from_dict(plan.to_dict()))


def test_a_plan_reads_as_a_table() -> None:
    plan = a_plan("mixtral", 1.05)
    text = str(plan)
    for entry in plan.entries:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{entry.matrix.name} ")]
        assert "x".join(map(str, entry.matrix.shape)) in line
        assert (str(entry.spec) if entry.spec else "dense") in line
        assert f"{entry.compressed.bytes:,}" in line
        assert entry.reason in line
    assert "expert weights fused" in text
    assert f"scope blocks: {plan.original.bytes:,} -> {plan.compressed.bytes:,} bytes ({plan.ratio:.2f}x)" in text


def test_a_plan_says_what_is_stored_in_int8() -> None:
    plan = factorformer.plan(MODELS["bert"].build(), "svd", 4, int8=True, exclude=["*.query"])
    lines = {line.split()[0]: line for line in str(plan).splitlines()}
    for entry in plan.entries:
        if entry.spec is None:
            assert (entry.form, entry.values) == ("dense", "float32")
        else:
            assert (entry.form, entry.values) == (f"{entry.spec}, int8", "int8")
        assert f" {entry.form} " in lines[entry.matrix.name]
    assert {entry.values for entry in plan.entries} == {"float32", "int8"}
    assert "int8" not in str(a_plan())


def test_planning_changes_nothing() -> None:
    model = MODELS["bert"].build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    factorformer.plan(model, "svd", ratio=2, scope="all")
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_planning_needs_no_weights() -> None:
    with torch.device("meta"):
        model = MODELS["llama"].make()
    assert factorformer.plan(model, "svd", ratio=2) == a_plan("llama")


# Choices


def test_include() -> None:
    plan = a_plan(ratio=1.2, include=["*.intermediate.dense", "*.layer.1.output.dense"])
    assert [entry.matrix.name for entry in plan.factorized] == [
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.1.intermediate.dense",
        "bert.encoder.layer.1.output.dense",
    ]
    assert {entry.reason for entry in plan.entries if entry.spec is None} == {"not included"}
    assert plan.original == a_plan().original  # what stays dense still counts


def test_exclude() -> None:
    plan = a_plan(ratio=1.3, exclude=["*.attention.*"])
    assert {entry.matrix.name.split(".")[-2] for entry in plan.factorized} == {"intermediate", "output"}
    assert not [entry for entry in plan.factorized if ".attention." in entry.matrix.name]
    assert {entry.reason for entry in plan.entries if entry.spec is None} == {"excluded"}


def test_include_and_exclude_together() -> None:
    plan = a_plan(ratio=1.1, include=["*.layer.0.*"], exclude=["*.query", "*.output.dense"])
    assert [entry.matrix.name.removeprefix("bert.encoder.layer.0.") for entry in plan.factorized] == [
        "attention.self.key",
        "attention.self.value",
        "intermediate.dense",
    ]


def test_a_tied_matrix_is_excluded_by_any_of_its_names() -> None:
    plan = a_plan("llama-tied", 1.5, "all", exclude=["lm_head"])
    (entry,) = [entry for entry in plan.entries if entry.matrix.aliases]
    assert (entry.matrix.name, entry.spec, entry.reason) == ("model.embed_tokens", None, "excluded")


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(option: str) -> None:
    with pytest.raises(ModelError, match=r"'\*\.quary' .*query"):
        a_plan(**{option: ["*.quary"]})


def test_nothing_left_to_factorize() -> None:
    with pytest.raises(BudgetError, match="no matrix"):
        a_plan(exclude=["*"])


# Errors


def test_an_impossible_ratio() -> None:
    with pytest.raises(BudgetError, match="ratio 1000 ") as caught:
        a_plan(ratio=1000)
    (largest,) = re.findall(r"ask for at most ([0-9.]+)", str(caught.value))
    plan = a_plan(ratio=float(largest))
    assert plan.ratio == pytest.approx(float(largest), rel=0.01)
    assert {entry.spec for entry in plan.entries} == {LowRank(1)}


def test_an_unknown_method() -> None:
    with pytest.raises(MethodError, match=r"method 'whitend' .*'whitened'.*allowed: svd, fwsvd"):
        factorformer.plan(MODELS["bert"].build(), "whitend")


def test_an_unknown_scope(no_shape_checks: None) -> None:
    with pytest.raises(factorformer.FactorformerError, match=r"scope 'block' .*'blocks'"):
        a_plan(scope="block")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [None, *RECIPES])
def test_every_method_plans(method: str | None) -> None:
    model = MODELS["bert"].build()
    plan = factorformer.plan(model, method, ratio=2)
    assert plan.method == method
    assert (plan.scope, plan.target) == ("all" if method == "shapeshifter" else "blocks", 2)
    (other,) = set(get_args(Scope)) - {plan.scope}
    assert factorformer.plan(model, method, ratio=2, scope=other).scope == other


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("scope", get_args(Scope))
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixtral"])
def test_ranks_go_by_role(name: str, scope: Scope) -> None:
    model = MODELS[name].build()
    try:
        plan = factorformer.plan(model, "shapeshifter", 2.5, scope)
    except BudgetError as error:
        (near,) = re.findall(r"(?:ask for at most|the nearest is) ([0-9.]+)$", str(error))
        plan = factorformer.plan(model, "shapeshifter", float(near), scope)
    assert plan.ratio == pytest.approx(plan.target, rel=0.01)
    ranks: dict[str, list[int]] = {}
    for entry in plan.factorized:
        assert isinstance(entry.spec, KroneckerSum)
        ranks.setdefault(entry.matrix.role, []).append(entry.spec.rank)
    assert max(ranks["attention"]) <= min(ranks["feed_forward"]) + 1
    embeddings = sum(entry.compressed.bytes for entry in plan.factorized if entry.matrix.role == "embedding")
    assert embeddings < plan.compressed.bytes / 2
    roles = {entry.matrix.role for entry in plan.entries if entry.matrix.dense is None}
    assert ("embedding" in roles) == (scope == "all" and name != "vit")


BROKEN: dict[str, Any] = {
    "another format": {"format": 1},
    "no format": {"format": None},
    "no entries": {"entries": None},
    "an entry of nothing": {"entries": [{}]},
    "a number": {"entries": 3},
    "no cost": {"rest": {"weight": 1}},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_content_that_is_no_plan(broken: str) -> None:
    with pytest.raises(MethodError, match="plan"):
        Plan.from_dict({**content_of_a_plan(), **BROKEN[broken]})


def test_a_plan_with_an_impossible_entry_names_it() -> None:
    content = content_of_a_plan()
    entry = content["entries"][0]
    for spec, message in (
        ({"structure": "low_rank", "rank": 100}, "rank 100 .*keep the matrix dense"),
        ({"structure": "low_rank", "rank": 0}, "at least 1"),
        ({"structure": "nonsense"}, "unknown structure"),
    ):
        entry["spec"] = spec
        with pytest.raises(MethodError, match=f"plan entry '{re.escape(entry['name'])}': .*{message}"):
            Plan.from_dict(content)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"text"', "3"])
def test_files_that_are_no_plan(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(MethodError, match=re.escape(str(tmp_path / "plan.json"))):
        Plan.load(tmp_path / "plan.json")


def test_a_directory_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="cannot read"):
        Plan.load(tmp_path)


def test_entries_price_themselves() -> None:
    entry = Entry(Matrix("m", (64, 32)), LowRank(4), "because")
    assert entry.original == Cost(2048, 8192, 4096)
    assert entry.compressed == Cost(384, 1536, 768)
    plan = Plan("svd", "blocks", 5, (entry,), Cost(10, 40, 0))
    assert plan.original.bytes == 8232
    assert plan.compressed.bytes == 1576
    assert plan.ratio == 8232 / 1576


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spec", "low_rank"),
        ("spec", ["low_rank", 4]),
        ("spec", {"structure": ["low_rank"], "rank": 4}),
        ("shape", [32]),
        ("shape", [32, "32"]),
        ("shape", 32),
        ("aliases", [1]),
        ("dtype", "float31"),
        ("dtype", 32),
        ("products", "1"),
        ("lookups", None),
        ("reason", 1),
        ("cause", "whim"),
        ("cause", None),
        ("bits", "yes"),
        ("spec", {"structure": "dense"}),
        ("role", None),
        ("role", "embeddings"),
        ("role", ["attention"]),
    ],
)
def test_entries_with_values_of_another_type(field: str, value: Any) -> None:
    content = content_of_a_plan()
    name = content["entries"][1]["name"]
    content["entries"][1][field] = value
    with pytest.raises(MethodError, match=f"plan entry '{name}'"):
        Plan.from_dict(content)


def test_an_unknown_role_is_answered_with_the_nearest() -> None:
    content = content_of_a_plan()
    content["entries"][0]["role"] = "attn"
    name = content["entries"][0]["name"]
    message = "role 'attn' .*'attention'.*allowed: attention, feed_forward, embedding"
    with pytest.raises(MethodError, match=f"plan entry '{name}'.*{message}"):
        Plan.from_dict(content)


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(Matrix)] + ["spec", "reason", "shares", "cause"]
)
def test_entries_lack_nothing(field: str) -> None:
    content = content_of_a_plan()
    del content["entries"][1][field]
    with pytest.raises(MethodError, match=f"plan entry.*no '{field}'"):
        Plan.from_dict(content)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method": 3}, "method"),
        ({"scope": "block"}, "scope"),
        ({"target": "2"}, "target"),
        ({"entries": ["x"]}, "entry.*'x'"),
        ({"rest": {"bytes": True}}, "parameters"),
    ],
)
def test_plans_with_values_of_another_type(change: dict[str, Any], named: str) -> None:
    with pytest.raises(MethodError, match=f"the plan .*{named}"):
        Plan.from_dict({**content_of_a_plan(), **change})


def test_what_stays_dense_is_told_by_reason() -> None:
    model = MODELS["mixtral"].build()
    plan = factorformer.plan(model, "svd", ratio=1.05, exclude=["*.q_proj"])
    (line,) = left_dense(plan.entries, plan.original.bytes)
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts." in name and p.dim() == 3) * 4
    assert line.startswith("expert weights")
    assert f": 4 matrices, {experts:,} of {plan.original.bytes:,} bytes" in line
    assert left_dense(a_plan().entries, a_plan().original.bytes) == []


# int8


@pytest.mark.parametrize("method", ["svd", "shapeshifter", "dense_sparse_plain"])
@pytest.mark.parametrize("scope", get_args(Scope))
def test_a_budget_is_met_in_int8(method: str, scope: Scope) -> None:
    plan = factorformer.plan(MODELS["bert"].build(), method, ratio=6, scope=scope, int8=True)
    assert plan.ratio == pytest.approx(6, rel=0.01)
    for entry in plan.factorized:
        assert entry.spec is not None
        assert entry.compressed.bytes == entry.spec.bytes(entry.matrix.shape, torch.int8)
        assert entry.original.bytes == 4 * entry.matrix.shape[0] * entry.matrix.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_in_int8_are_those_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """Scales have the type of the model."""
    kinds: set[str] = set()
    for method, ratio in (("svd", 8), ("kronecker", 8), ("dense_sparse_plain", 8), ("svd", 3)):
        model = MODELS["bert"].build().to(dtype)
        ratio *= dtype.itemsize / 4
        plan = factorformer.plan(model, method, ratio, "all", int8=True)
        assert plan.ratio > 0.98 * ratio
        kinds |= {entry.spec.kind for entry in plan.factorized if entry.spec is not None}
        report = factorformer.compress(model, plan)
        model.save_pretrained(tmp_path)
        stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert plan.compressed.bytes == sum(t.numel() * t.element_size() for t in stored.values())
        assert inventory(model, "all").compressed.bytes == report.compressed.bytes == plan.compressed.bytes
    assert kinds == {"low_rank", "kronecker_sum", "dense_sparse", "dense"}


def test_plans_with_int8_survive_json() -> None:
    for ratio in (3, 6):
        plan = factorformer.plan(MODELS["bert"].build(), "svd", ratio=ratio, int8=True)
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        assert ("dense, int8" in str(plan)) == (ratio == 3)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("method", ["svd", "dense_sparse_plain", "fisher", "auto"])
def test_nothing_in_scope_stays_in_floats_beside_int8(method: str) -> None:
    model = MODELS["bert"].build()
    for ratio in (1, 3, 4) if RECIPES[method].allocation == "uniform" else (4, 5):
        plan = factorformer.plan(model, method, ratio, int8=True, exclude=["*.query"])
        assert {e.values for e in plan.entries if e.cause is not Cause.PATTERNS} == {"int8"}
        assert {e.values for e in plan.entries if e.cause is Cause.PATTERNS} == {"float32"}
        assert plan.ratio >= min(ratio, 2) * 0.99


def test_what_int8_leaves_of_a_budget_goes_to_floats_by_loss() -> None:
    model = MODELS["bert"].build()
    for ratio in (1, 1.5, 2.5):
        plan = factorformer.plan(model, "fisher", ratio, int8=True)
        assert ratio * 0.99 <= plan.ratio <= ratio * 1.05, "no matrix of so few could be left in floats in addition"
        assert {entry.values for entry in plan.entries} == ({"float32"} if ratio == 1 else {"float32", "int8"})
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    factorformer.compress(model, plan, [text(8)])
    assert inventory(model).compressed.bytes == plan.compressed.bytes
    assert {entry.values for entry in inventory(model).entries} == {"float32", "int8"}
