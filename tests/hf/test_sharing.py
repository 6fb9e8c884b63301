"""Layers that share a dictionary hold one parameter, in memory and in files; damaged supports are refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tests.tiny import MODELS, VOCABULARY, logits

import factorformer
from factorformer.errors import CheckpointError, ModelError
from factorformer.layers.matrix import Cost
from factorformer.layers.nn import FactorizedMatrix
from factorformer.layers.surgery import find_matrices
from factorformer.planning import Entry, Plan, expand, find_groups, stacked
from factorformer.report import inventory
from factorformer.structures import DenseSparse

QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = "bert.encoder.layer.0.attention.self.key"


def a_plan(model: tf.PreTrainedModel, share: Any = "inputs", scope: Any = "blocks") -> Plan:
    """A plan by hand, without the fits that choose sizes."""
    matrices, rest = find_matrices(model, scope)
    groups = find_groups(matrices, share)
    stacks = stacked(matrices, groups)
    entries = [Entry(m, None if m.dense else DenseSparse.of(m.shape, 12, 3), m.dense or "test") for m in stacks]
    return Plan("dense_sparse_plain", scope, 2, expand(matrices, groups, entries), rest)


def compressed(name: str = "bert", share: Any = "inputs", scope: Any = "blocks") -> tf.PreTrainedModel:
    model = MODELS[name].build()
    factorformer.compress(model, a_plan(model, share, scope))
    return model


def sharing(model: torch.nn.Module) -> set[frozenset[str]]:
    """Names of layers that hold one dictionary."""
    held: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedMatrix):
            held.setdefault(id(module.dictionary), set()).add(name)
    return {frozenset(names) for names in held.values() if len(names) > 1}


@pytest.mark.parametrize(
    ("name", "share", "scope"),
    [(name, "inputs", "blocks") for name in ("bert", "albert", "gpt2", "llama", "t5", "vit")]
    + [("vit", "layers", "all"), ("t5", "layers", "all"), ("llama", "layers", "blocks"), ("bert", "inputs", "all")],
)
def test_files_hold_each_dictionary_once(name: str, share: str, scope: str, tmp_path: Path) -> None:
    model, inputs, auto = compressed(name, share, scope), MODELS[name].inputs(), MODELS[name].auto
    expected, groups = logits(model, inputs), sharing(model)
    assert groups
    for folder, options in (("whole", {}), ("sharded", {"max_shard_size": "10KB"})):
        model.save_pretrained(tmp_path / folder, **options)
        again = auto.from_pretrained(tmp_path / folder)
        assert sharing(again) == groups
        assert again.num_parameters() == model.num_parameters()
        torch.testing.assert_close(logits(again, inputs), expected, rtol=0, atol=1e-6)
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]["layers"]
    for group in groups:
        owners = [layer for layer in group if f"{layer}.dictionary" in stored]
        tied = {other for layer in config.values() for other in layer.get("tied", ())}
        assert len(owners) == 1
        assert {config[layer].get("shares") for layer in group - tied} <= {None, owners[0]}
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "whole/config.json").read_text()
    base = tf.AutoModel.from_pretrained(tmp_path / "whole")
    inside = [group for group in groups if not any("embed" in layer for layer in group)]  # those hold a tied head
    assert len([group for group in sharing(base) if not any("embed" in layer for layer in group)]) == len(inside)
    base.save_pretrained(tmp_path / "base")
    assert sharing(auto.from_pretrained(tmp_path / "base")) == groups
    dense = again.dequantize()
    torch.testing.assert_close(logits(dense, inputs), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "dense"), inputs), logits(dense, inputs))


def test_a_new_head(tmp_path: Path) -> None:
    model = compressed("roberta")
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert sharing(again) == sharing(model)


def test_copies_share_among_themselves(tmp_path: Path) -> None:
    model = compressed()
    other = copy.deepcopy(model)
    assert sharing(other) == sharing(model)
    assert other.get_submodule(KEY).dictionary is not model.get_submodule(KEY).dictionary
    other.save_pretrained(tmp_path)
    assert sharing(factorformer.load(tmp_path)) == sharing(model)
    model.tie_weights()
    assert sharing(model) == sharing(other)


def test_an_optimizer_sees_a_dictionary_once() -> None:
    model = compressed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.get_submodule(KEY).dictionary.detach().clone()
    model(**MODELS["bert"].inputs()).logits.sum().backward()
    gradient = model.get_submodule(QUERY).dictionary.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model.get_submodule(KEY).dictionary.detach(), before - 0.1 * gradient)


def test_a_new_model_shares_as_well() -> None:
    model = MODELS["bert"].build()
    spreads = {}
    for i, part in enumerate(("query", "key")):
        module = model.get_submodule(QUERY.replace("query", part))
        module.weight.data.normal_(std=0.1 * (i + 1))
        spreads[part] = 0.1 * (i + 1)
    factorformer.initialize(model, a_plan(model))
    assert model.get_submodule(QUERY).dictionary is model.get_submodule(KEY).dictionary
    for part, std in spreads.items():
        assert model.get_submodule(QUERY.replace("query", part)).to_dense().std().item() == pytest.approx(std, rel=0.3)


@pytest.mark.parametrize("frozen", [(KEY,), (QUERY,), "all"])
def test_a_dictionary_is_frozen_with_all_its_members(frozen: Any) -> None:
    model = MODELS["bert"].build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen != "all" and not name.startswith(tuple(frozen)))
    factorformer.compress(model, a_plan(model))
    assert model.get_submodule(KEY).dictionary.requires_grad == (frozen != "all")
    assert model.get_submodule(QUERY).weight.requires_grad == (frozen != "all" and QUERY not in frozen)


# Damage


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    compressed().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unshared() -> tf.PreTrainedModel:
    return compressed(share=None)


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


WRONG_TENSORS: dict[str, tuple[Any, str]] = {
    "the owner's is missing": (lambda t: t.pop(f"{QUERY}.dictionary"), rf"missing: {QUERY}\.dictionary"),
    "a member has one": (
        lambda t: t.update({f"{KEY}.dictionary": t[f"{QUERY}.dictionary"].clone()}),
        rf"unexpected: {KEY}\.dictionary",
    ),
    "a member has the only one": (
        lambda t: t.update({f"{KEY}.dictionary": t.pop(f"{QUERY}.dictionary")}),
        rf"missing: {QUERY}\.dictionary.*unexpected: {KEY}\.dictionary",
    ),
    "it is misshapen": (
        lambda t: t.update({f"{QUERY}.dictionary": t[f"{QUERY}.dictionary"][:-1].clone()}),
        rf"{QUERY}\.dictionary: \[11, 32\] in the file, \[12, 32\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_dictionaries(case: str, stored: Path, tmp_path: Path) -> None:
    change, message = WRONG_TENSORS[case]
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, change)
    for load in (factorformer.load, tf.AutoModelForMaskedLM.from_pretrained, tf.AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)


WRONG_LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "nobody": ({"shares": "nobody"}, "'nobody'.*no layer"),
    "itself": ({"shares": KEY}, f"'{KEY}'.*no layer"),
    "a number": ({"shares": 3}, "shares.* 3"),
    "other atoms": ({"atoms": 11}, r"size \[11, 32\], that of .* \[12, 32\]"),
}


@pytest.mark.parametrize("case", WRONG_LAYERS)
def test_wrong_descriptions(case: str, stored: Path, tmp_path: Path) -> None:
    change, message = WRONG_LAYERS[case]
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"][KEY].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"layer '{KEY}' wrongly: .*{message}"):
        factorformer.load(tmp_path)


UP = "encoder.layer.0.intermediate.dense"
SUPPORTS = {
    "bitmap": (DenseSparse(20, 6), lambda s: s[5].fill_(255), "marks"),
    "uint8": (DenseSparse(40, 3), lambda s: s[5].fill_(40), "position of 40"),
    "uint8 order": (DenseSparse(40, 3), lambda s: s[5].fill_(7), "do not ascend"),
    "uint16": (DenseSparse(300, 6), lambda s: s[5].fill_(255), "position of 300"),
}


@pytest.fixture(scope="module", params=SUPPORTS)
def damaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A model in whose file one row of a support is wrong, the intact file's name, and what is wrong."""
    spec, damage, message = SUPPORTS[request.param]
    config = tf.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=900, vocab_size=VOCABULARY
    )
    model = tf.BertModel(config).eval()
    matrices, _ = find_matrices(model)
    entries = tuple(Entry(m, spec, "") for m in matrices if m.name == UP)
    factorformer.compress(model, Plan("dense_sparse_plain", "blocks", 2, entries, Cost()))
    folder = tmp_path_factory.mktemp("damaged")
    model.save_pretrained(folder)
    factorformer.load(folder)
    model.save_pretrained(folder / "intact")
    edit(folder, lambda tensors: damage(tensors[f"{UP}.support"]))
    return folder, str(folder / "intact"), message


def test_a_damaged_support_does_not_load(damaged: tuple[Path, str, str]) -> None:
    folder, _, message = damaged
    for load in (factorformer.load, tf.AutoModel.from_pretrained, tf.AutoModelForMaskedLM.from_pretrained):
        with pytest.raises(CheckpointError, match=f"damaged in layer '(bert.)?{UP}': .*{message}"):
            load(folder)


def test_a_damaged_support_in_a_state_dict(damaged: tuple[Path, str, str]) -> None:
    folder, intact, message = damaged
    model = factorformer.load(intact)
    before = model.get_submodule(UP).support.clone()
    with pytest.raises(ModelError, match=f"layer '{UP}': .*{message}"):
        model.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(model.get_submodule(UP).support, before)


@pytest.mark.parametrize("share", ["inputs", "layers"])
def test_costs_read_off_a_model_are_those_of_its_plan(share: str) -> None:
    model = MODELS["bert"].build()
    plan = a_plan(model, share)
    factorformer.compress(model, plan)
    found = inventory(model)
    assert (found.compressed.bytes, found.compressed.parameters) == (plan.compressed.bytes, plan.compressed.parameters)
    assert [entry.shares for entry in found.factorized] == [entry.shares for entry in plan.factorized]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda support: support.float(), "F32"),  # transformers would turn these into bytes, whatever they say
        (lambda support: support.long() - 256, "I64"),
        (lambda support: torch.full(support.shape, float("nan")), "F32"),
    ],
    ids=["values", "wide", "nan"],
)
def test_a_support_of_another_type_never_arrives(
    damage: Any, found: str, unshared: tf.PreTrainedModel, tmp_path: Path
) -> None:
    model = copy.deepcopy(unshared)
    state = model.state_dict()
    with pytest.raises(ModelError, match=r"query\.support'.* torch\.\w+.* torch\.uint8"):
        model.load_state_dict(state | {f"{QUERY}.support": damage(state[f"{QUERY}.support"])})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{QUERY}.support"] = damage(tensors[f"{QUERY}.support"])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"query\.support'.* {found}\b.* U8"):
        factorformer.load(tmp_path)


def test_a_dictionary_of_integers_does_not_load(unshared: tf.PreTrainedModel, tmp_path: Path) -> None:
    unshared.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{KEY}.dictionary"] = tensors[f"{KEY}.dictionary"].int()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"key\.dictionary'.* torch\.int32"):
        factorformer.load(tmp_path)
