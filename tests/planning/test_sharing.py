"""Which matrices share a dictionary, and plans that say so."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from tests.tiny import BLOCKS, MODELS
from torch import Tensor, nn

import factorformer
from factorformer import Plan
from factorformer.errors import MethodError
from factorformer.layers.dense import dense_weight
from factorformer.layers.matrix import Cost, Matrix
from factorformer.layers.surgery import find_matrices
from factorformer.planning import Entry, Share, expand, find_groups, stacked
from factorformer.structures import DenseSparse

METHOD = "dense_sparse_plain"


@pytest.fixture(autouse=True, scope="module")
def _without_shape_checks() -> Iterator[None]:
    """Annotations unchecked: planning looks at thousands of sizes, which takes ten times as long with checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def groups_of(name: str, share: Share) -> list[list[str]]:
    matrices, _ = find_matrices(MODELS[name].build(), "all")
    return [[member.matrix.name for member in members] for members in find_groups(matrices, share).values()]


# By input

QKVO = ["query", "key", "value"]
IN_A_BLOCK: dict[str, list[list[str]]] = {
    "bert": [[*(f"attention.self.{part}" for part in QKVO), "attention.output.dense"]],
    "distilbert": [[f"attention.{part}_lin" for part in ("q", "k", "v", "out")]],
    "albert": [[f"albert_layers.0.attention.{part}" for part in (*QKVO, "dense")]],
    "gpt2": [["attn.c_attn", "attn.c_proj"]],
    "opt": [[f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")]],
    "llama": [[f"self_attn.{part}_proj" for part in "qkvo"], ["mlp.gate_proj", "mlp.up_proj"]],
    "qwen3": [[f"self_attn.{part}_proj" for part in "qkvo"], ["mlp.gate_proj", "mlp.up_proj"]],
    "vit": [[f"attention.{part}_proj" for part in "qkvo"]],
    "modernbert": [["attn.Wqkv", "attn.Wo"]],
    "mixtral": [[f"self_attn.{part}_proj" for part in "qkvo"]],
}


@pytest.mark.parametrize("name", IN_A_BLOCK)
def test_groups_in_a_block(name: str) -> None:
    found = groups_of(name, "inputs")
    assert len(found) == len(IN_A_BLOCK[name]) * (1 if name == "albert" else BLOCKS)
    for parts in IN_A_BLOCK[name]:
        assert any(all(path.endswith(f".{part}") for path, part in zip(g, parts, strict=True)) for g in found
                   if len(g) == len(parts))  # fmt: skip


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_keys_and_values_of_cross_attention_are_apart(name: str) -> None:
    found = groups_of(name, "inputs")
    cross = [[path.rpartition(".")[2] for path in g] for g in found if re.search("EncDec|encoder_attn", g[0])]
    expected = [["q", "o"], ["k", "v"]] if name == "t5" else [["k_proj", "v_proj"], ["q_proj", "out_proj"]]
    assert sorted(cross) == sorted(expected * BLOCKS)
    assert len(found) == (1 + 3) * BLOCKS


@pytest.mark.parametrize("name", MODELS)
def test_members_receive_the_very_same_tensor(name: str) -> None:
    """All but those that are in a group through their transpose, for they write where the others read."""
    model = MODELS[name].build()
    groups = find_groups(find_matrices(model, "all")[0], "inputs")
    seen: dict[str, list[Tensor]] = {}
    for members in groups.values():
        for member in members:
            module = model.get_submodule(member.matrix.name)
            module.register_forward_pre_hook(
                lambda _, inputs, path=member.matrix.name: seen.setdefault(path, []).append(inputs[0])
            )
    with torch.no_grad():
        model(**MODELS[name].inputs())
    assert groups
    for members in groups.values():
        readers = [seen[member.matrix.name] for member in members if member.side == "rows"]
        assert readers
        assert len(members) - len(readers) <= 1
        for calls in readers[1:]:
            assert all(a is b or torch.equal(a, b) for a, b in zip(calls, readers[0], strict=True))
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(calls, readers[0], strict=True))


def test_every_reader_of_a_tensor_in_a_block_is_found() -> None:
    """The other way round: what reads one tensor in a block of BERT, T5 or Llama is in one group."""
    for name in ("bert", "t5", "llama", "vit", "whisper"):
        model, readers = MODELS[name].build(), {}
        matrices = [m for m in find_matrices(model)[0] if m.dense is None]
        alive: list[Tensor] = []

        def see(_: nn.Module, inputs: tuple[Tensor], path: str, readers: dict = readers, alive: list = alive) -> None:
            alive.append(inputs[0])
            block = re.match(r".*?\.\d+\.", path)
            readers.setdefault((block and block[0], inputs[0].data_ptr()), set()).add(path)

        for matrix in matrices:
            hook = lambda module, inputs, path=matrix.name: see(module, inputs, path)  # noqa: E731
            model.get_submodule(matrix.name).register_forward_pre_hook(hook)
        with torch.no_grad():
            model(**MODELS[name].inputs())
        together = {frozenset(paths) for paths in readers.values() if len(paths) > 1}
        found = {
            frozenset(m.matrix.name for m in members if m.side == "rows")
            for members in find_groups(matrices, "inputs").values()
        }
        assert together <= found, name


# By layer


@pytest.mark.parametrize("name", MODELS)
def test_groups_across_layers(name: str) -> None:
    for group in groups_of(name, "layers"):
        assert len(group) == BLOCKS
        first, second = group
        assert first.replace(".0.", ".1.", 1) == second
    expected = 0 if name == "albert" else MODELS[name].matrices // BLOCKS
    assert len(groups_of(name, "layers")) == expected


def test_no_share_is_no_group() -> None:
    assert find_groups(find_matrices(MODELS["bert"].build())[0], None) == {}


def test_tied_excluded_and_single_matrices_stay_alone() -> None:
    q, k = (Matrix(f"0.attn.{part}", (32, 32), role="attention") for part in "qk")
    assert len(find_groups([q, k], "inputs")) == 1
    for other in (
        Matrix("0.attn.k", (32, 32), role="attention", aliases=("x",)),
        Matrix("0.attn.k", (32, 32), role="attention", dense="excluded"),
        Matrix("0.attn.k", (32, 24), role="attention"),
        Matrix("0.attn.k", (32, 32), "float16", role="attention"),
        Matrix("1.attn.k", (32, 32), role="attention"),
    ):
        assert find_groups([q, other], "inputs") == {}
    narrow = [Matrix(f"0.attn.{part}", (8, 64), role="attention") for part in "kv"]
    assert find_groups(narrow, "inputs") == {}  # 16 rows of 64: atoms belong along the other side


# Stacks


def test_stacking_is_sharing() -> None:
    matrices = find_matrices(MODELS["llama"].build())[0]
    groups = find_groups(matrices, "inputs")
    stacks = stacked(matrices, groups)
    assert len(stacks) == len(matrices) - sum(len(members) - 1 for members in groups.values())
    spec = DenseSparse(12, 3)
    entries = expand(matrices, groups, [Entry(m, spec if m.dense is None else None, "r") for m in stacks])
    assert [entry.matrix for entry in entries] == matrices
    for stack in stacks:
        if stack.name in groups:
            members = [e for e in entries if stack.name in (e.matrix.name, e.shares)]
            assert sum(e.compressed.bytes for e in members) == spec.bytes(stack.shape)
            assert sum(e.compressed.parameters for e in members) == spec.parameters(stack.shape)


KINDS = ("bert", "gpt2", "t5", "albert", "mixtral")


@pytest.mark.parametrize(
    ("name", "share"), [*((name, "inputs") for name in MODELS), *((name, "layers") for name in KINDS)]
)
def test_plans_meet_the_budget_and_are_what_is_stored(name: str, share: Share) -> None:
    assert_planned_and_stored(name, share)


def test_layers_of_the_other_architectures_share_as_well() -> None:
    for name in MODELS.keys() - {*KINDS}:
        assert_planned_and_stored(name, "layers")


def assert_planned_and_stored(name: str, share: Share) -> None:
    model = MODELS[name].build()
    plan = factorformer.plan(model, METHOD, MODELS[name].ratio, share=share)
    assert plan.ratio == pytest.approx(MODELS[name].ratio, rel=0.01)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    factorformer.compress(model, plan)
    after = sum(t.numel() * t.element_size() for t in model.parameters())
    after += sum(b.numel() for n, b in model.named_buffers() if n.endswith(".support"))
    assert before - after == plan.original.bytes - plan.compressed.bytes
    for owner, entries in plan.sharing.items():
        assert entries[0].matrix.name == owner
        dictionary = model.get_submodule(owner).dictionary
        assert all(model.get_submodule(e.matrix.name).dictionary is dictionary for e in entries)


def test_a_plan_without_sharing_has_no_groups() -> None:
    plan = factorformer.plan(MODELS["bert"].build(), METHOD, 2)
    assert plan.sharing == {}
    assert {entry.shares for entry in plan.entries} == {None}


def test_the_table_names_the_owner() -> None:
    plan = factorformer.plan(MODELS["bert"].build(), METHOD, 2, share="inputs")
    for line in str(plan).splitlines():
        if line.startswith("bert.encoder.layer.1.attention.self.key "):
            assert line.endswith("; dictionary of bert.encoder.layer.1.attention.self.query")
            break
    else:
        pytest.fail("no such line")


@pytest.mark.parametrize("share", ["inputs", "layers"])
def test_sharing_lowers_the_error_of_weights_that_share_structure(share: Share) -> None:
    model = MODELS["bert"].build()
    atoms = torch.randn(20, 32)
    for name, module in model.named_modules():
        if ".attention." in name and type(module) is nn.Linear:
            codes = torch.randn(32, 20) * (torch.rand(32, 20) < 0.2)
            module.weight.data = (codes @ atoms) if "output" not in name else (codes @ atoms).T
    weights = {n: dense_weight(m).clone() for n, m in model.named_modules() if type(m) is nn.Linear}
    errors = {}
    for choice in (None, share):
        copy = MODELS["bert"].build()
        for name, weight in weights.items():
            copy.get_submodule(name).weight.data = weight.clone()
        plan = factorformer.plan(copy, METHOD, 2.2, share=choice)
        report = factorformer.compress(copy, plan)
        errors[choice] = [report.errors[n] for n in report.errors if ".query" in n or ".key" in n]
    assert sum(errors[share]) < sum(errors[None])


# Errors


def test_methods_without_shareable_factors() -> None:
    with pytest.raises(MethodError, match=r"'svd' .*low_rank.*: dense_sp"):
        factorformer.plan(MODELS["bert"].build(), "svd", 2, share="inputs")


def test_an_unknown_share() -> None:
    with pytest.raises(MethodError, match=r"share 'input' .*'inputs'.*allowed: inputs, layers"):
        factorformer.plan(MODELS["bert"].build(), METHOD, 2, share="input")  # type: ignore[arg-type]


def shared_plan() -> dict[str, Any]:
    q, k = (Matrix(f"0.attn.{part}", (64, 32), role="attention") for part in "qk")
    spec = DenseSparse(16, 4)
    entries = (Entry(q, spec, "r"), Entry(k, spec, "r", q.name))
    return json.loads(json.dumps(Plan("dense_sparse", "blocks", 2, entries, Cost()).to_dict()))


BROKEN: list[tuple[int, dict[str, Any], str]] = [
    (1, {"shares": "nobody"}, "'nobody'.*no such entry"),
    (1, {"shares": "0.attn.k"}, r"'0\.attn\.k'.*none of its own"),
    (1, {"shares": 3}, "'shares' cannot be 3"),
    (1, {"bits": 8}, "int8 and float32|float32 and int8"),
    (0, {"shares": "0.attn.k"}, r"none of its own.*'0\.attn\.q'"),
    (1, {"spec": DenseSparse(20, 4).to_dict()}, "may differ in their sides only"),
    (1, {"spec": DenseSparse(16, 3).to_dict()}, "may differ in their sides only"),
    (1, {"spec": {"structure": "low_rank", "rank": 3}}, "low_rank has no factors"),
    (1, {"spec": None}, "one stays dense"),
    (0, {"spec": None}, "one stays dense"),
    (1, {"shape": [64, 40]}, r"sizes \{'dictionary': \(16, 40\)\} and \{'dictionary': \(16, 32\)\}"),
    (1, {"dtype": "float16"}, "types float16 and float32"),
    (1, {"shape": [64, 4]}, "no less"),
]


@pytest.mark.parametrize(("entry", "change", "message"), BROKEN)
def test_malformed_sharing_is_refused(entry: int, change: dict[str, Any], message: str) -> None:
    content = shared_plan()
    Plan.from_dict(content)
    content["entries"][entry].update(change)
    with pytest.raises(MethodError, match=message):
        Plan.from_dict(content)


def test_dense_matrices_in_int8_share_nothing() -> None:
    model = MODELS["bert"].build()
    plan = factorformer.plan(model, "dense_sparse_plain", 3, share="inputs", int8=True)
    assert plan.sharing == {}
    assert {str(entry.spec) for entry in plan.entries} == {"dense"}
    factorformer.compress(model, dataclasses.replace(plan, method="dense_sparse_plain"))


def test_members_may_be_too_small_to_gain_alone() -> None:
    q, k = Matrix("0.attn.q", (64, 32), role="attention"), Matrix("0.attn.k", (8, 32), role="attention")
    spec = DenseSparse(24, 4)
    plan = Plan(None, "blocks", 2, (Entry(q, spec, ""), Entry(k, spec, "", q.name)), Cost())
    assert plan.entries[1].compressed.parameters == 8 * 4
    assert plan.entries[0].compressed.parameters == 64 * 4 + 24 * 32
    with pytest.raises(MethodError, match=r"'0\.attn\.k'.*no less"):
        Plan(None, "blocks", 2, (Entry(k, spec, ""),), Cost())
