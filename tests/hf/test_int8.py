"""Models whose factors are stored in int8: planned by their bytes, saved, loaded, shared, trained and counted."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tests.hf.test_plugin import factorized, trainer
from tests.hf.test_sharing import a_plan as sharing_plan
from tests.hf.test_sharing import sharing
from tests.tiny import MODELS, Inputs, logits
from torch import Tensor

import factorformer
from factorformer.errors import BudgetError, CheckpointError, FactorformerWarning, ModelError
from factorformer.hf.description import describe
from factorformer.layers.matrix import Scope
from factorformer.layers.nn import FactorizedMatrix
from factorformer.layers.quantization import quantize
from factorformer.planning import Plan
from factorformer.report import inventory
from factorformer.structures import integers
from factorformer.training.dynamic_rank import DynamicRank, DynamicRankSettings
from factorformer.training.straight_through import StraightThrough

ROOT = Path(__file__).resolve().parents[2]
# One of each kind: an encoder, shared layers, `Conv1D`, a decoder with a head of its own and with a tied one, encoders
# with decoders, images, sound and experts.
CASES = [f"{name}@blocks" for name in ("bert", "albert", "gpt2", "llama", "t5", "vit", "whisper", "mixtral")]
CASES += [f"{name}@all" for name in ("bert", "albert", "gpt2", "llama", "llama-tied", "t5", "vit", "mixtral")]
QUERY = "bert.encoder.layer.0.attention.self.query"
ROUNDING = 0.05
"""Relative difference that 8-bit inputs of products may make of a tiny random model."""


def dense(name: str, dtype: torch.dtype) -> tf.PreTrainedModel:
    model = MODELS[name].build()
    model.to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    return model


def int8_plan(name: str, scope: Scope = "blocks", method: str = "svd", dtype: torch.dtype = torch.float32) -> Plan:
    """A plan for 5 times fewer bytes in float32, or the nearest that few and small matrices admit."""
    model = dense(name, dtype)
    ratio = 5 * dtype.itemsize / 4 if MODELS[name].ratio == 2 else MODELS[name].ratio
    for _ in range(2):
        try:
            return factorformer.plan(model, method, ratio=ratio, scope=scope, int8=True)
        except BudgetError as error:
            ratio = float(re.findall(r"(?:ask for at most|the nearest is) ([0-9.]+)$", str(error))[0])
    raise AssertionError("the ratio that the message names cannot be met either")


def compressed(name: str = "bert", scope: Scope = "blocks", **options: Any) -> tf.PreTrainedModel:
    model = MODELS[name].build()
    factorformer.compress(model, int8_plan(name, scope), **options)
    return model


def stored_bytes(folder: Path) -> int:
    return sum(t.numel() * t.element_size() for f in folder.glob("*.safetensors") for t in load_file(f).values())


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


# Every architecture


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("int8")
    for case in CASES:
        name, _, scope = case.partition("@")
        model = compressed(name, scope)  # type: ignore[arg-type]
        model.save_pretrained(root / case / "model")
        save_file({"logits": logits(model, MODELS[name].inputs())}, root / case / "expected.safetensors")
    return root


@pytest.fixture(scope="module")
def findings(saved: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.hf.int8_worker", str(saved)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_reload_in_a_new_process(case: str, findings: dict[str, Any]) -> None:
    found = findings[case]
    assert "error" not in found, found["error"]
    assert not [what for what, holds in found.items() if holds is not True]


@pytest.mark.parametrize("case", CASES)
def test_bytes_on_disk_are_those_of_the_plan(case: str, saved: Path) -> None:
    name, _, scope = case.partition("@")
    plan = int8_plan(name, scope)  # type: ignore[arg-type]
    # What an int8 plan need not factorize is dense in int8, which may already be smaller than asked for.
    assert plan.ratio == pytest.approx(plan.target, rel=0.01) or (name == "mixtral" and plan.ratio > plan.target)
    assert all((entry.matrix.bits == 8) == (entry.matrix.dense is None) for entry in plan.entries)
    dense = sum(p.numel() * p.element_size() for p in MODELS[name].build().parameters())
    assert dense - stored_bytes(saved / case / "model") == plan.original.bytes - plan.compressed.bytes
    found = inventory(factorformer.load(saved / case / "model"), scope)  # type: ignore[arg-type]
    assert (found.original, found.compressed, found.rest) == (plan.original, plan.compressed, plan.rest)
    assert [(e.matrix, e.spec) for e in found.factorized] == [(e.matrix, e.spec) for e in plan.factorized]


def test_the_other_architectures_reload(tmp_path: Path) -> None:
    """In this process, where it takes a moment."""
    others = [(name, scope) for name in MODELS for scope in get_args(Scope) if f"{name}@{scope}" not in CASES]
    assert len(others) + len(CASES) == 2 * len(MODELS)
    for name, scope in others:
        model, inputs = compressed(name, scope), MODELS[name].inputs()
        model.save_pretrained(tmp_path)
        again = factorformer.load(tmp_path)
        assert torch.equal(logits(again, inputs), logits(model, inputs)), (name, scope)
        assert all(m.quantized for m in again.modules() if isinstance(m, FactorizedMatrix)), (name, scope)
        assert again.state_dict().keys() == model.state_dict().keys(), (name, scope)


def test_bytes_are_those_of_codes_and_scales_in_any_type() -> None:
    """Scales count in the type of the model."""
    model, plan = dense("bert", torch.bfloat16), int8_plan("bert", dtype=torch.bfloat16)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    factorformer.compress(model, plan)
    stored = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    stored -= sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n not in model.state_dict())
    assert before - stored == plan.original.bytes - plan.compressed.bytes


@pytest.mark.parametrize("method", ["shapeshifter", "dense_sparse_plain", "auto"])
def test_other_structures(method: str, tmp_path: Path) -> None:
    model, inputs = MODELS["bert"].build(), MODELS["bert"].inputs()
    plan = int8_plan("bert", method=method)
    report = factorformer.compress(model, plan, [{**inputs, "labels": inputs["input_ids"]}])
    assert report.ratio == plan.ratio == pytest.approx(plan.target, rel=0.01)
    model.save_pretrained(tmp_path)
    again = factorformer.load(tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert inventory(again).compressed == plan.compressed
    assert relative(logits(again.dequantize(), inputs), logits(model, inputs)) < ROUNDING


def test_int8_holds_more_in_as_many_bytes() -> None:
    errors = {}
    for int8_values in (False, True):
        model = MODELS["bert"].build()
        plan = factorformer.plan(model, "svd", ratio=4, int8=int8_values)
        errors[int8_values] = sum(factorformer.compress(model, plan).errors.values())
    assert errors[True] < 0.77 * errors[False]  # worst of three seeds 0.59, times 1.3


# Plans


def test_a_plan_survives_json(tmp_path: Path) -> None:
    plan = int8_plan("bert")
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.compressed == plan.compressed
    assert {entry.matrix.bits for entry in again.factorized} == {8}


# Ties, sharing and other heads


@pytest.mark.parametrize(("name", "share"), [("bert", "inputs"), ("albert", "inputs"), ("vit", "layers")])
def test_shared_dictionaries(name: str, share: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name].build(), MODELS[name].inputs()
    floats = copy.deepcopy(model)
    plan = sharing_plan(model, share)
    factorformer.compress(floats, plan)
    content = plan.to_dict()
    for entry in content["entries"]:
        entry["bits"] = 8 if entry["dense"] is None else None
    plan = Plan.from_dict(content)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    factorformer.compress(model, plan)
    groups = sharing(model)
    assert groups == sharing(floats)
    assert relative(logits(model, inputs), logits(floats, inputs)) < ROUNDING
    model.save_pretrained(tmp_path / "model")
    assert dense - stored_bytes(tmp_path / "model") == plan.original.bytes - plan.compressed.bytes
    for options in ({}, {"device_map": "cpu"}):
        again = MODELS[name].auto.from_pretrained(tmp_path / "model", **options)
        assert sharing(again) == groups
        for names in groups:
            scales = {id(again.get_submodule(layer).dictionary_scale) for layer in names}
            assert len(scales) == 1
        assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert inventory(again).compressed == plan.compressed
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()
    model.tie_weights()
    assert sharing(model) == groups


def test_another_head(tmp_path: Path) -> None:
    model, inputs = compressed("roberta"), MODELS["roberta"].inputs()
    model.save_pretrained(tmp_path / "model")
    base = tf.AutoModel.from_pretrained(tmp_path / "model")
    with torch.inference_mode():
        expected = model.base_model(**inputs).last_hidden_state
        assert torch.equal(base(**inputs).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    for folder in ("model", "base"):
        other = tf.AutoModelForTokenClassification.from_pretrained(tmp_path / folder, num_labels=7).eval()
        assert {layer.quantized for layer in factorized(other).values()} == {True}
        with torch.inference_mode():
            assert torch.equal(other.base_model(**inputs).last_hidden_state, expected)


def test_a_head_that_a_base_model_is_tied_to(tmp_path: Path) -> None:
    model, inputs = compressed("llama-tied", "all"), MODELS["llama-tied"].inputs()
    model.save_pretrained(tmp_path / "model")
    tf.AutoModel.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "base")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert isinstance(head, FactorizedMatrix)
    assert isinstance(embedding, FactorizedMatrix)
    assert all(head.factors[name] is tensor for name, tensor in embedding.factors.items())
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_a_new_head_learns_on_an_int8_encoder(tmp_path: Path) -> None:
    compressed("roberta").save_pretrained(tmp_path / "model")
    model = factorformer.load(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(FactorformerWarning, match="hold_floats"):
        trained = trainer(model, tmp_path / "run", 2)
    trained.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    held = {f"{name}.{factor}" for name, layer in factorized(model).items() for factor in layer.factors}
    assert not changed & held
    assert "classifier.dense.weight" in changed
    again = factorformer.load(tmp_path / "run" / "checkpoint-2")
    inputs = MODELS["roberta"].inputs()
    assert torch.equal(logits(again, inputs), logits(model.eval(), inputs))


# Damage


def edit(folder: Path, tensors: Callable[[dict[str, Tensor]], object], config: Callable[[Any], object]) -> None:
    values, described = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    tensors(values)
    config(described["quantization_config"]["layers"])
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.weight_scale"), id, rf"missing: {QUERY}\.weight_scale"),
        (lambda t: t.pop(f"{QUERY}.right"), id, rf"missing: {QUERY}\.right"),
        (lambda t: t.update({f"{QUERY}.right_scale": torch.ones(99)}), id, rf"misshapen: {QUERY}\.right_scale"),
        (lambda t: t.update({f"{QUERY}.weight": t[f"{QUERY}.weight"].float()}), id, rf"'{QUERY}\.weight' is stored as"),
        (lambda t: t.update({f"{QUERY}.weight": t[f"{QUERY}.weight"].int()}), id, rf"'{QUERY}\.weight' is stored as"),
        (
            lambda t: t.update({f"{QUERY}.weight_scale": t[f"{QUERY}.weight_scale"].int()}),
            id,
            rf"'{QUERY}\.weight_scale' is stored as",
        ),
        (id, lambda layers: layers[QUERY].update(values="int2"), rf"'{QUERY}'.*'int2'"),
        (id, lambda layers: layers[QUERY].update(values=["int8"]), rf"'{QUERY}'.*\['int8'\]"),
        (id, lambda layers: layers[QUERY].pop("values"), rf"unexpected: {QUERY}\.right_scale"),
    ],
)
def test_a_damaged_checkpoint_names_the_layer(
    tensors: Callable[..., object], config: Callable[..., object], message: str, saved: Path, tmp_path: Path
) -> None:
    for file in (saved / "bert@blocks" / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, tensors, config)
    for loader in (factorformer.load, tf.AutoModelForMaskedLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            loader(tmp_path)


# Training


def loss_of(model: tf.PreTrainedModel, inputs: Inputs) -> Tensor:
    return model(**inputs, labels=inputs["input_ids"]).loss


def learn(model: tf.PreTrainedModel, inputs: Inputs, steps: int = 10, after: Callable[..., object] = id) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    for step in range(steps):
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step + 1)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "scope"), [("bert", "all"), ("gpt2", "blocks"), ("llama-tied", "all")])
def test_what_is_trained_is_what_is_stored(name: str, scope: Scope, tmp_path: Path) -> None:
    model, inputs = compressed(name, scope, hold_floats=True), MODELS[name].inputs()
    assert all(layer.fake_quantized and not layer.quantized for layer in factorized(model).values())
    assert {layer["values"] for layer in describe(model).layers.values()} == {"fake_int8"}
    losses = learn(model, inputs)
    assert losses[-1] < 0.9 * losses[0]
    exact = copy.deepcopy(model).double()
    trained, last = logits(model, inputs), logits(exact, inputs)
    quantize(model)
    assert all(layer.quantized for layer in factorized(model).values())
    assert relative(logits(model, inputs), trained) < ROUNDING
    quantize(exact)  # with exact products, nothing is left of that
    torch.testing.assert_close(logits(exact, inputs), last, rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(factorformer.load(tmp_path), inputs), logits(model, inputs))
    assert inventory(model, scope).compressed == int8_plan(name, scope).compressed
    before = model.state_dict()
    quantize(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_trainer_saves_floats_on_the_way(tmp_path: Path) -> None:
    whole, start = compressed("roberta", "all", hold_floats=True), MODELS["roberta"].inputs()
    trainer(whole, tmp_path / "run", 2).train()
    middle = factorformer.load(tmp_path / "run" / "checkpoint-1")
    assert all(layer.fake_quantized and not layer.quantized for layer in factorized(middle).values())
    assert {t.dtype for layer in factorized(middle).values() for t in layer.factors.values()} == {torch.float32}
    resumed = compressed("roberta", "all", hold_floats=True)
    trainer(resumed, tmp_path / "run", 2).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for model in (whole, resumed):
        quantize(model)
        with pytest.warns(FactorformerWarning, match="hold_floats"):
            trained = trainer(model.eval(), tmp_path / "other", 1)
        trained.save_model(str(tmp_path / "final"))
        assert torch.equal(logits(factorformer.load(tmp_path / "final"), start), logits(model, start))
    assert relative(logits(resumed, start), logits(whole, start)) < 1e-3


def test_training_from_scratch() -> None:
    model, inputs = MODELS["bert"].build(), MODELS["bert"].inputs()
    plan = int8_plan("bert", "all", "shapeshifter")
    factorformer.initialize(model, plan)
    assert all(layer.fake_quantized for layer in factorized(model).values())
    losses = learn(model, inputs)
    trained = logits(model, inputs)
    quantize(model)
    assert losses[-1] < 0.9 * losses[0]
    assert relative(logits(model, inputs), trained) < ROUNDING
    assert inventory(model, "all").compressed == plan.compressed


@pytest.mark.parametrize("method", ["rankdyna", "dynamic_kronecker", "dynamic_dense_sparse"])
def test_dynamic_ranks_end_in_the_bytes_of_the_plan(method: str, tmp_path: Path) -> None:
    model, inputs = MODELS["bert"].build(), MODELS["bert"].inputs()
    plan = factorformer.plan(model, method, ratio=6, int8=True)
    calibration = [{**inputs, "labels": inputs["input_ids"]}]
    settings = DynamicRankSettings(warmup=0.1, final=0.3, interval=1, importance_interval=1)
    ranks = DynamicRank(model, plan, calibration, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(10):
        loss_of(model, inputs).backward()
        ranks.before_step(step, 10)
        optimizer.step()
        ranks.after_step(step + 1, 10, optimizer)
        optimizer.zero_grad()
    ranks.finish(optimizer)
    assert all(layer.fake_quantized for layer in factorized(model).values())
    trained = logits(model, inputs)
    quantize(model)
    assert relative(logits(model, inputs), trained) < ROUNDING
    found = inventory(model)
    assert found.compressed.bytes <= plan.compressed.bytes
    assert found.ratio == pytest.approx(6, rel=0.02)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(factorformer.load(tmp_path), inputs), logits(model, inputs))


def test_straight_through(tmp_path: Path) -> None:
    model, inputs = MODELS["bert"].build(), MODELS["bert"].inputs()
    plan = sharing_plan(model, None)
    content = plan.to_dict()
    for entry in content["entries"]:
        entry["bits"] = 8 if entry["dense"] is None else None
    factorformer.compress(model, Plan.from_dict(content), hold_floats=True)
    straight = StraightThrough(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=rf"'{QUERY}'.*finish\(\)"):
        quantize(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    losses = learn(model, inputs, after=lambda step: straight.after_step(step, 10))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "middle")
    assert not any(layer.quantized for layer in factorized(factorformer.load(tmp_path / "middle")).values())
    straight.finish()
    trained = logits(model, inputs)
    quantize(model)
    assert relative(logits(model, inputs), trained) < ROUNDING
    model.save_pretrained(tmp_path / "final")
    assert torch.equal(logits(factorformer.load(tmp_path / "final"), inputs), logits(model, inputs))


def test_layers_that_are_done_cannot_train_straight_through() -> None:
    with pytest.raises(ModelError, match="integers only when training is over"):
        StraightThrough(compressed())


def test_int8_layers_are_named_in_the_description() -> None:
    model = compressed("bert", "all")
    layers = describe(model).layers
    assert {layer["values"] for layer in layers.values()} == {"int8"}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedMatrix):
            assert integers.is_stored(module.factors), name


def test_a_model_in_int8_is_trained_as_floats_and_stored_in_int8_again(tmp_path: Path) -> None:
    model = MODELS["bert"].build()
    factorformer.compress(model, factorformer.plan(model, "dense_sparse_plain", 6, int8=True, share="inputs"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert factorformer.hold_floats(loaded)
    assert not factorformer.hold_floats(loaded)
    factors = [m for m in loaded.modules() if isinstance(m, FactorizedMatrix)]
    shared = {id(m.dictionary) for m in factors}
    assert len(shared) < len(factors)
    stored = logits(model, MODELS["bert"].inputs())
    assert relative(logits(loaded, MODELS["bert"].inputs()), stored) < ROUNDING
    optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1)
    before = factors[0].weight.detach().clone()
    loaded(**MODELS["bert"].inputs()).logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(factors[0].weight, before)
    expected = logits(loaded, MODELS["bert"].inputs())
    quantize(loaded)
    assert {m.dictionary.dtype for m in factors} == {torch.int8}
    assert len({id(m.dictionary) for m in factors}) == len(shared)
    assert relative(logits(loaded, MODELS["bert"].inputs()), expected) < ROUNDING


def test_factors_that_are_not_finite_are_not_stored() -> None:
    model = MODELS["bert"].build()
    factorformer.compress(model, factorformer.plan(model, "svd", 6, int8=True), hold_floats=True)
    layer = model.get_submodule(QUERY)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=f"'{QUERY}'.*not finite"):
        quantize(model)
    assert not layer.quantized
