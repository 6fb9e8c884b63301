"""The compiled kernels equal float64 in every variant that this processor has, and touch no memory but their own."""

from __future__ import annotations

import ast
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from factorformer.errors import ModelError
from factorformer.kernels import cpu, sparse_product, support
from factorformer.kernels.compile import VARIANTS, compile_library

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "kernels" / "cpu_worker.py"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
compiled = pytest.mark.skipif(not cpu.AVAILABLE, reason="the kernels are not compiled here")


def python(*arguments: object, package: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, perhaps with another copy of the package."""
    path = {"PYTHONPATH": str(package)} if package else {}
    # Threads that wait would take the core from those that work.
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **path, **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, cwd=ROOT)


@functools.cache
def runs_here(variant: str) -> bool:
    done = python("-c", "import factorformer.kernels", FACTORFORMER_CPU=variant)
    return done.returncode == 0


@pytest.mark.parametrize("variant", [*VARIANTS, cpu.REFERENCE])
def test_products_equal_float64(variant: str) -> None:
    if variant != cpu.REFERENCE and not (cpu.AVAILABLE and runs_here(variant)):
        pytest.skip(f"no kernels for {variant} here")
    done = python(WORKER, variant, 50, FACTORFORMER_CPU=variant)
    assert done.stdout.split() == ["done"], done.stderr[-3000:]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without compiled kernels."""
    source = ROOT / "src" / "factorformer"
    shutil.copytree(source, tmp_path / "factorformer", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_without_a_library_torch_multiplies(package: Path) -> None:
    done = python("-W", "error", WORKER, cpu.REFERENCE, 5, package=package)
    assert done.stdout.split() == ["done"], done.stderr[-3000:]
    assert not done.stderr
    wanted = python("-c", "import factorformer.kernels", package=package, FACTORFORMER_CPU="baseline")
    assert "FactorformerError: FACTORFORMER_CPU is 'baseline', but there are no kernels" in wanted.stderr
    broken = package / "factorformer" / "kernels" / "libfactorformer.so"
    broken.write_bytes(b"no library at all")
    assert python(WORKER, cpu.REFERENCE, 5, package=package).stdout.split() == ["done"]


@compiled
def test_names_of_variants() -> None:
    unknown = python("-c", "import factorformer.kernels", FACTORFORMER_CPU="avx51")
    assert unknown.stderr.splitlines()[-1] == (
        "factorformer.errors.FactorformerError: FACTORFORMER_CPU: unknown variant 'avx51' (did you mean 'avx512'?); "
        f"allowed: {', '.join([*VARIANTS, cpu.REFERENCE])}"
    )
    for variant in VARIANTS:
        if not runs_here(variant):
            done = python("-c", "import factorformer.kernels", FACTORFORMER_CPU=variant)
            assert f"FACTORFORMER_CPU is '{variant}', which this processor does not have" in done.stderr
    assert cpu.variant() in {*VARIANTS, cpu.REFERENCE}


@compiled
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_threads_are_those_of_torch() -> None:
    # In a process of its own: other packages bring further copies of the library, which nothing here uses.
    code = (
        "from pathlib import Path; import factorformer.kernels; "
        "print({line.split()[-1] for line in Path('/proc/self/maps').read_text().splitlines() if 'libgomp' in line})"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert len(ast.literal_eval(done.stdout.replace("set()", "()"))) <= 1, f"two pools of threads: {done.stdout}"


def sanitizers() -> str:
    """The run-time library of the address sanitizer; empty where there is none."""
    if COMPILER is None:
        return ""
    said = subprocess.run([*COMPILER.split(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    return said.stdout.strip() if Path(said.stdout.strip()).is_absolute() else ""


@needs_compiler
@pytest.mark.parametrize("variant", ["best", "baseline"])
def test_sanitizers_find_nothing(variant: str, package: Path) -> None:
    runtime = sanitizers()
    if not runtime:
        pytest.skip("the compiler comes without a shared address sanitizer")
    if variant == "best":
        variant = next((name for name in reversed(VARIANTS) if name != "baseline" and runs_here(name)), "")
        if not variant:
            pytest.skip("baseline is the best that this processor has")
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")
    library = package / "factorformer" / "kernels" / "libfactorformer.so"
    compile_library(library, checks, [variant])
    quiet = "detect_leaks=0:verify_asan_link_order=0"
    done = python(WORKER, variant, 12, package=package, LD_PRELOAD=runtime, ASAN_OPTIONS=quiet)
    assert done.stdout.split() == ["done"], done.stderr[-6000:]
    # The sanitizer is at work: it sees a read beyond the end that the library is told to do.
    overread = (
        "import torch; from factorformer.kernels import cpu; x, y = torch.ones(64), torch.empty(80);"
        "cpu._loaded().factorformer_gelu(x.data_ptr(), 80, y.data_ptr())"
    )
    done = python("-c", overread, package=package, LD_PRELOAD=runtime, ASAN_OPTIONS=quiet)
    assert "heap-buffer-overflow" in done.stderr


@compiled
def test_sizes_that_do_not_fit_never_reach_the_kernels() -> None:
    values, packed = torch.randn(8, 3), support.pack(torch.tensor([[0, 1, 2]]).expand(8, 3), 5)
    codes, scales = torch.ones(8, 3, dtype=torch.int8), torch.ones(8)
    for x, given, scale, bias, message in (
        (torch.randn(2, 4), values, None, None, "columns of the input: got 4, but the product takes 5"),
        (torch.randn(2, 5), values, None, torch.ones(7), "values of the bias: got 7, but the product takes 8"),
        (torch.randn(2, 5), codes, scales[:7], None, "scales of the sparse matrix: got 7, but the product takes 8"),
        (torch.randn(2, 5), values, scales, None, "scales of the sparse matrix: got 8, but the product takes none"),
        (torch.randn(2, 5), codes, None, None, "scales of the sparse matrix: got none, but the product takes 8"),
        (torch.randn(2, 5), values[:7], None, None, None),
        (torch.randn(2, 5), torch.randn(8, 0), None, None, "0 nonzeros a row"),
    ):
        if message is None:  # seven rows have other supports than eight
            with pytest.raises(ModelError, match="7 rows, 8 supports"):
                cpu.sparse_matmul(x, given, packed, 5, 1, scale, bias)
            continue
        with pytest.raises(ModelError, match=message):
            cpu.sparse_matmul(x, given, packed, 5, 1, scale, bias)
    with pytest.raises(ModelError, match="columns of the input: got 7, but the product takes 8"):
        sparse_product(torch.randn(2, 7), values, packed, 5, transposed=True)
    with pytest.raises(ModelError, match="bytes of a row of the sparse support: got 1, but the product takes 6"):
        cpu.sparse_matmul(torch.randn(2, 500), values, packed, 500, 1, None, None)
    with pytest.raises(ModelError, match="rows of the second input: got 2, but the product takes 3"):
        cpu.sparse_outer(torch.randn(3, 8), torch.randn(2, 5), packed, 3, 1)


@compiled
def test_chains_that_do_not_fit_never_reach_the_kernels() -> None:
    x, first, second = torch.randn(2, 5), torch.randn(4, 5), torch.randn(6, 4)
    codes = torch.ones(4, 5, dtype=torch.int8)
    nothing = torch.ones(0)
    for weights, scales, columns, bias, message in (
        ([second], [None], [False], None, "columns of the input: got 5, but the product takes 4"),
        ([first, first], [None, None], [False] * 2, None, "columns of the input: got 4, but the product takes 5"),
        ([first], [None], [True], None, "columns of the input: got 5, but the product takes 4"),
        ([first, second], [None, None], [False] * 2, torch.ones(4), "values of the bias: got 4, .* takes 6"),
        ([codes], [None], [False], None, "scales of a matrix: got none, but the product takes 4"),
        ([codes], [nothing], [False], None, "scales of a matrix: got 0, but the product takes 4"),
        ([first], [torch.ones(4)], [False], None, "scales of a matrix: got 4, but the product takes none"),
        ([torch.eye(5)] * 5, [None] * 5, [False] * 5, None, "a chain has 1 to 4 matrices, got 5"),
    ):
        with pytest.raises(ModelError, match=message):
            cpu.chain(x, weights, scales, columns, bias)
    wide = torch.ones(1, cpu.WIDEST + 1, dtype=torch.int8)
    with pytest.raises(ModelError, match="int8 matrices have at most 65536 columns here, got 65537"):
        cpu.chain(torch.ones(1, cpu.WIDEST + 1), [wide], [torch.ones(1)], [False], None)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    for key, value in ((k[:1], k[:1]), (k, k[:, :, :4]), (k[..., :4], k[..., :4]), (k[:, [0, 1, 1]], k[:, [0, 1, 1]])):
        with pytest.raises(ModelError, match=r"attention: a query \(2, 4, 3, 8\) does not go with a key"):
            cpu.attention(q, key, value, None, 1.0)
