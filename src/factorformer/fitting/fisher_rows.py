"""Fisher rows of one batch: squared gradients of a weight, from the inputs and output gradients of its layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def fisher_rows(
    loss: Tensor, calls: Sequence[tuple[str, Tensor, Tensor]], layers: Mapping[str, nn.Module], examples: int
) -> dict[str, Tensor]:
    """For each row of each weight the squared gradients of the examples of a batch, summed over examples and columns.

    Args:
        loss: a mean over the examples, with a graph.
        calls: of layers: name, input and output, with the examples in the first dimension.
        layers: linear layers and embeddings, by name.
        examples: in the batch.

    Returns:
        `(out,)` by name, without layers that the loss does not depend on.
    """
    gradients = torch.autograd.grad(loss * examples, [y for _, _, y in calls], allow_unused=True)
    joined: dict[str, list[tuple[Tensor, Tensor]]] = {}
    rows: dict[str, Tensor] = {}
    for (name, x, _), gradient in zip(calls, gradients, strict=True):
        layer = layers[name]
        if gradient is None:
            continue
        if isinstance(layer, nn.Embedding) and len(x) != examples:
            # Positions that the whole batch shares have no gradient of one example: their rows all count the same.
            rows[name] = torch.ones(layer.num_embeddings, dtype=torch.float64, device=x.device)
        else:
            joined.setdefault(name, []).append((x, gradient))
    for name, pairs in joined.items():
        # All positions and calls of one example add up to its gradient, before the square is taken.
        delta = torch.cat([g.reshape(examples, -1, g.shape[-1]) for _, g in pairs], dim=1).float()
        layer = layers[name]
        if isinstance(layer, nn.Embedding):
            index = torch.cat([x.reshape(examples, -1) for x, _ in pairs], dim=1)
            rows[name] = _embedding_rows(index, delta, layer.num_embeddings)
        else:
            x = torch.cat([x.reshape(examples, -1, x.shape[-1]) for x, _ in pairs], dim=1).float()
            rows[name] = _linear_rows(x, delta)
    return rows


def _linear_rows(x: Float[Tensor, "batch t inner"], delta: Float[Tensor, "batch t out"]) -> Float[Tensor, " out"]:
    """Sum over examples and columns of squared gradients of a weight, by rows, without an (out, inner) matrix each.

    With `G = sum_t delta_t x_t^T`: `sum_j G_ij^2 = sum_ts delta_ti (x_t . x_s) delta_si`.
    """
    return (torch.bmm(torch.bmm(x, x.transpose(1, 2)), delta) * delta).sum((0, 1)).double()


def _embedding_rows(
    index: Int[Tensor, "batch t"], delta: Float[Tensor, "batch t width"], rows: int
) -> Float[Tensor, " out"]:
    """Sum over examples of the squared gradient norm of every embedding row."""
    example = torch.arange(len(index), device=index.device)[:, None]
    keys, inverse = torch.unique(example * rows + index, return_inverse=True)
    gradient = delta.new_zeros(len(keys), delta.shape[-1]).index_add_(0, inverse.flatten(), delta.flatten(0, 1))
    squares = gradient.square().sum(1).double()
    return squares.new_zeros(rows).index_add_(0, keys % rows, squares)
