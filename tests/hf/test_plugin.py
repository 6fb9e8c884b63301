"""A compressed model is an ordinary Hugging Face model: it trains, generates, casts and shares as others do."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.tiny import MODELS, logits

import factorformer
from factorformer.errors import CheckpointError
from factorformer.hf.config import FORMAT, METHOD, SHORT, FactorformerConfig
from factorformer.hf.description import describe
from factorformer.layers.matrix import Scope
from factorformer.layers.nn import FactorizedEmbedding, FactorizedLinear, FactorizedMatrix
from factorformer.structures import LowRank


def compressed(name: str, scope: Scope = "all") -> tf.PreTrainedModel:
    model = MODELS[name].build()
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=MODELS[name].ratio, scope=scope))
    return model


def factorized(model: torch.nn.Module) -> dict[str, FactorizedMatrix]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorizedMatrix)}


# Configuration


def test_description_survives_json() -> None:
    model = compressed("t5")
    config = describe(model)
    again = FactorformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.layers == config.layers
    assert again.format == FORMAT
    assert config.to_dict()["quant_method"] == METHOD
    # Every matrix is described once, whatever the number of modules that hold it.
    described = [name for name, layer in config.layers.items() for name in (name, *layer.get("tied", ()))]
    assert sorted(described) == sorted(factorized(model))
    assert set(config.layers["shared"]["tied"]) >= {"lm_head"}


def test_description_of_a_layer() -> None:
    config = FactorformerConfig({"layer": {"shape": [12, 18], "structure": "low_rank", "rank": 3}})
    assert config.structure("layer") == (LowRank(3), (12, 18))
    with pytest.raises(CheckpointError, match=r"'layer' wrongly.*dense"):
        FactorformerConfig({"layer": {"shape": [2, 2], "structure": "low_rank", "rank": 3}}).structure("layer")


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1}.*format {FORMAT}"):
        FactorformerConfig(format=FORMAT + 1)
    layer = {"shape": [8, 8], "structure": "low_rank", "rank": 2}
    for values in ("int8", "fake_int8", None):  # stored as ever
        assert FactorformerConfig({"a": {**layer, "values": values}}, format=FORMAT - 1).format == FORMAT
    for values in ("int4", "fake_int3"):
        with pytest.raises(CheckpointError, match=r"4 or 3 bits; compress the original again"):
            FactorformerConfig({"a": {**layer, "values": values}}, format=FORMAT - 1)


def test_a_shrunk_layer_is_saved_as_it_is(tmp_path: Path) -> None:
    model = compressed("bert")
    name, layer = next(iter(factorized(model).items()))
    layer.keep(layer.spec.select(layer.factors, torch.tensor([0]), LowRank(1)))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"][name]["rank"] == 1
    again = factorformer.load(tmp_path)
    assert factorized(again)[name].spec == LowRank(1)
    assert torch.equal(logits(again, MODELS["bert"].inputs()), logits(model, MODELS["bert"].inputs()))


# Other models


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    model = MODELS["bert"].build()
    model.save_pretrained(tmp_path)
    for again in (tf.AutoModelForMaskedLM.from_pretrained(tmp_path), factorformer.load(tmp_path)):
        assert not factorized(again)
        assert getattr(again, "hf_quantizer", None) is None
        assert torch.equal(logits(again, MODELS["bert"].inputs()), logits(model, MODELS["bert"].inputs()))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_compressing_one_model_does_not_touch_another() -> None:
    one, other = MODELS["llama-tied"].build(), MODELS["llama-tied"].build()
    keys = type(other)._tied_weights_keys
    before = copy.deepcopy(keys)
    factorformer.compress(one, factorformer.plan(one, "svd", ratio=2, scope="all"))
    assert type(other)._tied_weights_keys is keys
    assert keys == before
    assert not hasattr(other.config, "quantization_config")
    assert other.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


# Precision and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "vit"])
def test_to(name: str, dtype: torch.dtype) -> None:
    model, inputs = compressed(name), MODELS[name].inputs()
    expected = logits(model, inputs)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    assert (logits(model, inputs).float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"dtype": torch.bfloat16}])
def test_memory_is_that_of_the_factors(options: dict, tmp_path: Path) -> None:
    model = compressed("bert")
    model.save_pretrained(tmp_path)
    again = factorformer.load(tmp_path, **options)
    itemsize = 2 if options.get("dtype") else 4
    assert sum(p.untyped_storage().nbytes() for p in again.parameters()) == itemsize * model.num_parameters()
    assert {p.device.type for p in again.parameters()} == {"cpu"}


def test_a_state_dict_loads_without_files(tmp_path: Path) -> None:
    model, inputs = compressed("bert"), MODELS["bert"].inputs()
    model.save_pretrained(tmp_path)
    state, config = load_file(tmp_path / "model.safetensors"), tf.AutoConfig.from_pretrained(tmp_path)
    again = tf.BertForMaskedLM.from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    del state["bert.encoder.layer.0.attention.self.query.right"]
    with pytest.raises(CheckpointError, match=r"query\.right' was not loaded"):
        tf.BertForMaskedLM.from_pretrained(None, config=config, state_dict=state)


# Ties


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "opt", "llama-tied", "t5", "whisper", "modernbert"])
def test_tied_layers_hold_one_parameter_and_stay_tied(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, FactorizedEmbedding)
    assert isinstance(head, FactorizedLinear)
    assert all(embedding.factors[factor] is tensor for factor, tensor in head.factors.items())
    model.tie_weights()
    assert all(embedding.factors[factor] is tensor for factor, tensor in head.factors.items())
    model.save_pretrained(tmp_path)
    again = factorformer.load(tmp_path)
    for factor, tensor in again.get_input_embeddings().factors.items():
        assert tensor is again.get_output_embeddings().factors[factor]
        assert torch.equal(tensor, embedding.factors[factor])
    assert again.num_parameters() == model.num_parameters()


def test_untied_layers_stay_untied(tmp_path: Path) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path)
    again = factorformer.load(tmp_path)
    assert again.get_input_embeddings().weight is not again.get_output_embeddings().weight
    assert not torch.equal(again.get_input_embeddings().weight, again.get_output_embeddings().weight)


# Copies and dequantization


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_deep_copies(name: str, tmp_path: Path) -> None:
    model, inputs = compressed(name), MODELS[name].inputs()
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, inputs), logits(model, inputs))
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(factorformer.load(tmp_path), inputs), logits(model, inputs))


@pytest.mark.parametrize("scope", ["blocks", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_dequantized_models_are_as_before_compression(name: str, scope: Scope, tmp_path: Path) -> None:
    model, inputs = compressed(name, scope), MODELS[name].inputs()
    expected = logits(model, inputs)
    dense, plain = model.dequantize(), MODELS[name].build()
    assert not factorized(dense)
    assert (logits(dense, inputs) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert {n: type(m) for n, m in dense.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert {n: p.shape for n, p in dense.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert dense.all_tied_weights_keys == plain.all_tied_weights_keys
    # And such a model can be compressed once more.
    factorformer.compress(dense, factorformer.plan(dense, "svd", ratio=MODELS[name].ratio, scope=scope))
    dense.save_pretrained(tmp_path)
    assert torch.equal(logits(factorformer.load(tmp_path), inputs), logits(dense, inputs))


def test_dequantizing_keeps_the_type(tmp_path: Path) -> None:
    saved = compressed("bert")
    saved.save_pretrained(tmp_path)  # which leaves the type of the model in its config
    loaded = factorformer.load(tmp_path)
    for model in (compressed("bert"), saved, loaded):
        assert {p.dtype for p in model.to(torch.bfloat16).dequantize().parameters()} == {torch.bfloat16}
    assert {p.dtype for p in factorformer.load(tmp_path).dequantize(torch.float16).parameters()} == {torch.float16}
    assert {p.dtype for p in factorformer.load(tmp_path).dequantize().parameters()} == {torch.float32}


# Generation and pipelines


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama", "llama-tied", "opt", "qwen3"])
def test_generation(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    inputs = {key: value[:1, :5] for key, value in MODELS[name].inputs().items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    model.save_pretrained(tmp_path)
    generated = factorformer.load(tmp_path).generate(**inputs, **options)
    assert torch.equal(generated, expected)
    uncached = factorformer.load(tmp_path).generate(**inputs, **options, use_cache=False)
    assert torch.equal(uncached, expected)


def test_pipeline(tmp_path: Path, minilm: Path) -> None:
    config = tf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=30522, num_labels=3
    )
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(config).eval()
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    model.save_pretrained(tmp_path)
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(tmp_path)
    found = tf.pipeline("text-classification", model=str(tmp_path), device="cpu")("A short text.", top_k=None)
    with torch.inference_mode():
        expected = model(**tokenizer("A short text.", return_tensors="pt")).logits.softmax(-1)[0]
    scores = {item["label"]: item["score"] for item in found}
    assert [scores[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-6)


def test_sentence_transformer(tmp_path: Path, minilm: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["Where is my card?", "How do I exchange money, and what does it cost?"]
    encoder = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    original = encoder.encode(texts)
    inner = encoder[0].auto_model if hasattr(encoder[0], "auto_model") else encoder[0].model
    factorformer.compress(inner, factorformer.plan(inner, "svd", ratio=2))
    expected = encoder.encode(texts)
    assert expected.shape == original.shape
    assert not np.allclose(expected, original, atol=1e-2)
    encoder.save_pretrained(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_array_equal(again.encode(texts), expected)
    inner = again[0].auto_model if hasattr(again[0], "auto_model") else again[0].model
    assert len(factorized(inner)) == 36


# Training


def rows() -> datasets.Dataset:
    ids = MODELS["bert"].inputs()["input_ids"].repeat(4, 1)
    return datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": [0, 1, 2, 0, 1, 2, 0, 1]}
    )


def trainer(model: tf.PreTrainedModel, folder: Path, steps: int) -> tf.Trainer:
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return tf.Trainer(model=model, args=arguments, train_dataset=rows())


@pytest.mark.parametrize("scope", ["blocks", "all"])
def test_trainer_trains_saves_and_resumes(scope: Scope, tmp_path: Path) -> None:
    compressed("roberta", scope).save_pretrained(tmp_path / "start")
    whole = factorformer.load(tmp_path / "start")
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    trainer(whole, tmp_path / "whole", 2).train()
    changed = {name for name, p in whole.named_parameters() if not torch.equal(p, before[name])}
    assert {f"{name}.{factor}" for name, layer in factorized(whole).items() for factor in layer.factors} <= changed

    trainer(factorformer.load(tmp_path / "start"), tmp_path / "parts", 1).train()
    checkpoint = tmp_path / "parts" / "checkpoint-1"
    assert (checkpoint / "model.safetensors").is_file()
    resumed = factorformer.load(checkpoint)
    assert len(factorized(resumed)) == len(factorized(whole))
    trainer(resumed, tmp_path / "parts", 2).train(resume_from_checkpoint=str(checkpoint))
    for name, parameter in resumed.named_parameters():
        torch.testing.assert_close(parameter, whole.get_parameter(name), rtol=0, atol=1e-6)
    inputs = MODELS["roberta"].inputs()
    again = factorformer.load(tmp_path / "parts" / "checkpoint-2")
    assert torch.equal(logits(again, inputs), logits(resumed.eval(), inputs))


def test_gradient_checkpointing() -> None:
    model, inputs = compressed("bert"), MODELS["bert"].inputs()
    inputs["labels"] = inputs["input_ids"]
    model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(**inputs).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_tables_that_are_not_factorized_can_be_resized(tmp_path: Path) -> None:
    dense = compressed("bert").dequantize()
    dense.resize_token_embeddings(120)
    assert dense.get_input_embeddings().num_embeddings == 120
    blocks = compressed("bert", "blocks")
    blocks.resize_token_embeddings(120)
    blocks.save_pretrained(tmp_path)
    inputs = MODELS["bert"].inputs()
    assert torch.equal(logits(factorformer.load(tmp_path), inputs), logits(blocks, inputs))


def test_a_new_model_of_the_same_config_is_dense() -> None:
    model = compressed("bert")
    assert not factorized(tf.BertForMaskedLM(model.config))


def test_forward_signature_is_untouched() -> None:
    assert inspect.signature(compressed("bert").forward) == inspect.signature(MODELS["bert"].build().forward)


# Without the package


def test_without_the_package_the_first_line_says_what_to_import(tmp_path: Path) -> None:
    model = compressed("t5")
    model.save_pretrained(tmp_path)
    code = "import sys; sys.modules['factorformer'] = None; import transformers; "
    code += f"transformers.AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "import factorformer" in done.stderr.strip().splitlines()[0], done.stderr[:1000]


def test_directories_with_the_short_name_of_the_method_load(tmp_path: Path) -> None:
    model = compressed("t5")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["quant_method"] = SHORT
    file.write_text(json.dumps(config))
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    again.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == METHOD
