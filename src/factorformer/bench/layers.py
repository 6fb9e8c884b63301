"""Which factors are faster than the dense matrix on this machine, and from how many tokens on."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from factorformer.bench.race import Spread
from factorformer.errors import ModelError
from factorformer.layers.nn import FactorizedLinear, new_factors
from factorformer.planning import Entry
from factorformer.planning.evidence.times import race
from factorformer.progress import Progress, silent
from factorformer.structures import Factors, Shape, Structure, int8

TOKENS = (1, 16, 128, 1024)
"""Rows of input at which products are timed by default."""

USUAL = 128
"""Rows of input at which a plan is judged: one long text, or a few short ones."""

NOISE = 1.1
"""How many times longer than the dense product one has to take, so that it is told."""

MOST = 2000
"""Rounds of one pair of products."""

PART = 0.1
"""Seconds that a plan's check spends on one shape and structure at most."""

LEAST_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Pace:
    """A product in factors against the dense one, at one number of tokens.

    Args:
        tokens: rows of input.
        speedup: how many times faster than dense in the same round.
        dense, factors: milliseconds.
    """

    tokens: int
    speedup: Spread
    dense: Spread
    factors: Spread


@dataclasses.dataclass(frozen=True)
class LayerPaces:
    """All layers of one shape, structure and type.

    Args:
        names: of the layers.
        shape: `(out, in)`.
        spec: their structure.
        dtype: in which the factors are stored: `int8`, or the floating type of the layers.
        paces: in growing numbers of tokens.
    """

    names: tuple[str, ...]
    shape: Shape
    spec: Structure
    dtype: str
    paces: tuple[Pace, ...]

    @property
    def ideal(self) -> float:
        """The speed-up if FLOPs were all that takes time."""
        return 2 * math.prod(self.shape) / self.spec.flops(self.shape)

    @property
    def pays(self) -> list[int]:
        """The numbers of tokens, of those measured, at which factors are at least as fast as the dense matrix."""
        return [pace.tokens for pace in self.paces if pace.speedup.median >= 1]

    @property
    def break_even(self) -> int | None:
        """The smallest measured number of tokens from which on factors always pay; None if they never do."""
        found = None
        for pace in reversed(self.paces):
            if pace.speedup.median < 1:
                break
            found = pace.tokens
        return found

    @property
    def verdict(self) -> str:
        """Where factors pay, in words."""
        measured, pays = [pace.tokens for pace in self.paces], self.pays
        if not pays:
            return "never"
        if pays == measured:
            return "always"
        if self.break_even is not None and pays == measured[-len(pays) :]:
            return f"from {self.break_even} tokens"
        if pays == measured[: len(pays)]:
            return f"up to {pays[-1]} tokens"
        return f"at {', '.join(map(str, pays))} tokens"


def layer_paces(
    model: nn.Module, tokens: Sequence[int] = TOKENS, seconds: float = 0.5, progress: Progress = silent
) -> list[LayerPaces]:
    """Time every distinct shape, structure and type among the factorized linear layers of a model.

    Args:
        model: compressed; its own factors multiply, on their device.
        tokens: rows of input.
        seconds: for each pair of products.
        progress: told how many are done.

    Raises:
        ModelError: no factorized linear layer.
    """
    groups: dict[tuple[Shape, Structure, torch.dtype, bool], list[tuple[str, FactorizedLinear]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLinear):
            key = (module.shape, module.spec, module.values.dtype, module.quantized)
            groups.setdefault(key, []).append((name, module))
    if not groups:
        raise ModelError("the model has no factorized linear layers: there is nothing to compare with dense products")
    found: list[LayerPaces] = []
    counts = sorted(set(tokens))
    for (shape, spec, dtype, quantized), layers in groups.items():
        factors = layers[0][1].factors
        paces = []
        for count in counts:
            paces.append(_pace(shape, spec, factors, dtype, count, seconds))
            progress("products", len(found) * len(counts) + len(paces), len(groups) * len(counts))
        names = tuple(name for name, _ in layers)
        stored = "int8" if quantized else str(dtype).removeprefix("torch.")
        found.append(LayerPaces(names, shape, spec, stored, tuple(paces)))
    return found


def _pace(
    shape: Shape, spec: Structure, factors: Factors, dtype: torch.dtype, tokens: int, seconds: float, settle: int = 1
) -> Pace:
    device = next(iter(factors.values())).device
    x = torch.randn(tokens, shape[1], device=device, dtype=dtype)
    weight = torch.full(shape, 0.01, device=device, dtype=dtype)
    runs: list[Callable[[], Tensor]] = [
        lambda: nn.functional.linear(x, weight),
        lambda: spec.matmul(shape, factors, x),
    ]
    race(runs, 1, settle=2, device=device)
    times = race(runs, MOST, seconds=seconds, least=LEAST_ROUNDS, settle=settle, device=device)
    return Pace(
        tokens,
        Spread.of(dense / factorized for dense, factorized in times),
        Spread.of(dense for dense, _ in times),
        Spread.of(factorized for _, factorized in times),
    )


def slower_than_dense(
    entries: Iterable[Entry], device: torch.device, tokens: int = USUAL, seconds: float = 2.0
) -> list[str]:
    """What of a plan takes more time in factors than it would dense, as advice: a line for each shape and structure.

    Each distinct size is timed once, with random factors, for no product depends on values. What the time does not
    suffice for is passed over, and so is what this machine is not made for: half precision on a CPU, and models without
    memory.

    Args:
        entries: of a plan or an inventory.
        device: of the model.
        tokens: rows of input.
        seconds: after which no further measurement begins.
    """
    sizes: dict[tuple[Shape, Structure, str, bool], list[str]] = {}
    for entry in entries:
        matrix = entry.matrix
        if entry.spec is not None and matrix.products:
            sizes.setdefault((matrix.shape, entry.spec, matrix.dtype, matrix.int8), []).append(matrix.name)
    begun = time.perf_counter()
    slow: dict[tuple[Shape, str], dict[str, float]] = {}
    others: list[str] = []
    for (shape, spec, dtype, quantized), names in sizes.items():
        values = getattr(torch, dtype)
        half = device.type == "cpu" and values.itemsize < 4
        if device.type == "meta" or half or time.perf_counter() - begun > seconds:
            others += names
            continue
        factors = new_factors(spec, shape, device, values)
        spec.initialize(factors, 1.0)
        factors = int8.quantize(factors) if quantized else factors
        pace = _pace(shape, spec, factors, values, tokens, min(PART, seconds / len(sizes)), settle=0)
        ratio = pace.factors.median / pace.dense.median
        if ratio > NOISE:
            slow.setdefault((shape, spec.kind), {}).update(dict.fromkeys(names, ratio))
        else:
            others += names
    return [_advice(shape, kind, ratios, others, tokens) for (shape, kind), ratios in slow.items()]


def _advice(shape: Shape, kind: str, ratios: Mapping[str, float], others: Sequence[str], tokens: int) -> str:
    """What is slower, by how much, and the patterns that keep it dense, which match none of the other matrices."""
    patterns: list[str] = []
    for name in ratios:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        patterns.append(name if any(fnmatchcase(other, pattern) for other in others) else pattern)
    least, most = (f"{bound(ratios.values()):.1f}x" for bound in (min, max))
    one = len(ratios) == 1
    keep = f"to keep {'it' if one else 'them'} dense: " + " ".join(f"--exclude '{p}'" for p in dict.fromkeys(patterns))
    if not others:
        keep = "none of the factors of this plan pay here: another method or a larger ratio may"
    return (
        f"{len(ratios)} {shape[0]}x{shape[1]} {'matrix' if one else 'matrices'} as {kind} "
        f"{'takes' if one else 'take'} {least if least == most else f'{least} to {most}'} as long as dense at {tokens} "
        f"tokens on this machine; {keep}"
    )
