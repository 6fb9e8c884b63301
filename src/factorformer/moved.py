"""Names that modules had before they moved into folders: importing one of them imports the module itself.

Only for programs that were written against them; nothing in the package uses them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

MOVED: Mapping[str, str] = {
    "factorformer.calibration": "factorformer.fitting.statistics",
    "factorformer.hf.data": "factorformer.tasks.data",
    "factorformer.hf.training": "factorformer.tasks.finetuning",
    "factorformer.nn": "factorformer.layers.nn",
    "factorformer.surgery": "factorformer.layers.surgery",
}


def register() -> None:
    """Let the import system know the old names."""
    sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, _Loader()) if fullname in MOVED else None


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module under its new name, whose specification stays its own."""
        module = importlib.import_module(MOVED[spec.name])
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module was executed when it was imported under its new name."""
        module.__spec__ = self.spec
