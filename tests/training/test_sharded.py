"""Models whose parameters several processes hold in parts (FSDP2) train as in one, or are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import ROOT

import factorformer

SEVERAL = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no process groups here")
def test_parts_train_as_the_whole_does(tmp_path: Path) -> None:
    command = [*SEVERAL, str(Path(__file__).with_name("sharded_worker.py")), str(tmp_path)]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ids = torch.arange(16)[None]
    for method, (alone, sharded) in found["losses"].items():
        assert sharded == pytest.approx(alone, rel=1e-5), method
        with torch.inference_mode():
            one, other = (factorformer.load(tmp_path / name)(ids).logits for name in (method, f"{method}-alone"))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert set(found["refused"]) == {"straight-through", "dynamic"}
    for message in found["refused"].values():
        assert "sharded" in message
