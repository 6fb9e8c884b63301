"""Weights that the source of a model's classes reads outside of their own layers."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping

import transformers
from torch import nn

from factorformer.layers.embeddings import embeddings_of

OUTSIDE = ("_init", "init_", "__init__", "tie_", "_tie", "resize", "_resize", "set_", "get_", "load_", "_load", "reset")
"""How methods begin that have no part in a forward pass."""

HARMLESS = ("device", "is_cuda", "requires_grad", "is_meta", "ndim")
"""Attributes of a weight that factors answer as it does."""


def read_in_source(model: nn.Module, places: Mapping[int, str]) -> tuple[set[str], set[str]]:
    """Layers whose weight, and those the type of whose weight, is read in the source of a module above them."""
    used: set[str] = set()
    cast: set[str] = set()
    above = {name.rpartition(".")[0] for name in places.values()}
    above |= {"".join(parts) for name in above for parts in _prefixes(name)}
    for name in above:
        module = model.get_submodule(name)
        for chain, attribute in _reads(module):
            for layer in _resolve(module, chain):
                if id(layer) in places and attribute not in HARMLESS:
                    (cast if attribute == "dtype" else used).add(places[id(layer)])
    return used, cast


def _prefixes(name: str) -> Iterator[tuple[str, ...]]:
    parts = name.split(".")
    for end in range(len(parts)):
        yield (".".join(parts[:end]),)


def _reads(module: nn.Module) -> Iterator[tuple[tuple[str, ...], str]]:
    """Paths from a module to the layers whose `.weight` its methods read, and what they ask of it, if only that."""
    for cls in type(module).__mro__:
        if cls in (nn.Module, transformers.PreTrainedModel):
            return
        for method in _methods(cls):
            yield from _Reader(module).read(method)


@functools.cache
def _methods(cls: type) -> tuple[ast.FunctionDef, ...]:
    """The methods of a class that read a weight of something, and may have a part in a forward pass."""
    found = []
    for name, method in vars(cls).items():
        if name.startswith(OUTSIDE) or not inspect.isfunction(method):
            continue
        method = inspect.unwrap(method)
        if "weight" not in method.__code__.co_names:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue
        if isinstance(tree, ast.FunctionDef):
            found.append(tree)
    return tuple(found)


class _Reader(ast.NodeVisitor):
    """Reads of `self.<path>.weight` in a method, without branches that a module's own settings rule out.

    Local names for a module, or for one after the other in a loop, are followed.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.found: list[tuple[tuple[str, ...], str]] = []
        self.names: dict[str, tuple[str, ...]] = {}

    def read(self, method: ast.FunctionDef) -> list[tuple[tuple[str, ...], str]]:
        self.guarded = "int8" in ast.unparse(method)  # it knows that a weight may be codes
        self.names = {method.args.args[0].arg: ()} if method.args.args else {}
        self.visit(method)
        return self.found

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        answer = _settled(node.test, self.module)
        for part in ([] if answer is False else node.body) + ([] if answer is True else node.orelse):
            self.visit(part)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._name(node.targets[0], _chain(node.value, self.names))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        target, over = node.target, node.iter
        if isinstance(target, ast.Tuple) and isinstance(over, ast.Call) and ast.unparse(over.func) == "enumerate":
            target, over = target.elts[-1], over.args[0]
        chain = _chain(over, self.names)
        each = [None if chain is None else chain if chain[-1:] == ("*",) else (*chain, "*")]
        if isinstance(over, (ast.Tuple, ast.List)):
            each = [_chain(element, self.names) for element in over.elts]
        self.visit(node.iter)
        for chain in each:
            self._name(target, chain)
            for part in [*node.body, *node.orelse]:
                self.visit(part)

    def _name(self, target: ast.expr, chain: tuple[str, ...] | None) -> None:
        if isinstance(target, ast.Name) and chain:
            self.names[target.id] = chain
        elif isinstance(target, ast.Name):
            self.names.pop(target.id, None)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain = _chain(node.value, self.names) if node.attr == "weight" else None
        if chain:
            self.found.append((chain, ""))
            return
        inner = node.value
        chain = None
        if isinstance(inner, ast.Attribute) and inner.attr == "weight":
            chain = _chain(inner.value, self.names)
        if chain:
            if not (node.attr == "dtype" and self.guarded):
                self.found.append((chain, node.attr if node.attr in (*HARMLESS, "dtype") else ""))
            return
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if ast.unparse(node).endswith(".weight.shape[0]"):  # a factor of this name has as many rows
            return
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
            return
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            self.generic_visit(node)


def _chain(node: ast.expr, names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """The path of `self.a[i].b`, with `*` for what is chosen by an index; None for anything else.

    Args:
        node: an expression.
        names: of `self`, and of local variables that stand for a path.
    """
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        before = _chain(node.value, names)
        return None if before is None else (*before, node.attr)
    if isinstance(node, ast.Subscript):
        before = _chain(node.value, names)
        return None if before is None else (*before, "*")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args:
        before = _chain(node.func.value, names)
        return None if before is None else (*before, f"{node.func.attr}()")
    return None


def _resolve(module: nn.Module, chain: tuple[str, ...]) -> list[nn.Module]:
    """The modules at the end of a path."""
    found = [module]
    for step in chain:
        if step == "*":
            found = [child for each in found for child in each.children()]
        elif step in ("get_input_embeddings()", "get_output_embeddings()"):
            found = [m for each in found if isinstance(m := embeddings_of(each, step[4:-2]), nn.Module)]
        else:
            found = [m for each in found if isinstance(m := getattr(each, step, None), nn.Module)]
    return found


def _settled(test: ast.expr, module: nn.Module) -> bool | None:
    """What a condition on nothing but a module's settings is; None for others."""
    if isinstance(test, ast.BoolOp):
        answers = [_settled(part, module) for part in test.values]
        decisive = not isinstance(test.op, ast.And)
        if decisive in answers:
            return decisive
        return None if None in answers else not decisive
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        answer = _settled(test.operand, module)
        return None if answer is None else not answer
    if ast.unparse(test) == "self.training":
        return False
    allowed = (ast.Attribute, ast.Compare, ast.Constant, ast.Name, ast.UnaryOp, ast.Load, ast.unaryop, ast.cmpop)
    nodes = list(ast.walk(test))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    if names != {"self"} or not all(isinstance(node, allowed) for node in nodes):
        return None
    try:
        return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {"self": module}))
    except Exception:  # it asks for what the module does not have
        return None
