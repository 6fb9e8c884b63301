"""The public surface is small and documented, and modules import only what stands above them."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import get_args

import pytest
import torch
from jaxtyping import TypeCheckError

import factorformer
from factorformer import errors, recipes
from factorformer.fitting import FITTERS
from factorformer.fitting.linalg import leading_eigenvectors
from factorformer.layers.matrix import Scope
from factorformer.planning import AllocationName
from factorformer.structures import STRUCTURES, Structure

SOURCE = Path(factorformer.__file__).parent
FILES = {
    ".".join(("factorformer", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(SOURCE.rglob("*.py"))
}

# A module imports only what stands above it. The longest matching name decides.
ORDER = [
    "moved",
    "errors",
    "registration",
    "files",
    "processes",
    "progress",
    "kernels",
    "structures",
    "layers",
    "fitting",
    "planning",
    "planning.evidence",
    "recipes",
    "training",
    "compression",
    "hf",
    "tasks",
    "export",
    "bench",
    "report",
    "streaming",
    "cli",
]


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """The package's modules that a module imports, and whether only for types."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            found = [
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in FILES else node.module or ""
                for a in node.names
            ]
        for module in found:
            if module in FILES:
                yield module, id(node) in for_types


def place(module: str) -> int:
    path = module.removeprefix("factorformer.")
    places = [(len(part), i) for i, part in enumerate(ORDER) if path == part or path.startswith(f"{part}.")]
    assert places, f"{module} has no place in the order of imports"
    return max(places)[1]


def package(module: str) -> str:
    return module.split(".")[1]


def test_a_module_imports_only_what_stands_above_it() -> None:
    wrong = []
    for module in FILES.keys() - {"factorformer"}:
        for imported, for_types in imports(module):
            if imported == "factorformer":  # for the version number
                fits = place(module) >= ORDER.index("report")
            elif ORDER[place(imported)] == ORDER[place(module)]:
                fits = package(imported) == package(module) and not for_types
            else:
                fits = place(imported) < place(module)
            if not fits:
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_imports_have_no_cycle() -> None:
    graph = {
        name: {imported for imported, for_types in imports(name) if not for_types and imported != "factorformer"}
        for name in FILES
        if name != "factorformer"
    }
    tuple(TopologicalSorter(graph).static_order())


# An abstract base says what each method does, for all that implement it.
DOCUMENTED_BY = {
    "structures/base.py": "factorformer.structures.",
    "training/straight_through.py": "factorformer.training.straight_through",
    "training/units.py": "factorformer.training.units",
}


def undocumented(module: str) -> Iterator[str]:
    """Public names of a module without a docstring."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    if not ast.get_docstring(tree):
        yield module
    abstract = {
        method.name
        for base, package in DOCUMENTED_BY.items()
        if module.startswith(package)
        for node in ast.walk(ast.parse((SOURCE / base).read_text()))
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and any("abstract" in ast.unparse(d) for d in method.decorator_list)
    }

    def check(body: list[ast.stmt], owner: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and node.name not in abstract:
                    yield f"{owner}.{node.name}"
                if isinstance(node, ast.ClassDef):
                    yield from check(node.body, f"{owner}.{node.name}")

    yield from check(tree.body, module)


def test_everything_public_is_documented() -> None:
    assert not [name for module in FILES for name in undocumented(module)]


def test_the_front_door_is_small_and_sorted() -> None:
    names = factorformer.__all__
    assert names == sorted(names)
    assert len(names) <= 20
    for name in names:
        value = getattr(factorformer, name)
        if name != "__version__":
            assert inspect.getdoc(value), name
    public = {n for n, v in vars(factorformer).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public | {"__version__"} == set(names)


def test_every_argument_of_a_verb_is_explained() -> None:
    for name in ("plan", "compress", "initialize", "load"):
        verb = getattr(factorformer, name)
        text = inspect.getdoc(verb) or ""
        assert not [argument for argument in inspect.signature(verb).parameters if argument not in text], name
        assert "Raises:" in text, name


def test_errors_have_one_base() -> None:
    named = [v for v in vars(errors).values() if inspect.isclass(v) and issubclass(v, Exception)]
    classes = [c for c in named if not issubclass(c, Warning)]
    assert len(classes) > 3
    assert all(issubclass(c, factorformer.FactorformerError) and c.__doc__ for c in classes)
    assert issubclass(factorformer.FactorformerError, ValueError)


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    assert errors.one_of("svdd", ["svd", "fwsvd"]) == "'svdd' (did you mean 'svd'?); allowed: svd, fwsvd"
    assert errors.one_of("zzz", ["svd", "fwsvd"]) == "'zzz'; allowed: svd, fwsvd"


def test_recipes_name_parts_that_exist() -> None:
    assert {"svd", "fwsvd", "whitened", "kronecker", "kronecker_whitened", "shapeshifter"} <= set(recipes.RECIPES)
    for name, recipe in recipes.RECIPES.items():
        assert set(recipe.structures) <= set(STRUCTURES.values())
        assert set(recipe.structures) <= set(FITTERS)
        assert recipe.kind in ("any", *STRUCTURES)
        assert recipe.allocation in get_args(AllocationName)
        assert recipe.summary
        assert "\n" not in recipe.summary
        assert recipe.paper
        assert recipe.needs in ("nothing", "text", "labelled text")
        assert recipe.scope in get_args(Scope)
        assert recipes.get(name) is recipe
    assert recipes.default_method(calibrated=True) == "fisher"
    assert recipes.default_method(calibrated=False) == "svd"


def test_every_structure_has_a_name_and_a_fitter() -> None:
    for kind, structure in STRUCTURES.items():
        assert issubclass(structure, Structure)
        assert structure.kind == kind
        assert structure in FITTERS


def test_the_package_is_typed_and_has_one_version() -> None:
    assert (SOURCE / "py.typed").is_file()
    assert importlib.metadata.version("factorformer") == factorformer.__version__


def test_importing_neither_prints_nor_needs_the_test_tools() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['beartype', 'hypothesis', 'pytest', 'sentence_transformers']))\n"
        "import factorformer; [getattr(factorformer, name) for name in factorformer.__all__]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_shapes_are_checked_while_tests_run() -> None:
    with pytest.raises(TypeCheckError, match="n n"):
        leading_eigenvectors(torch.zeros(3, 4), 1)
    with pytest.raises(TypeCheckError, match="rank"):
        leading_eigenvectors(torch.zeros(3, 3), 1.5)  # type: ignore[arg-type]
