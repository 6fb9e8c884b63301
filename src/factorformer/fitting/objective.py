"""What a model is for, as a scalar to differentiate: how far its loss or its output moves.

A curvature of the loss needs no labels where the model predicts a distribution: with labels drawn from that
distribution, the second moment of gradients is the Fisher information, the curvature of the divergence between the
predictions of the changed model and its own (Amari, 1998; Martens, 2020). Where a model gives a vector
instead, the gradient of its product with a random vector of mean zero and unit covariance has the second moment
`J^T J` of the Gauss-Newton matrix, and half of that is the curvature of `1 - cosine` for vectors of norm 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from factorformer.errors import DataError
from factorformer.fitting.batches import Batch

DRAWS = 4
"""Labels or directions that are drawn for a row where a row has one alone; a token of many needs no more than one."""

TEMPERATURE = 4.0
"""By what the logits of classifiers are divided before labels are drawn: of rows that they were trained on they are
too certain to show what matters to others. Ours, of 1, 2 and 4 on MiniLM fine-tuned on sst2 and banking77."""

COSINE = "1 - cosine"
"""The objective of encoders."""

PLACES = 512
"""Predictions that are looked at together."""

IGNORED = -100
"""A label that the losses of transformers pass over."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A sum over units, drawn anew for every gradient.

    Args:
        name: what a unit of it is: `loss` in nats, or `1 - cosine`.
        units: tokens or rows that it is a sum over.
        draws: gradients to take the second moment of.
        draw: a scalar with a graph.
        pooled: whether it depends on the mean over the tokens of each row, so that they share most of their gradients.
    """

    name: str
    units: float
    draws: int
    draw: Callable[[], Tensor]
    pooled: bool = False


def objective(
    model: nn.Module, batch: Batch, output: Any, generator: torch.Generator, drawn: bool = False
) -> Objective:
    """What to differentiate of a model's output.

    - The loss, where the batch holds labels of tokens, and where all that the model gives is a loss.
    - The log-likelihood of labels drawn from the prediction, where the model gives logits.
    - The product with a random direction of the normalized mean of the last hidden states of real tokens, or of another
      output of an encoder.

    Args:
        model: decides with its configuration what logits mean.
        batch: what the output is of.
        output: with a graph.
        generator: of the draws, on the CPU.
        drawn: draw labels where the model gives logits, even if the batch has some.

    Raises:
        DataError: the model gives no tensor that depends on its weights.
    """
    named = dict(output) if isinstance(output, Mapping) else {"output": output}
    config = getattr(model, "config", None)
    loss = named.get("loss")
    predicted = {key: value for key, value in named.items() if _is_logits(key, value)}
    draws = (drawn and bool(predicted)) or any(value.dim() == 2 for value in predicted.values())
    if isinstance(loss, Tensor) and loss.requires_grad and "labels" in batch and not draws:
        units = _labelled(model, batch["labels"], loss)
        return Objective("loss", units, 1, lambda: loss.sum() * units)
    mask = _mask(config, batch)
    if predicted:
        logits, ends = list(predicted.values()), set(predicted) == {"start_logits", "end_logits"}
        units, draws = _units(logits[0], mask)
        return Objective("loss", units, draws, lambda: _likelihood(config, logits, mask, generator, ends))
    states = _states(named)
    if states is None:
        raise DataError(
            f"{type(model).__name__} returned no tensor that depends on its weights: calibrate on data that it makes "
            "hidden states or logits of"
        )
    vectors = _pooled(states, mask)
    unit = F.normalize(vectors.float(), dim=-1)

    def direction() -> Tensor:
        return (unit * torch.randn(unit.shape, generator=generator).to(unit.device)).sum()

    return Objective(COSINE, len(unit), DRAWS, direction, pooled=states.dim() > 2)


def _is_logits(name: str, value: object) -> bool:
    named = name.startswith("logits") or name.endswith("_logits")
    return named and isinstance(value, Tensor) and value.requires_grad and value.dim() > 1


def _mask(config: Any, batch: Batch) -> Tensor | None:
    """Which positions of the output are real."""
    decoding = getattr(config, "is_encoder_decoder", False)
    mask = batch.get("decoder_attention_mask" if decoding else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _labelled(model: nn.Module, labels: Tensor, loss: Tensor) -> float:
    """How many labels a mean loss is of."""
    if labels.dim() < 2 or loss.dim() or labels.is_floating_point():
        return float(len(labels) if loss.dim() == 0 else 1)
    # A decoder alone predicts its own input, of which the first token is not predicted.
    decodes = getattr(model, "can_generate", bool)() and not getattr(model.config, "is_encoder_decoder", False)
    return float(((labels[:, 1:] if decodes else labels) != IGNORED).sum())


def _units(logits: Tensor, mask: Tensor | None) -> tuple[float, int]:
    """Rows or tokens that are predicted, and draws for each."""
    if logits.dim() < 3:
        return float(len(logits)), DRAWS
    if logits.dim() == 4:  # images have classes in front
        return float(logits[:, 0].numel()), 1
    real = mask is not None and mask.shape == logits.shape[:2]
    return float(mask.sum() if real and mask is not None else logits[..., 0].numel()), 1


def _likelihood(
    config: Any, logits: list[Tensor], mask: Tensor | None, generator: torch.Generator, ends: bool
) -> Tensor:
    """The sum of the negative log-likelihoods of labels that are drawn from the predictions.

    Its gradients have the curvature of what transformers takes for the loss, which is a mean over labels of a row, over
    the two ends of a span, and of squared errors.
    """
    total = logits[0].new_zeros((), dtype=torch.float32)
    problem = getattr(config, "problem_type", None)
    for values in logits:
        of_rows, values = values.dim() == 2, values.float()
        if values.dim() > 2 and mask is not None and mask.shape == values.shape[:2]:
            values = values[mask.bool().to(values.device)]
        if values.dim() == 2 and (values.shape[1] == 1 or problem == "regression"):
            noise = torch.randn(values.shape, generator=generator).to(values.device)
            total = total + (values * noise).sum() * (2 / values.shape[1]) ** 0.5
        elif values.dim() == 2 and problem == "multi_label_classification":
            drawn = torch.rand(values.shape, generator=generator).to(values.device) < values.detach().sigmoid()
            each = F.binary_cross_entropy_with_logits(values, drawn.float(), reduction="sum")
            total = total + each / values.shape[1] ** 0.5
        else:
            flat = values.movedim(1, -1) if values.dim() == 4 else values
            softer = TEMPERATURE if of_rows and not ends else 1.0
            flat = flat.reshape(-1, flat.shape[-1]) / softer
            drawn = _sample(flat.detach(), generator)
            total = total + softer * _negative_likelihood(flat, drawn)
    return total / 2**0.5 if ends else total


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One class for each row, by the inverse of its cumulative distribution."""
    chosen = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    found = []
    for part, point in zip(logits.split(PLACES), chosen.split(PLACES), strict=True):
        cumulative = part.softmax(-1).cumsum(-1)
        found.append(torch.searchsorted(cumulative, point * cumulative[:, -1:]).squeeze(1))
    return torch.cat(found).clamp_max(logits.shape[-1] - 1)


def _negative_likelihood(logits: Tensor, drawn: Tensor) -> Tensor:
    """Summed; of many places a few at a time, computed again in the backward pass, for vocabularies are wide."""
    if len(logits) <= PLACES:
        return F.cross_entropy(logits, drawn, reduction="sum")
    parts = zip(logits.split(PLACES), drawn.split(PLACES), strict=True)
    return torch.stack([checkpoint(_negative_likelihood, *part, use_reentrant=False) for part in parts]).sum()


def _states(named: Mapping[str, Any]) -> Tensor | None:
    """What an encoder makes of each row, or of each of its tokens: `(rows, ..., width)`."""
    tensors = {k: v for k, v in named.items() if isinstance(v, Tensor) and v.requires_grad and v.dim() > 1}
    names = ("sentence_embedding", "last_hidden_state", "pooler_output", *tensors)
    return next((tensors[name] for name in names if name in tensors), None)


def _pooled(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over real positions."""
    if states.dim() == 2:
        return states
    if states.dim() == 4:  # convolutional maps have channels in front
        return states.flatten(2).mean(2)
    if mask is None or mask.shape != states.shape[:2]:
        return states.flatten(1, -2).mean(1)
    real = mask.to(states)[..., None]
    return (states * real).sum(1) / real.sum(1).clamp_min(1)
