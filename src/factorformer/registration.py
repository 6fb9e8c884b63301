"""Makes plain transformers load compressed models, and PEFT train them, without importing either before the user does.

`from_pretrained` looks a format up in the registry of `transformers.quantizers.auto`, which transformers imports before
it can build any model. Ours is entered there by `factorformer.hf.plugin`, which needs torch and parts of transformers:
seconds that a program which only asks for a help page, or for a version, should not pay. So where a module is not
imported yet that one of ours has to follow, a finder in `sys.meta_path` waits for it, and goes away when all are there.

What fails in ours never breaks the import of another package: that works as ever, a warning says what does not, and the
first use of a compressed model raises the error.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from factorformer.errors import FactorformerWarning

REGISTRY = "transformers.quantizers.auto"
PLUGIN = "factorformer.hf.plugin"

FOLLOWED = {REGISTRY: PLUGIN, "peft.tuners.lora.model": "factorformer.hf.lora"}
"""Modules of other packages, and those of this one that are imported after them."""

_attach: Callable[[Any], None] | None = None


def register() -> None:
    """Import what follows modules that are there, and wait for the others."""
    for module in FOLLOWED:
        if module in sys.modules:
            _follow(module)
    if not FOLLOWED.keys() <= sys.modules.keys():
        sys.meta_path.insert(0, _Finder())


def attach_with(attach: Callable[[Any], None]) -> None:
    """Called by the plug-in when it is imported: what makes a model save as a compressed one."""
    global _attach
    _attach = attach


def attach(model: Any) -> None:
    """Make a model of transformers, or those inside of it, save, load and train as what its layers are by now.

    Where transformers was never imported, there are no such models.
    """
    if _attach is None and REGISTRY in sys.modules:
        importlib.import_module(PLUGIN)  # it failed before: now the error is raised
    if _attach is not None:
        _attach(model)


def _follow(module: str) -> None:
    try:
        importlib.import_module(FOLLOWED[module])
    except Exception as error:
        package = module.partition(".")[0]
        warnings.warn(
            f"{package} will not know models that factorformer compressed: {type(error).__name__}: {error}",
            FactorformerWarning,
            stacklevel=2,
        )


class _Finder(MetaPathFinder):
    """Finds modules where all others find them, and gives them a loader that imports ours afterwards."""

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:  # `path` of a namespace package is iterable, but no `Sequence`
        if fullname not in FOLLOWED:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Loads a module as its own loader does, then imports ours."""

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
        # Where the import of ours itself brought us here, this is nothing, and it registers when it goes on.
        _follow(module.__name__)
        # Not earlier: after an import that failed, the next attempt has to register too.
        if self.finder in sys.meta_path and FOLLOWED.keys() <= sys.modules.keys():
            sys.meta_path.remove(self.finder)
