"""Graph passes on torch's export: forms that run faster, and tensors stored in fewer bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer

LARGEST_CONSTANT = 64
"""Elements up to which the result of a computation on constants is stored in place of the computation."""

FEWEST_STORED = 1024
"""Elements from which on a tensor is worth to be stored in another type."""

LEVELS = 127
"""Of symmetric int8, on each side of zero."""

HALVES = {torch.float16: np.dtype(np.float16), torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}


def simplify(model: ir.Model) -> None:
    """Fold what is small, drop what is not used, and keep ONNX Runtime from two fusions slower than their parts.

    Its fused `SkipLayerNormalization` takes longer than an addition and a normalization; the sum of two
    tensors, written as `Sum` in place of `Add`, is not fused. The same goes for a bias before a GELU.
    """
    optimizer.optimize_ir(model, input_size_limit=LARGEST_CONSTANT, output_size_limit=LARGEST_CONSTANT)
    passes.DeduplicateInitializersPass()(model)
    for node in list(model.graph):
        if node.op_type == "Gemm" and len(node.inputs) == 2 and not node.outputs[0].is_graph_output():
            left, right = node.inputs
            if node.attributes.get_int("transB", 0):
                right = _node(node, "Transpose", [right], [ir.AttrInt64s("perm", [1, 0])])
            ir.convenience.replace_all_uses_with(node.outputs[0], _node(node, "MatMul", [left, right]))
            model.graph.remove(node, safe=True)
        if node.op_type in ("LayerNormalization", "Gelu"):
            before = node.inputs[0].producer() if node.inputs[0] is not None else None
            if before is not None and before.op_type == "Add":
                before.op_type = "Sum"


def fold(model: ir.Model) -> None:
    """Compute all that depends on constants alone, such as values of codes and scales, and sparse matrices."""
    optimizer.optimize_ir(model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)


def clean(model: ir.Model) -> None:
    """Drop unused nodes, and descriptions that say where in torch's program a node came from."""
    passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    # Shapes in between are for each runtime to find.
    between = {value for node in model.graph for value in node.outputs}.difference(model.graph.outputs)
    for value in between.union(model.graph.initializers.values()):
        value.shape = value.type = None


def store_as(model: ir.Model, dtype: torch.dtype) -> None:
    """Store weights in the half-precision type that they come from, where that loses nothing; products stay float32."""
    half = HALVES[dtype]
    for weight in _weights(model):
        values = _array(weight)
        small = values.astype(half)
        if np.array_equal(small.astype(np.float32), values):
            _replace(model, weight, _Stored(model, weight, small))


def quantize(model: ir.Model) -> list[tuple[ir.Value, ir.Value]]:
    """Store weights as int8 with a scale for each output, and multiply by them in int8.

    Activations are quantized as they come, with one scale for each product (`DynamicQuantizeLinear`). A matrix that is
    itself computed from constants, such as one with sparse factors, is quantized when the file is loaded.

    Returns:
        The left factor and the result of each product in int8.
    """
    stored = {weight: _Stored.int8(model, weight) for weight in _weights(model)}
    quantized: dict[ir.Value, list[ir.Value]] = {}
    products = [_multiply_in_int8(model, node, stored, quantized) for node in _products(model)]
    for weight, replacement in stored.items():
        _replace(model, weight, replacement)
    for node in model.graph:
        before = node.inputs[0].producer() if node.op_type == "Gelu" and node.inputs[0] is not None else None
        if before is not None and before.op_type == "Sum":
            before.op_type = "Add"  # a bias costs nothing after a product in int8, as part of it
    return products


def products_alone(model: ir.Model) -> list[str]:
    """Cut a graph in floats down to the products that `quantize` makes in int8, in the same order.

    Returns:
        Names of the inputs that take the place of their left factors; the outputs are the products.
    """
    products = _products(model)
    model.graph.inputs.clear()
    model.graph.outputs.clear()
    for place, node in enumerate(products):
        given = ir.Value(name=f"left_{place}", type=ir.TensorType(ir.DataType.FLOAT))
        node.replace_input_with(0, given)
        node.outputs[0].type = given.type
        model.graph.inputs.append(given)
        model.graph.outputs.append(node.outputs[0])
    passes.RemoveUnusedNodesPass()(model)
    return [value.name or "" for value in model.graph.inputs]


def _products(model: ir.Model) -> list[ir.Node]:
    """The products of a value that depends on inputs and one that does not."""
    static = _static(model)
    products = [node for node in model.graph if node.op_type == "MatMul"]
    return [node for node in products if node.inputs[1] in static and node.inputs[0] not in static]


class _Stored:
    """A weight stored in another type, and the nodes that turn it, or rows of it, into float32."""

    def __init__(self, model: ir.Model, weight: ir.Value, values: Any, scale: Any = None) -> None:
        self.values = _initializer(model, f"{weight.name}_{values.dtype}", values)
        self.scale = None if scale is None else _initializer(model, f"{weight.name}_scale", scale)
        self.by_columns = scale is not None and scale.shape == (1, values.shape[1])

    @classmethod
    def int8(cls, model: ir.Model, weight: ir.Value) -> _Stored:
        values = _array(weight)
        right = values.ndim == 2 and all(node.op_type == "MatMul" and place == 1 for node, place in weight.uses())
        axes = (0,) if right else tuple(range(1, values.ndim))
        scale = np.maximum(np.abs(values).max(axis=axes, keepdims=True) / LEVELS, np.finfo(np.float32).tiny)
        return cls(model, weight, np.rint(values / scale).astype(np.int8), scale.astype(np.float32))

    def whole(self, before: ir.Node) -> ir.Value:
        """All of it, evaluated by runtimes as they load the file."""
        return self._scaled(self.values, self.scale, before)

    def rows(self, gather: ir.Node) -> ir.Value:
        """What a look-up of rows gives; only those are turned into float32."""
        index, axis = gather.inputs[1], [ir.AttrInt64("axis", 0)]
        values, scale = (
            None if table is None else _node(gather, "Gather", [table, index], axis)
            for table in (self.values, self.scale)
        )
        return self._scaled(values, scale, gather)

    def _scaled(self, values: ir.Value | None, scale: ir.Value | None, before: ir.Node) -> ir.Value:
        values = _node(before, "Cast", [values], [ir.AttrInt64("to", ir.DataType.FLOAT)])
        return values if scale is None else _node(before, "Mul", [values, scale])


def _replace(model: ir.Model, weight: ir.Value, stored: _Stored) -> None:
    whole = None
    for node, place in list(weight.uses()):
        axis = node.attributes.get("axis")
        if node.op_type == "Gather" and place == 0 and (axis is None or axis.as_int() == 0):
            ir.convenience.replace_all_uses_with(node.outputs[0], stored.rows(node))
            model.graph.remove(node, safe=True)
            continue
        whole = whole or stored.whole(model.graph[0])
        node.replace_input_with(place, whole)
    model.graph.initializers.pop(weight.name or "")


def _multiply_in_int8(
    model: ir.Model, node: ir.Node, stored: dict[ir.Value, _Stored], quantized: dict[ir.Value, list[ir.Value]]
) -> tuple[ir.Value, ir.Value]:
    left, right = node.inputs
    assert left is not None
    assert right is not None
    if left not in quantized:
        quantized[left] = list(_nodes(node, "DynamicQuantizeLinear", [left], outputs=3))
    codes, scale, zero = quantized[left]
    matrix, scales = _int8_matrix(model, node, right, stored)
    product = _node(node, "MatMulInteger", [codes, matrix, zero])
    product = _node(node, "Cast", [product], [ir.AttrInt64("to", ir.DataType.FLOAT)])
    product = _node(node, "Mul", [product, _node(node, "Mul", [scale, scales])])
    before = node.outputs[0]
    name, product.type, product.shape = before.name, before.type, before.shape
    ir.convenience.replace_all_uses_with(before, product, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    if product.is_graph_output():
        before.name, product.name = None, name
    return left, product


def _int8_matrix(
    model: ir.Model, node: ir.Node, matrix: ir.Value, stored: dict[ir.Value, _Stored]
) -> tuple[ir.Value, ir.Value]:
    """The right factor of a product as int8, and the scale of each of its columns."""
    first = model.graph[0]
    producer = matrix.producer()
    turned = producer is not None and producer.op_type == "Transpose" and len(producer.inputs) == 1
    weight = stored.get(producer.inputs[0] if turned and producer else matrix)  # pyright: ignore[reportArgumentType]
    if weight is not None and weight.scale is not None and weight.by_columns != turned:
        scales = _node(first, "Reshape", [weight.scale, _integers(model, [-1])])
        if not turned:
            return weight.values, scales
        return _node(first, "Transpose", [weight.values], [ir.AttrInt64s("perm", [1, 0])]), scales
    largest = _node(
        node, "ReduceMax", [_node(node, "Abs", [matrix]), _integers(model, [0])], [ir.AttrInt64("keepdims", 0)]
    )
    tiny = _initializer(model, "tiny", np.array(np.finfo(np.float32).tiny, np.float32))
    levels = _initializer(model, "levels", np.array(LEVELS, np.float32))
    scales = _node(node, "Max", [_node(node, "Div", [largest, levels]), tiny])
    codes = _node(node, "Round", [_node(node, "Div", [matrix, scales])])
    return _node(node, "Cast", [codes], [ir.AttrInt64("to", ir.DataType.INT8)]), scales


def _weights(model: ir.Model) -> list[ir.Value]:
    """Float tensors that are worth to be stored otherwise: not vectors, and not small."""
    return [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and value.const_value.size >= FEWEST_STORED
        and len(value.const_value.shape) > 1
    ]


def _static(model: ir.Model) -> set[ir.Value]:
    """All values that depend on constants alone."""
    static = set(model.graph.initializers.values())
    for node in model.graph:
        if all(value is None or value in static for value in node.inputs):
            static.update(node.outputs)
    return static


def _array(value: ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value.numpy()


def _initializer(model: ir.Model, name: str, array: Any) -> ir.Value:
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    model.graph.register_initializer(value)
    return value


def _integers(model: ir.Model, values: list[int]) -> ir.Value:
    return _initializer(model, f"integers_{values}", np.array(values, np.int64))


def _node(before: ir.Node, kind: str, inputs: Iterable[ir.Value | None], attributes: Any = ()) -> ir.Value:
    return _nodes(before, kind, inputs, attributes)[0]


def _nodes(
    before: ir.Node, kind: str, inputs: Iterable[ir.Value | None], attributes: Any = (), outputs: int = 1
) -> tuple[ir.Value, ...]:
    """A new node in front of another one."""
    node = ir.Node("", kind, list(inputs), list(attributes), num_outputs=outputs)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return tuple(node.outputs)
