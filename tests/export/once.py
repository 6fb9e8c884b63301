"""One graph for several exports of a model: its translation takes most of their time."""

from __future__ import annotations

from typing import Any

import onnx_ir
import pytest

from factorformer.export import onnx as exporter


def translate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first export translates; later ones, which have to be of the same model, take its graph."""
    translate, made = exporter.translate, []

    def once(subject: Any) -> Any:
        if made:
            return onnx_ir.from_proto(made[0])
        model = translate(subject)
        made.append(onnx_ir.to_proto(model))  # before anything changes it
        return model

    monkeypatch.setattr(exporter, "translate", once)
