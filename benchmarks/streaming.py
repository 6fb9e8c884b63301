"""How much memory a model takes that is compressed block by block, and how long.

    python benchmarks/streaming.py --work FOLDER

Makes a decoder of random weights of at least so many GB in the folder, and compresses it in a process of its own,
without data and on windows of random tokens: of each block the matrices of keys alone, which are small, for it is not
the fits that are measured. The peak is the highest resident set of that process, which holds Python and torch as well;
the limit is two blocks and 1 GiB.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from common import machine, options, start, write
from safetensors.torch import save_file

from factorformer.streaming.stored import skeleton

INSIDE = """
import json, sys, time, torch, factorformer
source, output, method, windows, length = sys.argv[1:]
batches = [{"input_ids": torch.randint(5, 1000, (1, int(length)))} for _ in range(int(windows))]
began = time.perf_counter()
report = factorformer.compress_checkpoint(
    source, output, method, 1.01, include="*.k_proj", calibration=batches or None, overwrite=True
)
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak, "matrices": len(report.errors)}))
"""


def make(path: Path, gigabytes: float, width: int) -> int:
    """A decoder of so many GB, unless it is there; the bytes of one block."""
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=int(2.75 * width),
        num_attention_heads=width // 128,
        num_key_value_heads=1,
        num_hidden_layers=1,
        vocab_size=1000,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tensors = {name: tensor.shape for name, tensor in model.state_dict().items()}
    block = sum(shape.numel() * 2 for name, shape in tensors.items() if ".layers.0." in name)
    config.num_hidden_layers = -(-int(gigabytes * 1e9) // block)
    if not (path / "config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        index: dict[str, str] = {}
        for place in range(config.num_hidden_layers):
            drawn = {
                name.replace(".layers.0.", f".layers.{place}."): torch.randn(shape, dtype=torch.bfloat16) * 0.02
                for name, shape in tensors.items()
                if place == 0 or ".layers.0." in name
            }
            save_file(drawn, path / f"model-{place:05d}.safetensors", {"format": "pt"})
            index |= dict.fromkeys(drawn, f"model-{place:05d}.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(path)
    return block


def main() -> None:
    parser = options(__doc__, "streaming.json")
    parser.add_argument("--work", type=Path, required=True, help="folder for models")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    args = start(parser)
    source = args.work / f"decoder-{args.gigabytes:g}-{args.width}"
    block = make(source, args.gigabytes, args.width)
    stored = skeleton(source)[1]
    size = sum(file.stat().st_size for file in set(stored.files.values()))
    rows: list[dict[str, Any]] = []
    for method, windows in (("svd", 0), ("whitened", args.windows), ("fisher", args.windows)):
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            INSIDE,
            source,
            args.work / "small",
            method,
            windows,
            args.length,
        ]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"compression ended with {done.returncode}")
        row = {"method": method, "windows": windows, "length": args.length, **json.loads(done.stdout)}
        rows.append({**row, "model_bytes": size, "block_bytes": block, "limit": 2 * block + 2**30})
        print(json.dumps(rows[-1]), flush=True)
    write(args.output, {"rows": rows, "machine": machine()})


if __name__ == "__main__":
    main()
