"""What `test_int8.py` does in another process: load saved models and compare them with what was saved.

Run as `python -m tests.hf.int8_worker FOLDER`; prints one JSON object with the findings for every model.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch
from tests.hf.reload_worker import Findings, expected, low_inputs, stored, ties_hold
from tests.tiny import MODELS, Tiny, logits
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

import factorformer
from factorformer.layers.dense import dense_weight
from factorformer.layers.nn import FactorizedMatrix


def check(folder: Path, tiny: Tiny) -> Findings:
    """Load in every way that a user has."""
    inputs, reference = tiny.inputs(), expected(folder)
    model = factorformer.load(folder / "model", dtype=torch.float32)
    auto = tiny.auto.from_pretrained(folder / "model")
    layers = [module for module in model.modules() if isinstance(module, FactorizedMatrix)]
    auto.save_pretrained(folder / "again")
    low = tiny.auto.from_pretrained(folder / "model", dtype=torch.bfloat16)
    codes = {name: tensor for name, tensor in model.named_buffers() if tensor.dtype == torch.int8}
    dense = auto.dequantize()

    def same(found: Tensor) -> bool:
        # How torch adds up products with fused experts depends on where they lie in memory.
        experts = type(model).__name__.startswith("Mixtral")
        return torch.allclose(found, reference, rtol=0, atol=1e-6) if experts else torch.equal(found, reference)

    whole = {name: layer.to_dense() for name, layer in model.named_modules() if isinstance(layer, FactorizedMatrix)}
    return {
        "quantized": bool(layers) and all(layer.quantized for layer in layers),
        "load": same(logits(model, inputs)),
        "auto": same(logits(tiny.auto.from_pretrained(folder / "model"), inputs)),
        "tied": ties_hold_everywhere(model),
        "stored once": set(stored(folder / "model"))
        == {name for name, _ in model.named_parameters()}
        | {name for name, _ in model.named_buffers() if name in model.state_dict()},
        "scales stay": not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("_scale")),
        "same file": (folder / "again/model.safetensors").read_bytes()
        == (folder / "model/model.safetensors").read_bytes(),
        "same config": (folder / "again/config.json").read_text() == (folder / "model/config.json").read_text(),
        "bfloat16": {p.dtype for p in low.parameters()} == {torch.bfloat16}
        and all(torch.equal(low.get_buffer(name), tensor) for name, tensor in codes.items())
        and bool((logits(low, low_inputs(inputs, torch.bfloat16)).float() - reference).norm() < 0.1 * reference.norm()),
        "dequantized": not any(isinstance(m, FactorizedMatrix) for m in dense.modules())
        and ties_hold(dense)
        and all(torch.equal(dense_weight(dense.get_submodule(name)), weight) for name, weight in whole.items()),
    }


def ties_hold_everywhere(model: PreTrainedModel) -> bool:
    """Codes are buffers, which `get_parameter` does not know."""
    everything: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    everything |= dict(model.named_buffers(remove_duplicate=False))
    return all(everything[target] is everything[source] for target, source in model.all_tied_weights_keys.items())


def main(root: Path) -> None:
    """Print the findings for every model in the folder."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(12345)  # weights that the process would make up must differ from those that were saved
    results = {}
    for folder in sorted(root.iterdir()):
        try:
            results[folder.name] = check(folder, MODELS[folder.name.partition("@")[0]])
        except Exception:
            results[folder.name] = {"error": traceback.format_exc()}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
