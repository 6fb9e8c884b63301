"""Low rank as plain layers: loads where this package cannot be imported, and computes the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tests.fresh import Interpreter
from tests.tiny import MODELS, logits

import factorformer
from factorformer.errors import CheckpointError, ExportError, OutputError
from factorformer.export import linear
from factorformer.structures import Dense

BEFORE = """
import sys
sys.modules["factorformer"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GPT2LMHeadModel, RobertaModel
"""
ALONE = """
path, auto, inputs, out = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(path, trust_remote_code=True).eval()
assert not any(p.is_meta for p in model.parameters())
with torch.inference_mode():
    save_file({"output": model(**load_file(inputs))[0].contiguous()}, out)
print(type(model).__name__)
"""


def compressed(name: str, **options: object) -> tf.PreTrainedModel:
    model = MODELS[name].build()
    factorformer.compress(model, factorformer.plan(model, "svd", **{"ratio": 2, **options}))
    return model.eval()


Alone = Callable[[Path, str, dict[str, torch.Tensor]], tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """The class, and what it makes of inputs, in a process that cannot import this package."""
    folder = tmp_path_factory.mktemp("alone")
    given, made = folder / "given.safetensors", folder / "made.safetensors"
    with Interpreter(BEFORE, HF_MODULES_CACHE=str(folder / "modules"), HF_HUB_OFFLINE="1") as interpreter:

        def run(path: Path, auto: str, inputs: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
            save_file(inputs, given)
            done = interpreter.run(BEFORE + ALONE, path, auto, given, made)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout.strip(), load_file(made)["output"]

        yield run


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_it_loads_without_the_package(name: str, tmp_path: Path, alone: Alone) -> None:
    model, inputs = compressed(name), MODELS[name].inputs()
    expected = logits(model, inputs)
    done = linear.export(model, tmp_path / "plain")
    assert done.deviation < 1e-5
    assert torch.equal(logits(model, inputs), expected)  # it is left as it is
    kind, found = alone(tmp_path / "plain", MODELS[name].auto.__name__, inputs)
    assert kind == f"LowRank{type(model).__name__}"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert sum(t.nbytes for t in stored.values()) < 1.02 * sum(p.nbytes for p in model.parameters())
    assert any(key.endswith(".0.weight") for key in stored)


def test_the_part_without_a_head(tmp_path: Path, alone: Alone) -> None:
    model, inputs = compressed("roberta"), MODELS["roberta"].inputs()
    linear.export(model, tmp_path / "plain")
    kind, found = alone(tmp_path / "plain", "AutoModel", inputs)
    assert kind == "LowRankRobertaModel"
    with torch.inference_mode():
        expected = model.roberta(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_integers_and_tables_become_floats(tmp_path: Path, alone: Alone) -> None:
    model, inputs = compressed("roberta", scope="all", int8=True, ratio=5), MODELS["roberta"].inputs()
    expected = logits(model, inputs)
    linear.export(model, tmp_path / "plain")
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    _, found = alone(tmp_path / "plain", MODELS["roberta"].auto.__name__, inputs)
    error = (found - expected).norm() / expected.norm()  # the model rounds what it multiplies, too
    assert error < 0.05


def test_dense_matrices_in_integers_become_plain_layers(tmp_path: Path, alone: Alone) -> None:
    model, inputs = MODELS["gpt2"].build(), MODELS["gpt2"].inputs()
    dense = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
    plan = factorformer.plan(model, "svd", ratio=5, int8=True)
    entries = [
        dataclasses.replace(entry, spec=Dense()) if entry.matrix.name in dense else entry for entry in plan.entries
    ]
    factorformer.compress(model, dataclasses.replace(plan, entries=tuple(entries)))
    expected = logits(model.eval(), inputs)
    linear.export(model, tmp_path / "plain")
    _, found = alone(tmp_path / "plain", MODELS["gpt2"].auto.__name__, inputs)
    assert (found - expected).norm() / expected.norm() < 0.05


def test_nothing_takes_it_for_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its code the weights would not fit, and others be drawn in their place."""
    linear.export(compressed("roberta"), tmp_path / "plain")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with pytest.raises(ValueError, match="trust_remote_code"):
        MODELS["roberta"].auto.from_pretrained(tmp_path / "plain", trust_remote_code=False)
    with pytest.raises(CheckpointError, match=r"LowRankRoberta.*--trust-remote-code"):
        factorformer.load(tmp_path / "plain")


def test_what_does_not_load_again_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SOURCE", "raise KeyError('gone')\n" + linear.SOURCE)
    with pytest.raises(ExportError, match=r"LowRankRoberta.* does not load: .*gone"):
        linear.export(compressed("roberta"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_not_of_low_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has no layer of low rank"):
        linear.export(MODELS["bert"].build(), tmp_path / "plain")
    model = MODELS["bert"].build()
    factorformer.compress(model, factorformer.plan(model, "dense_sparse_plain", ratio=2))
    with pytest.raises(ExportError, match=r"'bert\.encoder.*' is stored as .*dequantize"):
        linear.export(model, tmp_path / "plain")
    tied = compressed("bert", scope="all")
    with pytest.raises(ExportError, match=r"'bert\.embeddings.*' is in factors, and tied to another layer"):
        linear.export(tied, tmp_path / "plain")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "mine").touch()
    with pytest.raises(OutputError, match="plain"):
        linear.export(compressed("bert"), tmp_path / "plain")
    assert [file.name for file in (tmp_path / "plain").iterdir()] == ["mine"]
