"""The compiled kernels equal float64 in every variant that this processor has, and touch no memory but their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.fresh import Interpreter

from factorformer.errors import FactorformerError, FactorformerWarning, ModelError
from factorformer.kernels import cpu, sparse_product, support
from factorformer.kernels.compile import FOR_TESTS, LIBRARY, VARIANTS, compile_library

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
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=900, cwd=ROOT)


@pytest.fixture(scope="module")
def with_torch() -> Iterator[Interpreter]:
    with Interpreter("import torch, numpy", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive") as made:
        yield made


def fuzzed(interpreter: Interpreter, variant: str, cases: int) -> None:
    """Run the worker, or skip where the processor does not have the variant."""
    code = "import os, runpy, sys; os.environ['FACTORFORMER_CPU'] = sys.argv[2]; sys.argv = sys.argv[1:]; "
    done = interpreter.run(code + "runpy.run_path(sys.argv[0], run_name='__main__')", WORKER, variant, cases)
    if "which this processor does not have" in done.stderr:
        pytest.skip(f"this processor does not have {variant}")
    assert done.stdout.split() == ["done"], done.stderr[-6000:]


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_products_equal_float64(variant: str, with_torch: Interpreter) -> None:
    fuzzed(with_torch, variant, 30)


def test_products_of_the_reference_equal_float64(with_torch: Interpreter) -> None:
    fuzzed(with_torch, cpu.REFERENCE, 10)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without compiled kernels."""
    source = ROOT / "src" / "factorformer"
    shutil.copytree(source, tmp_path / "factorformer", ignore=shutil.ignore_patterns("*.so", "*.failed", "__pycache__"))
    return tmp_path


def test_without_a_library_torch_multiplies_and_nothing_is_said(package: Path) -> None:
    code = "from factorformer.kernels import variant; print(variant())"
    done = python("-W", "error", "-c", code, package=package, FACTORFORMER_CPU="")
    assert done.stdout.split() == [cpu.REFERENCE], done.stderr[-3000:]
    assert not done.stderr


def test_what_is_wrong_with_the_library_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FACTORFORMER_CPU", raising=False)
    library, failed = tmp_path / "library.so", tmp_path / "library.failed"
    monkeypatch.setattr(cpu, "LIBRARY", library)
    monkeypatch.setattr(cpu, "FAILED", failed)
    assert cpu._load() is None  # there was no compiler

    def refused(reason: str) -> None:
        with pytest.warns(FactorformerWarning, match=f"(?s){reason}.*factorformer.kernels.compile") as caught:
            assert cpu._load() is None
        assert len(caught) == 1
        monkeypatch.setenv("FACTORFORMER_CPU", "baseline")
        with pytest.raises(FactorformerError, match=f"'baseline'.*{reason}"):
            cpu._load()
        monkeypatch.setenv("FACTORFORMER_CPU", cpu.REFERENCE)
        assert cpu._load() is None
        monkeypatch.delenv("FACTORFORMER_CPU")

    failed.write_text("it is raining\n")
    refused("could not be compiled .it is raining")
    library.write_bytes(b"no library at all")
    refused("cannot be loaded")
    if cpu.AVAILABLE:
        monkeypatch.setattr(cpu, "LIBRARY", LIBRARY)
        monkeypatch.setattr(cpu, "fingerprint", lambda: "other")
        refused("compiled from other sources")


def test_an_unknown_variant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORFORMER_CPU", "avx51")
    with pytest.raises(FactorformerError, match=r"'avx51'.*avx512"):
        cpu._load()
    assert cpu.variant() in {*VARIANTS, cpu.REFERENCE}


def sanitizers() -> str:
    """The run-time library of the address sanitizer; empty where there is none."""
    if COMPILER is None:
        return ""
    said = subprocess.run([*COMPILER.split(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    return said.stdout.strip() if Path(said.stdout.strip()).is_absolute() else ""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("variant", [cpu.variant(), *FOR_TESTS])
def test_sanitizers_find_nothing(variant: str, package: Path) -> None:
    """Neither in what this processor runs, nor in products by tiles, which few have and C++ stands in for here."""
    runtime = sanitizers()
    if not runtime or cpu.variant() == cpu.REFERENCE:
        pytest.skip("the compiler comes without a shared address sanitizer, or there are no kernels here")
    if variant in FOR_TESTS and cpu.variant() not in ("amx", "avx512_bf16"):
        pytest.skip("the processor does not multiply bfloat16, as what stands in for tiles does")
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")
    compile_library(package / "factorformer" / "kernels" / "libfactorformer.so", checks, [variant])
    quiet = "detect_leaks=0:verify_asan_link_order=0"
    environment = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": quiet, "FACTORFORMER_CPU": variant}
    done = python(str(WORKER), variant, "12", "overread", package=package, **environment)
    assert done.stdout.split() == ["done"], done.stderr[-3000:]
    # The sanitizer is at work: it sees what comes after that, a read beyond the end that the library is told to do.
    assert "heap-buffer-overflow" in done.stderr


@compiled
def test_sizes_that_do_not_fit_never_reach_the_kernels() -> None:
    values, packed = torch.randn(8, 3), support.pack(torch.tensor([[0, 1, 2]]).expand(8, 3), 5)
    codes, scales = torch.ones(8, 3, dtype=torch.int8), torch.ones(8)
    for x, given, scale, bias, message in (
        (torch.randn(2, 4), values, None, None, "columns of the input: got 4, .* 5"),
        (torch.randn(2, 5), values, None, torch.ones(7), "bias: got 7, .* 8"),
        (torch.randn(2, 5), codes, scales[:7], None, "scales of the sparse matrix: got 7, .* 8"),
        (torch.randn(2, 5), values, scales, None, "scales of the sparse matrix: got 8, .* none"),
        (torch.randn(2, 5), codes, None, None, "scales of the sparse matrix: got none, .* 8"),
        (torch.randn(2, 5), values[:7], None, None, "rows of the sparse support: got 8, .* 7"),
        (torch.randn(2, 5), torch.randn(8, 0), None, None, "0 nonzeros a row"),
    ):
        with pytest.raises(ModelError, match=message):
            cpu.sparse_matmul(x, given, packed, 5, scale, bias)
    with pytest.raises(ModelError, match=r"columns of the input: got 7, .* 8"):
        sparse_product(torch.randn(2, 7), values, packed, 5, transposed=True)
    with pytest.raises(ModelError, match=r"bytes .*sparse support: got 1, .* 6"):
        cpu.sparse_matmul(torch.randn(2, 500), values, packed, 500, None, None)
    with pytest.raises(ModelError, match=r"second input: got 2, .* 3"):
        cpu.sparse_outer(torch.randn(3, 8), torch.randn(2, 5), packed, 3)


@compiled
def test_chains_that_do_not_fit_never_reach_the_kernels() -> None:
    x, first, second = torch.randn(2, 5), torch.randn(4, 5), torch.randn(6, 4)
    codes = torch.ones(4, 5, dtype=torch.int8)
    nothing = torch.ones(0)
    for weights, scales, columns, bias, message in (
        ([second], [None], [False], None, "columns of the input: got 5, .* 4"),
        ([first, first], [None, None], [False] * 2, None, "columns of the input: got 4, .* 5"),
        ([first], [None], [True], None, "columns of the input: got 5, .* 4"),
        ([first, second], [None, None], [False] * 2, torch.ones(4), "bias: got 4, .* 6"),
        ([codes], [None], [False], None, "scales of a matrix: got none, .* 4"),
        ([codes], [nothing], [False], None, "scales of a matrix: got 0, .* 4"),
        ([first], [torch.ones(4)], [False], None, "scales of a matrix: got 4, .* none"),
        ([torch.eye(5)] * 5, [None] * 5, [False] * 5, None, "1 to 4 matrices, got 5"),
    ):
        with pytest.raises(ModelError, match=message):
            cpu.chain(x, weights, scales, columns, bias)
    wide = torch.ones(1, cpu.WIDEST + 1, dtype=torch.int8)
    with pytest.raises(ModelError, match=r"65536 columns.* 65537"):
        cpu.chain(torch.ones(1, cpu.WIDEST + 1), [wide], [torch.ones(1)], [False], None)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    for key, value in ((k[:1], k[:1]), (k, k[:, :, :4]), (k[..., :4], k[..., :4]), (k[:, [0, 1, 1]], k[:, [0, 1, 1]])):
        with pytest.raises(ModelError, match=r"attention: .*query \(2, 4, 3, 8\)"):
            cpu.attention(q, key, value, None, 1.0)
