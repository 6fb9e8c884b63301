"""The inputs and the output of an exported model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import ExportError
from factorformer.export.sentence import Pooling

HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")
"""How classes of models are named that put out `logits`."""


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Inputs of a model of text: `input_ids`, `attention_mask`, and `token_type_ids` where there is more than one type.

    Raises:
        ExportError: a model of something else than text, or one that generates text.
    """
    kind = type(model).__name__
    if model.main_input_name != "input_ids":
        raise ExportError(f"{kind} reads {model.main_input_name}; only models that read text can be exported")
    if model.config.get_text_config() is not model.config:
        raise ExportError(f"{kind} reads more than text; only models of text alone can be exported")
    # T5's encoder alone keeps the configuration of both.
    both = model.config.is_encoder_decoder and not kind.endswith("EncoderModel")
    if both or getattr(model.config, "is_decoder", False):
        raise ExportError(
            f"{kind} has a decoder that generates text; only encoders, and decoders as such, can be exported"
        )
    accepted = inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask"]
    if tokenizer is None:
        typed = getattr(model.config, "type_vocab_size", 0) > 1
    else:
        typed = "token_type_ids" in tokenizer.model_input_names
    return [*names, "token_type_ids"] if typed and "token_type_ids" in accepted else names


class Task(nn.Module):
    """A model as a function of tensors to one tensor, named as its output is.

    Args:
        model: a model of text, with a head that gives logits or without one.
        names: of its inputs, in order.
        pooling: of a sentence encoder.

    Raises:
        ExportError: a head that is not known, or a pooling beside a head.
    """

    def __init__(self, model: PreTrainedModel, names: list[str], pooling: Pooling | None = None) -> None:
        super().__init__()
        kind = type(model).__name__
        head = kind.endswith(HEADS)
        if not head and not (kind.endswith("Model") and model.base_model is model):
            raise ExportError(
                f"{kind} cannot be exported; allowed are models without a head, and those that end in "
                f"{', '.join(HEADS)}"
            )
        if head and pooling is not None:
            raise ExportError(f"{kind} has a head: leave pooling out, or export its encoder alone")
        if pooling is not None and hasattr(model.config, "hidden_size"):
            pooling.check_width(model.config.hidden_size)
        self.model, self.names, self.pooling = model, names, pooling
        self.after = nn.Sequential(*(() if pooling is None else pooling.after))
        accepted = inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in accepted else {}
        self.output = "logits" if head else "last_hidden_state" if pooling is None else "sentence_embedding"

    def forward(self, *inputs: Tensor) -> Tensor:
        """The one output, from inputs in order of their names."""
        named: Mapping[str, Tensor] = dict(zip(self.names, inputs, strict=True))
        outputs = self.model(**named, **self.options)
        if self.pooling is None:
            return getattr(outputs, self.output)
        return self.after(self.pooling(outputs.last_hidden_state, named["attention_mask"]))
