"""The embeddings that a model of transformers names as its own."""

from __future__ import annotations

import transformers
from torch import nn


def embeddings_of(model: nn.Module, which: str) -> nn.Module | None:
    """The `input_embeddings` or `output_embeddings` of a model; None where there are none, or none that it knows of."""
    try:
        return getattr(model, f"get_{which}")() if isinstance(model, transformers.PreTrainedModel) else None
    except (NotImplementedError, AttributeError):
        return None
