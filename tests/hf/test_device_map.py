"""Models that accelerate has divided among devices (`device_map`) are compressed where they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import dispatch_model
from torch import nn

import factorformer
from factorformer.errors import ModelError
from factorformer.layers._compat import undivided
from factorformer.layers.nn import FactorizedLinear

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def decoder(**options: Any) -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=99, **options)).eval()


def falcon() -> Any:
    """Its linear layers are of a class of its own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    return tf.FalconForCausalLM(tf.FalconConfig(**sizes)).eval()


def divide(model: Any) -> Any:
    """A copy with a device for each part, all of which are the same one."""
    places = dict.fromkeys(
        [*(f"{model.base_model_prefix}.{n}" for n, _ in model.base_model.named_children()), "lm_head"], "cpu"
    )
    return dispatch_model(copy.deepcopy(model), places, main_device="cpu", force_hooks=True)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")  # for "cpu" is in the map
@pytest.mark.parametrize("method", ["svd", "fisher"])
@pytest.mark.parametrize(
    ("make", "scope"),
    [(decoder, "blocks"), (decoder, "all"), (lambda: decoder(tie_word_embeddings=True), "all"), (falcon, "blocks")],
    ids=["blocks", "all", "tied", "falcon"],
)
def test_a_divided_model_is_compressed_as_a_whole_one(
    make: Callable[[], Any], scope: Any, method: str, tmp_path: Path
) -> None:
    whole = make()
    divided = divide(whole)
    assert any("forward" in vars(m) for m in divided.modules() if isinstance(m, nn.Linear))  # accelerate's
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
    alone = undivided(divided)
    assert not any("forward" in vars(module) and "_hf_hook" in vars(module) for module in alone.modules())
    alone.to(torch.float64)
    assert {p.dtype for p in divided.parameters()} == {torch.float32}  # its own `to` would have moved the original


def test_what_is_offloaded_is_refused_by_name(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path / "dense")
    places = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}
    model = tf.LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    with pytest.raises(ModelError, match=r"'model\.layers\.1\..*offloaded.*--stream"):
        factorformer.plan(model, "svd", 2)
