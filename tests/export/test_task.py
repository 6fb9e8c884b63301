"""What an exported model takes and puts out is read from its class."""

from __future__ import annotations

import pytest
from tests.tiny import MODELS
from transformers import BertConfig, BertForQuestionAnswering, CLIPConfig, CLIPModel

from factorformer.errors import ExportError
from factorformer.export.task import Task, input_names


def test_types_of_tokens_are_an_input_where_there_are_several() -> None:
    names = ["input_ids", "attention_mask"]
    assert input_names(MODELS["bert"].build(), None) == [*names, "token_type_ids"]
    assert input_names(MODELS["distilbert"].build(), None) == names


def test_an_unknown_head() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    with pytest.raises(ExportError, match=r"BertForQuestionAnswering.*allowed"):
        Task(BertForQuestionAnswering(config), ["input_ids"])


def test_a_model_of_more_than_text() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = CLIPConfig(text_config={**sizes, "vocab_size": 99}, vision_config={**sizes, "image_size": 32})
    with pytest.raises(ExportError, match="CLIPModel reads more than text"):
        input_names(CLIPModel(config), None)
