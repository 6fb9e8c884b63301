"""Options that subcommands share, and warnings on their way to the user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from factorformer.cli import main
from factorformer.cli._options import DeviceChoice, command_line, place_of
from factorformer.errors import MethodError

WARNING_PROGRAM = """
import sys, types, warnings
from factorformer.cli import main
from factorformer.cli._notes import notes
from factorformer.errors import FactorformerWarning

def app():
    with notes():
        for module in ("factorformer.kernels.cpu", "torch.nn.modules", "transformers.models", "factorformers"):
            ours = module.startswith("factorformer.")
            for _ in range(2):
                kind = FactorformerWarning if ours else RuntimeWarning
                warnings.warn_explicit(f"said by {module}", kind, "file.py", 3, module)

sys.modules["factorformer.cli.app"] = types.SimpleNamespace(app=app)
main()
"""


def test_only_our_warnings_reach_the_user_each_on_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", WARNING_PROGRAM], capture_output=True, text=True)
    assert done.stderr == "note: said by factorformer.kernels.cpu\n"


def test_the_device_is_chosen_or_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [place_of(device) for device in (DeviceChoice.auto, DeviceChoice.cpu)] == ["cpu", "cpu"]
    with pytest.raises(MethodError, match="--device cuda"):
        place_of(DeviceChoice.cuda)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert [place_of(device) for device in DeviceChoice] == ["cuda", "cpu", "cuda"]
    assert capsys.readouterr().err.splitlines() == ["device: A GPU (--device cpu leaves it alone)"]


def test_numbers_have_to_be_finite(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    train = ("--train", tables / "train.jsonl", "--label", "label")
    commands = {
        ("compress", base, tmp_path / "small", *train): ("--epochs", "--lr", "--ratio"),
        ("finetune", base, tmp_path / "small", *train): ("--epochs", "--lr"),
        ("plan", base): ("--ratio",),
        ("bench", base): ("--seconds",),
    }
    for command, options in commands.items():
        for option in options:
            for value in ("nan", "inf"):
                done = run(*command, option, value)
                assert done.exit_code == 2, (command, option, value)
                assert option in done.stderr
                assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_options_that_nothing_can_use_are_refused_or_named(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    for arguments, name in (
        (("compress", base, out, "--method", ""), "--method"),
        (("compress", "", out), "MODEL"),
        (("compress", base, out, "--exclude", ""), "--exclude"),
        (("evaluate", base, "--data", tables / "train.jsonl", "--label", ""), "--label"),
        (("compress", base, out, "--batch-size", 10**30), "--batch-size"),
        (("compress", base, out, "--max-length", 10**30), "--max-length"),
        (("train", out, "--train", tables / "texts.txt", "--vocabulary", 10**12), "--vocabulary"),
        (("train", out, "--train", tables / "texts.txt", "--ratio", 0.5), "ratio"),
        (("bench", base, "--threads", 10**6), "--threads"),
        (("plan", base, "--ratio", 0.5), "ratio"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, arguments
        assert done.stdout == ""
        assert name in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = run("compress", base, out, "--lr", 1e-3, "--epochs", 3.0, "--text", "body", "--json")
    assert done.exit_code == 0
    assert {"not used without --train: --epochs, --lr", "not used without data: --text"} <= {*done.stderr.splitlines()}
    json.loads(done.stdout)
    done = run("plan", base, "--text", "body", "--max-length", 9)
    assert "not used without --calibration: --text, --max-length" in done.stderr.splitlines()


def test_a_signal_to_terminate_ends_a_command_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ended = types.SimpleNamespace(app=lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setitem(sys.modules, "factorformer.cli.app", ended)
    try:
        with pytest.raises(SystemExit, match="130"):
            main()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_recorded_command_tells_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/me/bin/factorformer", "compress", "/home/me/model", "a b", "--json"])
    assert command_line() == "factorformer compress model 'a b' --json"
    monkeypatch.setattr("sys.argv", ["/usr/bin/pytest"])
    assert command_line() is None
