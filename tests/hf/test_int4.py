"""Models whose factors are stored in 4 bits: planned by their bytes, saved, loaded, shared and trained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.hf.test_int8 import factorized, relative, stored_bytes
from tests.tiny import MODELS, logits, text

import factorformer
from factorformer.errors import BudgetError, MethodError, ModelError
from factorformer.fitting import rounding
from factorformer.hf.description import describe
from factorformer.layers.matrix import Cost, Matrix, Scope
from factorformer.layers.nn import FactorizedMatrix
from factorformer.layers.quantization import hold_floats, quantize
from factorformer.planning import Plan, Unit
from factorformer.planning.evidence import prediction
from factorformer.report import inventory
from factorformer.structures.integers import STEPS

LOST = 0.02
"""What products lose that read factors of 4 bits as int8."""


def int4_plan(model: tf.PreTrainedModel, ratio: float, scope: Scope = "blocks", method: str = "svd") -> Plan:
    for _ in range(3):
        try:
            return factorformer.plan(model, method, ratio=ratio, scope=scope, int4=True)
        except BudgetError as error:
            ratio = float(str(error).rsplit(" ", 1)[1])
    raise AssertionError("the ratio that the message names cannot be met either")


def compressed(ratio: float = 10, method: str = "svd", *, hold: bool = False) -> tf.PreTrainedModel:
    model = MODELS["bert"].build()
    factorformer.compress(model, int4_plan(model, ratio, method=method), hold_floats=hold)
    return model


def test_every_architecture_reloads_in_the_bytes_of_its_plan(tmp_path: Path) -> None:
    scope: Scope = "all"
    for name in MODELS:
        model, inputs = MODELS[name].build(), MODELS[name].inputs()
        dense = sum(p.numel() * p.element_size() for p in model.parameters())
        plan = int4_plan(model, 9, scope)
        factorformer.compress(model, plan)
        model.save_pretrained(tmp_path)
        assert dense - stored_bytes(tmp_path) == plan.original.bytes - plan.compressed.bytes, name
        again = factorformer.load(tmp_path)
        torch.testing.assert_close(logits(again, inputs), logits(model, inputs), rtol=0, atol=1e-6)
        assert {(m.quantized, m.bits) for m in again.modules() if isinstance(m, FactorizedMatrix)} == {(True, 4)}
        assert again.state_dict().keys() == model.state_dict().keys(), name
        found = inventory(again, scope)
        assert (found.original, found.compressed, found.rest) == (plan.original, plan.compressed, plan.rest), name


def test_four_bits_or_eight_whichever_loses_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, data = MODELS["bert"].inputs(), [text(16)]

    def planned(ratio: float) -> Plan:
        return factorformer.plan(MODELS["bert"].build(), "fisher", ratio, int4=True, calibration=data)

    mixed = planned(5)
    assert {entry.values for entry in mixed.factorized} == {"int4", "int8"}
    model = MODELS["bert"].build()
    factorformer.compress(model, mixed, data)
    model.save_pretrained(tmp_path)
    again = factorformer.load(tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert {layer["values"] for layer in describe(again).layers.values()} == {"int4", "int8"}
    assert inventory(again).compressed == mixed.compressed
    assert Plan.from_dict(mixed.to_dict()) == mixed
    # Where all fit in 8 bits they are in 8 bits.
    assert {entry.values for entry in planned(3.353).factorized} == {"int8"}
    monkeypatch.setattr(prediction, "other_width", lambda *_: None)
    narrow = planned(5)
    assert {entry.values for entry in narrow.factorized} == {"int4"}
    assert mixed.predicted is not None
    assert narrow.predicted is not None
    assert mixed.predicted < narrow.predicted


@pytest.mark.parametrize(("dtype", "most"), [("float32", 7.5), ("bfloat16", 3.7)])
def test_the_other_width_depends_on_whether_all_fits_in_four_bits(dtype: str, most: float) -> None:
    matrices = [Matrix(str(i), (768, 768), dtype=dtype, bits=4) for i in range(4)]
    stays = Matrix("stays", (768, 768), dtype=dtype, bits=4, dense="no gradient reaches it")

    def width(ratio: float, *more: Matrix, budget: Unit = "bytes") -> int | None:
        return prediction.other_width(Plan("fisher", "all", ratio, (), Cost(), budget), [*matrices, *more])

    assert (width(most), width(most + 0.1), width(most, budget="flops")) == (8, 3, None)
    assert (width(most, stays), width(1.3, stays)) == (3, 8)


def test_beyond_that_three_bits_or_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, data = MODELS["bert"].inputs(), [text(16)]
    model = MODELS["bert"].build()
    mixed = factorformer.plan(model, "fisher", 16, int4=True, calibration=data)
    assert {entry.values for entry in mixed.factorized} == {"int3", "int4"}
    assert Plan.from_dict(mixed.to_dict()) == mixed
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    factorformer.compress(model, mixed, data, hold_floats=True)
    assert {layer["values"] for layer in describe(model).layers.values()} == {"fake_int3", "fake_int4"}
    held = logits(model, inputs)
    quantize(model)
    assert relative(logits(model, inputs), held) < LOST
    model.save_pretrained(tmp_path)
    assert dense - stored_bytes(tmp_path) == mixed.original.bytes - mixed.compressed.bytes
    again = factorformer.load(tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert inventory(again).compressed == mixed.compressed
    with torch.inference_mode():
        found = torch.compile(again, backend="eager")(**inputs).logits
    torch.testing.assert_close(found, logits(model, inputs), rtol=0, atol=1e-4)
    hold_floats(again)
    assert relative(logits(again, inputs), held) < 1e-4
    monkeypatch.setattr(prediction, "other_width", lambda *_: None)
    alone = factorformer.plan(MODELS["bert"].build(), "fisher", 16, int4=True, calibration=data)
    assert {entry.values for entry in alone.factorized} == {"int4"}
    assert mixed.predicted is not None
    assert alone.predicted is not None
    assert mixed.predicted < alone.predicted


def test_plain_transformers_loads_it(tmp_path: Path) -> None:
    model, inputs = compressed(), MODELS["bert"].inputs()
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForMaskedLM.from_pretrained(tmp_path)
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(logits(other, inputs), logits(model, inputs))
    assert {layer["values"] for layer in describe(model).layers.values()} == {"int4"}
    query = "bert.encoder.layer.0.attention.self.query."
    stored = load_file(tmp_path / "model.safetensors")
    types = {name.removeprefix(query): tensor.dtype for name, tensor in stored.items() if name.startswith(query)}
    assert {name: dtype for name, dtype in types.items() if "weight" in name} == {
        "weight": torch.int8,
        "weight_exponents": torch.uint8,
        "weight_scale": torch.float32,
    }
    assert relative(logits(again.dequantize(), inputs), logits(model, inputs)) < LOST


def test_half_precision(tmp_path: Path) -> None:
    model, inputs = compressed().bfloat16(), MODELS["bert"].inputs()
    model.save_pretrained(tmp_path)
    again = factorformer.load(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    wide = factorformer.load(tmp_path, dtype=torch.float32)
    assert relative(logits(wide, inputs), logits(compressed(), inputs)) < 0.05


def test_new_codes_are_read_after_old_ones() -> None:
    """What products read is kept until other codes are loaded, or the layer is moved."""
    inputs, model, other = MODELS["bert"].inputs(), compressed(), MODELS["bert"].build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    factorformer.compress(other, int4_plan(other, 10))
    assert relative(logits(other, inputs), logits(model, inputs)) > 0.05
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model, inputs), logits(other, inputs))
    for layer in factorized(model).values():
        layer.double().float()
    assert torch.equal(logits(model, inputs), logits(other, inputs))
    layer = next(iter(factorized(model).values()))
    x = torch.randn(3, layer.shape[1])
    before = layer(x)
    with torch.no_grad():
        layer.get_parameter("right_scale").mul_(2)
    expected = 2 * (before - layer.bias) + layer.bias
    torch.testing.assert_close(layer(x), expected)
    layer.get_parameter("right_scale").data = layer.get_parameter("right_scale").data / 2
    torch.testing.assert_close(layer(x), before)


def test_a_compiled_model_is_the_model() -> None:
    model, inputs = compressed(), MODELS["bert"].inputs()
    expected = logits(model, inputs)
    with torch.inference_mode():
        found = torch.compile(model, backend="eager")(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["svd", "kronecker", "dense_sparse_plain"])
def test_training_ends_in_what_it_rounded_to(method: str, tmp_path: Path) -> None:
    model, inputs = compressed(10, method, hold=True), MODELS["bert"].inputs()
    assert all(layer.fake_quantized and layer.bits == 4 for layer in factorized(model).values())
    assert {layer["values"] for layer in describe(model).layers.values()} == {"fake_int4"}
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(8):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "middle")
    middle, trained = factorformer.load(tmp_path / "middle"), logits(model, inputs)
    assert torch.equal(logits(middle, inputs), trained)
    for ended in (model, middle):
        quantize(ended)
        assert relative(logits(ended, inputs), trained) < LOST
    model.save_pretrained(tmp_path / "final")
    again = factorformer.load(tmp_path / "final")
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    hold_floats(again)
    assert relative(logits(again, inputs), trained) < 1e-4
    quantize(again)
    assert relative(logits(again, inputs), logits(model, inputs)) < 1e-4


def test_shared_dictionaries(tmp_path: Path) -> None:
    model, inputs = MODELS["bert"].build(), MODELS["bert"].inputs()
    plan = factorformer.plan(model, "dense_sparse_plain", 9, share="inputs", int4=True)
    factorformer.compress(model, plan)
    sharing = [layer for layer in factorized(model).values() if layer.shared]
    assert sharing
    for end in ("", "_scale", "_exponents"):
        assert len({id(getattr(layer, "dictionary" + end)) for layer in sharing}) < len(sharing)
    model.save_pretrained(tmp_path)
    again = factorformer.load(tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    each = {id(tensor): tensor for tensor in again.state_dict(keep_vars=True).values()}
    assert stored_bytes(tmp_path) == sum(tensor.numel() * tensor.element_size() for tensor in each.values())
    hold_floats(again)
    assert not any("exponents" in name for name in again.state_dict())
    again.save_pretrained(tmp_path / "held")
    assert relative(logits(factorformer.load(tmp_path / "held"), inputs), logits(model, inputs)) < LOST


def test_what_shares_a_dictionary_keeps_the_codes_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of several matrices are rounded together, and stored apart: of each the largest value says the scale."""
    chosen: list[torch.Tensor] = []

    def seeing(self: rounding._Codes) -> torch.Tensor:
        found = plain(self)
        chosen.extend(part.clone() for part in found.split(list(self.parts)))
        return found

    plain = rounding._Codes.rounded
    monkeypatch.setattr(rounding._Codes, "rounded", seeing)
    model, data = MODELS["bert"].build(), [text(16)]
    with torch.no_grad():  # so that the largest steps of matrices differ
        for place, layer in enumerate(found for found in model.modules() if isinstance(found, torch.nn.Linear)):
            layer.weight.mul_(1 + place % 3)
    plan = factorformer.plan(model, "dense_sparse", 9, share="inputs", int4=True, calibration=data)
    factorformer.compress(model, plan, data, hold_floats=True)
    sharing = [layer for layer in factorized(model).values() if layer.shared]
    assert len(chosen) > len(sharing) > 0
    known = {found.shape: [] for found in chosen}
    for found in chosen:
        known[found.shape].append(found)
    for layer in sharing:
        values = layer.get_parameter("weight").detach()
        assert any(torch.equal(values, found) for found in known[values.shape])
        grouped = torch.nn.functional.pad(values, (0, -values.shape[1] % 32)).unflatten(1, (-1, 32)).abs().amax(2)
        scale = grouped.max()
        octaves = STEPS * (scale / grouped[grouped > 0]).log2()
        # The largest lie on their codes, and all others in the middle of what has their exponents.
        off = (octaves - octaves.round()).abs()
        assert float(torch.minimum(off, (off - 0.5).abs()).max()) < 0.01
        assert float((off[octaves > 0.25] - 0.5).abs().max()) < 0.01


def test_plans_say_so_and_survive_json(tmp_path: Path) -> None:
    plan = int4_plan(MODELS["bert"].build(), 4)
    assert {entry.values for entry in plan.factorized} == {"int4"}
    assert "dense, int4" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_one_width_alone() -> None:
    with pytest.raises(MethodError, match="int8 or in int4"):
        factorformer.plan(MODELS["bert"].build(), "svd", int8=True, int4=True)
    layer = next(iter(factorized(compressed()).values()))
    with pytest.raises(ModelError, match="int4 already"):
        layer.fake_quantize()


def test_plans_by_loss_count_what_rounding_costs() -> None:
    inputs, predicted = MODELS["bert"].inputs(), {}
    for width, ratio in (("int8", 4.5), ("int4", 9)):
        model = MODELS["bert"].build()
        plan = factorformer.plan(model, "fisher", ratio, calibration=[inputs], **{width: True})
        predicted[width] = plan.predicted
        assert max(factorformer.compress(model, plan, [inputs]).errors.values()) > 0
    assert predicted["int4"] > predicted["int8"] > 0
