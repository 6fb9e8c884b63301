"""Sparse coding on plain tensors: a matrix as combinations of few atoms of a dictionary, and the dictionary itself.

Throughout, `target: (rows, width)` is approximated by `S D`, with a sparse `S: (rows, atoms)` of `nonzeros` entries a
row and a dense dictionary `D: (atoms, width)`; `gram = D D^T`.
"""

from __future__ import annotations

import numpy
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from factorformer.fitting.linalg import leading_eigenvectors

RIDGE = 1e-6
"""Added to Gram matrices, relative to the mean of their diagonal, so that atoms that nobody uses stay solvable."""


def largest(scores: Float[Tensor, "rows atoms"], nonzeros: int) -> Bool[Tensor, "rows atoms"]:
    """The mask of the entries that score highest in each row."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and nonzeros > 0:
        # With AVX-512, NumPy partitions rows three times as fast as two threads of torch find their largest entries.
        least = scores.shape[1] - nonzeros
        bound = torch.from_numpy(numpy.partition(scores.detach().numpy(), least, axis=1)[:, least : least + 1])
        mask = scores >= bound
        if bool((mask.sum(1) == nonzeros).all()):
            return mask  # no two scores of a row are equal there
    best = scores.topk(nonzeros, dim=1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def hard_threshold(codes: Float[Tensor, "rows atoms"], nonzeros: int) -> Float[Tensor, "rows atoms"]:
    """The largest entries of each row, and zeros."""
    return codes * largest(codes.square(), nonzeros)


def orthonormal_dictionary(
    target: Float[Tensor, "rows width"], atoms: int, nonzeros: int, rounds: int
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
        nonzeros: in each row of `S`.
        rounds: of both steps.
    """
    vectors, _ = leading_eigenvectors(target.T @ target, atoms)
    # Of the two signs of an eigenvector a library returns either, and rotations of both are two starts.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    random = torch.randn(atoms, atoms, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dictionary = torch.linalg.qr(random)[0].to(target) @ vectors.T
    for _ in range(rounds):
        codes = hard_threshold(target @ dictionary.T, nonzeros)
        left, _, right = torch.linalg.svd(codes.T @ target, full_matrices=False)
        dictionary = left @ right
    return hard_threshold(target @ dictionary.T, nonzeros), dictionary


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
        gram: `G = D D^T`, best with a constant diagonal; products with it have its precision.
        moment: `K`, the identity if None; best with a constant diagonal.
        steps: of conjugate gradients.
    """
    dims = (1,) if moment is None else (0, 1)
    tiny = torch.finfo(codes.dtype).tiny
    residual = (right * mask).sub_(_curved(codes, mask, gram, moment))
    direction = residual
    squared = residual.square().sum(dims, keepdim=True)
    for _ in range(steps):
        curved = _curved(direction, mask, gram, moment)
        length = squared / (direction * curved).sum(dims, keepdim=True).clamp_min(tiny)
        codes = torch.addcmul(codes, length, direction)
        residual = torch.addcmul(residual, length, curved, value=-1)
        previous, squared = squared, residual.square().sum(dims, keepdim=True)
        direction = torch.addcmul(residual, squared / previous.clamp_min(tiny), direction)
    return codes


def _curved(codes: Tensor, mask: Tensor, gram: Tensor, moment: Tensor | None) -> Tensor:
    """`K S G` on the mask."""
    product = times(codes, gram)
    return (product if moment is None else moment @ product).mul_(mask)


def times(codes: Float[Tensor, "rows atoms"], gram: Float[Tensor, "atoms atoms"]) -> Float[Tensor, "rows atoms"]:
    """`S G`, in the precision of `G`."""
    return (codes.to(gram.dtype) @ gram).to(codes.dtype)


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
