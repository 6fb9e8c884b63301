"""The verb `plan`: what every weight matrix becomes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import get_args

from torch import Tensor, nn

from factorformer import planning, recipes
from factorformer.errors import BudgetError, MethodError, one_of
from factorformer.fitting import QUICK, MetricName
from factorformer.fitting import statistics as calibrate
from factorformer.fitting.batches import Batch, Calibration, as_batches
from factorformer.fitting.matrices import fit_matrix, fit_stack, measure
from factorformer.layers.dense import dense_weight
from factorformer.layers.matrix import Cost, Matrix, Member, Scope, total
from factorformer.layers.surgery import find_matrices
from factorformer.planning import Entry, Plan, Share, Unit
from factorformer.planning.evidence.prediction import plan_by_loss
from factorformer.progress import Progress, silent
from factorformer.structures import Structure
from factorformer.structures.integers import Bits

DEFAULT_RATIO: dict[Bits | None, float] = {None: 3.0, 8: 10.0, 4: 15.0}
"""Compression ratio if none is given, by the bits of integers in which matrices are stored."""


def plan(
    model: nn.Module,
    method: str | None = None,
    ratio: float | None = None,
    scope: Scope | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    *,
    share: Share | None = None,
    budget: Unit = "bytes",
    int8: bool = False,
    int4: bool = False,
    rank_multiple: int = 1,
    calibration: Calibration | None = None,
    progress: Progress = silent,
    keep_statistics: bool = False,
    new_head: bool = False,
    token_counts: Tensor | None = None,
    before: Cost | None = None,
) -> Plan:
    """Decide what every weight matrix becomes, without changing anything.

    Where the bytes of a matrix can be spent in more than one way (on atoms or on nonzeros), a few cheap fits decide. A
    model without weights, on the meta device, gets sizes that are good on average. Methods that allocate by loss, such
    as `auto`, weigh the error curves of all matrices against each other, and predict the error of the whole.

    Args:
        model: a Transformer.
        method: a name that `factorformer methods` lists; None takes `fisher` with calibration data, and without leaves
            the choice to `compress`.
        ratio: bytes of the original tensors in scope over the bytes of what replaces them, or another cost if `budget`
            says so; by default 3, 10 in int8, which by itself gives 4, and 15 in int4, which gives almost 8.
        scope: `blocks` for the linear layers of the Transformer blocks, `all` for the whole model with embeddings; None
            for what the method is made for, which is `all` for `shapeshifter` and `blocks` for the others.
        include, exclude: shell patterns of module names, e.g. `*.attention.*`; one alone may be given as it is.
        share: which matrices share one dictionary: with `inputs` those of a block that read the same tensor (query, key
            and value; gate and up) and the output of attention, with `layers` the same matrix of all blocks; None for
            none.
        budget: what the ratio counts: bytes, FLOPs of the products for a token, or milliseconds that those of 512 rows
            take on this machine, measured now. Others than bytes are for methods that allocate by loss.
        int8: store all matrices that `include` and `exclude` leave, factorized or dense, in int8 with a scale for each
            row, and count them so. Dense ones take a quarter of the bytes of float32. At ratios below that methods that
            allocate by loss leave those matrices in floats that rounding harms most, as many as fit whole; other
            methods exceed such ratios.
        int4: the same in 4 bits, two values in a byte, with scales for groups of values. Methods that allocate by loss
            store matrices in another width where that loses less for its bytes: in 8 bits as long as all would fit
            dense in 4, and in 3 beyond; others exceed ratios below 8.
        rank_multiple: ranks of low-rank matrices are multiples of this; for methods that make such.
        calibration: batches as for `compress`; with them the cheap fits minimize the error that the method minimizes,
            and without them the plain error of the weights. With them allocation by loss is by the predicted
            rise of the loss, and what they do not reach stays dense.
        progress: progress callback.
        keep_statistics: leave what calibration measured in the plan, for `compress`; a moment takes as much memory as
            a square matrix as wide as the layer's input or output.
        new_head: whether the model's head has learned nothing yet: what an error does is then measured at the hidden
            states below it.
        token_counts: how often each token occurs in more text than that of calibration, `(vocabulary,)`: embeddings are
            judged, and fitted, by these. Most words are not among the few that calibration reads.
        before: cost of everything in scope before tokens were dropped or layers tied (`inventory(model).original`), if
            any were: a ratio of bytes is relative to that.

    Raises:
        MethodError: an unknown method or budget, a budget that the method does not count, or a method whose matrices
            have nothing to share, or no ranks to be multiples.
        BudgetError: a ratio that cannot be met within 1 %; the message names the nearest that can.
        ModelError: a pattern that matches nothing, or a weight that is not finite.
        DataError: calibration data that the model cannot run on, or that lacks labels if the method needs them.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(hidden_size=64, num_attention_heads=4, intermediate_size=128, vocab_size=50))
    >>> f"{plan(model, 'svd', ratio=2.5).ratio:.2f}"
    '2.50'
    """
    name = method or recipes.default_method(calibrated=calibration is not None)
    if int8 and int4:
        raise MethodError("matrices are stored in int8 or in int4, not in both: give one")
    bits: Bits | None = 8 if int8 else 4 if int4 else None
    ratio = DEFAULT_RATIO[bits] if ratio is None else ratio
    check_options(name, ratio, share, budget, rank_multiple)
    recipe = recipes.get(name)
    scope = scope or recipe.scope
    data = None if calibration is None else list(as_batches(model, calibration))
    matrices, rest = find_matrices(model, scope, include, exclude, bits=bits, batch=data[0] if data else None)
    if data is not None and recipe.metric != "plain":
        able = [matrix.name for matrix in matrices if matrix.dense is None]
        # Plans by loss find by themselves what no gradient reaches.
        metric = "plain" if recipe.allocation == "by_loss" else recipe.metric
        unreached = calibrate.unreached(model, able, data, metric, new_head=new_head)
        matrices = [dataclasses.replace(m, dense=unreached.get(m.name, m.dense)) for m in matrices]
    asked = ratio
    if before is not None and budget == "bytes":
        ratio *= (total(matrix.cost(None) for matrix in matrices) + rest).bytes / before.bytes
    _check_any(matrices, include is not None)
    _check_multiple(matrices, rank_multiple)
    allocate = planning.ALLOCATIONS[recipe.allocation]
    candidates = planning.candidates_of(recipe.structure, rank_multiple)
    if allocate is None:
        # Its sizes are those for this fit, and its prediction that of this fit.
        draft = Plan(method if data is None else name, scope, ratio, (), rest, budget)
        with _naming(rank_multiple):
            made = plan_by_loss(
                model,
                recipe.structures_of,
                recipe.metric,
                draft,
                matrices,
                data,
                progress,
                rank_multiple,
                new_head,
                token_counts,
            )
        made = dataclasses.replace(made, target=asked, before=before)
        return made if keep_statistics else dataclasses.replace(made, statistics={})
    groups = planning.find_groups(matrices, share)
    stacks = planning.stacked(matrices, groups)
    with _naming(rank_multiple):
        entries = allocate(stacks, candidates, ratio, rest)
    if recipe.training != "from scratch" and _can_choose(model, entries):
        choices = _choose(model, entries, groups, recipe.metric, data, progress, token_counts)

        def sizes(matrix: Matrix) -> Iterable[Structure]:
            return choices[matrix.name].ladder if matrix.name in choices else candidates(matrix)

        # Few and small matrices: with a given number of atoms, perhaps no combination of nonzeros meets the budget.
        with contextlib.suppress(BudgetError):
            entries = [_explained(entry, choices) for entry in allocate(stacks, sizes, ratio, rest)]
    return Plan(method, scope, asked, planning.expand(matrices, groups, entries), rest, before=before)


def _check_multiple(matrices: Sequence[Matrix], multiple: int) -> None:
    """Raise `BudgetError` if no rank that makes a matrix smaller is a multiple."""
    able = [matrix.shape for matrix in matrices if matrix.dense is None]
    largest = max(out * inner // (out + inner) for out, inner in able)
    if multiple > largest:
        raise BudgetError(
            f"ranks cannot be multiples of {multiple}: above {largest} none makes a matrix in scope smaller; ask for "
            "multiples of less"
        )


@contextlib.contextmanager
def _naming(multiple: int) -> Iterator[None]:
    """Say in errors about budgets that ranks are to be multiples, if they are."""
    try:
        yield
    except BudgetError as error:
        if multiple == 1:
            raise
        raise BudgetError(f"{error}, or leave out that ranks are multiples of {multiple}") from error


def _check_any(matrices: Sequence[Matrix], included: bool) -> None:
    """Raise `BudgetError` if every matrix has to stay dense, with the reasons."""
    if any(matrix.dense is None for matrix in matrices):
        return
    kept: dict[str, list[str]] = {}
    for matrix in matrices:
        kept.setdefault((matrix.dense or "").removesuffix(", left dense"), []).append(matrix.name)
    reasons = "; ".join(f"{reason}: {len(names)}, such as '{names[0]}'" for reason, names in kept.items())
    raise BudgetError(
        f"no matrix in scope can be factorized ({reasons or 'there is none'}); widen "
        + ("include and scope" if included else "the scope")
    )


def check_options(method: str, ratio: float | None, share: Share | None, budget: Unit, rank_multiple: int = 1) -> None:
    """Refuse what `plan` refuses of any model, before there is one.

    Raises:
        MethodError: an unknown method or budget, a budget that the method does not count, or a method whose matrices
            have nothing to share, or no ranks to be multiples.
        BudgetError: a ratio that no model can meet, or a multiple of ranks below 1.
    """
    _check_share(share, method, recipes.get(method).structure)
    _check_budget(budget, method)
    _check_has_ranks(method, rank_multiple)
    if ratio is not None and not 1 <= ratio < math.inf:
        raise BudgetError(f"ratio must be at least 1 (original bytes / compressed bytes), and finite; got {ratio}")


def _check_budget(budget: Unit, method: str) -> None:
    if budget not in get_args(Unit):
        raise MethodError(f"unknown budget {one_of(str(budget), get_args(Unit))}")
    if budget != "bytes" and planning.ALLOCATIONS[recipes.get(method).allocation] is not None:
        able = [name for name, recipe in recipes.RECIPES.items() if planning.ALLOCATIONS[recipe.allocation] is None]
        raise MethodError(
            f"a budget in {budget} needs a method that weighs sizes by what they cost and lose, and '{method}' gives "
            f"every matrix its part of the bytes; methods that do: {', '.join(able)}"
        )


def _check_has_ranks(method: str, multiple: int) -> None:
    if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
        raise BudgetError(f"ranks can be multiples of a whole number from 1 on; got {multiple}")
    able = [
        name
        for name, recipe in recipes.RECIPES.items()
        if recipe.allocation != "dynamic"
        and any(structure.is_multiple is not Structure.is_multiple for structure in recipe.structures)
    ]
    if multiple > 1 and method not in able:
        raise MethodError(
            f"rank_multiple={multiple} is for low-rank matrices of planned ranks, which '{method}' does not make; "
            f"methods that do: {', '.join(able)}"
        )


def _check_share(share: Share | None, method: str, structure: type[Structure]) -> None:
    if share is None:
        return
    if share not in get_args(Share):
        raise MethodError(f"unknown share {one_of(str(share), get_args(Share))}")
    if not structure.shareable:
        able = [name for name, recipe in recipes.RECIPES.items() if recipe.structure.shareable]
        makes = (
            "matrices of any structure, most of which"
            if structure is Structure
            else f"{structure.kind} matrices, which"
        )
        raise MethodError(
            f"share='{share}' needs factors that matrices can share, and '{method}' makes {makes} "
            f"have none; methods that do: {', '.join(able) or 'none'}"
        )


def _can_choose(model: nn.Module, entries: Sequence[Entry]) -> bool:
    """Whether any matrix could be stored in more than one way, and the weights to tell which are there."""
    planned = [entry for entry in entries if entry.spec is not None]
    return not any(dense_weight(model.get_submodule(entry.matrix.name)).is_meta for entry in planned) and any(
        len(entry.spec.families(entry.matrix.shape, entry.matrix.values)) > 1 for entry in planned if entry.spec
    )


def _choose(
    model: nn.Module,
    entries: Sequence[Entry],
    groups: Mapping[str, Sequence[Member]],
    metric: MetricName,
    data: Sequence[Batch] | None,
    progress: Progress,
    token_counts: Tensor | None,
) -> dict[str, planning.Choice]:
    """How each matrix, or stack of those that share factors, should divide its bytes: what a few cheap fits say."""
    stacks = [entry.matrix for entry in entries if entry.spec is not None]
    members = [member.matrix for stack in stacks for member in groups.get(stack.name, ())]
    names = [matrix.name for matrix in (*members, *(stack for stack in stacks if stack.name not in groups))]
    statistics = {} if data is None else measure(model, names, metric, data, progress, token_counts=token_counts)

    def error(matrix: Matrix, spec: Structure) -> float:
        members = groups.get(matrix.name)
        if members is None:
            return fit_matrix(model, matrix, spec, statistics, QUICK)[1]
        return fit_stack(model, members, spec, statistics, QUICK)[1]

    return planning.choose_families(entries, error, lambda done: progress("choose", done, None))


def _explained(entry: Entry, choices: Mapping[str, planning.Choice]) -> Entry:
    if entry.spec is None or entry.matrix.name not in choices:
        return entry
    return dataclasses.replace(entry, reason=f"{entry.reason}; {choices[entry.matrix.name].reason}")
