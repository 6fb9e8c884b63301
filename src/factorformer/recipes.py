"""Every published method is one row of this table; a new one is one more row."""

from __future__ import annotations

import dataclasses
from typing import Literal

from factorformer.errors import MethodError, one_of
from factorformer.fitting import MetricName
from factorformer.layers.matrix import Matrix, Scope
from factorformer.planning import AllocationName
from factorformer.structures import STRUCTURES, DenseSparse, KroneckerSum, LowRank, Structure

Training = Literal["none", "fine-tune", "straight-through", "from scratch"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method is four choices: structure, metric, allocation, training.

    Args:
        structure: what a weight matrix becomes; `Structure` itself stands for any, chosen for each matrix.
        tables: what embeddings can become that are looked up and nothing else, where that is not the same; chosen for
            each by what it loses.
        metric: what error the fit minimizes.
        allocation: who gets how much of the budget.
        training: how the factors learn after the fit, or instead of it.
        summary: one human-readable line.
        paper: where the method comes from.
        scope: what it changes and counts unless told otherwise.
        sequential: whether each matrix is fitted to what it reads in the model as it is compressed so far.
    """

    structure: type[Structure]
    metric: MetricName
    allocation: AllocationName
    training: Training
    summary: str
    paper: str
    scope: Scope = "blocks"
    sequential: bool = False
    tables: tuple[type[Structure], ...] = ()

    @property
    def structures(self) -> tuple[type[Structure], ...]:
        """What a weight matrix can become."""
        return tuple(STRUCTURES.values()) if self.structure is Structure else (self.structure,)

    def structures_of(self, matrix: Matrix) -> tuple[type[Structure], ...]:
        """What this one can become."""
        looked_up = matrix.lookups > 0 and not matrix.products
        return self.tables if looked_up and self.tables else self.structures

    @property
    def kind(self) -> str:
        """The name of the structure, or `any`."""
        return "any" if self.structure is Structure else self.structure.kind

    @property
    def needs(self) -> str:
        """What data the fit needs: nothing, text, or labelled text."""
        return {"plain": "nothing", "fisher_rows": "labelled text"}.get(self.metric, "text")


RECIPES: dict[str, Recipe] = {
    "svd": Recipe(
        structure=LowRank,
        metric="plain",
        allocation="uniform",
        training="fine-tune",
        summary="Truncated SVD of every matrix: the plain fit, for when there is no data at all",
        paper="Eckart and Young, Psychometrika 1936",
    ),
    "fwsvd": Recipe(
        structure=LowRank,
        metric="fisher_rows",
        allocation="uniform",
        training="fine-tune",
        summary="SVD with each row weighted by its Fisher information, from the gradients of labelled examples",
        paper="FWSVD: Hsu et al., ICLR 2022",
    ),
    "whitened": Recipe(
        structure=LowRank,
        metric="input_moment",
        allocation="uniform",
        training="fine-tune",
        summary="SVD that minimizes the error of each layer's output on calibration text, at the same ratio for all",
        paper="DRONE: Chen et al., NeurIPS 2021; SVD-LLM: Wang et al., ICLR 2025",
    ),
    "fisher": Recipe(
        structure=LowRank,
        metric="fisher",
        allocation="by_loss",
        training="fine-tune",
        summary="Low rank, for tables dictionaries as well, by the predicted rise of the loss: the default with data",
        paper="this project; the curvature is that of K-FAC: Martens and Grosse, ICML 2015",
        sequential=True,
        tables=(LowRank, DenseSparse),
    ),
    "auto": Recipe(
        structure=Structure,
        metric="fisher",
        allocation="by_loss",
        training="fine-tune",
        summary="Structure and size of each matrix, by the predicted rise of the loss for bytes, FLOPs or milliseconds",
        paper="this project",
        sequential=True,
        tables=(LowRank, DenseSparse),
    ),
    "kronecker": Recipe(
        structure=KroneckerSum,
        metric="plain",
        allocation="uniform",
        training="fine-tune",
        summary="Every matrix a sum of Kronecker products: the plain fit, in closed form",
        paper="Van Loan and Pitsianis, 1993",
    ),
    "kronecker_whitened": Recipe(
        structure=KroneckerSum,
        metric="input_moment",
        allocation="uniform",
        training="fine-tune",
        summary="A sum of Kronecker products that minimizes the error of each layer's output on calibration text",
        paper="this project: the input metric of DRONE and SVD-LLM, by alternating least squares",
    ),
    "dense_sparse_plain": Recipe(
        structure=DenseSparse,
        metric="plain",
        allocation="uniform",
        training="fine-tune",
        summary="A small dictionary times a sparse matrix: the plain fit",
        paper="sparse coding; Olshausen and Field, 1997",
    ),
    "dense_sparse": Recipe(
        structure=DenseSparse,
        metric="input_moment",
        allocation="uniform",
        training="fine-tune",
        summary="A small dictionary times a sparse matrix that minimize the error of each layer's output, fine-tuned",
        paper="this project: DSFormer's form, fitted once",
    ),
    "cospadi": Recipe(
        structure=DenseSparse,
        metric="input_moment",
        allocation="uniform",
        training="none",
        summary="The same fit as the end of it: data-aware, without training",
        paper="CoSpaDi: arXiv 2509.22075",
    ),
    "dsformer": Recipe(
        structure=DenseSparse,
        metric="input_moment",
        allocation="uniform",
        training="straight-through",
        summary="A small dictionary times a sparse matrix whose support is learned in fine-tuning, straight through",
        paper="DSFormer: Chand, Prabhu and Kumar, arXiv 2312.13211",
    ),
    "rankdyna": Recipe(
        structure=LowRank,
        metric="input_moment",
        allocation="dynamic",
        training="fine-tune",
        summary="Ranks move between matrices in one round of fine-tuning; components of the data-aware decomposition",
        paper="RankDyna: Hua et al., Findings of EMNLP 2023; the data-aware components: this project",
    ),
    "rankdyna_fisher": Recipe(
        structure=LowRank,
        metric="fisher",
        allocation="dynamic",
        training="fine-tune",
        summary="The same with the components of the decomposition in units of the loss, as in fisher",
        paper="RankDyna: Hua et al., Findings of EMNLP 2023; the components: this project",
    ),
    "rankdyna_plain": Recipe(
        structure=LowRank,
        metric="plain",
        allocation="dynamic",
        training="fine-tune",
        summary="The same with the components of the plain singular value decomposition",
        paper="RankDyna: Hua et al., Findings of EMNLP 2023",
    ),
    "dynamic_dense_sparse": Recipe(
        structure=DenseSparse,
        metric="input_moment",
        allocation="dynamic",
        training="fine-tune",
        summary="Atoms of dictionaries compete for the budget while the model is fine-tuned",
        paper="this project: RankDyna's competition between DSFormer's atoms",
    ),
    "dynamic_kronecker": Recipe(
        structure=KroneckerSum,
        metric="input_moment",
        allocation="dynamic",
        training="fine-tune",
        summary="Kronecker terms compete for the budget while the model is fine-tuned",
        paper="this project: RankDyna's competition between Shapeshifter's terms",
    ),
    "shapeshifter": Recipe(
        structure=KroneckerSum,
        metric="plain",
        allocation="by_role",
        training="from scratch",
        summary="The whole model as sums of Kronecker products, small in attention and larger in embeddings",
        paper="Shapeshifter: Panahi, Saeedi and Arodz, NeurIPS 2021",
        scope="all",
    ),
}


def get(method: str) -> Recipe:
    """The recipe of this name.

    Raises:
        MethodError: no such method; the message names the nearest.
    """
    if method not in RECIPES:
        raise MethodError(f"unknown method {one_of(method, RECIPES)}")
    return RECIPES[method]


def default_method(*, calibrated: bool) -> str:
    """The data-aware fit where there is calibration data, the plain fit where there is none."""
    return "fisher" if calibrated else "svd"
