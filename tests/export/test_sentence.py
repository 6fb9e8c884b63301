"""Sentence encoders put out what SentenceTransformer does, whatever follows the Transformer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from factorformer.errors import CheckpointError, ExportError
from factorformer.export.onnx import export
from factorformer.export.sentence import Layout, Normalize, Pooling, Projection, read_layout, read_longest, read_writing

TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}
LSTM = {"type": "sentence_transformers.models.LSTM", "path": "2_LSTM"}
DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}


def layout(path: Path, modules: Any, config: dict[str, Any]) -> Path:
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ("cls", "max")),
        ({"embedding_dimension": 8, "pooling_mode": "mean_sqrt_len_tokens"}, ("mean_sqrt_len_tokens",)),
        ({"pooling_mode": ["cls", "mean"]}, ("cls", "mean")),
    ],
)
def test_pooling_in_both_notations(tmp_path: Path, config: dict[str, Any], modes: tuple[str, ...]) -> None:
    found = read_layout(layout(tmp_path, [TRANSFORMER, POOLING, NORMALIZE], config))
    assert found.transformer == tmp_path
    assert found.pooling is not None
    assert found.pooling.modes == modes
    assert [type(module) for module in found.pooling.after] == [Normalize]


def test_no_normalization_and_no_modules(tmp_path: Path) -> None:
    assert read_layout(tmp_path) == Layout(tmp_path, tmp_path, None)
    assert read_longest(tmp_path) is None
    found = read_layout(layout(tmp_path, [TRANSFORMER, POOLING], {"pooling_mode": "cls"}))
    assert found.pooling == Pooling(("cls",))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    assert read_longest(tmp_path) == 24


def test_pooling_of_a_layout_takes_16_bits_and_passes_gradients(tmp_path: Path) -> None:
    folder = layout(tmp_path, [TRANSFORMER, POOLING, DENSE], {"pooling_mode": "mean"}) / "2_Dense"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"in_features": 4, "out_features": 3}))
    torch.save({"linear.weight": torch.randn(3, 4), "linear.bias": torch.zeros(3)}, folder / "pytorch_model.bin")
    found = read_layout(tmp_path)
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    expected = found.pool(hidden, mask)
    assert expected.shape == (2, 3)
    assert torch.allclose(found.pool(hidden.bfloat16(), mask), expected, atol=0.03)
    expected.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert found.pooling is not None
    assert not any(parameter.requires_grad for module in found.pooling.after for parameter in module.parameters())


@pytest.mark.parametrize(
    ("modules", "config", "message"),
    [
        ([TRANSFORMER, POOLING, LSTM], {"pooling_mode": "cls"}, "lists Transformer, Pooling, LSTM"),
        ([TRANSFORMER, DENSE, POOLING], {"pooling_mode": "cls"}, "lists Transformer, Dense, Pooling"),
        ([TRANSFORMER, POOLING], {"pooling_mode": "middletoken"}, "'middletoken'.*allowed: cls, max, mean"),
        ([TRANSFORMER, POOLING], {"pooling_mode": "cls", "include_prompt": False}, "prompts"),
        ([TRANSFORMER, POOLING], {}, "at least one mode"),
    ],
)
def test_pooling_that_is_not_known(tmp_path: Path, modules: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        read_layout(layout(tmp_path, modules, config))


def test_prompts_that_are_pooled_or_not(tmp_path: Path) -> None:
    """What is given to a model begins with a default prompt alone: without one, there is nothing to leave out."""
    found = layout(tmp_path, [TRANSFORMER, POOLING], {"pooling_mode": "cls", "include_prompt": False})
    said = found / "config_sentence_transformers.json"
    assert read_layout(found, alone=False).pooling is not None
    assert read_writing(found)("A text") == "A text"
    said.write_text(json.dumps({"prompts": {"query": "q: ", "none": ""}, "default_prompt_name": None}))
    assert read_layout(found, alone=False).pooling is not None
    assert read_writing(found).prompts == ("q: ",)
    said.write_text(json.dumps({"prompts": {"query": "q: "}, "default_prompt_name": "query"}))
    assert read_writing(found)("A text") == "q: A text"
    with pytest.raises(ExportError, match="leaves prompts out"):
        read_layout(found, alone=False)


@pytest.mark.parametrize("content", ["{", "[1]", '[{"type": "Pooling"}]'])
def test_modules_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        read_layout(tmp_path)


def test_pooling_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, -4.0], [50.0, 60.0]], [[9.0, 9.0], [1.0, 2.0], [3.0, -4.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    expected = {
        "cls": [1.0, 2.0],
        "max": [3.0, 2.0],
        "mean": [2.0, -1.0],
        "mean_sqrt_len_tokens": [4 / 2**0.5, -2 / 2**0.5],
        "weightedmean": [7 / 3, -2.0],
        "lasttoken": [3.0, -4.0],
    }
    for mode, vector in expected.items():
        assert torch.allclose(Pooling((mode,))(hidden, mask), torch.tensor([vector, vector]))  # pyright: ignore
    normalized = Pooling(("mean", "cls"), normalize=True)(hidden, mask)
    assert torch.allclose(normalized, torch.tensor([[2.0, -1.0, 1.0, 2.0]] * 2) / 10**0.5)


def test_dense_modules_that_cannot_be_read(tmp_path: Path) -> None:
    folder = layout(tmp_path, [TRANSFORMER, POOLING, DENSE], {"pooling_mode": "cls"}) / "2_Dense"
    folder.mkdir()
    good = {"in_features": 4, "out_features": 2, "activation_function": "torch.nn.modules.activation.GELU"}
    for change, error, message in (
        ({"activation_function": "os.system"}, ExportError, "os.system"),
        ({"module_input_name": "token_embeddings"}, ExportError, "token_embeddings"),
        ({"in_features": "many"}, CheckpointError, "2_Dense"),
        ({}, CheckpointError, "2_Dense"),  # no weights
    ):
        (folder / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(error, match=message):
            read_layout(tmp_path)
    torch.save({"linear.weight": torch.ones(2, 4), "linear.bias": torch.zeros(2)}, folder / "pytorch_model.bin")
    found = read_layout(tmp_path)
    assert found.pooling is not None
    assert torch.allclose(found.pooling.after[0](torch.ones(1, 4)), nn.GELU()(torch.full((1, 2), 4.0)))


TEXTS = ["the cat sat on the mat .", "a film", "it was not very good and the plot is bad .", "dog"]


def test_a_dense_module_of_another_width() -> None:
    pooling = Pooling(
        ("mean", "max"), after=(Projection((64, 8), activation=nn.Tanh()), Projection((9, 8), activation=nn.Tanh()))
    )
    with pytest.raises(ExportError, match=r" 9\b.* 8\b"):
        pooling.check_width(32)
    with pytest.raises(ExportError, match=r" 64\b.* 48\b"):
        pooling.check_width(24)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(" ".join(TEXTS).split())]
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
DECODER = {**SIZES, "num_key_value_heads": 2, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
POSITIONS = {"max_position_embeddings": 64}
ENCODERS: dict[str, tuple[Any, str]] = {
    "bert": (lambda: tf.BertModel(tf.BertConfig(**SIZES, **POSITIONS, vocab_size=40, initializer_range=0.2)), "right"),
    "qwen3": (lambda: tf.Qwen3Model(tf.Qwen3Config(**DECODER, head_dim=8, initializer_range=0.2)), "left"),
    "mistral": (
        lambda: tf.MistralModel(tf.MistralConfig(**DECODER, head_dim=8, sliding_window=4, initializer_range=0.2)),
        "right",
    ),
    "t5": (
        lambda: tf.T5EncoderModel(tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=40)),
        "right",
    ),
}


def transformer(folder: Path, name: str, side: str | None = None) -> str:
    """A tiny encoder with a tokenizer."""
    make, usual = ENCODERS[name]
    torch.manual_seed(0)
    make().eval().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)  # pyright: ignore
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        padding_side=side or usual,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return str(folder)


def check(directory: Path, target: Path, expected: np.ndarray) -> None:
    done = export(directory, target)
    assert done.output == "sentence_embedding"
    tokenizer = tf.AutoTokenizer.from_pretrained(target)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="np")
    session = onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])
    for rows in (slice(None), slice(1, 2)):
        (found,) = session.run(None, {name: inputs[name][rows] for name in done.inputs})
        assert np.abs(found - expected[rows]).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "side", "modes", "after"),
    [
        ("bert", "left", "weightedmean", "chain"),
        ("t5", None, "mean", "plain normalize"),  # sentence-t5
        ("qwen3", None, "lasttoken", "normalize"),  # Qwen3-Embedding
        ("mistral", None, ("lasttoken", "cls"), ""),  # E5-Mistral, and more
        ("mistral", "left", ("weightedmean", "mean", "max"), "residual"),
    ],
)
def test_as_sentence_transformers(name: str, side: str | None, modes: Any, after: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import __version__ as version
    from sentence_transformers.sentence_transformer import modules as st

    if side == "left" and "weightedmean" in modes and tuple(map(int, version.split(".")[:2])) < (6, 1):
        pytest.skip("sentence-transformers counts from the first token since 6.1, and from the padding before")
    encoder = st.Transformer(transformer(tmp_path / "encoder", name, side), max_seq_length=12)
    pooling = st.Pooling(32, pooling_mode=modes)
    width = pooling.pooling_output_dimension
    follow = {
        "chain": [st.Dense(width, 48, bias=False, activation_function=nn.Identity()), st.Normalize(), st.Dense(48, 8)],
        "plain normalize": [st.Dense(width, 24, bias=False, activation_function=nn.Identity()), st.Normalize()],
        "residual": [st.Dense(width, width, activation_function=nn.GELU(), use_residual=True), st.Dense(width, 8)],
        "normalize": [st.Dropout(0.5), st.Normalize()],
        "": [],
    }[after]
    model = SentenceTransformer(modules=[encoder, pooling, *follow], device="cpu")
    model.save_pretrained(str(tmp_path / "model"))
    check(tmp_path / "model", tmp_path / "out", model.encode(TEXTS))


@pytest.mark.filterwarnings("ignore::factorformer.errors.FactorformerWarning")
def test_a_transformer_in_a_folder_and_old_weights(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as st

    # As LaBSE: the mean, then a layer with tanh.
    parts = [st.Transformer(transformer(tmp_path / "e", "bert"), max_seq_length=12), st.Pooling(32), st.Dense(32, 8)]
    model = SentenceTransformer(modules=parts, device="cpu")
    model.save_pretrained(str(tmp_path / "model"))
    folder = tmp_path / "model" / "0_Transformer"
    folder.mkdir()
    listed = json.loads((tmp_path / "model" / "modules.json").read_text())
    listed[0]["path"] = folder.name
    (tmp_path / "model" / "modules.json").write_text(json.dumps(listed))
    for file in (tmp_path / "model").iterdir():
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(file, folder / file.name)
    body = tf.BertModel.from_pretrained(folder)
    whole = tf.BertForMaskedLM(body.config)  # it has a head as well, which a sentence encoder does not use
    whole.bert.load_state_dict(body.state_dict(), strict=False)
    whole.save_pretrained(folder)
    check(tmp_path / "model", tmp_path / "out", model.encode(TEXTS))


def test_a_cross_encoder_gives_its_scores(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    transformer(tmp_path / "e", "bert")
    config = tf.BertConfig.from_pretrained(tmp_path / "e", num_labels=1)
    tf.BertForSequenceClassification(config).eval().save_pretrained(tmp_path / "e")
    model = CrossEncoder(str(tmp_path / "e"), device="cpu", max_length=12)
    model.save_pretrained(str(tmp_path / "model"))
    done = export(tmp_path / "model", tmp_path / "out")
    assert done.output == "logits"
    inputs = tf.AutoTokenizer.from_pretrained(tmp_path / "out")(
        TEXTS, padding=True, truncation=True, return_tensors="np"
    )
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: inputs[name] for name in done.inputs})
    wanted = tf.BertForSequenceClassification.from_pretrained(tmp_path / "model")(
        **{name: torch.from_numpy(value) for name, value in inputs.items()}
    )
    assert np.abs(found - wanted.logits.detach().numpy()).max() < 1e-4
