"""Triton kernels of the products with a sparse matrix; needs `triton`, so only `kernels.cuda` imports it, when needed.

Each program builds tiles of `S` on chip, from the packed support and the values, and multiplies them by `tl.dot`. Why
not gather the entries of the input instead, which costs fewer FLOPs: on an H100, a multiprocessor reads 32 words of 4
bytes from shared memory in a cycle, so it gathers at most 32 (64 packed) multiply-adds, while its tensor cores do about
1024 dense ones in TF32 and 2048 in half precision, and its plain FP32 units 128. Gathering wins below a density of
32/128 in IEEE FP32 and of 3 % otherwise; dense-sparse layers keep 10 to 30 % of the entries, and an input that is read
out of order is read at a fraction of that rate. In bytes the tile costs what is stored, `density * 16 + 1` bits an
entry with a bitmap in half precision, instead of 16: that is the gain at few rows of input, where the matrix is read
once for few FLOPs.

What the tile costs in instructions, 24 an entry from a bitmap of whole words on Hopper and up to twice that from lists,
is shared by the rows of input of the program; 128 of them take a third of that in the tensor cores. So these kernels
are for few rows of input. For many, where `S` is no larger than the result, `densify` writes it once and a plain matrix
product follows. Only `outer` needs no such step: there the support is read once for all rows of input.

A tile is found in two steps that hold for all three codes. First each 32 columns of a row become a word of 32 bits: a
bitmap has them, and of a list of positions each one that falls into them sets its bit. Then the value of a set bit is
found at the number of bits set before it: those in earlier tiles, in earlier words of this tile, and below it in its
own word. Supports are validated when they are made and loaded, so nothing but the edges of tiles is masked here.
"""

# No postponed annotations: Triton recognizes `tl.constexpr` by its value.

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

BITMAP = tl.constexpr(0)
"""The codes of `kernels.support`: a bitmap here, else the bytes of a position."""


@triton.jit
@no_type_check
def _count(words):
    """Bits that are set, of each word; compilers know this form, and make one instruction of it."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit
@no_type_check
def _read_words(support, rows, valid, first, last, stride, WIDTH: tl.constexpr):
    """Words `first` to `first + WIDTH` of bitmaps, low byte first; those from `last` on are zero."""
    words = first + tl.arange(0, WIDTH)
    if support.dtype.element_ty == tl.uint8:
        found = tl.zeros((rows.shape[0], WIDTH), tl.uint32)
        for byte in tl.static_range(4):
            columns = 4 * words + byte
            inside = valid[:, None] & ((columns < stride) & (words < last))[None, :]
            bits = tl.load(support + rows[:, None] * stride + columns[None, :], inside, other=0)
            found |= bits.to(tl.uint32) << (8 * byte)
        return found
    else:  # rows of whole words, and `stride` of them
        inside = valid[:, None] & ((words < stride) & (words < last))[None, :]
        return tl.load(support + rows[:, None] * stride + words[None, :], inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit
@no_type_check
def _read_positions(support, rows, valid, entries, stride, CODE: tl.constexpr):
    """Positions of these entries of lists: in one byte or two."""
    where = support + rows[:, None] * stride + (entries * CODE)[None, :]
    positions = tl.load(where, valid, other=0).to(tl.int32)
    if CODE == 2:
        positions += tl.load(where + 1, valid, other=0).to(tl.int32) << 8
    return positions


@triton.jit
@no_type_check
def _words_of(
    support, rows, valid, first, stride, nonzeros,
    CODE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Words `first` to `first + WIDTH` of each row: `(rows, WIDTH)`, whatever the code."""
    if CODE == BITMAP:
        found = _read_words(support, rows, valid, first, first + WIDTH, stride, WIDTH)
    else:
        words = first + tl.arange(0, WIDTH)
        found = tl.zeros((rows.shape[0], WIDTH), tl.uint32)
        for chunk in range(0, nonzeros, CHUNK):
            entries = chunk + tl.arange(0, CHUNK)
            inside = valid[:, None] & (entries < nonzeros)[None, :]
            positions = _read_positions(support, rows, inside, entries, stride, CODE)
            bits = inside.to(tl.uint32) << (positions & 31).to(tl.uint32)
            here = (positions >> 5)[:, None, :] == words[None, :, None]
            # Positions differ, so their bits add up without carry.
            found += tl.sum(tl.where(here, bits[:, None, :], 0), 2)
    return found


@triton.jit
@no_type_check
def _count_before(
    support, rows, valid, first, stride, nonzeros, CODE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Nonzeros of each row before word `first`."""
    before = tl.zeros((rows.shape[0],), tl.int32)
    if CODE == BITMAP:
        for word in range(0, first, 4):
            before += tl.sum(_count(_read_words(support, rows, valid, word, first, stride, 4)), 1)
    else:
        for chunk in range(0, nonzeros, CHUNK):
            entries = chunk + tl.arange(0, CHUNK)
            inside = valid[:, None] & (entries < nonzeros)[None, :]
            positions = _read_positions(support, rows, inside, entries, stride, CODE)
            before += tl.sum((inside & (positions < first * 32)).to(tl.int32), 1)
    return before


@triton.jit
@no_type_check
def _expand(words, before):
    """Whether each column of a tile is stored, and at which entry of its row: `(rows, 32 * WIDTH)`, both."""
    rows: tl.constexpr = words.shape[0]
    columns: tl.constexpr = 32 * words.shape[1]
    bit = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    counts = _count(words)
    earlier = before[:, None] + tl.cumsum(counts, 1) - counts
    # A shift of ones by 32 is not defined, so the mask of what is below a bit is made of the bit.
    below = (tl.full((1, 1, 32), 1, tl.uint32) << bit) - 1
    stored = (words[:, :, None] >> bit) & 1
    entry = earlier[:, :, None] + _count(words[:, :, None] & below)
    return tl.reshape(stored, (rows, columns)) != 0, tl.reshape(entry, (rows, columns))


@triton.jit
@no_type_check
def _add_product(left, right, total, PRECISION: tl.constexpr):
    """`total + left @ right`; "interpreted" multiplies in float32, for the interpreter has no products of bfloat16."""
    if PRECISION == "interpreted":
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
@no_type_check
def densify(
    values, support, result, n, rows, atoms, nonzeros, stride,
    CODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`S` itself: a tile `(BLOCK_ROWS, 32 * WIDTH)` of it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * WIDTH
    valid = row < rows
    words = _words_of(support, row, valid, first, stride, nonzeros, CODE, WIDTH, CHUNK)
    before = _count_before(support, row, valid, first, stride, nonzeros, CODE, CHUNK)
    stored, entry = _expand(words, before)
    tile = tl.load(values + row[:, None] * nonzeros + entry, stored, other=0)
    atom = first * 32 + tl.arange(0, 32 * WIDTH)
    tl.store(result + row[:, None] * atoms + atom[None, :], tile, valid[:, None] & (atom < atoms)[None, :])


@triton.jit(do_not_specialize=["n"])  # one compilation for all numbers of rows of input
@no_type_check
def matmul(
    x, values, support, result, n, rows, atoms, nonzeros, stride, x_row, x_column,
    CODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`x @ S.T`: a tile `(BLOCK_N, BLOCK_ROWS)` of it, along the atoms."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists, valid = token < n, row < rows
    before = tl.zeros((BLOCK_ROWS,), tl.int32)
    total = tl.zeros((BLOCK_N, BLOCK_ROWS), tl.float32)
    for first in range(0, tl.cdiv(atoms, 32), WIDTH):
        atom = first * 32 + tl.arange(0, 32 * WIDTH)
        left = tl.load(
            x + token[:, None] * x_row + atom[None, :] * x_column, exists[:, None] & (atom < atoms)[None, :], other=0
        )
        words = _words_of(support, row, valid, first, stride, nonzeros, CODE, WIDTH, CHUNK)
        stored, entry = _expand(words, before)
        tile = tl.load(values + row[:, None] * nonzeros + entry, stored, other=0)
        total = _add_product(left, tl.trans(tile), total, PRECISION)
        before += tl.sum(_count(words), 1)
    where = result + token[:, None] * rows + row[None, :]
    tl.store(where, total.to(result.dtype.element_ty), exists[:, None] & valid[None, :])


@triton.jit(do_not_specialize=["n"])  # one compilation for all numbers of rows of input
@no_type_check
def matmul_transposed(
    x, values, support, result, n, rows, atoms, nonzeros, stride, x_row, x_column,
    CODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`x @ S`: a tile `(BLOCK_N, 32 * WIDTH)` of it, along the rows."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * WIDTH
    exists = token < n
    total = tl.zeros((BLOCK_N, 32 * WIDTH), tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        valid = row < rows
        left = tl.load(x + token[:, None] * x_row + row[None, :] * x_column, exists[:, None] & valid[None, :], other=0)
        words = _words_of(support, row, valid, first, stride, nonzeros, CODE, WIDTH, CHUNK)
        before = _count_before(support, row, valid, first, stride, nonzeros, CODE, CHUNK)
        stored, entry = _expand(words, before)
        tile = tl.load(values + row[:, None] * nonzeros + entry, stored, other=0)
        total = _add_product(left, tile, total, PRECISION)
    atom = first * 32 + tl.arange(0, 32 * WIDTH)
    where = result + token[:, None] * atoms + atom[None, :]
    tl.store(where, total.to(result.dtype.element_ty), exists[:, None] & (atom < atoms)[None, :])


@triton.jit(do_not_specialize=["n"])  # one compilation for all numbers of rows of input
@no_type_check
def outer(
    left, right, support, result, n, rows, atoms, nonzeros, stride,
    left_row, left_column, right_row, right_column,
    CODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The entries of `left.T @ right` on the support: those of a tile `(BLOCK_ROWS, 32 * WIDTH)` of it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * WIDTH
    atom = first * 32 + tl.arange(0, 32 * WIDTH)
    valid, exists = row < rows, atom < atoms
    total = tl.zeros((BLOCK_ROWS, 32 * WIDTH), tl.float32)
    for start in range(0, n, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = token < n
        one = tl.load(
            left + token[:, None] * left_row + row[None, :] * left_column, inside[:, None] & valid[None, :], other=0
        )
        other = tl.load(
            right + token[:, None] * right_row + atom[None, :] * right_column,
            inside[:, None] & exists[None, :],
            other=0,
        )
        total = _add_product(tl.trans(one), other, total, PRECISION)
    words = _words_of(support, row, valid, first, stride, nonzeros, CODE, WIDTH, CHUNK)
    before = _count_before(support, row, valid, first, stride, nonzeros, CODE, CHUNK)
    stored, entry = _expand(words, before)
    tl.store(result + row[:, None] * nonzeros + entry, total.to(result.dtype.element_ty), stored)
