"""How much faster calibration and fits are in several processes of one thread each than in one.

    python benchmarks/processes.py --text FILE --work FOLDER

Compresses the embedded MiniLM by `factorformer compress` as torchrun starts it, in one process and in as many as there
are cores, in turns; the seconds are those of measuring, of curves and of fits, without what reading and writing takes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import machine, options, start, write

COMMAND = Path(sys.executable).with_name("factorformer")
RUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node"]


def seconds(count: int, method: str, text: Path, output: Path, texts: int) -> dict[str, float]:
    """Of each phase, of so many processes with one thread each, on so many texts."""
    command = [*RUN, str(count), str(COMMAND), "compress", "minilm", str(output), "--method", method, "--ratio", "3"]
    command += ["--calibration", str(text), "--calibration-rows", str(texts), "--overwrite", "--json"]
    given = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=given, check=True)
    spent: dict[str, float] = json.loads(found.stdout)["seconds"]
    return {name: spent[name] for name in ("plan", "calibrate", "fit")}


def main() -> None:
    parser = options(__doc__, "processes.json")
    parser.add_argument("--text", type=Path, required=True, help="sentences, one a line")
    parser.add_argument("--work", type=Path, required=True, help="the model is written here")
    parser.add_argument("--methods", nargs="+", default=["whitened", "fisher"])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--texts", type=int, default=512, help="to calibrate on")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = start(parser)
    rows: list[dict[str, Any]] = []
    for method in arguments.methods:
        found: dict[int, list[dict[str, float]]] = {1: [], arguments.processes: []}
        for _ in range(arguments.rounds):
            for count, runs in found.items():
                place = arguments.work / "small"
                runs.append(seconds(count, method, arguments.text, place, arguments.texts))
                print(method, count, runs[-1], flush=True)
        totals = {count: statistics.median(sum(run.values()) for run in runs) for count, runs in found.items()}
        parts = {
            count: statistics.median(run["calibrate"] + run["fit"] for run in runs) for count, runs in found.items()
        }
        rows.append(
            {
                "method": method,
                "processes": arguments.processes,
                "texts": arguments.texts,
                "speedup": round(totals[1] / totals[arguments.processes], 3),
                "speedup_without_plan": round(parts[1] / parts[arguments.processes], 3),
                "seconds": {str(count): runs for count, runs in found.items()},
            }
        )
    known = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    same = [(row["method"], row["texts"]) for row in rows]
    known = [row for row in known if (row["method"], row.get("texts", 512)) not in same]
    write(arguments.output, {"rows": known + [{**row, "machine": machine()} for row in rows]})


if __name__ == "__main__":
    main()
