"""What stands in a directory decides which class is loaded; the body of a model is never made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tests.tiny import MODELS
from typer.testing import CliRunner

import factorformer
from factorformer.cli.app import app
from factorformer.errors import CheckpointError, FactorformerWarning, ModelError
from factorformer.hf import layout
from factorformer.hf.source import copy_companions, find, load_model, load_tokenizer, place_of_weights
from factorformer.hf.trust import trusted, trusting

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 24,
}


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {key: value for key, value in {**config, **changes}.items() if value is not None})


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def encoder(folder: Path, **config: Any) -> tf.BertModel:
    model = tf.BertModel(tf.BertConfig(**ENCODER)).eval()
    model.save_pretrained(folder)
    edit_config(folder, **config)
    return model


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Plain directories


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["BertForMaskedLM"], "head of BertForMaskedLM"),
        (["BertForSequenceClassification"], "head of BertForSequenceClassification"),
        (None, "names no class"),
        ([], "names no class"),
        (["HF_ColBERT"], "class 'HF_ColBERT'"),
        (["Trainer"], "class 'Trainer'"),
    ],
)
def test_a_body_is_loaded_without_the_head_that_is_not_there(named: Any, said: str, tmp_path: Path) -> None:
    model = encoder(tmp_path / "m", architectures=named)
    state = torch.get_rng_state()
    with pytest.warns(FactorformerWarning, match=said) as caught:
        loaded = factorformer.load(tmp_path / "m")
    assert len(caught) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is tf.BertModel
    assert same(loaded, model)


def test_a_missing_head_is_an_error_where_it_is_asked_for(tmp_path: Path) -> None:
    encoder(tmp_path / "m", architectures=["BertForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"classifier\.bias"):
        load_model(tmp_path / "m", whole=True)


@pytest.mark.parametrize("named", ["BertForMaskedLM", "BertModel", "HF_ColBERT"])
@pytest.mark.filterwarnings("ignore::factorformer.errors.FactorformerWarning")
def test_a_missing_body_stays_an_error(named: str, tmp_path: Path) -> None:
    encoder(tmp_path / "m", architectures=[named])
    edit_tensors(tmp_path / "m", lambda tensors: tensors.pop("encoder.layer.1.output.dense.weight"))
    with pytest.raises(CheckpointError, match=r"lacks .*encoder\.layer\.1\.output\.dense\.weight"):
        factorformer.load(tmp_path / "m")


def test_of_a_missing_body_and_head_the_body_is_named(tmp_path: Path) -> None:
    model = tf.RobertaModel(tf.RobertaConfig(**ENCODER)).eval()
    model.save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", architectures=["RobertaForSequenceClassification"])
    edit_tensors(tmp_path / "m", lambda tensors: tensors.pop("encoder.layer.1.output.dense.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 .*: roberta\.encoder\.layer\.1\.output\.dense\.weight$"):
        factorformer.load(tmp_path / "m")


def test_a_misshapen_weight_is_named(tmp_path: Path) -> None:
    encoder(tmp_path / "m")
    edit_config(tmp_path / "m", vocab_size=98)
    with pytest.raises(CheckpointError, match=r"other shapes.*word_embeddings\.weight \[99, 32\]"):
        factorformer.load(tmp_path / "m")


def test_an_encoder_without_a_pooler_stays_one(tmp_path: Path) -> None:
    model = tf.BertModel(tf.BertConfig(**ENCODER), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "m")
    loaded = factorformer.load(tmp_path / "m")
    assert same(loaded, model)
    factorformer.compress(loaded, factorformer.plan(loaded, "svd", 2))
    loaded.save_pretrained(tmp_path / "small")
    for again in (factorformer.load(tmp_path / "small"), tf.AutoModel.from_pretrained(tmp_path / "small")):
        assert same(again, loaded)
        assert again.pooler is None


def test_a_pooler_without_weights_is_no_absent_one(tmp_path: Path) -> None:
    config = tf.SwinConfig(image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 2], window_size=2)
    model = tf.SwinModel(config).eval()
    factorformer.compress(model, factorformer.plan(model, "svd", 1.5))
    model.save_pretrained(tmp_path / "small")
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixels).pooler_output
    for again in (factorformer.load(tmp_path / "small"), tf.AutoModel.from_pretrained(tmp_path / "small")):
        assert torch.equal(again(pixels).pooler_output, expected)


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    encoder(tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda tensors: tensors.update({f"second.{i}": torch.zeros(2) for i in range(7)}))
    with pytest.warns(FactorformerWarning, match=r"7 tensors .*BertModel.*second\.4, \.\.\.$"):
        factorformer.load(tmp_path / "m")


@pytest.mark.parametrize(("model_type", "said"), [("nonsense", "nonsense"), (None, "model_type|model type")])
def test_an_unknown_kind_of_model(model_type: str | None, said: str, tmp_path: Path) -> None:
    encoder(tmp_path / "m", model_type=model_type)
    with pytest.raises(CheckpointError, match=said):
        factorformer.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "made-up"}, "made-up"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"bits": 4}, "unnamed"),
    ],
)
def test_weights_that_others_quantized_are_refused_by_name(description: Any, said: str, tmp_path: Path) -> None:
    encoder(tmp_path / "m", quantization_config=description)
    (tmp_path / "m" / "model.safetensors").unlink()  # before any is read
    with pytest.raises(CheckpointError, match=rf"quantized by .*{said}.*full precision"):
        factorformer.load(tmp_path / "m")


def test_no_quantization_is_none(tmp_path: Path) -> None:
    model = encoder(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    write(tmp_path / "m" / "config.json", {**config, "quantization_config": None})
    assert same(factorformer.load(tmp_path / "m"), model)


def test_weights_left_on_a_server_for_large_files_are_named(tmp_path: Path) -> None:
    encoder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for load in (factorformer.load, lambda path: find(str(path))):
        with pytest.raises(CheckpointError, match=r"model\.safetensors' is a pointer of Git LFS"):
            load(tmp_path / "m")


def test_a_folder_inside_of_a_directory(tmp_path: Path) -> None:
    model = encoder(tmp_path / "m" / "sub")
    assert same(factorformer.load(tmp_path / "m", subfolder="sub"), model)
    with pytest.raises(CheckpointError, match=r"no such model directory.*nothing"):
        factorformer.load(tmp_path / "m", subfolder="nothing")


# Directories of sentence-transformers


def modules(folder: Path, *listed: tuple[str, str]) -> None:
    kinds = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in listed]
    write(folder / "modules.json", [{"idx": i, "name": str(i), **kind} for i, kind in enumerate(kinds)])
    for kind, path in listed:
        if kind not in layout.TRANSFORMERS and path:
            write(folder / path / "config.json", {"module": kind})


@pytest.mark.parametrize("inside", ["", "0_Transformer"])
def test_a_sentence_encoder_is_its_transformer(inside: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    model = encoder(folder / inside, architectures=["BertForMaskedLM"])
    modules(folder, ("Transformer", inside), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"))
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"dense")
    (folder / inside / "vocab.txt").write_text("a\n")
    (folder / inside / "trainer_state.json").write_text("{}")
    assert find(str(folder)) == folder
    assert place_of_weights(folder) == Path(inside)
    with pytest.warns(FactorformerWarning, match="sentence encoder.*BertModel.*not as BertForMaskedLM"):
        loaded = factorformer.load(folder)
    assert same(loaded, model)
    out = tmp_path / "out"
    copy_companions(folder, out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    wanted = {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert files == wanted | {str(Path(inside, name)) for name in ("config.json", "vocab.txt")}


def test_a_router_with_one_transformer(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    model = encoder(folder / "document_0_Transformer")
    write(folder / "query_0_StaticEmbedding" / "config.json", {})
    modules(folder, ("Router", ""))
    types = {"document_0_Transformer": "x.Transformer", "query_0_StaticEmbedding": "x.StaticEmbedding"}
    write(folder / "router_config.json", {"types": types, "structure": {}, "parameters": {}})
    assert same(factorformer.load(folder), model)
    copy_companions(folder, tmp_path / "out")
    assert (tmp_path / "out" / "query_0_StaticEmbedding" / "config.json").is_file()
    assert (tmp_path / "out" / "router_config.json").is_file()
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    encoder(folder / "query_0_Transformer")
    types = {"document_0_Transformer": "x.Transformer", "query_0_Transformer": "x.Transformer"}
    write(folder / "router_config.json", {"types": types, "structure": {}, "parameters": {}})
    with pytest.raises(CheckpointError, match=r"several Transformers.*document_0_Transformer.*query_0_Transformer"):
        find(str(folder))


def test_a_task_with_a_head_keeps_it(tmp_path: Path) -> None:
    model = MODELS["bert"].build()
    model.save_pretrained(tmp_path / "m")
    modules(tmp_path / "m", ("Transformer", ""), ("SpladePooling", "1_SpladePooling"))
    write(tmp_path / "m" / "sentence_bert_config.json", {"transformer_task": "fill-mask"})
    assert type(factorformer.load(tmp_path / "m")) is tf.BertForMaskedLM
    write(tmp_path / "m" / "sentence_bert_config.json", {})
    # Files of the masked language model have no pooler.
    with pytest.warns(FactorformerWarning, match="sentence encoder"), pytest.warns(match=r"left out: cls\.predictions"):
        loaded = factorformer.load(tmp_path / "m")
    assert type(loaded) is tf.BertModel
    assert loaded.pooler is None


def test_an_encoder_of_an_encoder_decoder(tmp_path: Path) -> None:
    config = tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99)
    model = tf.T5EncoderModel(config).eval()
    model.save_pretrained(tmp_path / "m")
    modules(tmp_path / "m", ("Transformer", ""), ("Pooling", "1_Pooling"))
    assert same(factorformer.load(tmp_path / "m"), model)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "x.StaticEmbedding", "path": "0_StaticEmbedding"}], "no Transformer.*StaticEmbedding"),
        ([{"type": "x.Transformer", "path": "0_Transformer"}], r"0_Transformer'.*config\.json"),
        ([{"type": "x.Transformer", "path": "../m"}], "outside"),
        ([{"type": "x.Transformer"}], r"modules\.json.*type and a path"),
        ({"a": 1}, r"modules\.json.*type and a path"),
    ],
)
def test_modules_that_cannot_be_read(content: Any, said: str, tmp_path: Path) -> None:
    write(tmp_path / "modules.json", content)
    with pytest.raises(CheckpointError, match=said):
        find(str(tmp_path))


def test_the_command_line_compresses_a_nested_transformer(tmp_path: Path, tokenizer: Any) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder, out = tmp_path / "m", tmp_path / "out"
    encoder(folder / "0_Transformer", architectures=["BertForMaskedLM"])
    tokenizer.save_pretrained(folder / "0_Transformer")
    modules(folder, ("Transformer", "0_Transformer"), ("Pooling", "1_Pooling"))
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    done = CliRunner().invoke(app, ["compress", str(folder), str(out), "--ratio", "2"])
    assert done.exit_code == 0, done.output
    assert done.stderr.count("note: ") == 1
    assert (out / "0_Transformer" / "model.safetensors").is_file()
    assert not (out / "model.safetensors").exists()
    again = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    assert again.encode(["w1 w2"]).shape == (1, 32)
    inner = again[0].auto_model if hasattr(again[0], "auto_model") else again[0].model
    assert same(inner, factorformer.load(out))


# What is no model


def test_an_adapter_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / "adapter_config.json", {"base_model_name_or_path": "who/else"})
    for load in (factorformer.load, lambda path: find(str(path))):
        with pytest.raises(CheckpointError, match=r"PEFT adapter of 'who/else'.*merge"):
            load(tmp_path)


def test_images_and_sound_are_not_calibrated_by_text(tmp_path: Path) -> None:
    for name, reads in (("vit", "images"), ("whisper", "sound")):
        MODELS[name].build().save_pretrained(tmp_path / name)
        with pytest.raises(ModelError, match=f"reads {reads}.*Python"):
            load_tokenizer(tmp_path / name)


def test_messages_of_tokenizers_are_not_cut_at_a_line(tmp_path: Path) -> None:
    MODELS["llama"].build().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert not str(caught.value).rstrip().endswith(":")


# Models with code of their own

OWN = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, hidden_size=32, **options):
        super().__init__(**options)
        self.hidden_size = hidden_size

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up, self.down = nn.Linear(config.hidden_size, 64), nn.Linear(64, config.hidden_size)
    def forward(self, x):
        return x + self.down(self.up(x).relu())

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(99, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(2))
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def forward(self, input_ids=None, **options):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutput(last_hidden_state=x)
"""


def test_own_code_is_executed_if_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(OWN)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    write(folder / "config.json", {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto_map})
    config = tf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    made = tf.AutoModel.from_config(config, trust_remote_code=True).eval()
    save_file(made.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"OwnModel.*--trust-remote-code"):
        factorformer.load(folder)
    model = factorformer.load(folder, trust_remote_code=True)
    assert same(model, made)
    factorformer.compress(model, factorformer.plan(model, "svd", 1.5))
    model.save_pretrained(tmp_path / "small")
    assert same(factorformer.load(tmp_path / "small", trust_remote_code=True), model)
    refused = CliRunner().invoke(app, ["inspect", str(tmp_path / "small")])
    assert refused.exit_code == 2
    assert "--trust-remote-code" in refused.stderr
    for command in (["inspect", "small"], ["compress", "m", "out", "--ratio=1.5"]):
        paths = [str(tmp_path / word) if word in ("small", "m", "out") else word for word in command]
        done = CliRunner().invoke(app, [*paths, "--trust-remote-code"])
        assert done.exit_code == 0, done.output
        assert not trusted()
    assert (tmp_path / "out" / "modeling_own.py").is_file()
    with trusting(True):
        assert same(load_model(tmp_path / "out"), factorformer.load(tmp_path / "out"))
