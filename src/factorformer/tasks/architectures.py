"""Which model is trained from scratch: an architecture by name or config.json, sizes, and the ids of a tokenizer."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from factorformer.errors import ModelError, one_line
from factorformer.tasks.trainer import seeded

Task = Literal["translation", "causal", "masked"]
"""What a model learns: one text from another, the next token, or tokens that are hidden."""

_MODELS: dict[Task, Any] = {
    "translation": AutoModelForSeq2SeqLM,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
}
_COMMON = "bert, gpt2, llama, marian, t5"
_NOT_CAUSAL = ("bert-generation", "cpmant", "xlnet", "trocr")
"""Listed as causal, but by default their tokens see later ones, or their loss is that of the token itself."""

SMALL: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim", "embedding_size"), 256
    ),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "ffn_dim", "hidden_dim"), 1024),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 1024),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
}
"""Sizes of a small model, for architectures given by name alone; no field is made larger than its class has it."""

_FROM_THE_TOKENIZER = {"vocab_size", "decoder_vocab_size", "suppress_tokens", "begin_suppress_tokens"}


_SPECIAL = ("pad", "bos", "eos", "unk", "cls", "sep", "mask")
"""Tokens whose ids a configuration holds."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A configuration class with values for its fields, before a tokenizer fixes the rest.

    Args:
        config_class: of transformers.
        values: of its fields; others keep the defaults of the class.
        task: what models of this class learn.
    """

    config_class: type[PreTrainedConfig]
    values: Mapping[str, Any]
    task: Task

    @property
    def name(self) -> str:
        """The `model_type` of transformers, such as `marian`."""
        return self.config_class.model_type

    @classmethod
    def of(cls, source: str, overrides: Sequence[str] = ()) -> Architecture:
        """An architecture as a user names it.

        Args:
            source: a name such as `bert` or `marian`, which gets the sizes of a small model; or a model directory, a
                `config.json`, or a model on the Hub, whose sizes are taken over.
            overrides: `FIELD=VALUE`; values are read as JSON, and as plain text where they are none.

        Raises:
            ModelError: no such architecture, one that does not learn from text, or an override that does not fit; the
                message names the nearest fields.

        >>> Architecture.of("gpt2", ["n_layer=2"]).task
        'causal'
        """
        config_class, values = _named(source)
        if "vocab_size" not in {*_fields(config_class), *config_class.attribute_map}:
            raise ModelError(
                f"'{source}' is made of several models ({config_class.__name__}) and does not learn from text alone; "
                f"architectures that do are, for instance, {_COMMON}"
            )
        for override in overrides:
            name, value = _override(config_class, override)
            values[name] = value
        found = cls(config_class, values, _task(config_class, values, source))
        found.build({})  # so that values that contradict each other are met before any long work
        return found

    def build(self, fixed: Mapping[str, Any]) -> PreTrainedConfig:
        """The configuration with these further values.

        Raises:
            ModelError: values that the class refuses.
        """
        try:
            return self.config_class(**{**self.values, **fixed})
        except Exception as error:  # classes check their values with many types of errors
            raise ModelError(f"{self.config_class.__name__} refuses these values: {_reason(error)}") from error

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
        """The configuration of a model that reads and writes what a tokenizer makes.

        Size of the vocabulary and ids of special tokens are the tokenizer's; whether embeddings and output head are
        tied stays as the class has it.

        Args:
            tokenizer: with tokens for padding and the end of a text.
        """
        return self._for(len(tokenizer), {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in _SPECIAL})

    def check(self, vocabulary: int) -> None:
        """Make a model without weights, so that sizes that its layers refuse are met before any long work.

        Args:
            vocabulary: tokens of the tokenizer that is going to be trained.

        Raises:
            ModelError: values that the configuration or the layers refuse.
        """
        with torch.device("meta"):
            new_model(self._for(vocabulary, {kind: token for token, kind in enumerate(_SPECIAL)}), self.task)

    def _for(self, vocabulary: int, ids: Mapping[str, int | None]) -> PreTrainedConfig:
        fields = _fields(self.config_class)
        fixed: dict[str, Any] = {
            f"{kind}_token_id": token
            for kind, token in ids.items()
            if f"{kind}_token_id" in fields or kind in ("pad", "bos", "eos")
        }
        fixed["vocab_size"] = vocabulary
        fixed |= dict.fromkeys({"decoder_vocab_size", "suppress_tokens", "begin_suppress_tokens"} & fields.keys())
        if self.task == "translation":
            fixed["decoder_start_token_id"] = ids["pad"]
            fixed |= dict.fromkeys({"forced_eos_token_id", "forced_bos_token_id"} & fields.keys())
        return self.build(fixed)


def new_model(config: PreTrainedConfig, task: Task, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, which depend on the seed alone.

    Raises:
        ModelError: sizes that its layers refuse.
    """
    try:
        with seeded(seed):
            return _MODELS[task].from_config(config)
    except Exception as error:  # layers check their sizes with many types of errors
        raise ModelError(f"no model can be made from this {type(config).__name__}: {_reason(error)}") from error


def _named(source: str) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    """Class and values of what a user calls a configuration."""
    known = {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    path = Path(source)
    if path.exists() or path.suffix == ".json" or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        try:
            config = AutoConfig.from_pretrained(source)
        except Exception as error:  # of JSON, of transformers, of the Hub's client, of HTTP, of sockets
            raise ModelError(f"cannot read a configuration from '{source}': {_reason(error)}") from error
        return type(config), _values(config.to_dict())
    if source in known:
        config_class = CONFIG_MAPPING[source]
        defaults = {name: field.default for name, field in _fields(config_class).items()}
        # A class with 0 or None there derives the value from the others.
        values: dict[str, Any] = {
            name: size
            for name, size in SMALL.items()
            if isinstance(default := defaults.get(name), int) and default > size
        }
        # Embeddings as large as the positions that are added to them (Vaswani et al. 2017, section 3.4).
        return config_class, values | ({"scale_embedding": True} if "scale_embedding" in defaults else {})
    if source in CONFIG_MAPPING:
        raise ModelError(f"'{source}' does not learn from text; architectures that do are, for instance, {_COMMON}")
    raise ModelError(
        f"'{source}' is no architecture{_near(source, known)}, no model directory and no config.json; "
        f"architectures are, for instance, {_COMMON}"
    )


def _values(content: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of the architecture: not how its weights were stored, nor which tokens are special."""
    others = {
        "model_type",
        "architectures",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "auto_map",
        "transformers_version",
        "_name_or_path",
        *("id2label", "label2id", "num_labels", "problem_type"),
    }
    return {key: value for key, value in content.items() if key not in others and not _of_the_tokenizer(key)}


def _of_the_tokenizer(field: str) -> bool:
    return field in _FROM_THE_TOKENIZER or field.endswith(("_token_id", "_token_ids"))


def _task(config_class: type[PreTrainedConfig], values: Mapping[str, Any], source: str) -> Task:
    kind = config_class.model_type
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "translation"
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and values.get("is_decoder") is not True:
        return "masked"
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in _NOT_CAUSAL:
        return "causal"
    raise ModelError(
        f"'{source}' ({kind}) does not learn from text; architectures that do are, for instance, {_COMMON}"
    )


def _fields(config_class: type[PreTrainedConfig]) -> dict[str, dataclasses.Field[Any]]:
    """The fields that a class has of its own, beside the housekeeping of all classes."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name: field for field in dataclasses.fields(config_class) if field.name not in common}


def _override(config_class: type[PreTrainedConfig], text: str) -> tuple[str, Any]:
    given, separator, raw = text.partition("=")
    given, raw = given.strip(), raw.strip()
    if not separator or not given or not raw:
        raise ModelError(f"--set takes FIELD=VALUE, such as num_hidden_layers=4; got '{text}'")
    fields = _fields(config_class)
    name = config_class.attribute_map.get(given, given)
    if name not in fields:
        settable = {*fields, *config_class.attribute_map}
        raise ModelError(
            f"{config_class.__name__} has no field '{given}'{_near(given, settable) or ': see its documentation'}"
        )
    if _of_the_tokenizer(name):
        raise ModelError(
            f"'{given}' comes from the tokenizer, which is trained on your text: choose --vocabulary instead"
        )
    try:
        value = json.loads(raw)
    except ValueError:
        value = {"True": True, "False": False, "None": None}.get(raw, raw)
    kind = fields[name].type
    if isinstance(value, int) and not isinstance(value, bool) and kind in (float, "float", "float | None"):
        value = float(value)
    if isinstance(value, int) and value < 0 < _number(fields[name].default):
        raise ModelError(f"--set {text}: {config_class.__name__}.{name} is a number above 0")
    alone: dict[str, Any] = {name: value}
    try:
        config_class(**alone)
    except Exception as error:
        # A value may fit only together with others: what is refused for itself names its field.
        if f"'{name}'" in str(error):
            raise ModelError(f"--set {text}: {_reason(error)}") from error
    return name, value


def _number(default: Any) -> float:
    return default if isinstance(default, (int, float)) else 0


def _near(given: str, names: Iterable[str]) -> str:
    """A hint at names like the one given; empty if there is none."""
    names = sorted(names)
    within = [name for name in names if given and given in name]
    near = list(dict.fromkeys([*difflib.get_close_matches(given, names, n=3, cutoff=0.6), *within]))[:3]
    return f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""


def _reason(error: Exception) -> str:
    """The reason of an error in one line, without the heading and the class that some put in front."""
    return re.sub(r"^(.*: )?\w+Error: ", "", one_line(error))
