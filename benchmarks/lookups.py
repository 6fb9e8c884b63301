"""Embedding tables in factors: how long look-ups take beside those of a plain table, and how long fits.

    python benchmarks/lookups.py

Tables have the shapes of MiniLM's (30,522 x 384) and of multilingual encoders' (250,000 x 768), each structure so many
times smaller than float32, in floats and in integers. Look-ups of 1,024 tokens are interleaved with those of the plain
table (A B C A B C), and so are single products of as many multiply-adds in the same type, by torch's library, below
which no kernel of these factors gets far; medians and their ratios count. Tokens are drawn at random, of which next to
none is drawn twice, or as those of a text occur (Zipf's law), and anew for each look-up. Fits weigh rows as tokens of a
text occur and columns by a falling spectrum, as `fisher` does; the values are those of MiniLM's table, repeated with
noise of their own size where a table is larger.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, options, start, write
from torch import Tensor
from transformers import AutoModel

from factorformer.fitting import Metric, fit
from factorformer.hf import minilm
from factorformer.layers.matrix import Matrix
from factorformer.layers.nn import FactorizedEmbedding
from factorformer.planning.evidence.times import interleaved
from factorformer.structures import STRUCTURES, DenseSparse, KroneckerSum, Structure
from factorformer.structures.integers import Bits

FITTED = 10**5
"""Rows up to which Kronecker sums are fitted: the singular vectors alone of a table of 250,000 x 768, rearranged, take
minutes."""

SHAPES = [(30_522, 384), (250_000, 768)]
WIDTHS: dict[str, Bits | None] = {"float32": None, "int8": 8, "int4": 4}


def spec_of(kind: str, shape: tuple[int, int], bits: Bits | None, ratio: float) -> Structure:
    """The largest of a structure that takes so many times fewer bytes than the table in float32."""
    matrix = Matrix("table", shape, bits=bits)
    limit = 4 * shape[0] * shape[1] / ratio
    fitting = itertools.takewhile(lambda s: matrix.bytes(s) <= limit, STRUCTURES[kind].candidates(shape, matrix.values))
    return max(fitting, key=matrix.bytes)


def table(shape: tuple[int, int]) -> Tensor:
    """Values like those of a trained table."""
    torch.manual_seed(0)
    small = AutoModel.from_pretrained(minilm.directory()).get_input_embeddings().weight.detach()
    tiled = small.repeat(-(-shape[0] // small.shape[0]), -(-shape[1] // small.shape[1]))[: shape[0], : shape[1]]
    return tiled if shape == tuple(small.shape) else tiled + small.std() * torch.randn(shape) / 2


def frequencies(rows: int) -> Tensor:
    """Of tokens, by Zipf's law, in no order."""
    return (1 / torch.arange(1, rows + 1, dtype=torch.float64))[torch.randperm(rows)]


def metric(shape: tuple[int, int]) -> Metric:
    """Rows as often as tokens occur, columns with a falling spectrum."""
    often = frequencies(shape[0])
    turned = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64))[0]
    falling = turned * torch.logspace(0, -1.5, shape[1], dtype=torch.float64) @ turned.T
    return Metric(often.sqrt(), torch.linalg.cholesky(falling))


def terms(spec: Structure) -> int:
    """Rows that make one row of a table, each times a coefficient."""
    return spec.nonzeros if isinstance(spec, DenseSparse) else spec.rank


def product(rows: int, inner: int, width: int, bits: Bits | None) -> Callable[[], Tensor]:
    """One product of so many multiply-adds, by the library of torch."""
    if bits is None:
        left, right = torch.randn(rows, inner), torch.randn(inner, width)
        return lambda: left @ right
    codes = torch.randint(-127, 128, (rows, inner), dtype=torch.int8)
    others = torch.randint(-127, 128, (inner, width), dtype=torch.int8)
    return lambda: torch._int_mm(codes, others)


def cell(shape: tuple[int, int], weight: Tensor, drawn: str, args: Any) -> list[dict[str, Any]]:
    """All structures of one shape, for tokens drawn in one way."""
    chances = torch.ones(shape[0]) if drawn == "at random" else frequencies(shape[0])
    indices = [torch.multinomial(chances, args.tokens, replacement=True) for _ in range(args.rounds)]
    different = statistics.mean(len(index.unique()) for index in indices)
    common = {"shape": list(shape), "tokens": args.tokens, "drawn": drawn, "different": round(different)}

    def run(look_up: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        each = itertools.cycle(indices)
        return lambda: look_up(next(each))

    rows, runs = [], {"plain": run(lambda index: F.embedding(index, weight))}
    for kind, (name, bits) in itertools.product(STRUCTURES, WIDTHS.items()):
        spec = spec_of(kind, shape, bits, args.ratio)
        layer = FactorizedEmbedding(spec, shape)
        if bits is not None:
            layer.fake_quantize(bits)
            layer.quantize()
        rows.append({**common, "structure": kind, "spec": str(spec), "values": name})
        runs[f"{kind} {name}"] = run(layer)
        runs[f"{kind} {name}, product"] = product(round(different), terms(spec), shape[1], bits)
    calls = list(runs.values())
    interleaved(calls, 3, settle=1)
    columns = list(zip(*interleaved(calls, args.rounds, settle=1), strict=True))
    for row, column, bare in zip(rows, columns[1::2], columns[2::2], strict=True):
        ratios = [found / plain for found, plain in zip(column, columns[0], strict=True)]
        row |= {"milliseconds": statistics.median(column), "plain_milliseconds": statistics.median(columns[0])}
        row |= dict(zip(("low", "ratio", "high"), statistics.quantiles(ratios, n=4), strict=True))
        row["product"] = statistics.median(found / plain for found, plain in zip(bare, columns[0], strict=True))
    return rows


def main() -> None:
    parser = options(__doc__, "lookups.json")
    parser.add_argument("--ratio", type=float, default=10)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shapes", type=int, nargs="+", default=[0, 1], help="which of the shapes")
    args = start(parser)
    cells, fits = [], []
    for shape in (SHAPES[place] for place in args.shapes):
        weight = table(shape)
        for drawn in ("at random", "as in text"):
            found = cell(shape, weight, drawn, args)
            cells += found
            for row in found:
                shown = ("drawn", "different", "structure", "values", "milliseconds", "ratio", "product")
                print({key: row[key] for key in shown}, flush=True)
        measured = metric(shape)
        for kind in STRUCTURES:
            if kind == KroneckerSum.kind and shape[0] > FITTED:
                continue
            spec, began = spec_of(kind, shape, 8, args.ratio), time.perf_counter()
            _, error = fit(weight, spec, measured)
            seconds = time.perf_counter() - began
            fits.append(
                {"shape": list(shape), "structure": kind, "spec": str(spec), "seconds": seconds, "error": error}
            )
            print(fits[-1], flush=True)
    write(args.output, {"ratio": args.ratio, "cells": cells, "fits": fits, "machine": machine()})


if __name__ == "__main__":
    main()
