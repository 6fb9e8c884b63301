"""The data choose how the bytes of a matrix are spent."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tests.tiny import MODELS, text

import factorformer
from factorformer.errors import ModelError
from factorformer.layers.matrix import Matrix
from factorformer.planning import Entry, choose_families
from factorformer.structures import DenseSparse, KroneckerSum, LowRank, Structure

SHAPE = (96, 48)


def chosen(error, entries: list[Entry] | None = None) -> dict:
    entries = entries or [Entry(Matrix(f"{i}", SHAPE), DenseSparse(24, 5), "") for i in range(5)]
    return choose_families(entries, error)


@pytest.mark.parametrize("best", [8, 20, 36, 60])
def test_the_family_of_least_error_is_found(best: int) -> None:
    asked: list[tuple[str, Structure]] = []

    def error(matrix: Matrix, spec: DenseSparse) -> float:
        asked.append((matrix.name, spec))
        return 0.1 + abs(spec.atoms - best) / 100

    entries = [Entry(Matrix(f"{i}", SHAPE), DenseSparse(24, 5), "") for i in range(5)]
    choices = choose_families(entries, error)
    assert set(choices) == {"0", "1", "2", "3", "4"}
    budget = DenseSparse(24, 5).bytes(SHAPE)
    specs = {spec for _, spec in asked}
    assert {name for name, _ in asked} == {"0", "2", "4"}  # the first, the middle and the last
    assert len(asked) == 3 * len(specs)
    assert all(spec.bytes(SHAPE) <= budget for spec in specs)
    families = [f for f in DenseSparse.families(SHAPE, torch.float32) if f[0].bytes(SHAPE) <= budget]
    nearest = min(families, key=lambda family: abs(family[0].atoms - best))
    for choice in choices.values():
        assert choice.ladder == tuple(nearest)
        assert f"of {len(specs)} such sizes tried" in choice.reason
        assert f"atoms={nearest[0].atoms}" in choice.reason


def test_what_rounding_adds_to_equal_errors_does_not_choose() -> None:
    entries = [Entry(Matrix("0", SHAPE), DenseSparse(24, 5), "")]
    ladders = set()
    for seed in range(5):
        random = torch.Generator().manual_seed(seed)
        choices = choose_families(entries, lambda *_: 0.5 + 1e-6 * float(torch.rand((), generator=random)))  # noqa: B023
        ladders.add(choices["0"].ladder)
    assert len(ladders) == 1


def test_groups_are_of_one_shape_role_type_and_size() -> None:
    asked = set()
    entries = [
        Entry(Matrix("a", SHAPE), DenseSparse(24, 5), ""),
        Entry(Matrix("b", SHAPE), DenseSparse(24, 6), ""),  # hardly larger: still like the first
        Entry(Matrix("c", SHAPE, role="attention"), DenseSparse(24, 5), ""),
        Entry(Matrix("d", SHAPE[::-1]), DenseSparse(24, 5, "columns"), ""),
        Entry(Matrix("e", SHAPE), DenseSparse(40, 12), ""),
        Entry(Matrix("f", SHAPE), None, "dense"),
        Entry(Matrix("g", SHAPE, "float16"), DenseSparse(24, 5), ""),
    ]
    choices = chosen(lambda matrix, spec: asked.add(matrix.name) or float(spec.atoms), entries)
    assert set(choices) == asked == {"a", "b", "c", "d", "e", "g"}
    assert choices["a"] is not choices["c"]
    assert choices["a"] == choices["b"]


def test_large_matrices_are_sampled_once() -> None:
    asked = set()
    entries = [Entry(Matrix(f"{i}", (4096, 512)), DenseSparse(200, 40), "") for i in range(5)]
    chosen(lambda matrix, spec: asked.add(matrix.name) or 1.0, entries)
    assert asked == {"2"}


@pytest.mark.parametrize("spec", [LowRank(4), KroneckerSum.of(SHAPE, 3)])
def test_one_family_is_no_choice(spec: Structure) -> None:
    assert len(type(spec).families(SHAPE, torch.float32)) == 1
    assert chosen(lambda *_: pytest.fail("fitted"), [Entry(Matrix("a", SHAPE), spec, "")]) == {}


@pytest.mark.parametrize("shape", [(384, 384), (96, 48), (48, 96), (32, 32), (17, 23)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_families_grow_and_stay_below_the_dense_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    families = DenseSparse.families(shape, dtype)
    numbers = [{spec.atoms for spec in family} for family in families]
    assert all(len(number) == 1 for number in numbers)
    assert sorted({min(number) for number in numbers}) == [min(number) for number in numbers]
    for family in families:
        sizes = [spec.bytes(shape, dtype) for spec in family]
        assert sizes == sorted(set(sizes))
        assert sizes[-1] < shape[0] * shape[1] * dtype.itemsize
        for spec in family:
            spec.check(shape)


def planted(atoms: int, nonzeros: int) -> tf.PreTrainedModel:
    """A model whose feed-forward matrices are combinations of so many atoms."""
    config = tf.BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192, vocab_size=99
    )
    model = tf.BertModel(config)
    for layer in model.encoder.layer:
        codes = torch.zeros(192, atoms)
        codes.scatter_(1, torch.rand(192, atoms).topk(nonzeros).indices, torch.randn(192, nonzeros))
        layer.intermediate.dense.weight.data = codes @ torch.randn(atoms, 48)
    return model


def test_weights_made_of_few_atoms_get_few() -> None:
    atoms = {}
    for planned, nonzeros in ((10, 6), (40, 3)):
        plan = factorformer.plan(planted(planned, nonzeros), "dense_sparse_plain", 2.5)
        assert plan.ratio == pytest.approx(2.5, rel=0.01)
        specs = [e.spec for e in plan.factorized if e.matrix.name.endswith("intermediate.dense")]
        atoms[planned] = {spec.atoms for spec in specs}
        assert len(atoms[planned]) == 1
    assert min(atoms[10]) < min(atoms[40])


def test_calibration_decides_in_the_metric_of_the_method() -> None:
    seen: list[str] = []
    model = MODELS["bert"].build()
    options = {"progress": lambda phase, *_: seen.append(phase)}
    plan = factorformer.plan(model, "dense_sparse", 2, calibration=[text(8)], **options)
    assert set(seen) == {"calibrate", "choose"}
    assert plan.ratio == pytest.approx(2, rel=0.01)
    factorformer.compress(model, plan, [text(8)])
    seen.clear()
    factorformer.plan(MODELS["bert"].build(), "dense_sparse", 2, **options)
    assert set(seen) == {"choose"}
    seen.clear()
    factorformer.plan(MODELS["bert"].build(), "whitened", 2, calibration=[text(8)], **options)
    assert not seen  # ranks leave nothing to choose


def test_models_without_weights_get_the_usual_sizes() -> None:
    with torch.device("meta"):
        model = MODELS["bert"].make()
    plan = factorformer.plan(model, "dense_sparse", 2)
    assert plan.ratio == pytest.approx(2, rel=0.01)
    assert not any("tried" in entry.reason for entry in plan.entries)
    assert all(
        "tried" in entry.reason for entry in factorformer.plan(MODELS["bert"].build(), "dense_sparse", 2).factorized
    )


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = MODELS["bert"].build()
    name = "bert.encoder.layer.0.intermediate.dense"
    model.get_submodule(name).weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=f"layer '{name}': .*NaN"):
        factorformer.plan(model, "dense_sparse", 2)
    model = MODELS["bert"].build()
    model.bert.encoder.layer[0].attention.self.key.weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"layers '.*query', .* share factors: .*NaN"):
        factorformer.plan(model, "dense_sparse", 2, share="inputs")
