"""Models that accelerate has divided among devices (`device_map`) are compressed where they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import dispatch_model

import factorformer
from factorformer.errors import BudgetError
from factorformer.layers.nn import FactorizedLinear

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def decoder() -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=99)).eval()


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")  # for "cpu" is in the map
@pytest.mark.parametrize("method", ["svd", "fisher"])
@pytest.mark.parametrize("scope", ["blocks", "all"])
def test_a_divided_model_is_compressed_as_a_whole_one(method: str, scope: Any, tmp_path: Path) -> None:
    whole = decoder()
    divided = dispatch_model(copy.deepcopy(whole), dict.fromkeys(PARTS, "cpu"), main_device="cpu", force_hooks=True)
    assert "forward" in vars(divided.model.layers[1].mlp.up_proj)  # accelerate has a part in its calls
    batches = [{"input_ids": torch.randint(99, (2, 16))} for _ in range(4)]
    given = None if method == "svd" else batches
    for model in (whole, divided):
        factorformer.compress(model, factorformer.plan(model, method, 2, scope, calibration=given), given)
    layers = [m for m in divided.modules() if isinstance(m, FactorizedLinear)]
    assert len(layers) == len([m for m in whole.modules() if isinstance(m, FactorizedLinear)]) > 0
    assert all("forward" in vars(layer) for layer in layers)
    with torch.inference_mode():
        expected, found = (model(**batches[0]).logits for model in (whole, divided))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        divided.save_pretrained(tmp_path / "small")
        torch.testing.assert_close(factorformer.load(tmp_path / "small")(**batches[0]).logits, found)


def test_what_is_offloaded_is_refused_by_name(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path / "dense")
    places = {**dict.fromkeys(PARTS, "cpu"), "model.layers.0": "disk", "model.layers.1": "disk"}
    model = tf.LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    with pytest.raises(BudgetError, match=r"offloaded by device_map.*--stream"):
        factorformer.plan(model, "svd", 2)
