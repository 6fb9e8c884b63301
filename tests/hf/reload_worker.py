"""What `test_reload.py` does in other processes: load saved models and compare them with what was saved.

Run as `python -m tests.hf.reload_worker MODE FOLDER`; prints one JSON object with the findings for every model.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.tiny import MODELS, Inputs, Tiny, logits
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

Findings = dict[str, Any]


def expected(folder: Path, name: str = "logits") -> torch.Tensor:
    return load_file(folder / "expected.safetensors")[name]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def ties_hold(model: PreTrainedModel) -> bool:
    return all(
        model.get_parameter(target) is model.get_parameter(source)
        for target, source in model.all_tied_weights_keys.items()
    )


def low_inputs(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def with_factorformer(folder: Path, tiny: Tiny) -> Findings:
    """Load in every way that a user has."""
    import factorformer
    from factorformer.layers.nn import FactorizedMatrix

    inputs, reference = tiny.inputs(), expected(folder)
    model = factorformer.load(folder / "model")
    auto = tiny.auto.from_pretrained(folder / "model")
    again = folder / "again"
    auto.save_pretrained(again)
    findings: Findings = {
        "class": type(model).__name__,
        "evaluates": not model.training,
        "factorized": sum(isinstance(m, FactorizedMatrix) for m in model.modules()),
        "load": torch.equal(logits(model, inputs), reference),
        "auto": torch.equal(logits(auto, inputs), reference),
        "sharded": torch.equal(logits(tiny.auto.from_pretrained(folder / "sharded"), inputs), reference),
        "mapped": torch.equal(logits(tiny.auto.from_pretrained(folder / "model", device_map="cpu"), inputs), reference),
        "tied": ties_hold(model) and ties_hold(auto),
        "ties": len(model.all_tied_weights_keys),
        "same file": (again / "model.safetensors").read_bytes() == (folder / "model/model.safetensors").read_bytes(),
        "same config": (again / "config.json").read_text() == (folder / "model/config.json").read_text(),
    }
    parameters = dict(model.named_parameters())
    findings["stored once"] = set(stored(folder / "model")) == set(parameters) | {
        name for name, _ in model.named_buffers() if name in model.state_dict()
    }
    for dtype in (torch.float16, torch.bfloat16):
        low = tiny.auto.from_pretrained(folder / "model", dtype=dtype)
        # transformers itself keeps some layers of T5 in float32 when the others take float16.
        kept = [name for name, p in low.named_parameters() if p.dtype != dtype]
        findings[str(dtype)] = (
            all(torch.equal(p, parameters[name].to(p.dtype)) for name, p in low.named_parameters())
            and (not kept or (dtype == torch.float16 and all(".wo." in name for name in kept)))
            and bool((logits(low, low_inputs(inputs, dtype)) - reference).abs().max() < 0.1 * reference.abs().max())
        )
    dense = model.dequantize()
    close = (logits(dense, inputs) - reference).abs().max() <= 1e-4 * reference.abs().max()
    findings["dequantized"] = bool(close) and not any(isinstance(m, FactorizedMatrix) for m in dense.modules())
    findings["dequantized ties"] = ties_hold(dense)
    dense.save_pretrained(folder / "dense")
    findings["dequantized config"] = "quantization_config" not in json.loads((folder / "dense/config.json").read_text())
    torch.save(logits(dense, inputs), folder / "dense.pt")
    return findings


def without_factorformer(folder: Path, tiny: Tiny) -> Findings:
    """A machine where the package is not installed."""
    findings: Findings = {}
    try:
        tiny.auto.from_pretrained(folder / "model")
    except (ImportError, RuntimeError, ValueError) as error:
        findings["raised"] = f"{type(error).__name__}: {error}"
    dense = tiny.auto.from_pretrained(folder / "dense")
    findings["dense"] = torch.equal(logits(dense, tiny.inputs()), torch.load(folder / "dense.pt"))
    findings["plain"] = {type(m).__module__.split(".")[0] for m in dense.modules()} <= {"torch", "transformers"}
    return findings


def main(mode: str, root: Path) -> None:
    """Print the findings for every model in the folder."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    check: Callable[[Path, Tiny], Findings] = with_factorformer
    if mode == "without":
        sys.modules["factorformer"] = None  # type: ignore[assignment]  # any import of it now fails
        check = without_factorformer
    results = {}
    for folder in sorted(root.iterdir()):
        try:
            results[folder.name] = check(folder, MODELS[folder.name.partition("@")[0]])
        except Exception:
            results[folder.name] = {"error": traceback.format_exc()}
    print(json.dumps(results))


if __name__ == "__main__":
    # Weights that the process would make up must differ from those that were saved.
    torch.manual_seed(12345)
    nn.Linear(1, 1)
    main(sys.argv[1], Path(sys.argv[2]))
