"""What an exported model puts out is read from its class and from `modules.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import MODELS
from transformers import BertConfig, BertForQuestionAnswering

from factorformer.errors import CheckpointError, ExportError
from factorformer.export.task import Pooling, Task, input_names, read_longest, read_pooling

TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}
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
    assert read_pooling(layout(tmp_path, [TRANSFORMER, POOLING, NORMALIZE], config)) == Pooling(modes, True)  # pyright: ignore


def test_no_normalization_and_no_modules(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    assert read_longest(tmp_path) is None
    assert read_pooling(layout(tmp_path, [TRANSFORMER, POOLING], {"pooling_mode": "cls"})) == Pooling(("cls",))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    assert read_longest(tmp_path) == 24


@pytest.mark.parametrize(
    ("modules", "config", "message"),
    [
        ([TRANSFORMER, POOLING, DENSE], {"pooling_mode": "cls"}, "lists Transformer, Pooling, Dense; what can be"),
        ([TRANSFORMER, POOLING], {"pooling_mode": "lasttoken"}, "pooling mode 'lasttoken'.*allowed: cls, max, mean"),
        ([TRANSFORMER, POOLING], {"pooling_mode_weightedmean_tokens": True}, "pooling mode 'weightedmean'"),
        ([TRANSFORMER, POOLING], {}, "at least one mode"),
    ],
)
def test_pooling_that_is_not_known(tmp_path: Path, modules: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        read_pooling(layout(tmp_path, modules, config))


@pytest.mark.parametrize("content", ["{", "[1]", '[{"type": "Pooling"}]'])
def test_modules_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        read_pooling(tmp_path)


def test_pooling_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, -4.0], [50.0, 60.0]], [[9.0, 9.0], [1.0, 2.0], [3.0, -4.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    expected = {
        "cls": [1.0, 2.0],
        "max": [3.0, 2.0],
        "mean": [2.0, -1.0],
        "mean_sqrt_len_tokens": [4 / 2**0.5, -2 / 2**0.5],
    }
    for mode, vector in expected.items():
        assert torch.allclose(Pooling((mode,))(hidden, mask), torch.tensor([vector, vector]))  # pyright: ignore
    normalized = Pooling(("mean", "cls"), normalize=True)(hidden, mask)
    assert torch.allclose(normalized, torch.tensor([[2.0, -1.0, 1.0, 2.0]] * 2) / 10**0.5)


def test_types_of_tokens_are_an_input_where_there_are_several() -> None:
    names = ["input_ids", "attention_mask"]
    assert input_names(MODELS["bert"].build(), None) == [*names, "token_type_ids"]
    assert input_names(MODELS["distilbert"].build(), None) == names


def test_an_unknown_head() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    with pytest.raises(ExportError, match=r"BertForQuestionAnswering cannot be exported; allowed are"):
        Task(BertForQuestionAnswering(config), ["input_ids"])
