"""Calibration data of any kind as batches: the keyword arguments of a model."""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factorformer.errors import DataError

Batch = Mapping[str, Any]
"""Keyword arguments of a model: tensors with one row for each example, and plain settings."""

Calibration = Iterable[Any]
"""Batches, or what `as_batches` makes some of."""

_CROSSING = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)\b.*\b(k|v|key|value|k_proj|v_proj)$"
)
"""Layers of a decoder that read what the encoder wrote."""

DATASET_ROWS = 8
"""Rows of a data set that make a batch."""


def real_tokens(model: nn.Module, path: str, batch: Batch, x: Tensor, positions: torch.Size) -> Tensor:
    """Vectors, or indices, of real tokens, without padding, in one row.

    Args:
        model: that the batch is of.
        path: of the layer that reads or writes `x`: an encoder's or a decoder's.
        batch: with masks, if there are any.
        x: `(*positions, width)` or `positions`.
        positions: what a mask may be of.
    """
    mask = real_mask(model, path, batch, positions)
    return x.flatten(0, len(positions) - 1) if mask is None else x[mask.to(x.device)]


def real_mask(model: nn.Module, path: str, batch: Batch, positions: torch.Size) -> Tensor | None:
    """Which positions hold real tokens, of the shape of `positions`; None where the batch does not say.

    Args:
        model, path, batch, positions: as for `real_tokens`.
    """
    config = getattr(model, "config", None)
    decoding = getattr(config, "is_encoder_decoder", False) and "decoder" in path and not _CROSSING.search(path)
    mask = batch.get("decoder_attention_mask" if decoding else "attention_mask")
    if mask is not None and mask.shape == positions:
        return mask.bool()
    if mask is not None and positions == (mask.numel(),):  # OPT folds batch and positions into one dimension
        return mask.flatten().bool()
    return None


def fingerprint(batch: Batch) -> int:
    """A number for what the tensors of a batch hold."""
    number = 0
    for _, value in sorted(batch.items()):
        if isinstance(value, Tensor):
            number = zlib.crc32(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), number)
    return number


def placed(batch: Batch, device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def as_batches(model: nn.Module, data: Calibration) -> Iterator[dict[str, Any]]:
    """Calibration data as keyword arguments of a model.

    Args:
        model: what the batches are for.
        data: batches, each a mapping of names to tensors, arrays or lists of numbers; or one such batch alone; or a
            tokenized `datasets.Dataset`, of which the columns are taken that the model's forward pass knows. Values
            that are None are left out; a single row without a dimension for the batch gets one.

    Raises:
        DataError: anything else; the message says what was found where.
    """
    if isinstance(data, Mapping):
        data = [data]
    elif hasattr(data, "column_names") and hasattr(data, "with_format"):
        data = _rows(model, data)
    elif isinstance(data, (str, bytes, Tensor, np.ndarray)) or not hasattr(data, "__iter__"):
        raise DataError(f"calibration data cannot be {_kind(data)}: give a list of batches, {_WANTED}")
    for place, batch in enumerate(data):
        if not isinstance(batch, Mapping):
            raise DataError(f"calibration batch {place} is {_kind(batch)}: a batch is {_WANTED}")
        values = {str(key): _value(place, str(key), value) for key, value in batch.items() if value is not None}
        tensors = [value for value in values.values() if isinstance(value, Tensor)]
        if not tensors:
            raise DataError(f"calibration batch {place} holds no tensors: a batch is {_WANTED}")
        ids = values.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 1:
            values = {key: value[None] if isinstance(value, Tensor) else value for key, value in values.items()}
        yield values


_WANTED = "a mapping of the model's arguments to tensors, such as tokenizer(texts, padding=True, return_tensors='pt')"


def _rows(model: nn.Module, data: Any) -> Iterator[dict[str, Any]]:
    """Batches of a data set; row by row where rows differ in length."""
    taken = inspect.signature(model.forward).parameters
    columns = [name for name in data.column_names if name in taken]
    if not columns:
        raise DataError(
            f"the calibration data set has the columns {', '.join(data.column_names)}, and {type(model).__name__} "
            "takes none of them: tokenize it first, so that it has input_ids"
        )
    data = data.with_format("numpy", columns=columns)
    for first in range(0, len(data), DATASET_ROWS):
        rows = [data[place] for place in range(first, min(first + DATASET_ROWS, len(data)))]
        shapes = [{name: np.shape(value) for name, value in row.items()} for row in rows]
        if all(shape == shapes[0] for shape in shapes):
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        else:
            yield from ({name: np.asarray(value)[None] for name, value in row.items()} for row in rows)


def _value(place: int, name: str, value: Any) -> Any:
    """A tensor, or a plain setting such as `use_cache`."""
    if isinstance(value, (Tensor, bool, int, float)):
        return value
    if isinstance(value, (np.ndarray, list, tuple)):
        try:
            if any(isinstance(part, Tensor) for part in value):
                return torch.stack(list(value))
            return torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"calibration batch {place} holds '{name}' as {_kind(value)}, which is no tensor ({error}): leave it "
                "out, or pad rows of different lengths"
            ) from error
    raise DataError(f"calibration batch {place} holds '{name}' as {_kind(value)}: a batch is {_WANTED}")


def _kind(value: Any) -> str:
    of = f" of {type(value[0]).__name__}" if isinstance(value, (list, tuple)) and value else ""
    return f"a {type(value).__name__}{of}"
