"""Whatever `save_pretrained` writes can be loaded, by whomever the layers or the configuration were made."""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path

import pytest
import torch
import transformers as tf
from huggingface_hub import metadata_load
from safetensors import safe_open
from tests.tiny import MODELS, logits

import factorformer
from factorformer.errors import FactorformerWarning, ModelError
from factorformer.hf.description import has_factors
from factorformer.layers.matrix import Scope
from factorformer.layers.nn import FactorizedMatrix

BERT = MODELS["bert"]


def compressed(name: str = "bert", scope: Scope = "blocks") -> tf.PreTrainedModel:
    model = MODELS[name].build()
    factorformer.compress(model, factorformer.plan(model, "svd", MODELS[name].ratio, scope))
    return model


def described(folder: Path) -> bool:
    return "quantization_config" in json.loads((folder / "config.json").read_text())


def test_models_that_share_a_configuration(tmp_path: Path) -> None:
    config = BERT.build().config
    one, other = tf.BertForMaskedLM(config).eval(), tf.BertForMaskedLM(config).eval()
    factorformer.compress(one, factorformer.plan(one, "svd", 2))
    assert one.config is not config
    assert len({id(m.config) for m in one.modules() if hasattr(m, "config")}) == 1
    for name, model in (("one", one), ("other", other)):
        model.save_pretrained(tmp_path / name)
        assert described(tmp_path / name) == (model is one)
        again = tf.BertForMaskedLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(again, BERT.inputs()), logits(model, BERT.inputs()))


def test_a_dense_model_of_a_compressed_configuration(tmp_path: Path) -> None:
    small = compressed()
    small.save_pretrained(tmp_path / "small")
    for config in (small.config, tf.AutoConfig.from_pretrained(tmp_path / "small")):
        model = tf.AutoModelForMaskedLM.from_config(config).eval()
        model.save_pretrained(tmp_path / "new")
        assert not described(tmp_path / "new")
        again = factorformer.load(tmp_path / "new")
        assert torch.equal(logits(again, BERT.inputs()), logits(model, BERT.inputs()))
        assert hasattr(config, "quantization_config")


def test_a_description_of_factors_that_are_not_there(tmp_path: Path) -> None:
    """So saves a process that never met a compressed model, only the configuration of one."""
    compressed().save_pretrained(tmp_path / "small")
    model = BERT.build()
    model.save_pretrained(tmp_path / "m")
    config = (tmp_path / "small" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(config)
    for load in (factorformer.load, tf.AutoModelForMaskedLM.from_pretrained):
        again = load(tmp_path / "m")
        assert torch.equal(logits(again, BERT.inputs()), logits(model, BERT.inputs()))
        assert getattr(again, "hf_quantizer", None) is None
        again.half().save_pretrained(tmp_path / "again")
        assert not described(tmp_path / "again")


def test_a_model_that_was_compressed_from_inside(tmp_path: Path) -> None:
    model = BERT.build()
    factorformer.compress(model.bert, factorformer.plan(model.bert, "svd", 2))
    model.save_pretrained(tmp_path)
    for load in (factorformer.load, tf.AutoModelForMaskedLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path), BERT.inputs()), logits(model, BERT.inputs()))


def test_a_head_follows_embeddings_that_were_compressed_from_inside(tmp_path: Path) -> None:
    model = MODELS["llama-tied"].build()
    factorformer.compress(model.model, factorformer.plan(model.model, "svd", 1.3, "all"))
    with pytest.warns(FactorformerWarning, match="'lm_head'.*tied"):
        model.save_pretrained(tmp_path)
    assert model.lm_head.right is model.model.embed_tokens.right
    inputs = MODELS["llama-tied"].inputs()
    assert torch.equal(logits(factorformer.load(tmp_path), inputs), logits(model, inputs))


def test_one_half_of_a_tie_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = MODELS["t5"].build()
    factorformer.compress(model.decoder, factorformer.plan(model.decoder, "svd", 1.3, "all"))
    with pytest.raises(ModelError, match="only one of the two"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_compressed_model_inside_of_another(tmp_path: Path) -> None:
    encoder = tf.BertModel(BERT.build().config)
    factorformer.compress(encoder, factorformer.plan(encoder, "svd", 2))
    encoder.save_pretrained(tmp_path / "encoder")
    config = copy.deepcopy(BERT.build().config)
    config.is_decoder = config.add_cross_attention = True
    tf.BertLMHeadModel(config).save_pretrained(tmp_path / "decoder")
    pair = tf.EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder").eval()
    inputs = {"input_ids": BERT.inputs()["input_ids"], "decoder_input_ids": BERT.inputs()["input_ids"]}
    pair.save_pretrained(tmp_path / "pair")
    again = tf.EncoderDecoderModel.from_pretrained(tmp_path / "pair")
    assert has_factors(again.encoder)
    assert torch.equal(logits(again, inputs), logits(pair, inputs))


def test_tensors_that_are_given_are_saved(tmp_path: Path) -> None:
    model = compressed()
    state = {name: t + 1 if name.endswith("LayerNorm.bias") else t for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    again = factorformer.load(tmp_path).bert.embeddings.LayerNorm.bias
    assert torch.equal(again, model.bert.embeddings.LayerNorm.bias + 1)
    model.save_pretrained(tmp_path)
    assert torch.equal(factorformer.load(tmp_path).bert.embeddings.LayerNorm.bias, again - 1)


def test_dequantized_models_have_the_tensor_names_of_their_architecture(tmp_path: Path) -> None:
    model = MODELS["mixtral"].build()
    model.save_pretrained(tmp_path / "before")
    compressed("mixtral").save_pretrained(tmp_path / "small")
    for small in (compressed("mixtral"), factorformer.load(tmp_path / "small")):
        small.dequantize().save_pretrained(tmp_path / "after")
        names = [
            {name for file in folder.glob("*.safetensors") for name in _names(file)}
            for folder in (tmp_path / "before", tmp_path / "after")
        ]
        assert names[0] == names[1]
        assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names[0]


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


# Casts


def test_half_and_float() -> None:
    model = compressed(scope="all")
    for cast, dtype in (("half", torch.float16), ("float", torch.float32), ("bfloat16", torch.bfloat16)):
        getattr(model, cast)()
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with pytest.raises(ValueError, match="half"):
        in_int8().half()


def in_int8() -> tf.PreTrainedModel:
    model = BERT.build()
    factorformer.compress(model, factorformer.plan(model, "svd", 8, int8=True))
    return model


# Training that ends in int8


def test_floats_that_are_rounded_come_back_as_such(tmp_path: Path) -> None:
    model = BERT.build()
    factorformer.compress(model, factorformer.plan(model, "svd", 8, int8=True), hold_floats=True)
    model.save_pretrained(tmp_path)
    for load in (factorformer.load, tf.AutoModelForMaskedLM.from_pretrained):
        again = load(tmp_path)
        assert torch.equal(logits(again, BERT.inputs()), logits(model, BERT.inputs()))
        factorformer.quantize(again)
        layers = [module for module in again.modules() if isinstance(module, FactorizedMatrix)]
        assert all(layer.quantized for layer in layers)
    base = tf.AutoModel.from_pretrained(tmp_path)
    assert all(module.fake_quantized for module in base.modules() if isinstance(module, FactorizedMatrix))
    factorformer.quantize(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(factorformer.load(tmp_path), BERT.inputs()), logits(model, BERT.inputs()))


def test_a_trainer_says_that_codes_do_not_train(tmp_path: Path) -> None:
    model = in_int8()
    arguments = tf.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.warns(FactorformerWarning, match=r"12 layers.*hold_floats") as caught:
        tf.Trainer(model, arguments)
    assert len(caught) == 1
    factorformer.hold_floats(model)
    tf.Trainer(model, arguments)
    tf.Trainer(compressed(), arguments)


# Token tables


@pytest.mark.parametrize("exclude", [None, ["model.embed_tokens"], ["lm_head"]])
def test_resizing_is_refused_before_anything_is_resized(exclude: list[str] | None, tmp_path: Path) -> None:
    model = MODELS["llama"].build()
    factorformer.compress(model, factorformer.plan(model, "svd", 1.3, "all", exclude=exclude))
    model.save_pretrained(tmp_path)
    for refusing in (model, factorformer.load(tmp_path), copy.deepcopy(model)):
        before = {name: parameter.shape for name, parameter in refusing.named_parameters()}
        with pytest.raises(ModelError, match="cannot be resized"):
            refusing.resize_token_embeddings(120)
        assert {name: parameter.shape for name, parameter in refusing.named_parameters()} == before
    model.dequantize().resize_token_embeddings(120)
    assert model.lm_head.weight.shape[0] == model.model.embed_tokens.weight.shape[0] == 120


def test_a_model_that_does_not_name_its_embeddings(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = tf.CLIPConfig(text_config={**sizes, "vocab_size": 99}, vision_config=vision, projection_dim=32)
    model = tf.CLIPModel(config).eval()
    factorformer.compress(model, factorformer.plan(model, "svd", 1.5))
    model.save_pretrained(tmp_path)
    again = factorformer.load(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


# The card


def test_what_goes_to_the_hub_has_our_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers writes one of its own over it, unless the repository has one."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub

    sent: dict[str, str] = {}

    class Hub:
        """What `push_to_hub` asks of it."""

        def create_repo(self, name: str, **_: Any) -> Any:
            """The repository."""
            return types.SimpleNamespace(repo_id=name)

        def create_commit(self, operations: Any, **_: Any) -> str:
            """Keep the files."""
            found = {each.path_in_repo: Path(each.path_or_fileobj) for each in operations}
            sent.update({name: file.read_text() for name, file in found.items() if file.suffix in (".md", ".json")})
            return "url"

    there: list[str] = []

    def load(*_: Any, **__: Any) -> ModelCard:
        if there:
            return ModelCard(there[0])
        raise EntryNotFoundError("no card")

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub.ModelCard, "load", load)
    model = BERT.build()
    factorformer.compress(model, factorformer.plan(model, "svd", 2))
    model.push_to_hub("me/small")
    assert "import factorformer" in sent["README.md"]
    model.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "README.md").write_text("what compress said")
    (tmp_path / "small" / "factorformer.json").write_text("{}")
    again = factorformer.load(tmp_path / "small")
    again.push_to_hub("me/small")
    assert (sent["README.md"], sent["factorformer.json"]) == ("what compress said", "{}")
    there.append("---\nlicense: mit\n---\nmine")
    again.push_to_hub("me/small")
    assert "mine" in sent["README.md"]
    dense = BERT.build()
    there.clear()
    dense.push_to_hub("me/dense")
    assert "automatically generated" in sent["README.md"]


def test_a_card_says_how_to_load_the_model(tmp_path: Path) -> None:
    source = tmp_path / "source"
    BERT.build().save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: who/else\n---\n# A model\n")
    model = factorformer.load(source)
    factorformer.compress(model, factorformer.plan(model, "svd", 2))
    model.save_pretrained(tmp_path / "small")
    card = tmp_path / "small" / "README.md"
    assert metadata_load(card) == {
        "library_name": "transformers",
        "tags": ["factorformer"],
        "base_model": "who/else",
        "license": "mit",
        "pipeline_tag": "fill-mask",
    }
    assert (tmp_path / "small" / "README.original.md").read_text().endswith("# A model\n")
    assert "import factorformer" in card.read_text()
    assert "BertForMaskedLM" in card.read_text()
    assert str(tmp_path) not in card.read_text()
    card.write_text("mine")
    model.save_pretrained(tmp_path / "small")
    assert card.read_text() == "mine"
    model.config.name_or_path = "org/name"
    model.save_pretrained(tmp_path / "named")
    assert (metadata_load(tmp_path / "named" / "README.md") or {})["base_model"] == "org/name"
    model.dequantize().save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / "README.md").exists()
