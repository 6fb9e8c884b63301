"""The kernels for GPUs equal the reference: on a GPU where there is one, and in Triton's interpreter everywhere."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.test_support import positions

from factorformer.errors import ModelError
from factorformer.kernels import cuda, sparse_product, support

pytest.importorskip("triton", reason="needs Triton: pip install triton (Linux; CUDA builds of torch bring it)")

# The interpreter is chosen when Triton is imported, so `test_in_the_interpreter` runs this file in another process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
multiplies = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU here; test_in_the_interpreter runs it on the CPU",
)
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)  # where there is no conftest as well


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative to the norm of the result: a rounding of the values, and of the sums at the end."""

# Rows, atoms, nonzeros, rows of input.
CASES = [
    (70, 50, 11, 5),  # bitmap, not a multiple of a word
    (64, 40, 12, 130),  # bitmap, more input than atoms
    (24, 200, 50, 3),  # bitmap, more than four words before a tile
    (20, 192, 50, 3),  # the same of whole words
    (40, 136, 8, 1),  # one byte, one row of input
    (33, 160, 18, 2),  # one byte, more than a chunk
    (16, 60, 4, 7),  # one byte, two tiles
    (20, 300, 5, 17),  # two bytes
    (8, 300, 18, 2),  # two bytes, more than a chunk
    (8, 33, 32, 0),  # no input at all
    (5, 1, 1, 2),
]


def fuzzed(count: int) -> Iterator[tuple[int, ...]]:
    draw = random.Random(0)
    for _ in range(count):
        atoms = draw.choice([draw.randint(1, 80), draw.randint(80, 240)])
        nonzeros = draw.randint(1, max(1, min(atoms, draw.choice([3, 20, atoms]))))
        yield draw.randint(1, 60), atoms, nonzeros, draw.randint(0, 40)


def operands(case: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Input of the product and of the transposed one, values, and packed support."""
    rows, atoms, nonzeros, n = case
    packed = support.pack(positions(rows, atoms, nonzeros, seed=rows), atoms).to(DEVICE)
    made = (torch.randn(size, device=DEVICE).to(dtype) for size in ((n, atoms), (n, rows), (rows, nonzeros)))
    return (*made, packed)


def reference(case: tuple[int, ...], x: torch.Tensor, y: torch.Tensor, values: torch.Tensor, packed: torch.Tensor):
    """Both products and the outer one, through the dense matrix in float64."""
    x, y, values = x.double(), y.double(), values.double()
    where = support.unpack(packed, case[1], case[2])
    dense = values.new_zeros(case[0], case[1]).scatter(1, where, values)
    return x @ dense.T, y @ dense, (y.T @ x).gather(1, where)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.fixture(scope="module")
def _registered() -> None:
    cuda.register(DEVICE)


def products(case: tuple[int, ...], x: torch.Tensor, y: torch.Tensor, values: torch.Tensor, packed: torch.Tensor):
    _, atoms, nonzeros, _ = case
    return (
        cuda.sparse_matmul(x, values, packed, atoms),
        cuda.sparse_matmul_transposed(y, values, packed, atoms),
        cuda.sparse_outer(y, x, packed, nonzeros),
    )


@multiplies
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_equal_the_reference(case: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "WRITTEN", 0)
    given = operands(case, torch.float32)
    for actual, expected in zip(products(case, *given), reference(case, *given), strict=True):
        assert_near(actual, expected, torch.float32)


@multiplies
def test_a_small_matrix_is_written_for_transposed_products(monkeypatch: pytest.MonkeyPatch) -> None:
    _, y, values, packed = operands(CASES[6], torch.float32)
    launch, launched, found = cuda._launch, [], []

    def noted(name: str, *rest: Any) -> torch.Tensor:
        launched.append(name)
        return launch(name, *rest)

    monkeypatch.setattr(cuda, "_launch", noted)
    for most in (cuda.WRITTEN, 0):
        monkeypatch.setattr(cuda, "WRITTEN", most)
        found.append(cuda.sparse_matmul_transposed(y, values, packed, CASES[6][1]))
    assert launched == ["densify", "matmul_transposed"]
    torch.testing.assert_close(*found)


@multiplies
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[8]], ids=str)
def test_half_precision_adds_up_in_float32(
    case: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "WRITTEN", 0)
    given = operands(case, dtype)
    for actual, expected in zip(products(case, *given), reference(case, *given), strict=True):
        assert_near(actual, expected, dtype)


@multiplies
def test_fuzzed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "WRITTEN", 0)
    codes = set()
    for case, dtype in zip(fuzzed(10), itertools.cycle([torch.float32, torch.bfloat16]), strict=False):
        codes.add(support.code_of(case[1], case[2]))
        given = operands(case, dtype)
        for actual, expected in zip(products(case, *given), reference(case, *given), strict=True):
            assert_near(actual, expected, dtype)
    assert len(codes) > 1


@multiplies
@pytest.mark.parametrize("nonzeros", [30, 8], ids=["bitmap", "list"])
def test_tiles_of_many_rows_of_input(nonzeros: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "PROGRAMS", 1)  # so that little input is multiplied in the tiles of much
    monkeypatch.setattr(cuda, "WRITTEN", 0)
    case = (136, 136, nonzeros, 130)
    given = operands(case, torch.bfloat16)
    for actual, expected in zip(products(case, *given), reference(case, *given), strict=True):
        assert_near(actual, expected, torch.bfloat16)


@multiplies
def test_inputs_need_not_be_contiguous() -> None:
    x, y, values, packed = operands(CASES[0], torch.float32)
    expected = reference(CASES[0], x, y, values, packed)
    strided = (x.T.contiguous().T, y.repeat_interleave(2, 1)[:, ::2], values.T.contiguous().T, packed)
    assert not any(tensor.is_contiguous() for tensor in strided[:3])
    for actual, right in zip(products(CASES[0], *strided), expected, strict=True):
        assert_near(actual, right, torch.float32)
    row = x[:1].expand(5, -1)
    assert_near(cuda.sparse_matmul(row, values, packed, CASES[0][1]), expected[0][:1].expand(5, -1), torch.float32)


@multiplies
@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=str)
def test_derivatives_of_the_operators(case: tuple[int, ...], transposed: bool) -> None:
    x, y, values, packed = operands(case, torch.float32)
    given, gradient = (y, x) if transposed else (x, y)
    given.requires_grad_()
    values.requires_grad_()
    product = sparse_product(given, values, packed, case[1], transposed=transposed)
    assert torch.equal(product, products(case, x, y, values, packed)[transposed])  # the operator is the kernel
    found = torch.autograd.grad(product, (given, values), gradient)
    forward, back, outer = reference(case, x.detach(), y.detach(), values.detach(), packed)
    assert_near(product, back if transposed else forward, torch.float32)
    assert_near(found[0], forward if transposed else back, torch.float32)
    assert_near(found[1], outer, torch.float32)


@multiplies
@pytest.mark.usefixtures("_registered")
def test_other_types_go_to_the_reference() -> None:
    x, y, values, packed = operands(CASES[0], torch.float32)
    x, values = x.double(), values.double()
    actual = sparse_product(x, values, packed, CASES[0][1])
    torch.testing.assert_close(actual, reference(CASES[0], x, y, values, packed)[0])


def test_sizes_that_disagree_never_reach_a_kernel() -> None:
    packed = support.pack(positions(4, 20, 8), 20)
    values = torch.randn(4, 8)
    with pytest.raises(ModelError, match="size 19 where 20"):
        cuda.sparse_matmul(torch.randn(2, 19), values, packed, 20)
    with pytest.raises(ModelError, match="size 5 where 4"):
        cuda.sparse_matmul_transposed(torch.randn(2, 5), values, packed, 20)
    with pytest.raises(ModelError, match="size 2 where 3"):
        cuda.sparse_outer(torch.randn(3, 4), torch.randn(2, 20), packed, 8)
    with pytest.raises(ModelError, match=r"4 rows of 3 bytes .* 4 rows of 4 bytes"):
        cuda.sparse_matmul(torch.randn(2, 30), values, packed, 30)
    with pytest.raises(ModelError, match=r"4 rows of 3 bytes .* 6 rows"):
        cuda.sparse_matmul(torch.randn(2, 20), torch.randn(6, 8), packed, 20)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("name", ["densify", "matmul", "matmul_transposed", "outer"])
@pytest.mark.parametrize(("code", "bits", "dtype"), [(0, 32, "bf16"), (0, 8, "bf16"), (1, 8, "fp32"), (2, 8, "fp16")])
def test_kernels_compile_for_hopper(
    name: str, code: int, bits: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from factorformer.kernels import triton_sparse

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_sparse, name)
    tiles = cuda.tiles_of(name, DTYPES[dtype], n=2048, rows=768, atoms=768)
    warps = tiles.pop("num_warps")
    constants = {**tiles, "CODE": code, "PRECISION": "ieee"} | {a: 1 for a in kernel.arg_names if a.endswith("_column")}
    pointers = {"support": f"*{'u' if bits == 8 else 'i'}{bits}"} | dict.fromkeys(
        ("x", "values", "result", "left", "right"), f"*{dtype}"
    )
    compiled = triton.compile(
        ASTSource(
            kernel,
            {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in kernel.arg_names},
            {(kernel.arg_names.index(a),): value for a, value in constants.items()},
            {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in kernel.arg_names if a in pointers},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    assert compiled.asm["cubin"]
    assert ("wgmma" in compiled.asm["ptx"]) == (name != "densify" and dtype != "fp32")  # tensor cores where possible
    assert "popc" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 100 * 1024  # two programs share a multiprocessor


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs this file in the interpreter")
def test_in_the_interpreter() -> None:
    # Not as a worker of xdist, which other plug-ins of pytest would take it for.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"],
        env=inherited | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout
    assert "no GPU here" not in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="about another process")
def test_triton_is_imported_when_needed_and_may_be_missing() -> None:
    code = """
import os, sys
import torch
from factorformer.kernels import cuda, sparse_product, support

def check():
    packed = support.pack(torch.tensor([[0, 2], [1, 2]]), 5)
    product = sparse_product(torch.eye(5), torch.ones(2, 2), packed, 5)
    assert product.T.tolist() == [[1, 0, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert "factorformer.kernels.triton_sparse" not in sys.modules

cuda.register()
check()
cuda.register("cpu")
os.environ["TRITON_INTERPRET"] = "1"  # the kernels would serve the CPU now, as they do a GPU
assert cuda.available(torch.device("cpu"))
cuda.available.cache_clear()
sys.modules["triton"] = None
check()
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_products_of_float32_are_exact_unless_torch_may_round(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    assert cuda._precision(device) == "ieee"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert cuda._precision(device) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert cuda._precision(device) == "ieee"
