"""How fast is a compressed encoder on this machine, end to end, against what a user would take instead?

    python benchmarks/latency.py --ratios 2.5 --methods svd kronecker dense_sparse_plain
    python benchmarks/latency.py --ratios 10 --methods svd:int8 kronecker:int8 dense_sparse_plain:int8
    python benchmarks/latency.py --model MPNET --ratios 10 --methods svd:int8 --no-compile --no-peers
    python benchmarks/latency.py --shapes banking77 --ratios 10 --methods svd:int8 --no-compile --no-peers

For each method and ratio the compressed model is timed, interleaved as in `factorformer bench`, against

- the dense model in eager torch, which is the baseline, compiled, and in torch's and torchao's dynamic int8;
- OpenVINO with the dense model, computing in float32 and in bfloat16, and with static int8 that NNCF made of it;
- ONNX Runtime with torch's export of the dense model, with its own dynamic int8 of that, and with our export of it;
- static embeddings, a table of 256 columns of which the mean is taken, as the other end;
- the dense model in one call of our kernels, with its weights rounded to bfloat16 and to int8;
- Torch-Pruning, with heads and feed-forward units removed until the blocks hold no more parameters than ours;
- tensorly-torch, with every linear layer of the blocks factorized to about as many parameters.

Ours runs in eager torch, with its layers in one call (`factorformer.fuse`), compiled, and in ONNX Runtime through our
export, as it is and in int8. What is not installed, or does not run, is left out and said so.

A shape is BATCHxTOKENS of random words without padding, or `banking77`: the first test questions of it, in batches of
32, as they come, padded to the longest of each. Nothing is trained: times do not depend on values. With each shape
without padding comes the least that the multiplications of the model could take, as dense and as factors (`floor.py`),
and what the time of ours goes to. One line of JSON for each model, method, ratio and shape; lines that are there
already are not measured again, unless `--again` says so.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import floor
import openvino_peers
import torch
import torch.nn.functional as F
from common import append_line, default_data, machine, options, read_lines, start
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

import factorformer
from factorformer.bench.candidates import Candidate, Runner, draw, load, parse, real
from factorformer.bench.comparison import LEAST, MOST, SETTLE, WARM_UP, Shape, Timing, compare, summarize
from factorformer.errors import FactorformerError, one_line
from factorformer.files import output_directory
from factorformer.hf.source import find, load_model, load_tokenizer, most_tokens
from factorformer.layers.surgery import find_blocks
from factorformer.planning.evidence.times import interleaved
from factorformer.report import inventory
from factorformer.tasks import data

CPU = torch.device("cpu")
PEERS = ("onnx", "onnxruntime", "openvino", "nncf", "torchao", "torch-pruning", "tensorly", "tensorly-torch")
SENTENCES, OF_EACH = "banking77", 32
STATIC = 256
"""Columns of static embeddings."""
BATCHES = 8
"""Of real sentences, in one pass."""
LAYERS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
FEED_FORWARD = ("intermediate.dense", "output.dense")


def parameters(model: nn.Module) -> int:
    """Stored values in the blocks: floats, and codes of int8 factors, which are buffers."""
    blocks = [model.get_submodule(name) for name in find_blocks(model)]
    codes = sum(b.numel() for block in blocks for b in block.buffers() if b.dtype == torch.int8)
    return codes + sum(p.numel() for block in blocks for p in block.parameters())


def runner(model: PreTrainedModel) -> Runner:
    """A model that another library changed, run by torch."""

    def prepare(ids: Tensor) -> Callable[[], object]:
        mask = real(ids, model.config.pad_token_id)
        return lambda: model(input_ids=ids, attention_mask=mask)

    return Runner(prepare, model.config.vocab_size, model.config.pad_token_id, most_tokens(model), model.eval())


def pruned(dense: PreTrainedModel, target: int) -> PreTrainedModel:
    """Torch-Pruning: the same part of all heads and of all feed-forward units, those of the smallest weights first.

    Args:
        dense: stays as it is.
        target: parameters in the blocks; those of the result are fewer by less than one unit for each block.
    """
    import torch_pruning as tp

    model = copy.deepcopy(dense)
    config, blocks = model.config, [model.get_submodule(name) for name in find_blocks(model)]
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    # Biases and norms of a block that stay whatever is removed: those after its two last products, and two norms.
    of_head, of_unit, fixed = head * (4 * width + 3), 2 * width + 1, 6 * width
    part = (target / len(blocks) - fixed) / (config.num_attention_heads * of_head + config.intermediate_size * of_unit)
    heads = max(1, round(part * config.num_attention_heads))
    units = math.floor((target / len(blocks) - fixed - heads * of_head) / of_unit)
    if units < 1:
        raise FactorformerError(f"{target:,} parameters in the blocks are too few for one feed-forward unit in each")
    ids = torch.ones(1, 8, dtype=torch.long)
    for block in blocks:
        graph = tp.DependencyGraph()
        with torch.enable_grad():
            graph.build_dependency(
                model,
                example_inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                output_transform=lambda output: output.last_hidden_state.sum(),
            )
        attention, up = block.get_submodule("attention.self"), block.get_submodule("intermediate.dense")
        query = attention.get_submodule("query")
        rows = query.weight.detach().reshape(config.num_attention_heads, -1).norm(dim=1).argsort()
        gone = [head * i + j for i in rows[: len(rows) - heads].tolist() for j in range(head)]
        remove(graph, query, gone, tp.prune_linear_out_channels)
        rows = up.weight.detach().norm(dim=1).argsort()
        remove(graph, up, rows[: len(rows) - units].tolist(), tp.prune_linear_out_channels)
        attention.num_attention_heads, attention.all_head_size = heads, heads * head
    return model


def remove(graph: Any, layer: nn.Module, rows: list[int], how: Any) -> None:
    """Remove outputs of a layer, and everything that depends on them."""
    if rows:
        graph.get_pruning_group(layer, how, idxs=sorted(rows)).prune()


def tensorized(dense: PreTrainedModel, target: int, kind: str) -> PreTrainedModel:
    """tensorly-torch: all linear layers of the blocks, with the same part of their parameters, multiplied as factors.

    Args:
        dense: stays as it is.
        target: parameters in the blocks, met within some per cent: ranks are whole numbers.
        kind: `tucker`, or `blocktt`, which is a sum of Kronecker products.
    """
    import tltorch
    from tltorch.utils import get_tensorized_shape

    model = copy.deepcopy(dense)
    blocks = [model.get_submodule(name) for name in find_blocks(model)]
    linear = [(block, name) for block in blocks for name in (*LAYERS, *FEED_FORWARD)]
    weights = sum(block.get_submodule(name).get_parameter("weight").numel() for block, name in linear)
    part = 1 - (parameters(model) - target) / weights
    for block, name in linear:
        old = block.get_submodule(name)
        out, inner = old.get_parameter("weight").shape
        columns, rows = get_tensorized_shape(inner, out, order=2, verbose=False)
        cores = sum(a * b for a, b in zip(columns, rows, strict=True))
        rank: Any = part if kind == "tucker" else [1, max(1, round(part * out * inner / cores)), 1]
        new = tltorch.FactorizedLinear(columns, rows, bias=True, factorization=kind, rank=rank)
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, new)
    return model


class Field:
    """Who runs against a compressed model, made once where it does not depend on that."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dense = load_model(find(args.model)).to(CPU)  # pyright: ignore[reportArgumentType]
        self.tokenizer = load_tokenizer(find(args.model))
        self.work: Path = args.work / called(args.model)
        self.source = self.work / "dense"
        if not self.source.exists():
            self.save(self.dense, self.source)
        self.installed = {name: importlib.util.find_spec(name) is not None for name in MODULES}
        self.ready: dict[str, tuple[Candidate, Runner]] = {}

    def save(self, model: PreTrainedModel, path: Path) -> None:
        with output_directory(path) as directory:
            model.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)

    def add(self, label: str, written: str) -> None:
        """A candidate in the notation of `factorformer bench`, loaded once."""
        if label not in self.ready:
            try:
                candidate = parse(written)
                self.ready[label] = candidate, load(candidate, torch.get_num_threads(), CPU)
            except FactorformerError as error:
                print(f"left out: {label}: {error}", flush=True)

    def made(self, label: str, package: str, make: Callable[[], PreTrainedModel]) -> None:
        """A candidate that another library makes of the dense model."""
        if not self.installed[package]:
            print(f"left out: {label}: {package} is not installed", flush=True)
            return
        try:
            self.ready[label] = Candidate(label, self.source), runner(make())
        except FactorformerError as error:
            print(f"left out: {label}: {error}", flush=True)

    def exported(self, source: Path, *, int8: bool) -> Path:
        """Our ONNX file of a model."""
        from factorformer.export.onnx import export

        path = source.with_name(f"{source.name}-onnx{'-int8' if int8 else ''}")
        if not path.exists():
            model, tokenizer = load_model(source), load_tokenizer(source)
            export(model, path, tokenizer=tokenizer, int8=int8)
        return path

    def exported_by_torch(self) -> tuple[Path, Path]:
        """What a user makes of the dense model without us: torch's ONNX file, and ONNX Runtime's dynamic int8 of it."""
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        float32, int8 = (self.source.with_name(f"dense-torch-{name}") / "model.onnx" for name in ("onnx", "int8"))
        if not int8.exists():
            names = ["input_ids", "attention_mask"]
            sizes = {0: torch.export.Dim("batch", max=512), 1: torch.export.Dim("tokens", min=2, max=512)}
            example = tuple(torch.ones(2, 8, dtype=torch.long) for _ in names)
            for file in (float32, int8):
                file.parent.mkdir(exist_ok=True)
                (file.parent / "config.json").write_text((self.source / "config.json").read_text())
            with torch.no_grad():
                torch.onnx.export(
                    openvino_peers.Hidden(self.dense),
                    example,
                    float32,
                    dynamic_shapes=tuple(sizes for _ in names),
                    input_names=names,
                    opset_version=20,
                    external_data=False,
                    verbose=False,
                )
            model = onnx.load(float32)
            del model.graph.value_info[:]  # shapes of the exporter that contradict those that the quantizer infers
            quantize_dynamic(model, int8, weight_type=QuantType.QInt8)
        return float32.parent, int8.parent

    def openvino(self) -> None:
        """The dense model in OpenVINO, by three ways."""
        if importlib.util.find_spec("openvino") is None or importlib.util.find_spec("nncf") is None:
            print("left out: OpenVINO: openvino and nncf are not installed", flush=True)
            return
        file = self.args.data / SENTENCES / "train.tsv"
        if not file.exists():
            print(f"left out: OpenVINO: '{file}', on which its int8 is calibrated, is not there", flush=True)
            return
        questions = data.read(file)["text"]
        config, threads = self.dense.config, torch.get_num_threads()
        paths = openvino_peers.convert(self.dense, self.tokenizer, questions, self.work / "dense-openvino")
        for label, name, precision in (("", "dense", "f32"), (" bf16", "dense", "bf16"), (" int8", "int8", "f32")):
            label, path = f"dense, OpenVINO{label}", paths[name]
            made = openvino_peers.runner(path, precision, threads, config.vocab_size, config.pad_token_id)
            self.ready[label] = Candidate(label, path), made

    def peers(self) -> None:
        """Everybody who runs the dense model, the baseline first."""
        source = self.source
        self.add("dense, eager", str(source))
        self.openvino()
        if self.installed["onnxruntime"] and self.installed["onnx"]:
            by_torch, by_onnxruntime = self.exported_by_torch()
            self.add("dense, ONNX Runtime", str(by_torch))
            self.add("dense, ONNX Runtime's int8", str(by_onnxruntime))
            self.add("dense, our export in int8", str(self.exported(source, int8=True)))
        else:
            print("left out: ONNX Runtime: onnx and onnxruntime are not installed", flush=True)
        table = torch.randn(self.dense.config.vocab_size, STATIC)
        known = self.dense.config.vocab_size, self.dense.config.pad_token_id, most_tokens(self.dense)
        averaged = Runner(lambda ids: lambda: F.embedding_bag(ids, table, mode="mean"), *known, nn.Identity())
        self.ready["static embeddings"] = Candidate("static embeddings", source), averaged
        self.add("dense, fused bf16", f"fused-bf16:{source}")
        self.add("dense, fused int8", f"fused-int8:{source}")
        if not self.args.peers:
            return
        if self.args.compile:
            self.add("dense, torch.compile", f"compile:{source}")
        self.add("dense, fused", f"fused:{source}")
        self.add("dense, torch bf16", f"bf16:{source}")
        self.add("dense, torch int8", f"int8:{source}")
        self.add("dense, torchao int8", f"torchao-int8:{source}")
        if self.args.compile:
            self.add("dense, torchao int8, torch.compile", f"compile:torchao-int8:{source}")
        if self.installed["onnxruntime"] and self.installed["onnx"]:
            self.add("dense, our export", str(self.exported(source, int8=False)))

    def against(self, method: str, ratio: float) -> dict[str, Any]:
        """Add the compressed model and those of its size; what is known of it."""
        path = self.work / f"{method.replace(':', '-')}-{ratio:g}"
        if not path.exists():
            model, name = copy.deepcopy(self.dense), method.removesuffix(":int8")
            factorformer.compress(model, factorformer.plan(model, name, ratio, int8=name != method))
            self.save(model, path)
        found = inventory(load_model(path), "blocks")
        target = found.compressed.parameters
        self.add("ours, eager", str(path))
        self.add("ours, fused", f"fused:{path}")
        if not method.endswith(":int8"):
            self.add("ours, fused bf16", f"fused-bf16:{path}")
            self.add("ours, fused int8", f"fused-int8:{path}")
        known = {"ratio": round(found.ratio, 4), "parameters_in_blocks": target}
        self.small = load_model(path)
        if not self.args.peers:
            return known
        if self.args.compile:
            self.add("ours, torch.compile", f"compile:{path}")
        if self.installed["onnxruntime"] and self.installed["onnx"]:
            self.add("ours, our export", str(self.exported(path, int8=False)))
            self.add("ours, our export in int8", str(self.exported(path, int8=True)))
        self.made("Torch-Pruning", "torch_pruning", lambda: pruned(self.dense, target))
        for kind in ("tucker", "blocktt"):
            self.made(f"tensorly-torch, {kind}", "tltorch", lambda kind=kind: tensorized(self.dense, target, kind))
        return known

    def sentences(self) -> list[Tensor]:
        """Batches of test questions, padded."""
        questions = data.read(self.args.data / SENTENCES / "test.tsv")["text"]
        parts = [questions[first : first + OF_EACH] for first in range(0, BATCHES * OF_EACH, OF_EACH)]
        return [self.tokenizer(list(part), padding=True, return_tensors="pt")["input_ids"] for part in parts]

    def floors(self, shape: Shape) -> dict[str, Any]:
        """The least that the dense and the compressed model could take, and where the time of ours goes."""
        ids = draw([of for _, of in self.ready.values()], shape.batch, shape.tokens, self.args.seed)
        least = {
            name: floor.floors(floor.work_of(model, shape.batch, shape.tokens))
            for name, model in (("dense", self.dense), ("ours", self.small))
        }
        spent = {}
        for label, (_, of) in self.ready.items():
            if isinstance(of.module, PreTrainedModel) and "fused" in label:
                spent[label] = floor.split(of.module, ids, of.padding)
        return {"floors": least, "spent": {label: parts for label, parts in spent.items() if parts}}

    def timings(self, shape: Shape | str) -> tuple[tuple[Timing, ...], int]:
        """Of all candidates, and the number of rounds."""
        candidates, runners = zip(*self.ready.values(), strict=True)
        settings = {"rounds": self.args.rounds, "seconds": self.args.seconds}
        if isinstance(shape, Shape):
            (comparison,) = compare(candidates, runners, [shape], seed=self.args.seed, **settings)
            return comparison.timings, comparison.rounds
        parts = self.sentences()

        def passes(of: Runner) -> Callable[[], object]:
            prepared = [of.prepare(ids) for ids in parts]
            return lambda: [run() for run in prepared]

        runs = [passes(of) for of in runners]
        seconds = self.args.seconds if self.args.rounds is None else math.inf
        times = interleaved(runs, self.args.rounds or MOST, seconds=seconds, least=LEAST, settle=SETTLE)
        return summarize(times), len(times)

    def compare(self, shape: Shape | str) -> list[dict[str, Any]]:
        for label, (_, of) in list(self.ready.items()):
            try:
                parts = self.sentences()[:1] if isinstance(shape, str) else []
                with torch.inference_mode():
                    of.prepare(parts[0] if parts else draw([of], shape.batch, shape.tokens, self.args.seed))()
            except Exception as error:  # compilers and quantized operators raise many types
                print(f"left out: {label}: {one_line(error)}", flush=True)
                del self.ready[label]
        timings, rounds = self.timings(shape)
        rows = []
        for label, timing in zip(self.ready, timings, strict=True):
            _, of = self.ready[label]
            # torch's int8 has none: its weights are packed.
            blocks = parameters(of.module) if isinstance(of.module, PreTrainedModel) else 0
            rows.append(
                {
                    "name": label,
                    "speedup": {key: round(value, 4) for key, value in dataclasses.asdict(timing.speedup).items()},
                    "milliseconds": {
                        key: round(value, 4) for key, value in dataclasses.asdict(timing.milliseconds).items()
                    },
                    "rounds": rounds,
                    "parameters_in_blocks": blocks or None,
                }
            )
        return rows


MODULES = ("onnx", "onnxruntime", "torchao", "torch_pruning", "tltorch")


def called(model: str) -> str:
    """How rows name a model."""
    return model if model == "minilm" else Path(model).name


def shape_of(text: str) -> Shape | str:
    """BATCHxTOKENS, or the name of the sentences."""
    return text if text == SENTENCES else Shape.parse(text)


def versions() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def show_floors(row: dict[str, Any]) -> None:
    """What the products of a model could take at least, by type, and how far above that of its own each one is."""
    kind = "int8" if row["method"].endswith(":int8") else "fp32"
    for of, least in row.get("floors", {}).items():
        for each, found in least.items():
            numbers = f"{found['flops'] / 1e9:.3g} GFLOP, {found['weight_bytes'] / 1e6:.3g} MB"
            rates = f"{found['gflops']:.0f} GFLOP/s, {found['weight_bytes'] / found['read'] / 1e6:.3g} GB/s"
            print(f"  floor of {of} in {each:<5} {found['milliseconds']:9.3f} ms  {numbers}, at {rates}", flush=True)
    for result in row["results"] if row.get("floors") else ():
        name = result["name"]
        ours = not name.startswith(("dense", "static"))
        own = next((each for each in ("int8", "bf16") if each in name), kind if ours else "fp32")
        over = result["milliseconds"]["median"] / row["floors"]["ours" if ours else "dense"][own]["milliseconds"]
        print(f"  {name:<36} {over:6.2f} times the floor of {'ours' if ours else 'dense'} in {own}", flush=True)


def main() -> None:
    parser = options(__doc__, "latency.jsonl")
    parser.add_argument("--model", default="minilm", help="a directory, or `minilm`")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with one folder for each task")
    parser.add_argument("--methods", nargs="+", default=["svd", "kronecker", "dense_sparse_plain"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[2.5], help="of bytes in the blocks")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[Shape(1, 32), Shape(8, 64), Shape(32, 128)])
    parser.add_argument("--also", nargs="*", default=[], help="more candidates, in the notation of factorformer bench")
    parser.add_argument("--threads", type=int, default=None, help="by default one for each core")
    parser.add_argument("--rounds", type=int, default=None, help=f"by default as many as fit, at least {LEAST}")
    parser.add_argument("--seconds", type=float, default=60, help="for each shape")
    parser.add_argument("--seed", type=int, default=0, help="of the words")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile as well")
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="other libraries than these two as well"
    )
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument("--work", type=Path, default=Path("runs/latency"), help="models are kept here")
    args = start(parser)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    lines = [row for row in read_lines(args.output) if row["machine"]["threads"] == threads and not args.again]
    name = called(args.model)
    done = {(row["method"], row["asked_ratio"], row["shape"]) for row in lines if row.get("model") == name}
    field: Field | None = None
    for method in args.methods:
        for ratio in args.ratios:
            open_shapes = [shape for shape in args.shapes if (method, ratio, str(shape)) not in done]
            if not open_shapes:
                continue
            if field is None:
                field = Field(args)
                field.peers()
            common = dict(field.ready)
            known = field.against(method, ratio)
            for written in args.also:
                field.add(written, written)
            for shape in open_shapes:
                row = {
                    "model": name,
                    "method": method,
                    "asked_ratio": ratio,
                    "shape": str(shape),
                    **known,
                    "results": field.compare(shape),
                    **(field.floors(shape) if isinstance(shape, Shape) else {}),
                    "warm_up": WARM_UP,
                    "settle": SETTLE,
                    "seed": args.seed,
                    "load": round(os.getloadavg()[0], 2),
                    "machine": machine(),
                    "versions": versions(),
                }
                append_line(args.output, row)
                print(json.dumps({key: row[key] for key in ("method", "asked_ratio", "shape")}), flush=True)
                for result in row["results"]:
                    speedup, time = result["speedup"], result["milliseconds"]["median"]
                    quartiles = f"{speedup['low']:.2f} to {speedup['high']:.2f}"
                    line = f"  {result['name']:<36} {speedup['median']:6.2f}x  {quartiles}  {time:9.2f} ms"
                    print(line, flush=True)
                show_floors(row)
            field.ready = common


if __name__ == "__main__":
    main()
