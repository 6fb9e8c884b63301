"""Makes plain transformers load compressed models, without importing transformers before the user does.

`from_pretrained` looks a format up in the registry of `transformers.quantizers.auto`, which transformers imports before
it can build any model. Ours is entered there by `factorformer.hf.plugin`, which needs torch and parts of transformers:
seconds that a program which only asks for a help page, or for a version, should not pay. So where the registry is not
imported yet, a finder in `sys.meta_path` waits for it, and goes away when its work is done.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"
PLUGIN = "factorformer.hf.plugin"

_attach: Callable[[Any], None] | None = None


def register() -> None:
    """Enter the format in transformers' registry: now if that is imported, else as soon as it is."""
    if REGISTRY in sys.modules:
        importlib.import_module(PLUGIN)
    else:
        sys.meta_path.insert(0, _Finder())


def attach_with(attach: Callable[[Any], None]) -> None:
    """Called by the plug-in when it is imported: what makes a model save as a compressed one."""
    global _attach
    _attach = attach


def attach(model: Any) -> None:
    """Make a model of transformers, or those inside of it, save, load and train as what its layers are by now.

    Where transformers was never imported, there are no such models.
    """
    if _attach is not None:
        _attach(model)


class _Finder(MetaPathFinder):
    """Finds the registry where all others find it, and gives it a loader that imports the plug-in afterwards."""

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:  # `path` of a namespace package is iterable, but no `Sequence`
        if fullname != REGISTRY:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Loads a module as its own loader does, then imports the plug-in."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whatever reads the module's source or resources through its loader finds the real one.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        # Where the import of the plug-in itself brought us here, this is nothing, and it registers when it goes on.
        importlib.import_module(PLUGIN)
        # Not earlier: after an import that failed, the next attempt has to register too.
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
