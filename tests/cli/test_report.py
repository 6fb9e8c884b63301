"""`factorformer report`, and the report of `compress`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from factorformer.files import RESULT_FILE

pytest.importorskip("plotly", reason="reports are drawn by plotly, which is not installed")


def test_of_the_command_line(run: Any, base: Path, tables: Path, tmp_path: Path) -> None:
    small, first = tmp_path / "small", tmp_path / "first.html"
    arguments = ("--calibration", tables / "texts.txt", "--ratio", 2, "--report", first)
    done = run("compress", base, small, *arguments)
    assert done.exit_code == 0, done.stderr
    assert first.exists()
    record = json.loads((small / RESULT_FILE).read_text())
    assert len(record["fits"]) == 12
    assert all(fit["error"] > 0 and fit["rise"] > 0 and fit["reason"] for fit in record["fits"].values())
    done = run("report", small, "--against", base, "--no-time", "--output", tmp_path / "again.html", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert {w["name"] for w in found["weights"] if w["rise"] is not None} == set(record["fits"])
    for file, message in ((tmp_path / "new", "directory to make"), (tmp_path / "new" / "a.html", "directory to make")):
        refused = run("compress", base, tmp_path / "new", "--ratio", 2, "--report", file)
        assert refused.exit_code == 2
        assert message in refused.stderr
    refused = run("compress", base, tmp_path / "new", "--ratio", 2, "--stream", "--report", tmp_path / "a.html")
    assert "--stream never holds" in refused.stderr
    refused = run("report", small, "--output", first)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    refused = run("report", tmp_path / "nothing", "--output", tmp_path / "other.html")
    assert refused.exit_code == 2
    assert not (tmp_path / "other.html").exists()
