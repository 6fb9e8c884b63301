"""The dense model in OpenVINO, as a user makes it: in its own precision, in bfloat16, and in static int8 by NNCF."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.bench.candidates import Runner, real
from factorformer.files import output_directory

SENTENCES = 200
"""That static scales are calibrated on."""

NAMES = ("input_ids", "attention_mask")


class Hidden(nn.Module):
    """The last hidden state alone, for tracers and exporters."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def convert(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], folder: Path
) -> dict[str, Path]:
    """Write `dense.xml` in floats and `int8.xml` with static scales into a folder, unless they are there.

    Args:
        model: dense.
        tokenizer: of it.
        sentences: to calibrate on; the first `SENTENCES` are taken.
        folder: appears when both are there.
    """
    paths = {name: folder / f"{name}.xml" for name in ("dense", "int8")}
    if folder.exists():
        return paths
    import nncf  # pyright: ignore[reportMissingImports]
    import openvino  # pyright: ignore[reportMissingImports]

    ids = torch.full((2, 32), 100)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with torch.no_grad():
        graph = openvino.convert_model(Hidden(model), example_input=dict(zip(NAMES, (ids, mask), strict=True)))

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, SENTENCES, 4):
            rows = tokenizer(list(sentences[first : first + 4]), padding=True, truncation=True, return_tensors="np")
            yield {name: rows[name] for name in NAMES}

    calibration = nncf.Dataset(list(batches()))
    int8 = nncf.quantize(graph, calibration, model_type=nncf.ModelType.TRANSFORMER, subset_size=SENTENCES // 4)
    with output_directory(folder) as directory:
        openvino.save_model(graph, directory / "dense.xml", compress_to_fp16=False)
        openvino.save_model(int8, directory / "int8.xml")
    return paths


def runner(path: Path, precision: str, threads: int, vocabulary: int, padding: int | None) -> Runner:
    """A model in OpenVINO, tuned for latency.

    Args:
        path: of the XML file.
        precision: in which OpenVINO may compute what is in floats: `f32` or `bf16`.
        threads: that it may use.
        vocabulary: number of token ids.
        padding: id of the padding token.
    """
    import openvino  # pyright: ignore[reportMissingImports]

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request: Any = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()

    def prepare(ids: Tensor) -> Callable[[], object]:
        mask = real(ids, padding)
        feed = {name: value.numpy() for name, value in zip(NAMES, (ids, mask), strict=True)}
        return lambda: request.infer(feed)

    return Runner(prepare, vocabulary, padding, None)
