"""Compiles the CPU kernels; needs a C++ compiler and nothing else, torch included.

Installation runs this if there is a compiler, and goes on without if there is none: the package then multiplies
with torch alone. `python -m factorformer.kernels.compile` builds the library in place again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
LIBRARY = Path(__file__).with_name("libfactorformer.so")
FAILED = LIBRARY.with_suffix(".failed")
"""What a compiler said when it could not build the library; gone once it can."""

_WIDE = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mbmi2", "-mprefer-vector-width=512")
VARIANTS: dict[str, tuple[str, ...]] = {"baseline": ()}
"""Flags of each variant; the library takes the last that the processor has."""
FOR_TESTS: dict[str, tuple[str, ...]] = {}
"""Flags of what no library holds by default: instructions in plain C++, for processors that do not have them."""
if platform.machine().lower() in ("x86_64", "amd64"):
    _VNNI = (*_WIDE, "-mavx512vnni")
    VARIANTS |= {"avx2": ("-mavx2", "-mfma"), "avx512": _WIDE, "avx512_vnni": _VNNI}
    _PLACES = (*_VNNI, "-mavx512vbmi2")
    _PAIRS = (*_PLACES, "-mavx512bf16")
    VARIANTS |= {
        "avx512_vbmi2": _PLACES,
        "avx512_bf16": _PAIRS,
        "amx": (*_PAIRS, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    }
    FOR_TESTS |= {"amx_emulated": (*_PAIRS, "-DFACTORFORMER_EMULATED_TILES")}

_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)


class NoCompilerError(OSError):
    """There is no C++ compiler."""


def fingerprint() -> str:
    """A digest of the sources, which the library carries: one of other sources is not used."""
    digest = hashlib.sha256()
    for file in sorted(file for file in SOURCES.iterdir() if file.suffix in (".h", ".cpp")):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def install() -> None:
    """Build the library in its place; what made it fail is kept beside it, for the package to tell.

    Raises:
        OSError: as `compile_library`.
    """
    FAILED.unlink(missing_ok=True)
    try:
        compile_library()
    except NoCompilerError:
        raise
    except OSError as error:
        FAILED.write_text(f"{error}\n", encoding="utf-8")
        raise


def compile_library(
    output: Path = LIBRARY, extra: Sequence[str] = (), variants: Sequence[str] = tuple(VARIANTS)
) -> None:
    """Build the library; it appears whole or not at all.

    Args:
        output: the file to make.
        extra: further flags for compiler and linker, such as those of sanitizers.
        variants: which to build; all but for tests.

    Raises:
        NoCompilerError: no compiler.
        OSError: it failed; the message holds what it said.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError("no C++ compiler: set CXX, or install one")
    output, command = output.absolute(), shlex.split(compiler)
    if shutil.which(command[0]) is None:
        raise NoCompilerError(f"no C++ compiler '{command[0]}': set CXX to one that is installed")
    try:
        _build(command, output, ("-fopenmp", *extra), variants)
    except OSError:
        # Some compilers come without OpenMP: one thread is better than no library.
        _build(command, output, tuple(extra), variants)


def _build(compiler: list[str], output: Path, extra: tuple[str, ...], variants: Sequence[str]) -> None:
    variants = [name for name in variants if name == "baseline" or _knows(compiler, (VARIANTS | FOR_TESTS)[name])]
    with tempfile.TemporaryDirectory(prefix=".kernels-", dir=output.parent) as folder:
        objects = [Path(folder, f"{name}.o") for name in (*variants, "library")]
        commands = [
            [
                *(*compiler, *_FLAGS, *extra, *(VARIANTS | FOR_TESTS)[name], f"-DFACTORFORMER_VARIANT={name}"),
                *("-c", "variant.cpp", "-o", str(made)),
            ]
            for name, made in zip(variants, objects, strict=False)
        ]
        sources = f'-DFACTORFORMER_SOURCES="{fingerprint()}"'
        commands.append([*compiler, *_FLAGS, *extra, sources, "-c", "library.cpp", "-o", str(objects[-1])])
        _run(commands)
        partial = Path(folder, output.name)
        _run([[*compiler, "-shared", *extra, *map(str, objects), "-o", str(partial)]])
        partial.replace(output)


def _knows(compiler: list[str], flags: Sequence[str]) -> bool:
    """Whether a compiler has these instructions: an older one builds the other variants."""
    command = [*compiler, *flags, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def _run(commands: list[list[str]]) -> None:
    """Run commands side by side."""
    running = [
        subprocess.Popen(command, cwd=SOURCES, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    said = [(process.communicate()[0], process.returncode) for process in running]
    for command, (text, code) in zip(commands, said, strict=True):
        if code:
            raise OSError(f"{' '.join(command)} failed: {text.strip()}")


if __name__ == "__main__":
    install()
