"""Architectures by name or file, their overrides, and the tokenizer's ids in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers as tf

import factorformer
from factorformer.errors import ModelError
from factorformer.tasks.architectures import SMALL, Architecture, Task, new_model
from factorformer.tasks.tokenization import train_tokenizer

FAMILIES = {
    "albert": "masked",
    "bart": "translation",
    "bert": "masked",
    "distilbert": "masked",
    "gpt2": "causal",
    "llama": "causal",
    "marian": "translation",
    "modernbert": "masked",
    "opt": "causal",
    "qwen3": "causal",
    "roberta": "masked",
    "t5": "translation",
}


def tokenizer(task: Task) -> tf.PreTrainedTokenizerFast:
    return train_tokenizer(["to be, or not to be"] * 2, 268 + (task == "masked"), task=task)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_name_is_a_small_model_that_knows_its_tokenizer(name: str) -> None:
    architecture = Architecture.of(name)
    assert architecture.task == FAMILIES[name]
    words = tokenizer(architecture.task)
    config = architecture.for_tokenizer(words)
    model = new_model(config, architecture.task)
    assert model.num_parameters() < 8e6
    assert model.get_input_embeddings().num_embeddings == len(words) == config.vocab_size
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, words.bos_token_id)
    assert getattr(config, "forced_eos_token_id", None) is None
    if architecture.task == "translation":
        assert config.decoder_start_token_id == 0
    defaults = type(config)()
    assert config.tie_word_embeddings == defaults.tie_word_embeddings
    for field, size in SMALL.items():
        if isinstance(getattr(defaults, field, None), int) and hasattr(config, field):
            assert getattr(config, field) <= max(size, getattr(defaults, field))


def test_overrides_have_the_types_of_their_fields() -> None:
    overrides = ["hidden_size=64", "resid_pdrop=0", "activation_function=relu", "n_inner=null", "use_cache=False"]
    config = Architecture.of("gpt2", [*overrides, "initializer_range=1"]).build({})
    assert (config.n_embd, config.activation_function, config.n_inner, config.use_cache) == (64, "relu", None, False)
    assert isinstance(config.initializer_range, float)


def test_a_decoder_made_of_an_encoder() -> None:
    assert Architecture.of("bert", ["is_decoder=true"]).task == "causal"


def test_a_file_or_directory_keeps_its_sizes(tmp_path: Path) -> None:
    model = tf.BertForSequenceClassification(
        tf.BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, num_labels=5)
    )
    factorformer.compress(model, factorformer.plan(model, "svd", 2))
    model.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        config = Architecture.of(str(source), ["num_hidden_layers=2"]).for_tokenizer(tokenizer("masked"))
        assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 96, 2)
        assert config.vocab_size == 268 + 1
        assert not hasattr(config, "quantization_config")
        assert config.num_labels == 2
        assert config.architectures is None


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("berd", [], "'berd'.*'bert'"),
        ("vit", [], "'vit'.*text.*bert, gpt2"),
        ("trocr", [], "'trocr'.*text"),
        ("gemma3", [], "'gemma3'.*several"),
        ("somebody/nothing", [], "'somebody/nothing'.*huggingface"),
        ("nothing.json", [], r"'nothing\.json'"),
        ("bert", ["hiden_size=4"], "BertConfig.*'hiden_size'.*'hidden_size'"),
        ("bert", ["qqqq=4"], "BertConfig.*'qqqq'.*documentation"),
        ("bert", ["hidden_size"], "FIELD=VALUE.*'hidden_size'"),
        ("bert", ["hidden_size=big"], "--set hidden_size=big: "),
        ("bert", ["vocab_size=9"], "'vocab_size'.*tokenizer"),
        ("marian", ["pad_token_id=9"], "'pad_token_id'.*tokenizer"),
        ("llama", ["hidden_size=30"], r"LlamaConfig.*hidden size \(30\)"),
    ],
)
def test_what_is_refused(source: str, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=message):
        Architecture.of(source, overrides)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content in (["bert"], {"model_type": "bird"}, {}):
        file.write_text(json.dumps(content))
        with pytest.raises(ModelError, match=r"configuration.*config\.json"):
            Architecture.of(str(file))


def test_sizes_that_only_the_layers_refuse() -> None:
    architecture = Architecture.of("marian", ["d_model=250"])
    with pytest.raises(ModelError, match=r"MarianConfig.*embed_dim"):
        new_model(architecture.for_tokenizer(tokenizer("translation")), "translation")


def test_new_models_are_drawn_from_the_seed() -> None:
    architecture = Architecture.of("gpt2", ["n_embd=32", "n_layer=1"])
    config = architecture.for_tokenizer(tokenizer("causal"))
    first, same, other = (new_model(config, "causal", seed).transformer.wte.weight for seed in (1, 1, 2))
    assert first.equal(same)
    assert not first.equal(other)


def test_layers_are_tried_before_any_long_work() -> None:
    for source, override in (("gpt2", "n_head=7"), ("bert", "num_attention_heads=5")):
        with pytest.raises(ModelError, match=r"no model can be made"):
            Architecture.of(source, [override]).check(300)
    for source in ("gpt2", "bert", "marian", "t5", "llama", "bart"):
        Architecture.of(source).check(300)
    with pytest.raises(ModelError, match=r"n_layer=-1.*GPT2Config\.n_layer"):
        Architecture.of("gpt2", ["n_layer=-1"])
