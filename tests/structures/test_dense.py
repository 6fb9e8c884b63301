"""Dense matrices in int8: multiplied as other factors, saved, loaded, held as floats, and no candidate in floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.contracts.integers import IntegersContract
from tests.contracts.structure import Case
from tests.tiny import MODELS, logits

import factorformer
from factorformer.errors import MethodError, ModelError
from factorformer.fitting import Metric, fit
from factorformer.fitting.matrices import fit_matrix
from factorformer.kernels import cpu
from factorformer.layers.matrix import Cost, Matrix
from factorformer.layers.nn import FactorizedLinear
from factorformer.planning import Entry, Plan
from factorformer.report import inventory
from factorformer.structures import Dense, from_dict
from factorformer.structures.integers import Bits
from factorformer.training.dynamic_rank import DynamicRank
from factorformer.training.straight_through import StraightThrough

CASES = [Case(Dense(), shape) for shape in [(24, 16), (16, 40), (5, 7)]]


@pytest.mark.parametrize("case", CASES, ids=str)
class TestInt8(IntegersContract):
    test_nothing_densifies = None  # it is dense


@pytest.mark.parametrize("case", CASES, ids=str)
class TestInt4(IntegersContract):
    bits = 4
    test_nothing_densifies = None


def test_bytes_are_codes_and_scales() -> None:
    assert Dense().bytes((768, 384), torch.int8) == 768 * 384 + 4 * 768
    assert list(Dense.candidates((768, 384), torch.float32)) == []
    assert list(Dense.candidates((768, 384), torch.int8)) == [Dense()]
    assert from_dict(Dense().to_dict()) == Dense()


def test_it_has_one_size() -> None:
    layer = FactorizedLinear(Dense(), (8, 6))
    with pytest.raises(ModelError, match="one"):
        Dense().with_units(2)
    layer.keep(Dense().select(layer.factors, torch.arange(1), Dense()))
    assert layer.spec == Dense()


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_its_error_is_that_of_rounding(bits: Bits) -> None:
    model, root = torch.nn.Sequential(torch.nn.Linear(30, 40)), torch.randn(30, 30, dtype=torch.float64).tril()
    for metric in (Metric(), Metric(None, root)):
        factors, error = fit_matrix(model, Matrix("0", (40, 30), bits=bits), Dense(), metric)
        layer = FactorizedLinear(Dense(), (40, 30), factors)
        layer.fake_quantize(bits)
        assert error == pytest.approx(
            metric.relative_error(model[0].weight.detach(), layer.to_dense().detach()), rel=1e-5
        )
        low, high = {8: (0, 0.02), 4: (0.02, 0.2), 3: (0.05, 0.5)}[bits]
        assert low < error < high
    with pytest.raises(ModelError, match="NaN"):
        fit(torch.full((4, 4), torch.nan), Dense())


def test_the_compiled_kernels_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.variant() is None:
        pytest.skip("needs the compiled kernels")
    layer, x = FactorizedLinear(Dense(), (64, 48)), torch.randn(40, 48)
    layer.quantize()
    calls: list[int] = []
    chain = cpu.chain
    monkeypatch.setattr(cpu, "chain", lambda *args: calls.append(1) or chain(*args))
    with torch.inference_mode():
        layer(x)
    assert calls


def test_a_plan_in_floats_has_none() -> None:
    with pytest.raises(MethodError, match=r"'m'.* integers"):
        Plan("svd", "blocks", 2, (Entry(Matrix("m", (64, 32)), Dense(), ""),), Cost())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "t5"])
def test_models_are_saved_loaded_trained_and_made_dense_again(name: str, tmp_path: Path) -> None:
    model, inputs = MODELS[name].build(), MODELS[name].inputs()
    before = logits(model, inputs)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    plan = factorformer.plan(model, "svd", 3, scope="all", int8=True)
    assert {str(entry.spec) for entry in plan.entries if entry.matrix.dense is None} == {"dense"}
    report = factorformer.compress(model, plan)
    assert 0 < max(report.errors.values()) < 0.02
    assert float((logits(model, inputs) - before).norm() / before.norm()) < 0.05
    model.save_pretrained(tmp_path)
    stored = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "model.safetensors").values())
    assert dense - stored == plan.original.bytes - plan.compressed.bytes
    again = MODELS[name].auto.from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert inventory(again, "all").compressed == plan.compressed
    assert factorformer.hold_floats(again)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"]).contiguous()
    again(**inputs, labels=labels).loss.backward()
    layer = next(m for m in again.modules() if isinstance(m, FactorizedLinear))
    assert layer.get_parameter("weight").grad is not None
    factorformer.quantize(again)
    now = logits(model, inputs)
    assert float((logits(again, inputs) - now).norm() / now.norm()) < 1e-2
    plain = factorformer.load(tmp_path).dequantize()
    assert float((logits(plain, inputs) - before).norm() / before.norm()) < 0.05


def test_dynamic_ranks_leave_it_whole() -> None:
    inputs = MODELS["bert"].inputs()
    labelled = {**inputs, "labels": inputs["input_ids"]}
    model = MODELS["bert"].build().train()
    plan = factorformer.plan(model, "rankdyna_plain", 3, int8=True, calibration=[inputs])
    training = DynamicRank(model, plan, [inputs])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(3):
        model(**labelled).loss.backward()
        training.before_step(step, 3)
        optimizer.step()
        training.after_step(step + 1, 3, optimizer)
    training.finish()
    factorformer.quantize(model)
    found = inventory(model)
    assert {entry.form for entry in found.factorized} == {"dense, int8"}
    assert found.compressed == plan.compressed


def test_it_has_no_support_to_learn_straight_through() -> None:
    model = MODELS["bert"].build()
    plan = factorformer.plan(model, "dsformer", 3, int8=True, calibration=[MODELS["bert"].inputs()])
    factorformer.compress(model, plan, [MODELS["bert"].inputs()], hold_floats=True)
    with pytest.raises(ModelError, match="support"):
        StraightThrough(model)
