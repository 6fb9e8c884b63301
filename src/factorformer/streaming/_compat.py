"""How transformers turns the tensors of files into those of a model, which it does not document.

Relies on `PreTrainedModel._from_config` and `_get_dtype_plan`, on `get_model_conversion_mapping` of
conversion_mapping.py, and on `WeightConverter`, `WeightRenaming`, `rename_source_key` and
`convert_and_load_state_dict_in_model` of core_model_loading.py: transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def built(kind: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A new model of a class, in a type, but for what its architecture keeps in float32."""
    model = kind._from_config(config, dtype=dtype)
    kept = {re.compile(name.replace("*", ".*")): wide for name, wide in model._get_dtype_plan(dtype).items()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wide = next((wide for pattern, wide in kept.items() if pattern.search(name)), None)
        if wide is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(wide)
    return model


def targets(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[list[str], bool]]:
    """Which tensors of a model each tensor of its files becomes a part of, and whether it is that tensor as it is."""
    mapping = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_source = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[list[str], bool]] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if pattern is None:
            found[name] = [target], True
        else:
            first, *others = by_source[pattern].target_patterns
            found[name] = [target, *(target.replace(first, other) for other in others)], False
    return found


def convert_into(model: PreTrainedModel, tensors: Mapping[str, Any]) -> list[str]:
    """Give tensors of a model the values that tensors of files, by their names there, are converted to.

    Returns:
        What went wrong, a line each.
    """
    rules: Any = get_model_conversion_mapping(model)
    settings = LoadStateDictConfig(weight_mapping=rules)
    found, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings)
    wrong = [f"{key} has another shape" for key in found.mismatched_keys]
    return wrong + [f"{name}: {error}" for name, error in found.conversion_errors.items()]
