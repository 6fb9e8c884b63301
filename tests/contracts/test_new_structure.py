"""Adding a structure takes the places that CONTRIBUTING.md names, and nothing else has to know of it."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from tests.contracts.integers import IntegersContract
from tests.contracts.structure import Case, KindContract, StructureContract, never_dense  # noqa: F401
from tests.contracts.toy import ScaledLowRank, fit_scaled_low_rank
from tests.tiny import MODELS

import factorformer
from factorformer.fitting import FITTERS
from factorformer.layers.nn import FactorizedMatrix
from factorformer.recipes import RECIPES, Recipe
from factorformer.report import inventory
from factorformer.structures import STRUCTURES
from factorformer.training.dynamic_rank import DynamicRank, DynamicRankSettings

SOURCE = Path(factorformer.__file__).parent


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRUCTURES, ScaledLowRank.kind, ScaledLowRank)
    monkeypatch.setitem(FITTERS, ScaledLowRank, fit_scaled_low_rank)
    for name, allocation in (("toy", "uniform"), ("dynamic_toy", "dynamic")):
        recipe = Recipe(ScaledLowRank, "input_moment", allocation, "fine-tune", "", "")  # type: ignore[arg-type]
        monkeypatch.setitem(RECIPES, name, recipe)


@pytest.mark.parametrize("case", [Case(ScaledLowRank(3), (24, 16)), Case(ScaledLowRank(5), (16, 40))], ids=str)
class TestToy(StructureContract):
    pass


@pytest.mark.parametrize("case", [Case(ScaledLowRank(3), (24, 16))], ids=str)
class TestToyInInt8(IntegersContract):
    pass


@pytest.mark.parametrize("case", [Case(ScaledLowRank(3), (24, 16))], ids=str)
class TestToyInInt4(IntegersContract):
    bits = 4


@pytest.mark.parametrize("structure", [ScaledLowRank])
class TestToyKind(KindContract):
    pass


@pytest.mark.parametrize("method", ["toy", "auto"])
def test_plan_compress_save_and_load(method: str, tmp_path: Path) -> None:
    """The planner by loss measures its errors too, for nothing says what they are."""
    model, batch = MODELS["bert"].build(), MODELS["bert"].inputs()
    plan = factorformer.plan(model, method, 2, calibration=[batch] if method == "auto" else None)
    path = tmp_path / "plan.json"
    plan.save(path)
    plan = factorformer.Plan.load(path)
    if method == "toy":
        assert {type(entry.spec) for entry in plan.factorized} == {ScaledLowRank}
    report = factorformer.compress(model, plan, [batch])
    assert report.ratio == pytest.approx(2, rel=0.02)
    model.save_pretrained(tmp_path / "model")
    loaded = factorformer.load(tmp_path / "model").eval()
    assert inventory(loaded).ratio == pytest.approx(report.ratio)
    with torch.no_grad():
        assert torch.equal(loaded(**batch)[0], model.eval()(**batch)[0])


def test_int8_and_dynamic_ranks(tmp_path: Path) -> None:
    batch = MODELS["bert"].inputs()
    model = MODELS["bert"].build()
    plan = factorformer.plan(model, "toy", 6, int8=True)
    factorformer.compress(model, plan, [batch])
    model.save_pretrained(tmp_path)
    loaded = factorformer.load(tmp_path).eval()
    assert all(m.quantized for m in loaded.modules() if isinstance(m, FactorizedMatrix))
    with torch.no_grad():
        assert torch.equal(loaded(**batch)[0], model.eval()(**batch)[0])

    model = MODELS["bert"].build()
    plan = factorformer.plan(model, "dynamic_toy", 2)
    ranks = DynamicRank(model, plan, [batch], DynamicRankSettings(0.1, 0.3, interval=1, importance_interval=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for done in range(4):
        model(**batch)[0].square().mean().backward()
        ranks.before_step(done, 4)
        optimizer.step()
        optimizer.zero_grad()
        ranks.after_step(done + 1, 4, optimizer)
    ranks.finish(optimizer)
    assert inventory(model).ratio == pytest.approx(plan.ratio, rel=0.03)


def test_export_in_operators_of_onnx() -> None:
    from factorformer.export.lowering import freeze

    model, batch = MODELS["bert"].build(), MODELS["bert"].inputs()
    factorformer.compress(model, factorformer.plan(model, "toy", 2), [batch])
    frozen = copy.deepcopy(model).eval()
    freeze(frozen, quantized=False)
    with torch.no_grad():
        torch.testing.assert_close(frozen(**batch)[0], model.eval()(**batch)[0])


def test_nothing_below_structures_asks_which_one_it_is() -> None:
    """Neither by class nor by name; an assertion of the one class that a function is for is no question."""
    names = {structure.__name__ for structure in STRUCTURES.values()}
    kinds = set(STRUCTURES) - {ScaledLowRank.kind}
    asked = []
    for file in sorted(SOURCE.rglob("*.py")):
        if file.parent.name == "structures":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        asserted = {id(n) for a in ast.walk(tree) if isinstance(a, ast.Assert) for n in ast.walk(a)}
        for node in ast.walk(tree):
            if id(node) in asserted:
                continue
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & names
            elif isinstance(node, ast.Compare):
                used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & names
                used |= {
                    n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                } & kinds
            else:
                continue
            if used:
                asked.append(f"{file.relative_to(SOURCE)}:{node.lineno}: {ast.unparse(node)}")
    assert not asked
