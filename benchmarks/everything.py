"""Run every benchmark from nothing, one after the other: `make results`.

    python benchmarks/everything.py                  # all of docs/results.md and docs/performance.md; a day or so
    python benchmarks/everything.py --quick          # a cheap variant of each, to see that all run; about 15 minutes
    python benchmarks/everything.py --only headline latency

Results go to `results/`, those of --quick to `runs/quick/`. What failed is listed at the end, with exit code 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from common import HERE, default_data

TASKS = "--train-rows 4000 --precision bf16"
RUNS = {
    "headline": [("headline", "")],
    "latency": [("latency", "--methods svd:int8 --ratios 10 --shapes 1x32 8x64 32x128 banking77")],
    "products": [("products", "--plot docs/images/roofline.svg")],
    "translation": [("translation", ""), ("translation", "--timing")],
    "kronecker": [("kronecker", "")],
    "low-rank": [("accuracy", "--train-rows 4000 --methods whitened fwsvd svd dense-longer torchao-int8")],
    "dense-sparse": [
        (
            "accuracy",
            f"{TASKS} --dense-epochs 6 --methods dsformer dense_sparse whitened fwsvd svd magnitude-nm",
        ),
        ("accuracy", f"{TASKS} --dense-epochs 6 --methods dsformer whitened --ratios 5 --seeds 1 2"),
    ],
    "dynamic": [
        ("accuracy", f"{TASKS} --dense-epochs 3 --epochs 6 --methods rankdyna dynamic_dense_sparse --ratios 3 5"),
        (
            "accuracy",
            f"{TASKS} --dense-epochs 3 --methods svd fwsvd whitened fisher auto --ratios 3 5",
        ),
        ("accuracy", f"{TASKS} --dense-epochs 6 --epochs 6 --methods fwsvd whitened --ratios 3 5"),
        ("dynamic_rank", "--methods rankdyna --steps 120"),
    ],
    "ten": [
        (
            "accuracy",
            f"{TASKS} --dense-epochs 3 --ratios 10 --keep runs/ten "
            "--methods auto:int8=1 auto:int8=1+distill torchao-int3",
        ),
        (
            "accuracy",
            f"{TASKS} --dense-epochs 3 --epochs 6 --ratios 10 --keep runs/ten --methods rankdyna:int8=1",
        ),
    ],
    "embeddings": [("embeddings", "--ratios 1.5 2 2.8 4")],
    "dictionary": [("dictionary", "")],
    "straight-through": [("straight_through", "")],
    "fitting": [("fitting", "")],
    "planning": [("planning", "")],
    "lookups": [("lookups", "")],
    "encoders": [("encoders", "minilm --minutes 30 --work runs/encoders")],
}
QUICK = {
    "headline": "--train-rows 96 --test-rows 64 --epochs 1 --original-epochs 1 --methods whitened --shapes 1x32 "
    "--seconds 2",
    "latency": "--methods svd:int8 --ratios 10 --shapes 1x32 --rounds 5 --no-compile",
    "products": "--rounds 3 --seconds 0.2",
    "translation": "--pairs 64 --systems shapeshifter --width 128 --ffn 256 --vocabulary 300 --ratio 4 --steps 4 "
    "--points 1",
    "kronecker": "--quick",
    "accuracy": "--tasks sst2 --train-rows 64 --epochs 1 --rate 1e-4 --methods whitened --ratios 2.8",
    "dynamic_rank": "--methods rankdyna --ratios 3 --precisions fp32 --steps 20",
    "embeddings": "--ratios 2.8 --texts 30 --methods svd whitened",
    "dictionary": "--parts peers",
    "straight_through": "--ratios 2.8 --rounds 2",
    "fitting": "--repetitions 1",
    "planning": "--tasks sst2 --ratios --compared 3 --times --train-rows 64 --test-rows 32 --calibration-rows 64",
    "lookups": "--shapes 0 --rounds 3",
    "encoders": "minilm --ratios 4 --minutes 0.1",
}
IMAGES = {"encoders": "encoders.svg", "planning": "planning.svg", "translation": "translation.svg"}
"""Scripts that draw an image, which --quick puts beside its results."""

KEPT = ("headline", "latency", "accuracy", "translation", "planning", "encoders")
"""Scripts that keep models in a folder."""

WITH_DATA = (
    "headline",
    "latency",
    "accuracy",
    "embeddings",
    "straight_through",
    "dynamic_rank",
    "planning",
    "translation",
    "encoders",
)


def quick(script: str, data: Path) -> list[str]:
    """Arguments of a cheap run that leaves the results alone."""
    place = Path("runs/quick")
    ending = "jsonl" if script in ("accuracy", "latency", "products", "encoders") else "json"
    arguments = [*QUICK[script].split(), "--allow-dirty", "--output", str(place / f"{script}.{ending}")]
    if script in IMAGES:
        arguments += ["--image", str(place / IMAGES[script])]
    if script in KEPT:
        arguments += ["--work", str(place / script)]
    return arguments + of_data(script, data)


def of_data(script: str, data: Path) -> list[str]:
    if script not in WITH_DATA:
        return []
    return ["--data", str(data / "multi30k" if script == "translation" else data)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with one folder for each task")
    parser.add_argument("--quick", action="store_true", help="a cheap variant of each, whose results are not kept")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    if args.quick:
        scripts = dict.fromkeys(script for name in args.only for script, _ in RUNS[name])
        commands = [(script, quick(script, args.data)) for script in scripts]
    else:
        runs = [run for name in args.only for run in RUNS[name]]
        commands = [(script, [*options.split(), *of_data(script, args.data)]) for script, options in runs]
    failed = []
    for script, arguments in commands:
        command = [sys.executable, str(HERE / f"{script}.py"), *arguments]
        print(f"$ python benchmarks/{script}.py {' '.join(arguments)}", flush=True)
        started = time.monotonic()
        if subprocess.run(command, cwd=HERE.parent).returncode:
            failed.append(script)
        print(f"  {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
