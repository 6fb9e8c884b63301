"""What a model computes for its caller: which inputs it takes, and what comes out."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import CheckpointError, ExportError, one_of

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens")

HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")
"""How classes of models are named that put out `logits`."""

_OLD_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a sentence encoder makes one vector of those of its tokens.

    Args:
        modes: the first token, the largest entries, the mean, or the sum over the root of the number of tokens; several
            are concatenated.
        normalize: divide by the Euclidean norm.

    Raises:
        ExportError: an unknown mode, or none.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise ExportError(f"pooling mode {one_of(mode, MODES)}")
        if not self.modes:
            raise ExportError(f"pooling needs at least one mode; allowed: {', '.join(MODES)}")

    def __call__(
        self, hidden: Float[Tensor, "batch length width"], mask: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch pooled"]:
        """One vector for each text; padding, where the mask is 0, does not count."""
        weights = mask[:, :, None].to(hidden.dtype)
        vectors = []
        for mode in self.modes:
            if mode == "cls":
                first = mask.to(torch.int32).argmax(1)
                vectors.append(hidden.gather(1, first[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0])
            elif mode == "max":
                vectors.append(hidden.masked_fill(weights == 0, float("-inf")).amax(1))
            else:
                count = weights.sum(1).clamp(min=1e-9)
                vectors.append((hidden * weights).sum(1) / (count if mode == "mean" else count.sqrt()))
        pooled = torch.cat(vectors, dim=1) if len(vectors) > 1 else vectors[0]
        return F.normalize(pooled, dim=1) if self.normalize else pooled


def read_pooling(directory: Path) -> Pooling | None:
    """The pooling of a directory in the layout of sentence-transformers; None without a `modules.json`.

    Raises:
        CheckpointError: a description that cannot be read.
        ExportError: modules or modes that the export does not know.
    """
    if not (directory / "modules.json").is_file():
        return None
    modules = _read(directory / "modules.json")
    try:
        kinds = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"'{directory}/modules.json' does not list modules with a type and a path") from error
    names = [kind for kind, _ in kinds]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        raise ExportError(
            f"'{directory}/modules.json' lists {', '.join(names)}; what can be exported is Transformer, Pooling, "
            "and Normalize or nothing"
        )
    config = _read(directory / kinds[1][1] / "config.json")
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for key, name in _OLD_NAMES.items() if config.get(key)]
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    return Pooling(modes, "Normalize" in names)


def read_longest(directory: Path) -> int | None:
    """Tokens after which a sentence encoder in the layout of sentence-transformers cuts texts, if it says so."""
    file = directory / "sentence_bert_config.json"
    return _read(file).get("max_seq_length") if file.is_file() else None


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read '{file}': {error}") from error


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Inputs of a model of text: `input_ids`, `attention_mask`, and `token_type_ids` where there is more than one type.

    Raises:
        ExportError: a model of something else than text, or one that generates text.
    """
    kind = type(model).__name__
    if model.main_input_name != "input_ids":
        raise ExportError(f"{kind} reads {model.main_input_name}; only models that read text can be exported")
    if model.config.is_encoder_decoder or getattr(model.config, "is_decoder", False):
        raise ExportError(f"{kind} has a decoder; only encoders can be exported")
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
        model: an encoder, with a head that gives logits or without one.
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
                f"{kind} cannot be exported; allowed are encoders without a head, and those that end in "
                f"{', '.join(HEADS)}"
            )
        if head and pooling is not None:
            raise ExportError(f"{kind} has a head: leave pooling out, or export its encoder alone")
        self.model, self.names, self.pooling = model, names, pooling
        self.output = "logits" if head else "last_hidden_state" if pooling is None else "sentence_embedding"

    def forward(self, *inputs: Tensor) -> Tensor:
        """The one output, from inputs in order of their names."""
        named: Mapping[str, Tensor] = dict(zip(self.names, inputs, strict=True))
        outputs = self.model(**named)
        if self.pooling is None:
            return getattr(outputs, self.output)
        return self.pooling(outputs.last_hidden_state, named["attention_mask"])
