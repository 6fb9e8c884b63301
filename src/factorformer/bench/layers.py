"""Products in factors against dense ones on this machine, by number of tokens."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from factorformer.bench.comparison import Spread
from factorformer.errors import ModelError
from factorformer.layers.nn import FactorizedLinear, new_factors
from factorformer.planning import Entry
from factorformer.planning.evidence.times import interleaved
from factorformer.progress import Progress, silent
from factorformer.structures import Dense, Factors, Shape, Structure, integers
from factorformer.structures.integers import Bits

TOKENS = (1, 16, 128, 1024)
"""Rows of input at which products are timed by default."""

USUAL = 128
"""Rows of input for which a plan is checked: one long text, or a few short ones."""

SLOWDOWN_THRESHOLD = 1.1
"""Layers slower than dense by this factor are reported."""

MOST = 2000
"""Maximum rounds of one pair of products."""

PART = 0.1
"""Maximum seconds that the check of a plan spends on one shape and structure."""

LEAST_ROUNDS = 3
"""Minimum rounds of one pair of products."""


@dataclasses.dataclass(frozen=True)
class LayerTiming:
    """Time of a product in factors and of the dense one, at one number of tokens.

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
class LayerComparison:
    """Timings of all layers of one shape, structure and type.

    Args:
        names: of the layers.
        shape: `(out, in)`.
        spec: their structure.
        dtype: in which the factors are stored: `int8`, `int4`, `int3`, or the floating type of the layers.
        timings: in growing numbers of tokens.
    """

    names: tuple[str, ...]
    shape: Shape
    spec: Structure
    dtype: str
    timings: tuple[LayerTiming, ...]

    @property
    def ideal(self) -> float:
        """The ratio of FLOPs: the speed-up if time were proportional to them."""
        return 2 * math.prod(self.shape) / self.spec.flops(self.shape)

    @property
    def pays(self) -> list[int]:
        """The numbers of tokens, of those measured, at which factors are at least as fast as the dense matrix."""
        return [timing.tokens for timing in self.timings if timing.speedup.median >= 1]

    @property
    def break_even(self) -> int | None:
        """The smallest measured number of tokens from which on factors always pay; None if they never do."""
        found = None
        for timing in reversed(self.timings):
            if timing.speedup.median < 1:
                break
            found = timing.tokens
        return found

    @property
    def verdict(self) -> str:
        """Where factors pay, in words."""
        measured, pays = [timing.tokens for timing in self.timings], self.pays
        if not pays:
            return "never"
        if pays == measured:
            return "always"
        if self.break_even is not None and pays == measured[-len(pays) :]:
            return f"from {self.break_even} tokens"
        if pays == measured[: len(pays)]:
            return f"up to {pays[-1]} tokens"
        return f"at {', '.join(map(str, pays))} tokens"


def time_layers(
    model: nn.Module, tokens: Sequence[int] = TOKENS, seconds: float = 0.5, progress: Progress = silent
) -> list[LayerComparison]:
    """Time every distinct shape, structure and type among the factorized linear layers of a model.

    Args:
        model: compressed; its own factors multiply, on their device.
        tokens: rows of input.
        seconds: for each pair of products.
        progress: progress callback, called with the products timed.

    Raises:
        ModelError: no factorized linear layer.
    """
    groups: dict[tuple[Shape, Structure, torch.dtype, Bits | None], list[tuple[str, FactorizedLinear]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLinear):
            bits = module.bits if module.quantized else None
            key = (module.shape, module.spec, module.values.dtype, bits)
            groups.setdefault(key, []).append((name, module))
    if not groups:
        raise ModelError("the model has no factorized linear layers: there is nothing to compare with dense products")
    found: list[LayerComparison] = []
    counts = sorted(set(tokens))
    for (shape, spec, dtype, bits), layers in groups.items():
        factors = layers[0][1].multiplied
        timings = []
        for count in counts:
            timings.append(_time(shape, spec, factors, dtype, count, seconds))
            progress("products", len(found) * len(counts) + len(timings), len(groups) * len(counts))
        names = tuple(name for name, _ in layers)
        stored = str(dtype).removeprefix("torch.") if bits is None else f"int{bits}"
        found.append(LayerComparison(names, shape, spec, stored, tuple(timings)))
    return found


def _time(
    shape: Shape, spec: Structure, factors: Factors, dtype: torch.dtype, tokens: int, seconds: float, settle: int = 1
) -> LayerTiming:
    device = next(iter(factors.values())).device
    x = torch.randn(tokens, shape[1], device=device, dtype=dtype)
    weight = torch.full(shape, 0.01, device=device, dtype=dtype)
    runs: list[Callable[[], Tensor]] = [
        lambda: nn.functional.linear(x, weight),
        lambda: spec.matmul(shape, factors, x),
    ]
    interleaved(runs, 1, settle=2, device=device)
    times = interleaved(runs, MOST, seconds=seconds, least=LEAST_ROUNDS, settle=settle, device=device)
    return LayerTiming(
        tokens,
        Spread.of(dense / factorized for dense, factorized in times),
        Spread.of(dense for dense, _ in times),
        Spread.of(factorized for _, factorized in times),
    )


def slower_than_dense(
    entries: Iterable[Entry], device: torch.device, tokens: int = USUAL, seconds: float = 2.0
) -> list[str]:
    """Advice on layers of a plan that are slower in factors than dense: a line for each shape and structure.

    Each distinct size is timed once, with random factors, for no product depends on values. What the time does not
    suffice for is passed over, and so is what this machine is not made for: half precision on a CPU, and models without
    memory.

    Args:
        entries: of a plan or an inventory.
        device: of the model.
        tokens: rows of input.
        seconds: after which no further measurement begins.
    """
    sizes: dict[tuple[Shape, Structure, str, Bits | None], list[str]] = {}
    for entry in entries:
        matrix = entry.matrix
        if entry.spec is not None and matrix.products:
            sizes.setdefault((matrix.shape, entry.spec, matrix.dtype, matrix.bits), []).append(matrix.name)
    begun = time.perf_counter()
    slow: dict[tuple[Shape, str], dict[str, float]] = {}
    others: list[str] = []
    for (shape, spec, dtype, bits), names in sizes.items():
        values = getattr(torch, dtype)
        half = device.type == "cpu" and values.itemsize < 4
        if device.type == "meta" or half or time.perf_counter() - begun > seconds:
            others += names
            continue
        factors = new_factors(spec, shape, device, values)
        spec.initialize(factors, 1.0)
        factors = factors if bits is None else integers.quantize(factors, 8)
        timing = _time(shape, spec, factors, values, tokens, min(PART, seconds / len(sizes)), settle=0)
        ratio = timing.factors.median / timing.dense.median
        if ratio > SLOWDOWN_THRESHOLD:
            slow.setdefault((shape, spec.kind), {}).update(dict.fromkeys(names, ratio))
        else:
            others += names
    return [_advice(shape, kind, ratios, others, tokens) for (shape, kind), ratios in slow.items()]


def _advice(shape: Shape, kind: str, ratios: Mapping[str, float], others: Sequence[str], tokens: int) -> str:
    """The slower layers, by how much, and the patterns that keep them dense and match none of the other matrices."""
    patterns: list[str] = []
    for name in ratios:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        patterns.append(name if any(fnmatchcase(other, pattern) for other in others) else pattern)
    least, most = (f"{bound(ratios.values()):.1f}x" for bound in (min, max))
    one = len(ratios) == 1
    keep = f"to keep {'it' if one else 'them'} dense: " + " ".join(f"--exclude '{p}'" for p in dict.fromkeys(patterns))
    if not others:
        keep = "none of the factors of this plan pay here: another method or a larger ratio may"
    if kind == Dense.kind:
        kind, keep = "dense in integers", "what `factorformer export` makes of int8 is faster"
    return (
        f"{len(ratios)} {shape[0]}x{shape[1]} {'matrix' if one else 'matrices'} as {kind} "
        f"{'takes' if one else 'take'} {least if least == most else f'{least} to {most}'} as long as dense at {tokens} "
        f"tokens on this machine; {keep}"
    )
