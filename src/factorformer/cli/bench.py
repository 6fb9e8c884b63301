"""`factorformer bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from factorformer.cli._options import LARGEST, AsJson, Device, DeviceChoice, console, emit_json, finite, note, place_of
from factorformer.errors import MethodError

if TYPE_CHECKING:
    from factorformer.bench.candidates import Candidate
    from factorformer.report.bench import BenchResult

Benched = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        show_default=False,
        help="What is measured: MODEL or VARIANT:MODEL, where MODEL is a directory, a name on the Hugging Face Hub, "
        "'minilm', a file for ONNX Runtime or OpenVINO, or a directory that `factorformer export` made.",
    ),
]
Against = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        metavar="MODEL",
        show_default=False,
        help="What to compare with, in the same notation. Can be given several times; ratios are to the first.",
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="BATCHxTOKENS",
        show_default=False,
        help="Texts in a batch, and tokens in each. Can be given several times. By default 1x32, 8x64 and 32x128.",
    ),
]
Generate = Annotated[
    list[str] | None,
    typer.Option(
        "--generate",
        metavar="PROMPT+TOKENS",
        show_default=False,
        help="Of causal language models: read a prompt of so many tokens, and go on with so many, one by one. Can be "
        "given several times. In place of the shapes, unless these are given too.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=1024, show_default=False, help="By default as many as torch takes: one for each core."
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        "--rounds", min=1, max=LARGEST, show_default=False, help="Passes of each model that count, for each shape."
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        "--seconds",
        min=0.01,
        callback=finite,
        show_default=False,
        help="Without --rounds, the time for each shape: by default 10, and 30 for each --generate; with --layers that "
        "for each pair of products: by default 0.5.",
    ),
]
Layers = Annotated[
    bool, typer.Option("--layers", help="Time each kind of factorized layer against the dense product instead.")
]
Tokens = Annotated[
    list[int] | None,
    typer.Option(
        "--tokens",
        min=1,
        max=LARGEST,
        show_default=False,
        help="With --layers: rows of input. Can be given several times. By default 1, 16, 128 and 1024.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Of the words.")]

DEFAULT_SHAPES = ("1x32", "8x64", "32x128")


def bench(
    model: Benched,
    against: Against = None,
    shape: Shapes = None,
    generate: Generate = None,
    threads: Threads = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    device: Device = DeviceChoice.cpu,
    layers: Layers = False,
    tokens: Tokens = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure how fast and how large a model is on this machine, against others.

    Passes of all models are interleaved in one process, so that whatever else the machine does meets all of them alike;
    ratios are taken within each round. 'speed-up' is the time of the first --against over that of the model, and its
    quartiles tell how sure it is. Peak memory and the time to load are taken in a new process for each model.

    A variant before a model chooses its route: [bold]fused:[/bold] by `factorformer.fuse`, with all layers in one call
    where it knows them, [bold]fused-int8:[/bold] and [bold]fused-bf16:[/bold] with their products in these types,
    [bold]compile:[/bold] through torch.compile, [bold]bf16:[/bold] in bfloat16, [bold]int8:[/bold] in
    torch's dynamic int8, [bold]torchao-int8:[/bold] in torchao's (both of dense models only), [bold]onnx:[/bold] and
    [bold]openvino:[/bold] for the file of a directory that holds other weights as well. They can be combined, such as
    compile:bf16:small/.

    [bold]With --generate[/bold] causal language models read a prompt and go on with it greedily, one text at a time and
    with a cache: tokens a second of both, and the speed-ups of each.

    [bold]With --layers[/bold] each kind of factorized layer is timed against the dense product of the same shape, and
    the table shows from how many tokens on its factors pay.

    \b
    [bold]Examples[/bold]
      factorformer bench small/ --against minilm
      factorformer bench small/ --against dense/ --against int8:dense/
      factorformer bench compile:small/ --against dense/ --shape 1x128 --json
      factorformer bench small-onnx/ --against dense-onnx/ --threads 1
      factorformer bench small-chat/ --against chat/ --against bf16:chat/ --generate 128+128
      factorformer bench small/ --layers
    """
    given = {"--against": against, "--shape": shape, "--generate": generate, "--rounds": rounds}
    unused = [name for name, value in given.items() if value is not None] if layers else []
    if unused or (tokens is not None and not layers):
        wrong = f"--layers times products, not models: leave out {', '.join(unused)}"
        raise MethodError(wrong if unused else "--tokens is for --layers: the tokens of models are in --shape")
    if rounds is not None and seconds is not None:
        raise MethodError("--rounds and --seconds both say when to stop: leave one out")
    import torch

    from factorformer.bench.candidates import parse
    from factorformer.report.bench import show_bench

    place, before = place_of(device), torch.get_num_threads()
    benched, *others = [parse(text) for text in (model, *(against or []))]
    # Ratios are to the first of the others, which is most often the original.
    candidates = [*others[:1], benched, *others[1:]]
    torch.set_num_threads(threads or before)
    try:
        if layers:
            result = _layers(benched, tokens, seconds, place, seed)
        else:
            shapes = shape or (() if generate else DEFAULT_SHAPES)
            result = _models(candidates, shapes, generate or (), rounds, seconds, place, seed)
    finally:
        torch.set_num_threads(before)
    if as_json:
        emit_json(result.to_dict())
        return
    show_bench(result, console())
    if not layers and against is None:
        note("ratios are to the model itself: name the original with --against")


def _layers(benched: Candidate, tokens: list[int] | None, seconds: float | None, place: str, seed: int) -> BenchResult:
    """Time the factorized layers of a model against dense products."""
    import torch

    from factorformer.bench.layers import TOKENS, time_layers
    from factorformer.hf.source import load_model
    from factorformer.progress import bars
    from factorformer.report.bench import BenchResult

    if benched.route != "torch" or benched.variants:
        raise MethodError(f"--layers reads the factors of a model directory, not '{benched.name}'")
    with bars() as progress:
        found = time_layers(load_model(benched.path, device=place), tokens or TOKENS, seconds or 0.5, progress)
    return BenchResult([], [], [], torch.get_num_threads(), place, seed, found)


def _models(
    candidates: Sequence[Candidate],
    shapes: Sequence[str],
    generate: Sequence[str],
    rounds: int | None,
    seconds: float | None,
    place: str,
    seed: int,
) -> BenchResult:
    """Time the models against each other, and measure their size and memory."""
    import torch

    from factorformer.bench.candidates import common_vocabulary, load
    from factorformer.bench.comparison import Shape, compare
    from factorformer.bench.footprint import footprint
    from factorformer.bench.generation import Length, compare_generation, load_decoder
    from factorformer.progress import bars
    from factorformer.report.bench import BenchResult

    sizes, lengths = [Shape.parse(text) for text in shapes], [Length.parse(text) for text in generate]
    device, threads = torch.device(place), torch.get_num_threads()
    with bars() as progress:
        runners = []
        for candidate in candidates:
            progress("load", len(runners), len(candidates))
            runners.append((load_decoder if lengths else load)(candidate, threads, device))
        progress("load", len(runners), len(candidates))
        comparisons = compare(
            candidates,
            runners,
            sizes,
            rounds=rounds,
            seconds=seconds or 10.0,
            seed=seed,
            device=device,
            progress=progress,
        )
        generations = compare_generation(
            candidates,
            runners,
            lengths,
            rounds=rounds,
            seconds=seconds or 30.0,
            seed=seed,
            device=device,
            progress=progress,
        )
        words = common_vocabulary(runners)
        runners.clear()  # what follows has the memory to itself
        footprints = []
        longest = max(lengths, key=lambda length: length.prompt + length.tokens, default=None)
        largest = max(sizes, key=lambda shape: shape.batch * shape.tokens, default=Shape(1, 1))
        for candidate in candidates:
            progress("memory and load time", len(footprints), len(candidates))
            footprints.append(footprint(candidate, largest, threads, place, seed, words, None if sizes else longest))
        progress("memory and load time", len(footprints), len(candidates))
    return BenchResult(candidates, footprints, comparisons, threads, place, seed, generations=generations)
