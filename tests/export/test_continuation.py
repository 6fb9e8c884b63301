"""Causal language models as files that keep what they have read: the same tokens as in torch, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tests.conftest import ROOT
from tests.export.once import translate_once
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import factorformer
from factorformer.errors import ExportError
from factorformer.export import onnx, openvino

WORDS = 60
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.3, "eos_token_id": None}
KINDS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "mistral": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**SIZES | {"num_hidden_layers": 1}, num_key_value_heads=2, sliding_window=8)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=WORDS,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            init_std=0.3,
            eos_token_id=None,
        )
    ),
}
ALONE = """
import runpy, sys
sys.modules["torch"] = sys.modules["factorformer"] = sys.modules["transformers"] = None
from pathlib import Path
made = runpy.run_path(sys.argv[1])
print(made["generate"](Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
"""


def compressed(kind: str, **options: object) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    factorformer.compress(model, factorformer.plan(model, "svd", **{"ratio": 1.5, **options}))
    return model


@pytest.fixture(scope="module")
def tokenizer() -> tf.PreTrainedTokenizerBase:
    words = Tokenizer(WordLevel({f"w{place}": place for place in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")


@pytest.fixture(scope="module")
def llama(tokenizer: tf.PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One in floats, and with products in integers, from one translation."""
    model, folder = compressed("llama"), tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        translate_once(patch)
        return {
            name: onnx.export(model, folder / name, tokenizer=tokenizer, int8=name == "rounded")
            for name in ("rounded", "floats")
        }


@pytest.mark.parametrize("kind", KINDS)
def test_64_tokens_are_the_same_without_torch(
    kind: str, llama: dict[str, Any], tokenizer: tf.PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = compressed(kind)
    done = llama["floats"] if kind == "llama" else onnx.export(model, tmp_path / "out", tokenizer=tokenizer)
    assert done.output == "logits"
    assert done.deviation < 1e-5
    assert done.inputs[:2] == ("input_ids", "attention_mask")
    last = model.config.num_hidden_layers - 1
    assert [n for n in done.inputs if n.startswith("past")][-1] == f"past_key_values.{last}.value"
    text = "w5 w9 w31 w7"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = model.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1] :].tolist()
    assert len(set(expected)) > 3  # and not one token again and again
    command = [sys.executable, "-c", ALONE, ROOT / "examples" / "generate_onnx.py", done.path, text, "64"]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == expected


def test_integers(llama: dict[str, Any], tokenizer: tf.PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Of factors that are stored in them, and of products."""
    stored = onnx.export(compressed("llama", ratio=6, int8=True), tmp_path / "stored", tokenizer=tokenizer)
    assert stored.deviation < 1e-5
    assert llama["rounded"].cosine is not None
    assert llama["rounded"].cosine > 0.99


def test_a_file_is_timed(llama: dict[str, Any]) -> None:
    from factorformer.bench.candidates import load, parse
    from factorformer.bench.comparison import Shape, compare

    candidate = parse(str(llama["floats"].path))
    runner = load(candidate, 1, torch.device("cpu"))
    (found,) = compare([candidate], [runner], [Shape(2, 8)], rounds=1)
    assert found.timings[0].milliseconds.median > 0


def test_what_cannot_go_on_with_texts_is_refused(tmp_path: Path) -> None:
    gemma = tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8))
    mamba = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=1))
    for model, said in ((gemma, "softcap"), (mamba, "keys and values")):
        with pytest.raises(ExportError, match=said):
            onnx.export(model.eval(), tmp_path / "out")
    with pytest.raises(ExportError, match="LlamaForCausalLM goes on with texts: export it to ONNX"):
        openvino.export(compressed("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
