"""Compiles the CPU kernels while the package is built or installed, where a C++ compiler is at hand."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelBuildHook(BuildHookInterface):
    """Adds the compiled library to wheels and editable installs; without a compiler they are pure Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before files are collected."""
        if self.target_name != "wheel":
            return
        build = runpy.run_path(str(Path(self.root, "src/factorformer/kernels/compile.py")))
        library: Path = build["LIBRARY"]
        try:
            build["install"]()
        except OSError as error:
            # pip hides this: where a compiler failed, the package says so again when it is used. A library of an
            # earlier installation goes on serving, if it was made of these very sources.
            self.app.display_warning(f"the CPU kernels of factorformer were not compiled: {error}")
        for made in (library, build["FAILED"]):
            if made.exists():
                build_data["artifacts"].append(str(made.relative_to(self.root)))
        if not library.exists():
            return
        build_data["pure_python"] = False
        # Plain C inside: one wheel serves all versions of Python.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
