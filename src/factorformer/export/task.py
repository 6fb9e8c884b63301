"""The inputs and the outputs of an exported model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from factorformer.errors import ExportError
from factorformer.export.sentence import Pooling

CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How classes of models are named that go on with a text."""

PAST = "past_key_values"
"""How inputs begin that hold keys and values of tokens before, by the convention of Optimum and transformers.js."""

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
                f"{', '.join((*HEADS, *CAUSAL))}"
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

    @property
    def outputs(self) -> list[str]:
        """Names of all that is put out."""
        return [self.output]

    @property
    def shapes(self) -> list[dict[int, str]]:
        """Names of the sizes of each input that are not fixed, by their places."""
        return [{0: "batch", 1: "length"} for _ in self.names]

    def complete(self, given: Mapping[str, Tensor], known: int) -> list[Tensor]:
        """The inputs in order, of `input_ids` and what else is given."""
        return [given[name] for name in self.names]

    def forward(self, *inputs: Tensor) -> Tensor:
        """The one output, from inputs in order of their names."""
        named: Mapping[str, Tensor] = dict(zip(self.names, inputs, strict=True))
        outputs = self.model(**named, **self.options)
        if self.pooling is None:
            return getattr(outputs, self.output)
        return self.after(self.pooling(outputs.last_hidden_state, named["attention_mask"]))


class Continuation(nn.Module):
    """A causal language model as a function of new tokens, and of the keys and values of those before.

    Args:
        model: with a head for the next token.

    Raises:
        ExportError: it keeps something else than keys and values of every layer.
    """

    output = "logits"
    pooling = None

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        start = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad():
            kept = getattr(model(input_ids=start, use_cache=True), "past_key_values", None)
        self.sizes = [(keys.shape, values.shape) for keys, values in _layers(kept)]
        """Of keys and values of one token, for each layer."""
        if not self.sizes:
            raise ExportError(
                f"{type(model).__name__} does not keep keys and values of all tokens: it cannot be exported"
            )
        self.positioned = "position_ids" in inspect.signature(model.forward).parameters
        both = [f"{layer}.{part}" for layer in range(len(self.sizes)) for part in ("key", "value")]
        own = ["input_ids", "attention_mask", *(["position_ids"] if self.positioned else [])]
        self.names = [*own, *(f"{PAST}.{name}" for name in both)]
        self.outputs = [self.output, *(f"present.{name}" for name in both)]

    @property
    def shapes(self) -> list[dict[int, str]]:
        """Names of the sizes of each input that are not fixed, by their places."""
        new = {0: "batch", 1: "length"}
        kinds = {"input_ids": new, "attention_mask": {0: "batch", 1: "total"}, "position_ids": new}
        return [kinds.get(name, {0: "batch", 2: "past"}) for name in self.names]

    def complete(self, given: Mapping[str, Tensor], known: int) -> list[Tensor]:
        """The inputs in order, the first so many tokens by keys and values drawn at random in place of their own."""
        ids, mask = given["input_ids"], given["attention_mask"]
        draws = torch.Generator().manual_seed(known)
        sizes = [size for pair in self.sizes for size in pair]
        past = [torch.randn(len(ids), size[1], known, size[3], generator=draws) for size in sizes]
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, known:]
        return [ids[:, known:], mask, *([positions] if self.positioned else []), *past]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Logits of all new tokens, and keys and values of all tokens, layer by layer."""
        given = dict(zip(self.names, inputs, strict=True))
        past = [given.pop(name) for name in self.names if name.startswith(PAST)]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        outputs = self.model(**given, past_key_values=cache, use_cache=True)
        return outputs.logits, *(tensor for pair in _layers(outputs.past_key_values) for tensor in pair)


def task_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, pooling: Pooling | None
) -> Task | Continuation:
    """What a file of a model computes.

    Raises:
        ExportError: as from `Task`, `Continuation` and `input_names`.
    """
    names, kind = input_names(model, tokenizer), type(model).__name__
    if not kind.endswith(CAUSAL):
        return Task(model, names, pooling)
    if pooling is not None:
        raise ExportError(f"{kind} goes on with texts: leave pooling out, or export its encoder alone")
    return Continuation(model)


def _layers(cache: object) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer; none if it keeps anything else."""
    found: list[tuple[Tensor, Tensor]] = []
    for layer in getattr(cache, "layers", ()):
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            return []
        found.append((layer.keys, layer.values))
    return found
