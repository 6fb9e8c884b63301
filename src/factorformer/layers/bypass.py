"""Layers whose weight an architecture uses without calling them: factors under the same name would mislead it.

Mamba multiplies by `dt_proj.weight` itself; Mamba 2 casts what goes into the head to `lm_head.weight.dtype`, which is
int8 once the head is stored so. Three rules find such layers, whatever their names:

- *A trial*: one forward pass of a copy whose weights take no memory and whose layers multiply nothing. A weight that
  any operation sees has been used from outside, for its own layer did not.
- *The source*: `self.<layer>.weight` in the methods of the modules above a layer, for what the trial does not reach,
  such as a branch for another device. What is done in training alone does not count: Mamba's kernels for training on
  a GPU read `out_proj.weight`, and refuse factors by their shape.
- *Initialization*, through which every model goes that is loaded: Whisper asks its table of positions for its shape,
  to make sinusoids of it.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import itertools
import logging
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from factorformer.layers.dummies import dummy_inputs
from factorformer.layers.modes import evaluating

USED = "the architecture reads its weight itself, left dense"
CAST = "the architecture casts activations to the type of its weight, which must not be int8, left dense"

ROUNDS = 8
"""Trials with weights in int8, each without the layers that the ones before found."""

OUTSIDE = ("_init", "init_", "__init__", "tie_", "_tie", "resize", "_resize", "set_", "get_", "load_", "_load", "reset")
"""How methods begin that have no part in a forward pass."""

HARMLESS = ("device", "is_cuda", "requires_grad", "is_meta", "ndim")
"""Attributes of a weight that factors answer as it does."""


def bypassed(
    model: nn.Module, layers: Mapping[str, nn.Module], *, int8: bool = False, batch: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Which of these layers have to stay dense for what the architecture does with their weights, and why.

    Args:
        model: any module; it is neither run nor changed, and random numbers are left alone.
        layers: linear layers and embeddings of it, by name.
        int8: whether factors are to be stored in int8, so that the type of a weight matters.
        batch: keyword arguments of the model; by default random ones, made from its configuration.
    """
    places = {id(module): name for name, module in layers.items()}
    used, cast = _in_source(model, places)
    found = _in_trials(model, layers, int8=False, batch=batch)
    used |= found | _in_initialization(model, layers)
    if int8:
        cast = _in_trials(model, layers, int8=True, batch=batch, known=used, unreached=cast)
    used, cast = _alike(model, layers, used), _alike(model, layers, cast if int8 else set())
    return dict.fromkeys(cast, CAST) | dict.fromkeys(used, USED)


def accepted(model: nn.Module) -> dict[str, Any] | None:
    """A random batch that a model runs on; None where none is found, or weights have no values."""
    if any(tensor.is_meta for tensor in model.parameters()):
        return None
    like = next(model.parameters(), torch.empty(0))
    for batch in dummy_inputs(model):
        batch = {k: v.to(like if v.is_floating_point() else like.device) for k, v in batch.items()}
        with _quiet(), evaluating(model), contextlib.suppress(Exception):  # an input of another kind than it takes
            model(**batch)
            return dict(batch)
    return None


def _alike(model: nn.Module, layers: Mapping[str, nn.Module], names: set[str]) -> set[str]:
    """Names, and those of layers that modules of the same class hold in the same place."""

    def place(name: str) -> tuple[type, str]:
        parent, _, child = name.rpartition(".")
        return type(model.get_submodule(parent)), child

    kinds = {place(name) for name in names}
    kinds = {kind for kind in kinds if kind[0] not in (nn.ModuleList, nn.Sequential, nn.ModuleDict)}
    return names | {name for name in layers if place(name) in kinds}


# The trial


class _Watch(TorchDispatchMode):
    """Sees every operation of a trial: those on a watched weight, and those that make int8 of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, str] = {}
        self.used: set[str] = set()
        self.cast: set[str] = set()
        self.reached: set[str] = set()
        self.last: str | None = None

    def blame(self) -> None:
        """The layer whose weight was read last."""
        if self.last is not None:
            self.cast.add(self.last)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in tensors}
        names = {self.storages[storage] for storage in storages & self.storages.keys()}
        if func is not torch.ops.aten.detach.default:
            self.used |= names
        if func is torch.ops.aten._grouped_mm.default:  # of experts, whose repeated numbers it would not take
            return args[0].new_zeros(len(args[0]), args[1].shape[-1])
        result = func(*args, **(kwargs or {}))
        if not names and isinstance(result, Tensor) and result.dtype == torch.int8:
            if tensors and tensors[0].is_floating_point() and tensors[0].shape == result.shape:
                self.blame()
                return tensors[0].clone()  # so that the trial goes on as the dense model would
            if all(t.dtype != torch.int8 for t in tensors):
                self.blame()
        return result


@functools.cache
def _watched(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass that says when its weight is read, and makes up what comes out."""

    def read(self: nn.Module, name: str) -> Any:
        if name == "weight":
            watch, path, _ = self.__dict__["_watch"]
            watch.last = path
        return cls.__getattr__(self, name)

    def forward(self: nn.Module, x: Tensor, *_: Any, **__: Any) -> Tensor:
        watch, path, output = self.__dict__["_watch"]
        watch.reached.add(path)
        if issubclass(cls, nn.Embedding):
            return output.expand(*x.shape, -1).clone()
        return output.to(x.dtype if x.is_floating_point() else output.dtype).expand(*x.shape[:-1], -1).clone()

    return type(cls.__name__, (cls,), {"__getattr__": read, "forward": forward})


def _in_trials(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    *,
    int8: bool,
    batch: Mapping[str, Any] | None,
    known: set[str] | None = None,
    unreached: set[str] | None = None,
) -> set[str]:
    """Layers that a trial finds used or, in int8, cast to; with those of `unreached` that no trial reached."""
    found: set[str] = set()
    codes: set[str] = set()
    for _ in range(ROUNDS if int8 else 1):
        codes = set(layers) - found - (known or set()) if int8 else set()
        watch = _trial(model, layers, codes, batch)
        if watch is None:
            return found | (unreached or set())
        new = (watch.cast if int8 else watch.used) - found
        found |= new
        if not int8 or not new:
            return found | ((unreached or set()) - watch.reached)
    return found | codes


def _trial(
    model: nn.Module, layers: Mapping[str, nn.Module], codes: set[str], batch: Mapping[str, Any] | None
) -> _Watch | None:
    """Run a copy of the model, and those models inside of it that it did not reach; None where it cannot be copied."""
    with torch.device("cpu"):  # a model that is being loaded is made on another one
        return _watched_run(model, layers, codes, batch)


def _watched_run(
    model: nn.Module, layers: Mapping[str, nn.Module], codes: set[str], batch: Mapping[str, Any] | None
) -> _Watch | None:
    try:
        twin = _without_memory(model)
    except Exception:  # whatever the modules of an unknown architecture hold
        return None
    watch = _Watch()
    for name, layer in layers.items():
        copied = twin.get_submodule(name)
        _observe(copied, layer, name, watch, name in codes)
    inner = [(n, m) for n, m in twin.named_modules() if n and isinstance(m, transformers.PreTrainedModel)]
    with _quiet(), watch:
        _run(twin, watch, itertools.chain([batch] if batch else [], dummy_inputs(model)), bool(codes))
        for name, part in inner:
            if not any(path.startswith(f"{name}.") for path in watch.reached):
                _run(part, watch, dummy_inputs(part), bool(codes))
    return watch


def _in_initialization(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Layers whose weight, if it has another shape, makes the initialization of the module that holds them fail."""
    try:
        twin = _without_memory(model).to("meta")
    except Exception:  # as in a trial
        return set()
    watch, copies = _Watch(), {name: twin.get_submodule(name) for name in layers}
    parts = [part for part in twin.modules() if isinstance(part, transformers.PreTrainedModel)]
    found: set[str] = set()

    def works(part: transformers.PreTrainedModel, module: nn.Module) -> bool:
        watch.last = None
        try:
            part._init_weights(module)
        except Exception:
            return False
        return True

    with _quiet():
        own = {id(layer) for layer in copies.values()}
        able = [(part, m) for part in parts for m in part.modules() if id(m) not in own and works(part, m)]
        whole = {name: layer.get_parameter("weight") for name, layer in copies.items()}
        for name, layer in copies.items():
            _observe(layer, layers[name], name, watch, False)
            layer._parameters["weight"] = nn.Parameter(whole[name][:, :1], requires_grad=False)
        for part, module in able:
            while not works(part, module) and (name := watch.last) is not None and name not in found:
                found.add(name)
                copies[name]._parameters["weight"] = whole[name]
    return found


def _observe(layer: nn.Module, original: nn.Module, name: str, watch: _Watch, as_codes: bool) -> None:
    weight = layer.get_parameter("weight")
    turned = weight.shape[0] if isinstance(original, nn.Linear) else weight.shape[-1]
    output = torch.linspace(-1, 1, turned, dtype=weight.dtype)
    if as_codes:
        del layer._parameters["weight"]
        layer.register_buffer("weight", torch.zeros(1, dtype=torch.int8).expand(weight.shape))
        weight = layer.get_buffer("weight")
    watch.storages[weight.untyped_storage()._cdata] = name
    layer.__dict__["_watch"] = (watch, name, output)
    layer.__class__ = _watched(type(layer))


def _run(module: nn.Module, watch: _Watch, batches: Iterable[Mapping[str, Any]], int8: bool) -> None:
    """The first of the batches that the module takes; what it used of the others before it failed counts as well."""
    for batch in itertools.islice(batches, 12):
        watch.last = None
        try:
            module(**{key: _copied(value) for key, value in batch.items()})
        except TypeError:
            if int8 and watch.last is not None:  # `torch.finfo` of int8
                watch.blame()
            continue
        except Exception:  # an input of another kind than the model takes: the next one may fit
            continue
        return


def _copied(value: Any) -> Any:
    return value[:2].clone() if isinstance(value, Tensor) and value.dim() else value


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy on the CPU all of whose parameters are one number, repeated without taking memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        value = torch.full((), 0.02 if parameter.is_floating_point() else 0, dtype=parameter.dtype)
        memo[id(parameter)] = nn.Parameter(value.expand(parameter.shape), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.detach().cpu().clone()
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():  # hooks are for the model itself
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


class _quiet:  # a context manager, used as a function is
    """No gradients, no random numbers taken, no word from anyone."""

    def __enter__(self) -> None:
        self.contexts = [torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings()]
        for context in self.contexts:
            context.__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)

    def __exit__(self, *error: Any) -> None:
        logging.disable(logging.NOTSET)
        for context in reversed(self.contexts):
            context.__exit__(None, None, None)


# The source


def _in_source(model: nn.Module, places: Mapping[int, str]) -> tuple[set[str], set[str]]:
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


def embeddings_of(model: nn.Module, which: str) -> nn.Module | None:
    """The `input_embeddings` or `output_embeddings` of a model; None where there are none, or none that it knows of."""
    try:
        return getattr(model, f"get_{which}")() if isinstance(model, transformers.PreTrainedModel) else None
    except (NotImplementedError, AttributeError):
        return None
