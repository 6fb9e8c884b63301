"""Several processes do what one does: the same plan and factors, one that writes, nothing left where one dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.test_commands import result_of

import factorformer
from factorformer import processes
from factorformer.layers.nn import FactorizedMatrix

SEVERAL = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node"]
COMMAND = str(Path(sys.executable).with_name("factorformer"))

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no process groups here")


def started(count: int, *arguments: object, messages: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [*SEVERAL, str(count), COMMAND, *map(str, arguments)]
    given = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True, env=given)


def products(path: Path) -> dict[str, torch.Tensor]:
    layers = factorformer.load(path).named_modules()
    return {name: layer.to_dense() for name, layer in layers if isinstance(layer, FactorizedMatrix)}


@pytest.fixture
def texts(tables: Path, tmp_path: Path) -> Path:
    """For four batches, of which two processes of three get one and the last two."""
    (tmp_path / "texts.txt").write_text((tables / "texts.txt").read_text() * 4)
    return tmp_path / "texts.txt"


@pytest.mark.parametrize(("method", "count", "most"), [("whitened", 2, 1e-4), ("fisher", 3, 0.02)])
def test_they_do_what_one_does(
    method: str, count: int, most: float, run: Any, base: Path, texts: Path, tmp_path: Path
) -> None:
    """But that fits in order read what passes in bfloat16, where processors have it, round one way or the other."""
    options = ("--method", method, "--ratio", 2, "--calibration", texts, "--json")
    once = result_of(run("compress", base, tmp_path / "one", *options))
    several = started(count, "compress", base, tmp_path / "several", *options)
    output, messages = several.communicate(timeout=200)
    assert several.returncode == 0, messages
    assert messages.count(f"method: {method}") == 1
    content = json.loads(output)  # which one of them has printed
    assert content["bytes"] == once["bytes"]
    for name, value in once["metrics"].items():
        assert content["metrics"][name] == pytest.approx(value, rel=1e-3)
    ones, others = products(tmp_path / "one"), products(tmp_path / "several")
    assert ones.keys() == others.keys()
    for name, matrix in ones.items():
        assert (others[name] - matrix).norm() < most * matrix.norm(), name


def test_one_that_dies_ends_all(base: Path, texts: Path, tmp_path: Path) -> None:
    arguments = ("compress", base, tmp_path / "small", "--method", "auto", "--calibration", texts)
    with (tmp_path / "messages").open("w") as messages:
        several = started(2, *arguments, messages=messages)
    children = Path(f"/proc/{several.pid}/task/{several.pid}/children")
    if not children.exists():
        several.kill()
        pytest.skip("the system does not tell the children of a process")
    end = time.monotonic() + 100
    while "method: auto" not in (tmp_path / "messages").read_text() and time.monotonic() < end:
        time.sleep(0.05)  # until they have met
    os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
    output, _ = several.communicate(timeout=100)
    assert several.returncode != 0
    assert not output
    said = (tmp_path / "messages").read_text()
    assert said.count("error: another process of this job has ended") + said.count("interrupted; nothing was") == 1, (
        said
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["messages", "texts.txt"]


def test_what_they_do_not_divide(
    run: Any, base: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(processes.VARIABLES, ("0", "2", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert processes.started() == 2
    refused = run("evaluate", base, "--data", texts)
    assert refused.exit_code == 2
    assert "done by one process, and 2 were started" in refused.stderr
    monkeypatch.setattr(processes, "_joined", [(0, 2)])
    refused = run("compress", base, tmp_path / "small", "--train", texts, "--distill", base)
    assert refused.exit_code == 2
    assert "divide calibration and fits, and neither training nor --stream" in refused.stderr
    assert processes.own([5, 1, 3, 1], float) == [5]
    monkeypatch.setattr(processes, "_joined", [(1, 2)])
    assert processes.own([5, 1, 3, 1], float) == [1, 3, 1]
    assert not processes.is_first() or os.environ["RANK"] == "0"
