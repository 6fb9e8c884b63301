"""The kernels are compiled by what compiler there is, and errors say what it said."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from factorformer.kernels.compile import compile_library

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None or os.name != "posix", reason="no C++ compiler here")


def script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


def test_a_compiler_without_openmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread is better than no library; and relative paths, options in CXX and folders with spaces are no trap."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    said = folder / "said"
    refuses = f'case "$*" in *-fopenmp*) exit 1;; esac; echo "$@" >> "{said}"; exec {COMPILER} "$@"'
    monkeypatch.setenv("CXX", f"'{script(folder / 'old c++', refuses)}' -O0")
    monkeypatch.chdir(folder)
    compile_library(Path("made.so"), ["-O0"], ["baseline"])
    library = ctypes.CDLL(str(folder / "made.so"))
    library.factorformer_variant.restype = ctypes.c_char_p
    assert library.factorformer_variant() == b"baseline"
    assert sorted(file.name for file in folder.iterdir()) == ["made.so", "old c++", "said"]
    assert " -O0" in said.read_text()
    assert "libgomp" not in (folder / "made.so").read_bytes().decode("latin-1")


def test_errors_hold_what_the_compiler_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "echo it is raining; exit 3"))
    with pytest.raises(OSError, match=r"(?s)broken .*-c variant.cpp .* failed: it is raining"):
        compile_library(tmp_path / "library.so")
    monkeypatch.setenv("CXX", "c+++")
    with pytest.raises(OSError, match=r"no C\+\+ compiler 'c\+\+\+': set CXX to one that is installed"):
        compile_library(tmp_path / "library.so")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"no C\+\+ compiler: set CXX, or install one"):
        compile_library(tmp_path / "library.so")
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]
