"""Every architecture, compressed and saved, comes back bit for bit in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.hf.reload_worker import Findings
from tests.tiny import MODELS, logits

import factorformer
from factorformer.layers.nn import FactorizedMatrix

ROOT = Path(__file__).resolve().parents[2]
CASES = [f"{name}@{scope}" for name in MODELS for scope in ("blocks", "all")]
TIED = {"bert", "distilbert", "albert", "gpt2", "opt", "llama-tied", "t5", "whisper", "modernbert"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for every case, with the model, its sharded copy, and its logits."""
    root = tmp_path_factory.mktemp("reload")
    for case in CASES:
        name, _, scope = case.partition("@")
        tiny = MODELS[name]
        model = tiny.build()
        plan = factorformer.plan(model, "svd", ratio=tiny.ratio, scope=scope)  # type: ignore[arg-type]
        factorformer.compress(model, plan)
        model.save_pretrained(root / case / "model")
        model.save_pretrained(root / case / "sharded", max_shard_size="10KB")
        assert len(list((root / case / "sharded").glob("*.safetensors"))) > 1
        save_file({"logits": logits(model, tiny.inputs())}, root / case / "expected.safetensors")
    return root


def elsewhere(mode: str, folder: Path) -> dict[str, Findings]:
    """What a new process finds."""
    command = [sys.executable, "-m", "tests.hf.reload_worker", mode, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def findings(saved: Path) -> dict[str, Findings]:
    return elsewhere("with", saved)


@pytest.fixture(scope="module")
def findings_without(saved: Path, findings: dict[str, Findings]) -> dict[str, Findings]:
    return elsewhere("without", saved)


@pytest.mark.parametrize("case", CASES)
def test_reload_in_a_new_process(case: str, findings: dict[str, Findings]) -> None:
    name, _, scope = case.partition("@")
    found = dict(findings[case])
    assert "error" not in found, found["error"]
    model = MODELS[name].build()
    assert found.pop("class") == type(model).__name__
    ties, factorized = found.pop("ties"), found.pop("factorized")
    if scope == "blocks" or name == "vit":  # without an embedding or a large head
        assert factorized == MODELS[name].matrices
    else:
        assert factorized > MODELS[name].matrices
    assert bool(ties) == (name in TIED)
    wrong = [what for what, holds in found.items() if holds is not True]
    assert not wrong


@pytest.mark.parametrize("case", CASES)
def test_without_the_package_loading_fails_instead_of_guessing(
    case: str, findings_without: dict[str, Findings]
) -> None:
    found = findings_without[case]
    assert "error" not in found, found["error"]
    assert "raised" in found, "a partly random model was loaded"
    assert "mismatched_sizes" in found["raised"]


@pytest.mark.parametrize("case", CASES)
def test_a_dequantized_model_needs_no_package(case: str, findings_without: dict[str, Findings]) -> None:
    found = findings_without[case]
    assert "error" not in found, found["error"]
    assert found["dense"]
    assert found["plain"]


@pytest.mark.parametrize("case", CASES)
def test_bytes_on_disk_are_those_of_the_plan(case: str, saved: Path) -> None:
    name, _, scope = case.partition("@")
    tiny = MODELS[name]
    plan = factorformer.plan(tiny.build(), "svd", ratio=tiny.ratio, scope=scope)  # type: ignore[arg-type]
    model = factorformer.load(saved / case / "model")
    assert sum(isinstance(m, FactorizedMatrix) for m in model.modules()) > 0
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    dense = sum(p.numel() * p.element_size() for p in tiny.build().parameters())
    assert dense - stored == plan.original.bytes - plan.compressed.bytes
    if scope == "all":
        assert stored == plan.compressed.bytes
    values = sum(t.numel() * t.element_size() for t in dict.fromkeys(model.parameters()))
    header = (saved / case / "model" / "model.safetensors").stat().st_size - values
    buffers = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n in model.state_dict())
    assert 0 < header - buffers < 200 * len(list(model.parameters()))


def test_a_model_compressed_in_half_precision(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = MODELS["bert"].build().to(dtype)
        plan = factorformer.plan(model, "svd", ratio=2)
        assert {entry.matrix.dtype for entry in plan.entries} == {str(dtype).removeprefix("torch.")}
        factorformer.compress(model, plan)
        model.save_pretrained(tmp_path)
        again = factorformer.load(tmp_path, dtype="auto")
        assert {p.dtype for p in again.parameters()} == {dtype}
        inputs = MODELS["bert"].inputs()
        assert torch.equal(logits(again, inputs), logits(model, inputs))
