"""Sparse coding on plain tensors: a matrix as combinations of few atoms of a dictionary, and the dictionary itself.

Throughout, `target: (rows, width)` is approximated by `S D`, with a sparse `S: (rows, atoms)` and a dense dictionary
`D: (atoms, width)`; `gram = D D^T`, and `choose` turns scores of entries into the mask of those that may be nonzero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Choose = Callable[[Tensor], Tensor]
"""Scores of entries, `(rows, atoms)` and not negative, to a mask of the same shape with as many entries in each row."""

RIDGE = 1e-6
"""Added to Gram matrices, relative to the mean of their diagonal, so that atoms that nobody uses stay solvable."""


def largest(nonzeros: int) -> Choose:
    """The mask of the entries that score highest in each row."""

    def choose(scores: Float[Tensor, "rows atoms"]) -> Bool[Tensor, "rows atoms"]:
        best = scores.topk(nonzeros, dim=1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)

    return choose


def orthonormal_dictionary(
    target: Float[Tensor, "rows width"], atoms: int, choose: Choose, rounds: int
) -> tuple[Float[Tensor, "rows atoms"], Float[Tensor, "atoms width"]]:
    """Sparse codes in the best orthonormal dictionary: hard thresholding and an orthogonal Procrustes problem in turn.

    With orthonormal atoms the best codes are the largest entries of `M D^T`, and the best such dictionary for given
    codes is `U V^T` of the singular value decomposition `S^T M = U diag(s) V^T`: neither raises the error (Lesage,
    Gribonval, Bimbot and Benaroya, ICASSP 2005; CoSpaDi, arXiv 2509.22075, fits language models so). The start is a
    fixed random rotation of the leading singular vectors, whose codes are dense: thresholding those vectors themselves
    would never leave them.

    Args:
        target: `M`.
        atoms: at most rows and width.
        choose: the constraint on `S`.
        rounds: of both steps.
    """
    _, vectors = torch.linalg.eigh(target.T @ target)
    random = torch.randn(atoms, atoms, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dictionary = torch.linalg.qr(random)[0].to(target) @ vectors[:, -atoms:].T
    for _ in range(rounds):
        left, _, right = torch.linalg.svd(hard_threshold(target @ dictionary.T, choose).T @ target, full_matrices=False)
        dictionary = left @ right
    return hard_threshold(target @ dictionary.T, choose), dictionary


def hard_threshold(codes: Float[Tensor, "rows atoms"], choose: Choose) -> Float[Tensor, "rows atoms"]:
    """The largest entries that `choose` admits, and zeros."""
    return codes * choose(codes.square())


def matching_pursuit(
    projected: Float[Tensor, "rows atoms"], gram: Float[Tensor, "atoms atoms"], nonzeros: int, rounds: int = 8
) -> Float[Tensor, "rows atoms"]:
    """Sparse codes in a given dictionary of unit atoms, by orthogonal matching pursuit with several atoms a round.

    Each round adds the atoms that correlate best with the residual, and solves least squares on all chosen so far
    (Pati, Rezaiifar and Krishnaprasad, 1993; batch form of Rubinstein, Zibulevsky and Elad, 2008). With as many rounds
    as nonzeros it is the classical method.

    Args:
        projected: `target @ D.T`.
        gram: `D @ D.T`, with a diagonal of 1 (or 0, for atoms of zeros).
        nonzeros: in each row of the result.
        rounds: at most as many as nonzeros.
    """
    codes, mask = torch.zeros_like(projected), torch.zeros_like(projected, dtype=torch.bool)
    rounds = min(rounds, nonzeros)
    for done in range(rounds):
        added = nonzeros * (done + 1) // rounds - nonzeros * done // rounds
        residual = (projected - codes @ gram).abs().masked_fill(mask, -1)
        mask = mask | largest(added)(residual)
        codes = solve_codes(projected, gram, mask)
    return codes


def solve_codes(
    projected: Float[Tensor, "rows atoms"], gram: Float[Tensor, "atoms atoms"], mask: Bool[Tensor, "rows atoms"]
) -> Float[Tensor, "rows atoms"]:
    """Least squares on given supports with as many entries in each row, by a batched Cholesky decomposition."""
    result = torch.zeros_like(projected)
    count = int(mask[0].sum())
    ridge = RIDGE * torch.eye(count, dtype=gram.dtype, device=gram.device)
    for rows in torch.arange(len(mask)).split(max(1, 2**22 // count**2)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        positions = mask[part].nonzero()[:, 1].view(-1, count)
        chosen = gram[positions[:, :, None], positions[:, None, :]] + ridge
        values = torch.cholesky_solve(projected[part].gather(1, positions)[..., None], torch.linalg.cholesky(chosen))
        result[part].scatter_(1, positions, values[..., 0])
    return result


def refine_codes(
    codes: Float[Tensor, "rows atoms"],
    mask: Bool[Tensor, "rows atoms"],
    right: Float[Tensor, "rows atoms"],
    gram: Float[Tensor, "atoms atoms"],
    moment: Float[Tensor, "rows rows"] | None,
    steps: int,
) -> Float[Tensor, "rows atoms"]:
    """Conjugate gradients towards the least squares codes on given supports: `(K S G) = right` on the mask.

    Dense products with a mask are faster than exact solutions row by row, from some tens of nonzeros on, and the only
    way where a `moment` couples the rows.

    Args:
        codes: the start, zero outside of the mask.
        mask: the support.
        right: `K M D^T`.
        gram: `G = D D^T`, best with a constant diagonal.
        moment: `K`, the identity if None; best with a constant diagonal.
        steps: of conjugate gradients.
    """
    dims = (1,) if moment is None else (0, 1)
    tiny = torch.finfo(codes.dtype).tiny

    def curve(direction: Tensor) -> Tensor:
        product = direction @ gram
        return (product if moment is None else moment @ product).mul_(mask)

    residual = (right * mask).sub_(curve(codes))
    direction = residual
    squared = residual.square().sum(dims, keepdim=True)
    for _ in range(steps):
        curved = curve(direction)
        length = squared / (direction * curved).sum(dims, keepdim=True).clamp_min(tiny)
        codes = torch.addcmul(codes, length, direction)
        residual = torch.addcmul(residual, length, curved, value=-1)
        previous, squared = squared, residual.square().sum(dims, keepdim=True)
        direction = torch.addcmul(residual, squared / previous.clamp_min(tiny), direction)
    return codes


def best_dictionary(
    codes: Float[Tensor, "rows atoms"],
    target: Float[Tensor, "rows width"],
    moment: Float[Tensor, "rows rows"] | None = None,
) -> Float[Tensor, "atoms width"]:
    """`(S^T K S)^-1 S^T K M`, the least squares dictionary for given codes (Engan, Aase and Husoy, ICASSP 1999)."""
    weighted = codes.T if moment is None else codes.T @ moment
    gram = weighted @ codes
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    root, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):  # a matrix of low rank, which needs fewer atoms than it has
        gram.diagonal().add_(100 * RIDGE * gram.diagonal().mean())
        root = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(weighted @ target, root)
