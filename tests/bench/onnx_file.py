"""A small model in ONNX form, written by hand; importable without onnx."""

from __future__ import annotations

from pathlib import Path

import numpy


def write_onnx(path: Path, words: int = 14, inputs: tuple[str, ...] = ("input_ids", "attention_mask")) -> Path:
    """Embeddings of the words where the mask is 1, `(batch, tokens)` to `(batch, tokens, 4)`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    table = numpy.random.default_rng(0).normal(size=(words, 4)).astype(numpy.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", inputs[0]], ["rows"]),
            helper.make_node("Cast", [inputs[-1]], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "axis"], ["column"]),
            helper.make_node("Mul", ["rows", "column"], ["output"]),
        ],
        "embeddings",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in inputs],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "tokens", 4])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(numpy.array([-1]), "axis")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path
