"""The kernels are compiled by what compiler there is, and errors say what it said."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from factorformer.kernels import compile as build
from factorformer.kernels.compile import compile_library, fingerprint

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
    library.factorformer_sources.restype = ctypes.c_char_p
    assert library.factorformer_sources().decode() == fingerprint()
    assert sorted(file.name for file in folder.iterdir()) == ["made.so", "old c++", "said"]
    assert " -O0" in said.read_text()
    assert "libgomp" not in (folder / "made.so").read_bytes().decode("latin-1")


def test_errors_hold_what_the_compiler_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "echo it is raining; exit 3"))
    with pytest.raises(OSError, match=r"(?s)broken .*-c variant\.cpp .*it is raining"):
        compile_library(tmp_path / "library.so")
    monkeypatch.setenv("CXX", "c+++")
    with pytest.raises(OSError, match=r"no C\+\+ compiler 'c\+\+\+': .*CXX"):
        compile_library(tmp_path / "library.so")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"no C\+\+ compiler: .*CXX"):
        compile_library(tmp_path / "library.so")
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


def test_a_failed_installation_leaves_what_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no compiler is, nothing was expected; and the next one that works takes the note away."""
    failed = tmp_path / "library.failed"
    monkeypatch.setattr(build, "FAILED", failed)
    monkeypatch.setattr(build, "compile_library", lambda: compile_library(tmp_path / "library.so"))
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "echo it is raining; exit 3"))
    with pytest.raises(OSError, match="raining"):
        build.install()
    assert "raining" in failed.read_text()
    monkeypatch.setenv("CXX", "c+++")
    with pytest.raises(build.NoCompilerError, match=r"c\+\+\+"):
        build.install()
    assert not failed.exists()


def test_the_fingerprint_is_that_of_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, copy)
    monkeypatch.setattr(build, "SOURCES", copy)
    first = fingerprint()
    (copy / "sparse.h~").write_text("of an editor")
    assert fingerprint() == first
    for file in [*copy.glob("*.h"), *copy.glob("*.cpp")]:
        text = file.read_bytes()
        file.write_bytes(text + b"\n")
        assert fingerprint() != first, file
        file.write_bytes(text)
    assert fingerprint() == first
