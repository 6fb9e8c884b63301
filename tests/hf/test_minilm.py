"""The real all-MiniLM-L6-v2 at half of its bytes keeps its embeddings, if it is compressed on text."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
import transformers as tf

import factorformer
from factorformer.fitting import fit
from factorformer.fitting.linalg import leading_singular_vectors
from factorformer.structures import DenseSparse
from factorformer.tasks.data import Columns, batches, encode, read, sample
from factorformer.tasks.evaluation import compare_embeddings, embed

pytestmark = pytest.mark.real

Questions = tuple[tf.PreTrainedTokenizerBase, datasets.Dataset, datasets.Dataset, torch.Tensor]
"""A tokenizer, rows to calibrate and to measure on, and the original's embeddings of the latter."""


@pytest.fixture(scope="module")
def questions(minilm: Path, data: Path) -> Questions:
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm)
    columns = Columns(("text",))
    train = encode(tokenizer, sample(read(data / "banking77" / "train.tsv"), 300), columns, max_length=64)
    test = encode(tokenizer, sample(read(data / "banking77" / "test.tsv"), 100), columns, max_length=64)
    original = embed(tf.AutoModel.from_pretrained(minilm), tokenizer, test)
    return tokenizer, train, test, original


def test_calibration_keeps_what_the_plain_fit_loses(minilm: Path, questions: Questions, tmp_path: Path) -> None:
    tokenizer, train, test, original = questions
    found = {}
    for method in ("svd", "whitened"):
        model = tf.AutoModel.from_pretrained(minilm).eval()
        plan = factorformer.plan(model, method, ratio=2)
        assert plan.ratio == pytest.approx(2, rel=0.01)
        assert len(plan.factorized) == 36
        calibration = batches(tokenizer, train) if method == "whitened" else None
        report = factorformer.compress(model, plan, calibration)
        assert max(report.errors.values()) < (0.7 if method == "svd" else 0.5)
        compressed = embed(model, tokenizer, test)
        found[method] = compare_embeddings(original, compressed)
    model.save_pretrained(tmp_path / "whitened")
    assert torch.equal(embed(factorformer.load(tmp_path / "whitened"), tokenizer, test), compressed)
    assert found["svd"]["embedding_cosine"] < 0.6
    assert found["whitened"]["embedding_cosine"] >= 0.82
    assert found["whitened"]["similarity_spearman"] > found["svd"]["similarity_spearman"] + 0.2


def test_a_dictionary_loses_less_than_low_rank(minilm: Path, questions: Questions, tmp_path: Path) -> None:
    tokenizer, train, test, original = questions
    lost = {}
    for method in ("whitened", "cospadi"):
        model = tf.AutoModel.from_pretrained(minilm).eval()
        # One block of six at half of its bytes.
        plan = factorformer.plan(model, method, ratio=12 / 11, include=["encoder.layer.2.*"])
        assert len(plan.factorized) == 6
        factorformer.compress(model, plan, batches(tokenizer, train))
        compressed = embed(model, tokenizer, test)
        lost[method] = 1 - compare_embeddings(original, compressed)["embedding_cosine"]
    assert all("left the least error" in entry.reason for entry in plan.factorized)
    # Measured 0.43 here and 0.56 in block 5: the worse of the two with a margin of 1.3.
    assert lost["cospadi"] < 0.73 * lost["whitened"]
    model.save_pretrained(tmp_path)
    assert torch.equal(embed(factorformer.load(tmp_path), tokenizer, test), compressed)


@pytest.mark.parametrize(("ratio", "atoms", "nonzeros", "error"), [(2.0, 384, 84, 0.25), (2.8, 288, 56, 0.38)])
def test_a_dictionary_for_a_real_matrix(minilm: Path, ratio: float, atoms: int, nonzeros: int, error: float) -> None:
    model = tf.AutoModel.from_pretrained(minilm)
    weight = model.get_submodule("encoder.layer.2.intermediate.dense").weight.detach()
    spec = DenseSparse(atoms, nonzeros)
    assert weight.numel() * 4 / spec.bytes((1536, 384)) == pytest.approx(ratio, rel=0.01)
    assert fit(weight, spec)[1] < error


def test_real_matrices_are_fitted_to_a_thousandth_of_the_optimum(minilm: Path) -> None:
    model = tf.AutoModel.from_pretrained(minilm)
    routes = set()
    for name in ("attention.self.query", "attention.output.dense", "intermediate.dense"):
        weight = model.get_submodule(f"encoder.layer.2.{name}").weight.detach()
        values = torch.linalg.svdvals(weight.double())
        for rank in (16, 96, 300):
            side, vectors, tail, route = leading_singular_vectors(weight, rank)
            work = (weight if side == "left" else weight.T).double()
            left = work - vectors.double() @ (vectors.double().T @ work)
            best = values[rank:].norm()
            assert left.norm() <= 1.001 * best
            assert tail.sqrt().item() == pytest.approx(best.item(), rel=1e-3)
            routes.add(route)
    assert "gram32" in routes  # the cheapest one serves real weights
