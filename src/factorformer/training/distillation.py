"""Losses that let a compressed model follow the model it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class DistillationWeights:
    """How much each signal counts beside the loss on labels.

    Args:
        labels: weight of the model's own loss.
        logits: weight of the teacher's softened predictions.
        hidden: weight of the teacher's hidden states.
        pooled: weight of the teacher's mean-pooled embeddings.
        temperature: softening of the predictions.
    """

    labels: float = 0.5
    logits: float = 0.5
    hidden: float = 0.5
    pooled: float = 0.0
    temperature: float = 2.0


WITHOUT_LABELS = DistillationWeights(labels=0.0, logits=0.0, hidden=1.0, pooled=1.0)
"""On plain text, hidden states and pooled embeddings of the original model are the only targets."""


def logit_loss(
    student: Float[Tensor, "rows classes"],
    teacher: Float[Tensor, "rows classes"],
    temperature: float,
    independent: bool = False,
) -> Float[Tensor, ""]:
    """Kullback-Leibler divergence of softened predictions, times temperature squared (Hinton et al., 2015).

    A single column is a regression output: there the squared error takes its place.

    Args:
        student, teacher: of texts or of words.
        temperature: what logits are divided by.
        independent: classes do not exclude each other (multi-label): divergences of all of them add up.
    """
    if independent:
        target = torch.sigmoid(teacher / temperature)
        losses = [
            F.binary_cross_entropy_with_logits(logits / temperature, target, reduction="sum")
            for logits in (student, teacher)
        ]
        return (losses[0] - losses[1]) / len(student) * temperature**2
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher)
    log_p = F.log_softmax(student / temperature, -1)
    log_q = F.log_softmax(teacher / temperature, -1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * temperature**2


def hidden_loss(
    student: Sequence[Float[Tensor, "batch t width"]],
    teacher: Sequence[Float[Tensor, "batch t width"]],
    mask: Bool[Tensor, "batch t"],
) -> Float[Tensor, ""]:
    """Mean squared error of hidden states, relative to the teacher's variance, averaged over layers and real tokens.

    Relative, so that layers whose states are large do not drown the others.
    """
    losses = [
        F.mse_loss(s[mask], t[mask]) / t[mask].var().clamp_min(torch.finfo(t.dtype).eps)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def mean_pool(hidden: Float[Tensor, "batch t width"], mask: Bool[Tensor, "batch t"]) -> Float[Tensor, "batch width"]:
    """The mean over real tokens, as sentence encoders pool."""
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


def pooled_loss(student: Float[Tensor, "batch width"], teacher: Float[Tensor, "batch width"]) -> Float[Tensor, ""]:
    """One minus the mean cosine of pooled embeddings."""
    return 1 - F.cosine_similarity(student, teacher).mean()
