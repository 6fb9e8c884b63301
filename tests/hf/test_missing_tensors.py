"""No tensor can be absent from a checkpoint without an error: nothing ever loads as random numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file
from tests.tiny import MODELS

import factorformer
from factorformer.errors import CheckpointError


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_missed(name: str, tmp_path: Path) -> None:
    """Of the tensors that differ by their block alone, one is tried: in either scope, if it is outside the blocks."""
    tiny = MODELS[name]
    tried = set()
    for scope in ("blocks", "all"):
        model = tiny.build()
        if name == "whisper":  # of hundreds of tensors: what one of several blocks misses, the others show
            config = {**model.config.to_dict(), "encoder_layers": 1, "decoder_layers": 1, "num_hidden_layers": 1}
            model = type(model)(type(model.config).from_dict(config))
        ratio = tiny.ratio if scope == "blocks" else 1.02 if name == "mixtral" else 1.3
        factorformer.compress(model, factorformer.plan(model, "svd", ratio, scope))
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        inside = f"{model.base_model_prefix}."
        for absent in reversed(tensors):
            kind = re.sub(r"\.\d+\.", ".*.", absent, count=1)
            if kind in tried:
                continue
            if kind != absent:
                tried.add(kind)
            rest = {key: value for key, value in tensors.items() if key != absent}
            save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(CheckpointError, match="missing"):
                tiny.auto.from_pretrained(tmp_path)
            if absent.startswith(inside) and "pooler." not in absent:
                with pytest.raises(CheckpointError, match="missing"):
                    transformers.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "other"),
    [("llama", "AutoModelForQuestionAnswering"), ("t5", "T5Stack"), ("whisper", "WhisperEncoder")],
)
def test_a_class_that_shares_no_names_is_refused(name: str, other: str, tmp_path: Path) -> None:
    model = MODELS[name].build()
    factorformer.compress(model, factorformer.plan(model, "svd", MODELS[name].ratio))
    model.save_pretrained(tmp_path)
    if hasattr(transformers, other):
        wanted = getattr(transformers, other)
    else:
        wanted = next(type(m) for m in model.modules() if type(m).__name__ == other)
    with pytest.raises(CheckpointError, match=r"none of the|missing"):
        wanted.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "opt"])
def test_a_new_head_follows_the_factorized_embeddings_it_is_tied_to(name: str, tmp_path: Path) -> None:
    model = transformers.AutoModel.from_config(MODELS[name].build().config)
    factorformer.compress(model, factorformer.plan(model, "svd", 1.3, "all"))
    model.save_pretrained(tmp_path)
    loaded = MODELS[name].auto.from_pretrained(tmp_path)
    head, words = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.weight is words.weight
    assert head.right is words.right
