"""Blocks that share their matrices: planned once, trained as one, saved once, and loaded as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from tests.hf.test_int8 import stored_bytes
from tests.tiny import MODELS, logits

import factorformer
from factorformer.errors import MethodError
from factorformer.layers.quantization import hold_floats, quantize
from factorformer.layers.tying import tie_layers
from factorformer.report import inventory


def bert(layers: int = 4) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
    return tf.BertForMaskedLM(tf.BertConfig(**sizes, num_hidden_layers=layers)).eval()


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_matrices_are_stored_once(width: str, tmp_path: Path) -> None:
    model, inputs = bert(), MODELS["bert"].inputs()
    before = inventory(model, "all").original
    mean = torch.stack([layer.output.dense.weight for layer in model.bert.encoder.layer[:2]]).mean(0)
    bias = model.bert.encoder.layer[1].output.dense.bias.clone()
    tie_layers(model, 2)
    first, second, third = (model.bert.encoder.layer[place].output.dense for place in (0, 1, 2))
    assert second.weight is first.weight
    assert third.weight is not first.weight
    torch.testing.assert_close(first.weight, mean)
    assert torch.equal(second.bias, bias)
    plan = factorformer.plan(model, "svd", 12, scope="all", before=before, **{width: True})
    assert plan.ratio == pytest.approx(12, rel=0.02)
    assert plan.original == before
    assert sum(bool(entry.matrix.aliases) for entry in plan.entries) >= 12
    factorformer.compress(model, plan, hold_floats=True)
    inner = [layer.output.dense for layer in model.bert.encoder.layer]
    assert inner[0].weight is inner[1].weight
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    quantize(model)
    model.save_pretrained(tmp_path)
    assert stored_bytes(tmp_path) == plan.compressed.bytes
    for again in (factorformer.load(tmp_path), tf.AutoModelForMaskedLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(again, inputs), logits(model, inputs))
        loaded = [layer.output.dense for layer in again.bert.encoder.layer]
        assert loaded[0].weight is loaded[1].weight
        assert loaded[0].weight is not loaded[2].weight
        assert inventory(again, "all").compressed == plan.compressed
    hold_floats(again)
    assert loaded[0].weight is loaded[1].weight
    again.save_pretrained(tmp_path / "held")
    held = factorformer.load(tmp_path / "held")
    torch.testing.assert_close(logits(held, inputs), logits(again, inputs))


def test_numbers_that_share_nothing_are_refused() -> None:
    for unique in (0, 4, 5):
        with pytest.raises(MethodError, match=rf"fewer than the 4 of 'bert.encoder.layer'; got {unique}"):
            tie_layers(bert(), unique)
