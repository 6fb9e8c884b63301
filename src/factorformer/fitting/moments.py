"""Second moments of vectors, such as the inputs of a layer, summed batch by batch."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref

import torch
from jaxtyping import Float
from torch import Tensor

from factorformer import processes
from factorformer.errors import ModelError
from factorformer.fitting.linalg import square_root
from factorformer.layers.modes import exact_products, fast_float32

BLOCK = 256
"""Columns of a moment that are updated at once: what lies above the diagonal of blocks is not computed."""

SHRINKAGE = 0.03
"""Weight of the identity in a moment of few vectors.

On MiniLM's embeddings, factors of 0.001 to 0.1 in its place did equally well with 30 and with 100 sentences, and 0.3
and 1 did worse.
"""


ATTEMPTS = (1, 1e2, 1e4, 1e6)
"""What the weight of the identity is multiplied by, until there is a root: sums of float32 are known no better."""

ROOTS = 4
"""Square roots that are kept: those of one matrix are asked for again and again."""

_roots: weakref.WeakKeyDictionary[SecondMoment, tuple[int, Tensor]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(eq=False)
class SecondMoment:
    """Second moment `C = X^T X / n` of vectors `X: (n, width)`.

    Args:
        total: `X^T X`, `(width, width)`, of which the lower triangle counts.
        count: `n`.
    """

    total: Float[Tensor, "width width"]
    count: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> SecondMoment:
        """Of no vectors yet."""
        return cls(torch.zeros(width, width, device=device))

    def add(self, vectors: Float[Tensor, "n width"], times: int = 1) -> None:
        """Count more vectors, each so many times: products and sums in the type of `total`."""
        rounded, vectors = vectors.dtype == torch.bfloat16, vectors.to(self.total.dtype)
        with exact_products(vectors.device), fast_float32(vectors.device, rounding=rounded):
            for first in range(0, len(self.total), BLOCK):
                block = vectors[:, first : first + BLOCK]
                self.total[first:, first : first + BLOCK].addmm_(vectors[:, first:].T, block, alpha=times)
        self.count += times * len(vectors)

    def symmetric(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "width width"]:
        """`X^T X`, both triangles."""
        made = self.total.to(dtype, copy=True).tril_()
        return made.add_(made.tril(-1).T)  # of wide layers, each copy more is what a run takes at its peak

    def mean_square(self) -> float:
        """Mean of the diagonal of `C`: the mean square of an entry of the vectors."""
        return float(self.total.diagonal().double().mean()) / max(self.count, 1)

    def moment(self, more: float = 1.0, dtype: torch.dtype = torch.float64) -> Float[Tensor, "width width"]:
        """`C`, regularized so that it is positive definite.

        Fewer vectors than entries leave directions unseen, whose error would then cost nothing. As in Ledoit and Wolf
        (2004) the estimate is shrunk towards a multiple of the identity. The weight of that, ours,
        `SHRINKAGE * width / (width + count)`, falls as directions are seen more often.

        Args:
            more: times that weight.
            dtype: of the result.
        """
        width = len(self.total)
        weight = min(more * SHRINKAGE * width / (width + self.count), SHRINKAGE)
        moment = self.symmetric(dtype).mul_((1 - weight) / max(self.count, 1))
        scale = self.mean_square()
        # Vectors of zeros only make no direction matter more than another.
        moment.diagonal().add_(weight * scale if scale > 0 else 1)
        return moment

    def root(self) -> Float[Tensor, "width width"]:
        """Lower-triangular square root of `moment()`, in float64."""
        known = _roots.get(self)
        if known is None or known[0] != self.count:
            while len(_roots) >= ROOTS:
                del _roots[next(iter(_roots))]
            known = _roots[self] = self.count, self._root()
        return known[1]

    def _root(self) -> Tensor:
        *attempts, last = ATTEMPTS
        for more in attempts:
            with contextlib.suppress(ModelError):
                return square_root(self.moment(more))
        return square_root(self.moment(last))


def join_moments(moments: dict[str, SecondMoment], device: torch.device) -> None:
    """Add up moments of layers over all processes, in place; those that share one share it afterwards.

    Args:
        moments: by layer; one that has met no vectors may be missing.
        device: where missing ones are made.
    """
    leaders: dict[int, str] = {}
    found = processes.gathered({name: leaders.setdefault(id(moment), name) for name, moment in moments.items()})
    widths = processes.merged({name: len(moment.total) for name, moment in moments.items()})
    alike: dict[tuple[str | None, ...], list[str]] = {}
    for name in sorted(widths):
        alike.setdefault(tuple(each.get(name) for each in found), []).append(name)
    for names in alike.values():
        known = moments.get(names[0]) or SecondMoment.zeros(widths[names[0]], device)
        made = SecondMoment(known.total.clone(), int(processes.total(known.count)))
        processes.add(made.total)
        moments |= dict.fromkeys(names, made)


def join_rows(rows: dict[str, Tensor], device: torch.device) -> None:
    """Add up numbers for rows of layers over all processes, in place; arguments as for `join_moments`."""
    sizes = processes.merged({name: (len(values), values.dtype) for name, values in rows.items()})
    for name, (size, dtype) in sorted(sizes.items()):
        made = rows[name].clone() if name in rows else torch.zeros(size, dtype=dtype, device=device)
        processes.add(made)
        rows[name] = made


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer; a field that was not asked for is None.

    With `A` the second moment of the input and `G` that of the gradient of the loss at the output, both means over
    tokens, the loss rises by about `1/2 n tr(G dW A dW^T)` with `n` from `tokens` (the Kronecker-factored Fisher
    information: Martens and Grosse, ICML 2015).

    Args:
        inputs: `A`; of an embedding, whose weight has its outputs along the columns, `G`.
        rows: importance of each row of the weight, `(out,)`: Fisher rows, or how often an embedding's row was used; or
            the diagonal of `G`, where that is too wide to be square.
        outputs: `G`.
        tokens: real tokens that a layer sees for each unit that the loss is a mean over.
        objective: in what the loss is, `loss` or `1 - cosine`; empty where gradients were not measured.
        dependence: by what factor it rises instead: tokens depend on each other, and gradients on inputs.
    """

    inputs: SecondMoment | None = None
    rows: Float[Tensor, " out"] | None = None
    outputs: SecondMoment | None = None
    tokens: float = 1.0
    objective: str = ""
    dependence: float = 1.0
