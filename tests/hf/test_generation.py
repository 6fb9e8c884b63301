"""Compressed decoders generate what they did before they were saved, with every cache that a CPU has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import MODELS

import factorformer

CACHES = ("dynamic", "static", None)
DECODERS = ("gpt2", "llama", "llama-tied", "qwen3", "opt", "mixtral")


@pytest.mark.parametrize("name", [name for name in DECODERS if name in MODELS])
def test_generation_after_reload(name: str, tmp_path: Path) -> None:
    model = MODELS[name].build().eval()
    plan = factorformer.plan(model, "svd", ratio=MODELS[name].ratio)
    factorformer.compress(model, plan)
    model.save_pretrained(tmp_path)
    again = factorformer.load(tmp_path)
    prompts = MODELS[name].inputs()["input_ids"][:2, :5]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = []
    for each in (model, again):
        for cache in CACHES:
            how = {"use_cache": False} if cache is None else {"cache_implementation": cache}
            found.append(each.generate(prompts, attention_mask=torch.ones_like(prompts), **settings, **how))
    assert found[0].shape == (2, 11)
    assert all(torch.equal(tokens, found[0]) for tokens in found)
