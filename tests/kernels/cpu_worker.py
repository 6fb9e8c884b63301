"""Fuzzes the compiled kernels against float64: `python tests/kernels/cpu_worker.py VARIANT CASES`.

A process of its own, for the variant is chosen when the library is loaded.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from factorformer.kernels import Dense, cpu, sparse_product, support
from factorformer.kernels import chain as dense_chain
from factorformer.kernels import gelu as dense_gelu
from factorformer.kernels.encoder import Encoder, EncoderLayer, Linear, Norm
from factorformer.structures import TensorSpec, integers

TOKENS = (0, 1, 3, 4, 5, 16, 17, 31, 33, 64, 100, 700)
THREADS = (1, 2, 3)
ROUNDING = 3e-6
"""Of sums of products, relative to the sum of their sizes."""
UNIT = 0.51 / 32639
"""Half of the unit of numbers of two bytes, in the largest of them, and what floats add."""

# Rows, atoms, nonzeros, tokens.
SPARSE = [
    (1000, 300, 200, 33),  # several chunks of a bitmap
    (1040, 300, 18, 700),  # pieces that are sorted apart, two bytes a position, several spans
    (96, 260, 130, 700),
    (300, 70, 33, 1700),  # tokens split among all threads
    (48, 65, 7, 4),  # odd bytes of a bitmap
    (1500, 700, 200, 1),  # more rows than totals of integers hold, and what a thread keeps to itself
    (1500, 200, 9, 3),
    (30, 5000, 700, 2),
    (7, 1, 1, 5),
]


def close(found: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    error = (found.double() - expected).abs()
    assert (error <= tolerance + 1e-30).all(), f"off by {error.max()}, {(error / (tolerance + 1e-30)).max()} of allowed"


def on_threads() -> Iterator[int]:
    for threads in THREADS:
        torch.set_num_threads(threads)
        yield threads


def laid_out(draw: random.Random, x: Tensor) -> Tensor:
    """The same values, perhaps not in one piece."""
    way = draw.randrange(3)
    if way == 0:
        return x
    if way == 1:
        return x.T.contiguous().T
    return torch.cat((x, x), 1)[:, : x.shape[1]]


def some_sparse(draw: random.Random) -> tuple[int, ...]:
    atoms = draw.choice((draw.randint(1, 40), draw.randint(40, 330)))
    nonzeros = draw.randint(1, draw.choice((min(atoms, 4), min(atoms, 30), atoms)))
    return draw.choice((draw.randint(1, 40), draw.randint(40, 400))), atoms, nonzeros, draw.choice(TOKENS)


def check_sparse(draw: random.Random, case: tuple[int, ...], integers: bool) -> str:
    rows, atoms, nonzeros, n = case
    positions = torch.rand(rows, atoms).topk(nonzeros, dim=1).indices.sort(1).values
    packed = laid_out(draw, support.pack(positions, atoms))
    values, scales = torch.randn(rows, nonzeros), None
    if integers:
        values, scales = torch.randint(-128, 128, (rows, nonzeros), dtype=torch.int8), torch.rand(rows)
    bias = torch.randn(rows) if draw.random() < 0.5 else None
    whole = values.double() if scales is None else values.double() * scales.double()[:, None]
    dense = torch.zeros(rows, atoms, dtype=torch.float64).scatter(1, positions, whole)
    x, y = laid_out(draw, torch.randn(n, atoms)), laid_out(draw, torch.randn(n, rows))
    leading = (2, n // 2) if n % 2 == 0 else (n,)
    offset = torch.zeros(rows) if bias is None else bias
    a, b, sizes = x.double(), y.double(), dense.abs()
    across, down = ROUNDING * (a.abs() @ sizes.T + offset.abs()), ROUNDING * (b.abs() @ sizes)
    if scales is not None and 0 < n <= 4:  # few tokens are two bytes a value, in units of their largest
        across += UNIT * a.abs().amax(1, keepdim=True) * sizes.sum(1)
        codes = torch.zeros(rows, atoms, dtype=torch.float64).scatter(1, positions, values.double().abs())
        down += UNIT * (b * scales).abs().amax(1, keepdim=True) * codes.sum(0)
    for _ in on_threads():
        found = sparse_product(x.reshape(*leading, atoms), values, packed, atoms, scales=scales, bias=bias)
        close(found.view(n, rows), a @ dense.T + offset, across)
        found = sparse_product(y.reshape(*leading, rows), values, packed, atoms, scales=scales, transposed=True)
        close(found.view(n, atoms), b @ dense, down)
        found = torch.ops.factorformer.sparse_outer(y, x, packed, nonzeros)
        close(found, (b.T @ a).gather(1, positions), ROUNDING * (b.abs().T @ a.abs()).gather(1, positions))
    return support.code_of(atoms, nonzeros)


def integer_product(x: Tensor, matrix: Dense) -> tuple[Tensor, Tensor]:
    """The product with int8 weights as the kernel does it, and how far few inputs that round otherwise lead."""
    assert matrix.scales is not None
    values, scales = (x.float() * matrix.scales, torch.ones(1)) if matrix.columns else (x.float(), matrix.scales)
    low, high = values.amin(1, keepdim=True).clamp_max(0), values.amax(1, keepdim=True).clamp_min(0)
    scale = ((high - low) * (1 / 255)).clamp_min(1e-30)
    zero = (-low / scale).round()
    codes = (values * (1 / scale) + zero).clamp(0, 255).round().double() - zero.double()
    weight = (matrix.weight.T if matrix.columns else matrix.weight).double()
    factor = scale.double() * scales.double()
    rounding = ROUNDING * (codes.abs() + zero.double()) @ weight.abs().T + 4 * weight.abs().amax(1)
    return codes @ weight.T * factor, rounding * factor


def check_chain(draw: random.Random) -> None:
    n, count = draw.choice(TOKENS), draw.randint(1, 4)
    most = 60 if n > 100 else 260
    sizes = [
        draw.choice((draw.randint(1, 20), 16 * draw.randint(1, 8), draw.randint(1, most))) for _ in range(count + 1)
    ]
    matrices = []
    for wide, out in itertools.pairwise(sizes):
        columns = draw.random() < 0.4
        shape = (wide, out) if columns else (out, wide)
        if draw.random() < 0.5:
            codes = torch.randint(-127, 128, shape, dtype=torch.int8)
            matrices.append(Dense(codes, torch.rand(shape[0]) + 0.01, columns))
        else:
            matrices.append(Dense(torch.randn(shape), None, columns))
    x = laid_out(draw, torch.randn(n, sizes[0]) + draw.choice((0, 0, 3, -3)))
    bias = torch.randn(sizes[-1]) if draw.random() < 0.5 else None
    expected, tolerance = x.double(), torch.zeros(x.shape, dtype=torch.float64)
    for matrix in matrices:
        weight = matrix.values(torch.float64).double()
        carried = tolerance @ weight.abs().T
        if matrix.scales is not None and n > 4 and len(expected):
            expected, added = integer_product(expected, matrix)
        else:
            added = ROUNDING * (expected.abs() @ weight.abs().T)
            expected = expected @ weight.T
        tolerance = carried + added
    if bias is not None:
        expected, tolerance = expected + bias, tolerance + ROUNDING * bias.abs()
    for _ in on_threads():
        close(dense_chain(x, matrices, bias), expected, tolerance)


def check_few_tokens() -> None:
    """Tokens that leave the first cache, results whose columns threads share, and the largest sums of integers."""
    for n in (1, 2, 4):
        for out, wide, columns in ((21, 8200, False), (4100, 9, True), (4160, 9, True), (900, 37, True)):
            shape, x = ((wide, out) if columns else (out, wide)), torch.randn(n, wide)
            codes, scales = torch.randint(-128, 128, shape, dtype=torch.int8), torch.rand(shape[0])
            for matrix in (Dense(torch.randn(shape), None, columns), Dense(codes, scales, columns)):
                weight = matrix.values(torch.float64).double()
                for _ in on_threads():
                    close(
                        dense_chain(x, (matrix,)), x.double() @ weight.T, ROUNDING * (x.double().abs() @ weight.abs().T)
                    )
        for rows, atoms, sign in ((18, 4096, 1), (18, 4096, -1), (600, 70, 1), (600, 70, -1)):
            nonzeros = atoms - 5
            packed = support.pack(torch.arange(nonzeros).expand(rows, -1), atoms)
            codes, scales = torch.full((rows, nonzeros), -128, dtype=torch.int8), torch.rand(rows)
            whole = torch.nn.functional.pad(codes.double() * scales.double()[:, None], (0, 5))
            x, y = torch.full((n, atoms), 3.0 * sign), torch.full((n, rows), 3.0 * sign)
            for _ in on_threads():
                found = sparse_product(x, codes, packed, atoms, scales=scales)
                close(found, x.double() @ whole.T, UNIT * x.double().abs() @ whole.abs().T)
                found = sparse_product(y, codes, packed, atoms, scales=scales, transposed=True)
                close(
                    found,
                    y.double() @ whole,
                    UNIT * (y * scales).abs().max().double() * 128 * rows + torch.zeros(atoms),
                )


def check_exact_integers() -> None:
    """Inputs that are whole numbers of their scale lose nothing, so that the sums of integers are seen alone."""
    for n, wide, out in ((5, 37, 19), (64, 130, 70), (100, 4, 16), (33, 1023, 5)):
        x = torch.randint(0, 256, (n, wide)).float() - 100
        x[:, 0], x[:, -1] = -100, 155
        for columns in (False, True):
            codes = torch.randint(-127, 128, (wide, out) if columns else (out, wide), dtype=torch.int8)
            weight = Dense(codes, torch.full((len(codes),), 0.5), columns)
            expected = x.double() @ weight.values(torch.float64).T
            for _ in on_threads():
                close(dense_chain(x, (weight,)), expected, 1e-6 * 127 * 255 * wide * torch.ones(1))


def coded(draw: random.Random, *size: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """A factor in floats or int8, its scales, and its values."""
    if draw.random() < 0.5:
        values = torch.randn(size)
        return values, None, values.double()
    codes, scales = torch.randint(-127, 128, size, dtype=torch.int8), torch.rand(size[0]) + 0.01
    return codes, scales, codes.double() * scales.double().view(-1, *[1] * (len(size) - 1))


def some_index(draw: random.Random, rows: int) -> Tensor:
    index = torch.randint(rows, (draw.choice(TOKENS),))
    return index.to(draw.choice((torch.int64, torch.int32)))


def check_rows_of_sparse(draw: random.Random) -> None:
    rows, atoms, nonzeros, _ = some_sparse(draw)
    positions = torch.rand(rows, atoms).topk(nonzeros, dim=1).indices.sort(1).values
    packed = laid_out(draw, support.pack(positions, atoms))
    values, scales, whole = coded(draw, rows, nonzeros)
    table, table_scales, dictionary = coded(draw, atoms, draw.randint(1, 200))
    dense = torch.zeros(rows, atoms, dtype=torch.float64).scatter(1, positions, whole)
    index = some_index(draw, rows)
    for _ in on_threads():
        found = cpu.sparse_rows(index, values, scales, packed, (table, table_scales))
        chosen = dense[index.long()]
        sizes = chosen.abs() @ dictionary.abs()
        if table_scales is not None:  # coefficients of bytes are two bytes, in units of the largest
            unit = (chosen.abs() * table_scales.double()).amax(1, keepdim=True) / 127 / 254 / 2
            sizes = sizes + unit / ROUNDING * (chosen != 0).double() @ table.double().abs()
        close(found, chosen @ dictionary, ROUNDING * sizes)


def check_rows_of_dense(draw: random.Random) -> None:
    rows, rank, width = draw.randint(1, 60), draw.randint(1, 70), draw.randint(1, 200)
    (table, scales, whole), (other, other_scales, right) = coded(draw, rows, rank), coded(draw, rank, width)
    index = some_index(draw, rows)
    chosen = whole[index.long()]
    allowed = ROUNDING * (chosen.abs() @ right.abs())
    if other_scales is not None:  # rows are rounded to a byte
        scaled = chosen * other_scales.double()
        span = scaled.amax(1, keepdim=True).clamp_min(0) - scaled.amin(1, keepdim=True).clamp_max(0)
        allowed = allowed + 0.51 / 255 * span * other.double().abs().sum(0)
    for _ in on_threads():
        close(cpu.dense_rows(index, (table, scales), None), chosen, ROUNDING * chosen.abs())
        close(cpu.dense_rows(index, (table, scales), (other, other_scales)), chosen @ right, allowed)


def check_rows_of_kronecker(draw: random.Random) -> None:
    (m1, n1), (m2, n2) = ((draw.randint(1, 30), draw.randint(1, 5)) for _ in range(2))
    n2, rank = n2 * draw.choice((1, 7, 40)), draw.randint(1, 20)
    integers = draw.random() < 0.5
    while True:  # both or none
        left, right = coded(draw, m1, n1, rank), coded(draw, m2, rank, n2)
        if (left[1] is None) == (right[1] is None) == (not integers):
            break
    shape = m1 * m2 - draw.randrange(m2), n1 * n2 - draw.randrange(n2)
    dense = torch.einsum("ajr,brk->abjk", left[2], right[2]).reshape(m1 * m2, n1 * n2)
    sizes = torch.einsum("ajr,brk->abjk", left[2].abs(), right[2].abs()).reshape(m1 * m2, n1 * n2)
    index = some_index(draw, shape[0])
    for _ in on_threads():
        found = cpu.kronecker_rows(index, left[:2], right[:2], rank, shape)
        close(found, dense[index.long(), : shape[1]], ROUNDING * sizes[index.long(), : shape[1]])


def check_kronecker(draw: random.Random) -> None:
    (m1, n1), (m2, n2) = ((draw.randint(1, 30), draw.randint(1, 20)) for _ in range(2))
    m2, rank, n = m2 * draw.choice((1, 1, 5)), draw.randint(1, 20), draw.choice((0, 1, 2, 4))
    (weight, scales, left), (other, other_scales, right) = coded(draw, m1, n1, rank), coded(draw, m2, rank, n2)
    if (scales is None) != (other_scales is None):
        weight, scales, other, other_scales = left.float(), None, right.float(), None
    shape = m1 * m2 - draw.randrange(m2), n1 * n2 - draw.randrange(n2)
    x, bias = laid_out(draw, torch.randn(n, shape[1])), torch.randn(shape[0]) if draw.random() < 0.5 else None
    offset = torch.zeros(shape[0]) if bias is None else bias

    def product(a: Tensor, left: Tensor, right: Tensor) -> Tensor:
        dense = torch.einsum("ajr,brk->abjk", left, right).reshape(m1 * m2, n1 * n2)[: shape[0], : shape[1]]
        return a @ dense.T

    allowed = ROUNDING * (product(x.double().abs(), left.abs(), right.abs()) + offset.abs())
    for _ in on_threads():
        found = cpu.kronecker(x, (weight, scales), (other, other_scales), rank, shape, bias)
        close(found, product(x.double(), left, right) + offset, allowed)


def check_rows_that_are_not_there() -> None:
    values, packed = torch.randn(9, 2), support.pack(torch.tensor([[0, 3]] * 9), 4)
    left, right = (torch.randn(3, 2, 2), None), (torch.randn(3, 2, 5), None)
    for index in (9, -1, 2**40):
        for others in (0, 40):
            wrong = torch.tensor([*range(9)] * others + [index])
            for look_up in (
                lambda at: cpu.sparse_rows(at, values, None, packed, (torch.randn(4, 7), None)),
                lambda at: cpu.kronecker_rows(at, left, right, 2, (9, 10)),
                lambda at: cpu.dense_rows(at, (values, None), None),
                lambda at: cpu.dense_rows(at, (values, None), (torch.randn(2, 3), None)),
            ):
                try:
                    look_up(wrong)
                except IndexError:
                    continue
                raise AssertionError(index)


def check_rounding(draw: random.Random) -> None:
    """To the very values that products read of what is stored."""
    size = draw.choice(((0, 4), (1, 1), (7, 5), (4, 3, 6), (3, 32), (5, 1, 70), (150, 300)))
    spread = torch.logspace(0, -draw.randint(0, 6), size[0]).view(-1, *[1] * (len(size) - 1))
    x = torch.randn(size) * spread * 10.0 ** draw.randint(-30, 30)
    if draw.random() < 0.3:
        x[..., : draw.randint(1, size[-1])] = 0
    for bits in get_args(integers.Bits):
        stored = integers.quantize({"weight": x}, bits)
        if bits != 8:
            stored = integers.in_int8(stored, {"weight": TensorSpec(size)}, bits)
        for _ in on_threads():
            assert torch.equal(integers.rounded(x, bits), integers.floats(stored)["weight"]), (size, bits)
    wrong = torch.randn(3, 70)
    wrong[1, 40] = draw.choice((torch.nan, torch.inf))
    assert integers.rounded(wrong, 8).isnan().all(1).tolist() == [False, True, False]
    assert integers.rounded(wrong, 4).isnan().all()  # whose rows have a scale in common


def check_gelu() -> None:
    compiled = cpu.variant() != cpu.REFERENCE
    allowed = torch.tensor(4e-7 if compiled else 2e-6)
    for n in (*TOKENS, 20_001):
        x = torch.randn(n) * 4
        for _ in on_threads():
            found, again = dense_gelu(x), x.clone()
            close(found, F.gelu(x.double()), allowed)
            overwritten = dense_gelu(again, overwrite=True)
            assert torch.equal(overwritten, found)
            assert torch.equal(again, found if compiled else x)
    x = torch.linspace(-20, 20, 100_001)
    close(dense_gelu(x), F.gelu(x.double()), allowed)
    if compiled:  # torch has no numbers for the ends
        x = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e-45, 1e-20, 3e38, -3e38, 1e10, -1e10, torch.inf, -torch.inf])
        torch.testing.assert_close(dense_gelu(x), x.clamp_min(0), rtol=0, atol=1e-20)
        assert dense_gelu(torch.tensor([torch.nan, 1.0])).isnan().tolist() == [True, False]


def masks(batch: int, heads: int, queries: int, keys: int) -> Iterator[Tensor | None]:
    yield None
    shapes = (
        *((keys,), (queries, keys), (1, 1, 1, keys), (batch, 1, 1, keys), (batch, 1, queries, keys)),
        *((1, heads, queries, keys), (batch, heads, 1, keys), (batch, heads, queries, keys), (batch, 1, queries, 1)),
    )
    for shape in shapes:
        yield torch.rand(shape) < 0.6
    yield (torch.rand(keys, queries, heads, batch) < 0.6).permute(3, 2, 1, 0)
    yield torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    yield torch.ones(queries, keys, dtype=torch.bool).tril()


def check_attention(draw: random.Random) -> None:
    key_heads = draw.randint(1, 3)
    batch, heads = draw.randint(1, 3), key_heads * draw.choice((1, 1, 2, 4))
    queries, keys = draw.choice((1, 2, 7, 16, 17, 40, 70)), draw.choice((1, 2, 5, 16, 33, 600))
    width, spread = draw.choice((1, 3, 8, 16, 20, 33, 64)), draw.choice((1.0, 1.0, 30.0))

    def states(count: int, tokens: int) -> Tensor:
        if draw.random() < 0.5:
            return torch.randn(batch, count, tokens, width)
        return torch.randn(batch, tokens, count, width + 2)[..., 1 : width + 1].transpose(1, 2)

    q, k, v = states(heads, queries) * spread, states(key_heads, keys), states(key_heads, keys)
    wide = [t.double().repeat_interleave(heads // key_heads, 1) for t in (k, v)]
    scores = q.double() @ wide[0].mT * 0.3
    for mask in masks(batch, heads, queries, keys):
        seen = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        expected = seen.softmax(-1).nan_to_num(1 / keys) @ wide[1]
        for _ in on_threads():
            found = cpu.attention(q, k, v, mask, 0.3).transpose(1, 2)
            close(found, expected, 1e-5 * spread * v.abs().max().double())
    q[0, 0, 0, 0] = torch.nan
    assert cpu.attention(q, k, v, None, 0.3)[0, 0, 0].isnan().all()
    assert not cpu.attention(q, k, v, None, 0.3)[0, 1:].isnan().any()


def some_linear(draw: random.Random, wide: int, out: int) -> Linear:
    """A product with one or two matrices."""
    matrices = []
    sizes = [wide, *([draw.randint(1, 40)] if draw.random() < 0.5 else []), out]
    for inner, rows in itertools.pairwise(sizes):
        weight = torch.randn(rows, inner) * 0.8 / inner**0.5
        if draw.random() < 0.5:
            scales = weight.abs().amax(1) / 127 + 1e-9
            weight = (weight / scales[:, None]).round().to(torch.int8)
            matrices.append(Dense(weight, scales))
        else:
            matrices.append(Dense(weight))
    return Linear(matrices, torch.randn(out) * 0.3 if draw.random() < 0.8 else None)


def encoded(layers: list[EncoderLayer], heads: int, x: Tensor, bias: Tensor | None) -> Tensor:
    """What the layers make of the tokens of one sequence, in float64."""

    def product(linear: Linear, y: Tensor) -> Tensor:
        for matrix in linear.matrices:
            y = y @ matrix.values(torch.float32).double().T
        return y if linear.bias is None else y + linear.bias.double()

    def normal(norm: Norm, y: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], norm.weight.double(), norm.bias.double(), norm.epsilon)

    for layer in layers:
        q, k, v = (product(part, x).unflatten(-1, (heads, -1)).transpose(0, 1) for part in layer[:3])
        scores = q @ k.mT * q.shape[-1] ** -0.5 + (0 if bias is None else bias)
        context = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = normal(layer.after_attention, product(layer.output, context) + x)
        x = normal(layer.after_products, product(layer.down, F.gelu(product(layer.up, x))) + x)
    return x


def check_encoder(draw: random.Random) -> None:
    """Each token's vector within what its products round away, whatever else is in the batch."""
    heads, size = draw.randint(1, 4), draw.choice((2, 5, 8, 16, 24))
    width = max(heads * size, 4)  # of two values, which is the larger decides all that a normalization leaves
    size = width // heads

    def norm() -> Norm:
        return Norm(1 + 0.2 * torch.randn(width), 0.2 * torch.randn(width), draw.choice((1e-12, 1e-5)))

    layers = []
    for _ in range(draw.randint(1, 3)):
        inner = draw.randint(1, 90)
        parts: list[Any] = [some_linear(draw, width, width) for _ in range(4)]
        parts += [some_linear(draw, width, inner), some_linear(draw, inner, width)]
        layers.append(EncoderLayer(*parts, norm(), norm()))
    lengths = [draw.choice((0, 1, 2, 7, 15, 16, 17, 40, 64, 65, 150)) for _ in range(draw.randint(1, 6))]
    reach = 160
    table = torch.randn(heads, 2 * reach + 1) if draw.random() < 0.5 else None
    tokens = sum(lengths)
    x = torch.randn(tokens + 5, width)
    rows = torch.randperm(len(x))[:tokens]
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    expected = torch.zeros(x.shape, dtype=torch.float64)
    for first, last in itertools.pairwise(starts.tolist()):
        behind = torch.arange(last - first)[:, None] - torch.arange(last - first)
        bias = None if table is None else table[:, behind + reach].double()
        expected[rows[first:last]] = encoded(layers, heads, x[rows[first:last]].double(), bias)
    for products, bound in (("float32", 2e-5), ("bfloat16", 0.06), ("int8", 0.25), (None, 0.25)):
        encoder = Encoder(layers, heads, products, table)
        for _ in on_threads():
            found = encoder(x, rows, starts)
            error = (found - expected).norm(dim=1) / width**0.5
            assert error.max() <= bound, (products, error.max(), heads, size, lengths)
            assert not found[torch.ones(len(x), dtype=torch.bool).index_fill(0, rows, False)].any()
    if tokens:
        x[rows[0], 0] = torch.nan  # is seen by its own sequence and no other
        wrong = ~encoder(x, rows, starts).isfinite().all(1)
        assert wrong.nonzero().flatten().tolist() == sorted(rows[: next(n for n in lengths if n)].tolist())


def check_what_is_no_number() -> None:
    """One token that is not a number, or infinite, is seen in its own result and in no other."""
    for value in (torch.nan, torch.inf, -torch.inf):
        for n in (2, 5, 40, 100):
            x = torch.randn(n, 37)
            x[1, 3] = value
            for columns in (False, True):
                codes = torch.randint(1, 128, (37, 20) if columns else (20, 37), dtype=torch.int8)
                for matrix in (Dense(codes.float(), None, columns), Dense(codes, torch.rand(len(codes)), columns)):
                    wrong = (~dense_chain(x, (matrix,)).isfinite()).all(1)
                    assert wrong.nonzero().flatten().tolist() == [1], (value, n, matrix.scales is None)
        packed = support.pack(torch.rand(90, 30).topk(20, dim=1).indices.sort(1).values, 30)
        codes = torch.randint(1, 128, (90, 20), dtype=torch.int8)
        for n in (2, 5):
            across, down = torch.randn(n, 30), torch.randn(n, 90)
            across[1], down[1, 70] = value, value
            for values, scales in ((codes.float(), None), (codes, torch.rand(90))):
                for x, transposed in ((across, False), (down, True)):
                    found = sparse_product(x, values, packed, 30, scales=scales, transposed=transposed)
                    wrong = (~found.isfinite()).any(1).nonzero().flatten().tolist()
                    assert wrong == [1], (value, n, scales is None, transposed)
    for value in (torch.nan, torch.inf):
        codes, scales = torch.randint(1, 128, (9, 20), dtype=torch.int8), torch.rand(9)
        table, atom_scales = torch.randint(1, 128, (30, 130), dtype=torch.int8), torch.rand(30)
        packed = support.pack(torch.rand(9, 30).topk(20, dim=1).indices.sort(1).values, 30)
        scales[4] = value
        found = cpu.sparse_rows(torch.arange(9), codes, scales, packed, (table, atom_scales))
        assert (~found.isfinite()).all(1).nonzero().flatten().tolist() == [4]
        assert found[torch.arange(9) != 4].isfinite().all()


def small_encoder() -> Encoder:
    linear, norm = Linear([Dense(torch.eye(4))], None), Norm(torch.ones(4), torch.zeros(4), 1e-5)
    return Encoder([EncoderLayer(*[linear] * 6, norm, norm)], 1, None)


def check_fork() -> None:
    """A forked process, which has none of the threads of the one before, goes on to compute."""
    if not hasattr(os, "fork") or "ASAN_OPTIONS" in os.environ:
        return
    torch.set_num_threads(3)
    encoder, x, starts = small_encoder(), torch.randn(900, 4), torch.arange(0, 901, 30)
    expected, product = encoder(x, torch.arange(900), starts), torch.randn(600, 600)
    product = product @ product
    child = os.fork()
    if child == 0:
        product @ product
        os._exit(not torch.equal(encoder(x, torch.arange(900), starts), expected))
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError("the process waits for threads that it does not have")
    assert status == 0
    assert torch.equal(encoder(x, torch.arange(900), starts), expected)


def check_out_of_memory() -> None:
    """Where scratch memory cannot be had there is an error: an exception would not leave a parallel region alive."""
    if "ASAN_OPTIONS" in os.environ or not Path("/proc/self/statm").exists():
        return  # the sanitizer takes more addresses than any limit leaves
    query, keys = torch.randn(1, 2, 1, 1), torch.randn(1, 2, 2**22, 1)
    x, weight = torch.randn(5, 4_000_000), torch.randn(1, 4_000_000)
    torch.set_num_threads(2)
    encoder, rows, starts = small_encoder(), torch.arange(2**20), torch.tensor([0, 2**20])
    states, made = torch.zeros(2**20, 4), torch.zeros(2**20, 4)
    cpu.attention(query, keys[:, :, :5], keys[:, :, :5], None, 1.0)  # threads have their stacks from now on
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**23, before[1]))
    failed = 0
    for product in (
        lambda: cpu.encode(encoder._fields, states, rows, starts, made),
        lambda: cpu.attention(query, keys, keys, None, 1.0),
        lambda: cpu.chain(x, [weight], [None], [False], None),
    ):
        try:
            product()
        except MemoryError:
            failed += 1
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert failed == 3, failed
    close(cpu.chain(x, [weight], [None], [False], None), x.double() @ weight.double().T, torch.tensor(1.0))


def main(name: str, cases: int) -> None:
    assert cpu.variant() == name, cpu.variant()
    draw = random.Random(0)
    torch.manual_seed(0)
    if name == "amx_emulated":  # other tiles, which nothing but encoders multiply by
        for _ in range(cases):
            check_encoder(draw)
        print("done", flush=True)
        return
    codes = [check_sparse(draw, case, integers) for case in SPARSE for integers in (False, True)]
    codes += [check_sparse(draw, some_sparse(draw), draw.random() < 0.4) for _ in range(cases)]
    assert set(codes) == {"bitmap", "uint8", "uint16"}
    check_gelu()
    if name == cpu.REFERENCE:  # torch multiplies dequantized weights, and has an attention of its own
        print("done")
        return
    for _ in range(cases):
        check_chain(draw)
        check_rows_of_sparse(draw)
        check_rows_of_kronecker(draw)
        check_kronecker(draw)
        check_rows_of_dense(draw)
        check_rounding(draw)
    for _ in range(max(cases // 2, 4)):
        check_encoder(draw)
    check_rows_that_are_not_there()
    check_few_tokens()
    check_exact_integers()
    check_what_is_no_number()
    for _ in range(max(cases // 8, 2)):
        check_attention(draw)
    check_fork()
    check_out_of_memory()
    if Path("/proc/self/maps").exists():  # other packages bring further copies of the library, which nothing here uses
        pools = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
        assert len(pools) <= 1, f"two pools of threads: {pools}"
    print("done", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1], int(sys.argv[2]))
        if sys.argv[3:] == ["overread"]:
            x, y = torch.ones(64), torch.empty(80)
            cpu._loaded().factorformer_gelu(x.data_ptr(), 80, y.data_ptr())
