"""The result of a benchmark has one JSON form, and tables with ratios in front."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from factorformer import kernels
from factorformer.bench.candidates import Candidate
from factorformer.bench.comparison import Comparison, Shape, Spread, summarize
from factorformer.bench.footprint import Footprint
from factorformer.bench.layers import LayerComparison, LayerTiming
from factorformer.report.bench import BenchResult, show_bench
from factorformer.structures import LowRank

CANDIDATES = (Candidate("dense/", Path("dense")), Candidate("int8:dense/", Path("dense"), "torch", ("int8",)))
FOOTPRINTS = (Footprint(1000, 30.0, 4000, 50), Footprint(250, 60.0, 0, 50))
COMPARISONS = (Comparison(Shape(8, 64), 2, summarize([[10.0, 5.0], [30.0, 10.0]], first=[40.0, 50.0])),)
MODELS = BenchResult(CANDIDATES, FOOTPRINTS, COMPARISONS, threads=2, device="cpu", seed=3)
PACES = tuple(LayerTiming(n, Spread(r, r, r), Spread(4, 5, 6), Spread(1, 2, 3)) for n, r in ((1, 0.5), (128, 2.5)))
LAYERS = BenchResult([], [], [], 1, "cpu", 0, [LayerComparison(("q", "k"), (64, 32), LowRank(4), "float32", PACES)])


def printed(result: BenchResult) -> str:
    console = Console(file=io.StringIO(), width=160)
    show_bench(result, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_json_of_models() -> None:
    content = json.loads(json.dumps(MODELS.to_dict(), allow_nan=False))
    keys = ["baseline", "candidates", "shapes", "generations", "layers", "settings", "machine", "versions"]
    assert list(content) == keys
    assert (content["baseline"], content["layers"]) == ("dense/", None)
    _, other = content["candidates"]
    assert other == {
        "name": "int8:dense/",
        "route": "torch",
        "variants": ["int8"],
        "file_bytes": 250,
        "load_milliseconds": 60,
        "peak_bytes": 0,
        "import_bytes": 50,
        "gpu_peak_bytes": None,
        "smaller": {"file": 4, "peak": None, "load": 0.5},
    }
    (shape,) = content["shapes"]
    assert (shape["batch"], shape["tokens"], shape["rounds"]) == (8, 64, 2)
    assert shape["results"][1] == {
        "name": "int8:dense/",
        "speedup": {"low": 2.25, "median": 2.5, "high": 2.75},
        "milliseconds": {"low": 6.25, "median": 7.5, "high": 8.75},
        "texts_per_second": 8000 / 7.5,
        "tokens_per_second": 512000 / 7.5,
        "first_pass_milliseconds": 50,
    }
    assert set(content["settings"]) == {"threads", "device", "seed", "warm_up", "settle", "order", "inputs"}
    assert set(content["machine"]) == {"processor", "cores", "instructions", "kernels", "load", "gpu", "system"}
    assert set(content["versions"]) == {"factorformer", "torch", "transformers", "python"}


def test_json_of_layers() -> None:
    content = json.loads(json.dumps(LAYERS.to_dict(), allow_nan=False))
    assert (content["baseline"], content["candidates"], content["shapes"]) == (None, [], [])
    (layer,) = content["layers"]
    assert layer["names"] == ["q", "k"]
    assert layer["structure"] == {"structure": "low_rank", "rank": 4}
    assert (layer["shape"], layer["dtype"]) == ([64, 32], "float32")
    assert layer["flops_ratio"] == 64 * 32 / (4 * 96)
    assert (layer["break_even"], layer["pays"]) == (128, [128])
    assert layer["tokens"][0] == {
        "tokens": 1,
        "speedup": {"low": 0.5, "median": 0.5, "high": 0.5},
        "dense_milliseconds": {"low": 4, "median": 5, "high": 6},
        "milliseconds": {"low": 1, "median": 2, "high": 3},
    }


def test_tables_of_models_have_ratios_first() -> None:
    text = printed(MODELS)
    row = next(line for line in text.splitlines() if "int8:dense/" in line)
    assert row.split() == [
        "int8:dense/",
        "2.50x",
        "2.25",
        "-",
        "2.75",
        "7.50",
        "6.25",
        "-",
        "8.75",
        "1,066.7",
        "68,267",
    ]
    assert "8 x 64 tokens, 2 rounds" in text
    size = [line for line in text.splitlines() if "int8:dense/" in line][1]
    assert size.split() == ["int8:dense/", "4.00x", "250", "0", "0.50x", "60"]
    assert f"2 threads, kernels: {kernels.variant()}" in text
    assert "ratios to dense/" in text
    assert "3 rounds of warm-up" in text


def test_the_table_of_layers_says_where_factors_pay() -> None:
    text = printed(LAYERS)
    assert "q and 1 more" in text
    assert "2.50x (2.000)" in text
    assert "from 128 tokens" in text
    assert "1 token " in text
