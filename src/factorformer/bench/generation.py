"""How fast decoders read a prompt and go on with it, token by token with a cache, in turns of several models."""

from __future__ import annotations

import dataclasses
import inspect
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from factorformer.bench.candidates import Candidate, Runner, draw, load
from factorformer.bench.comparison import Spread
from factorformer.errors import DataError, MethodError, ModelError, one_line
from factorformer.planning.evidence.times import synchronize
from factorformer.progress import Progress, silent

LEAST, MOST = 3, 50
"""Rounds, whatever the time limit."""


@dataclasses.dataclass(frozen=True)
class Length:
    """Tokens of a prompt, and tokens that are generated.

    >>> Length.parse("128+64")
    Length(prompt=128, tokens=64)
    """

    prompt: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Length:
        """Read `PROMPT+TOKENS`.

        Raises:
            DataError: it is written otherwise, or there are not two tokens to generate.
        """
        match = re.fullmatch(r"([1-9]\d{0,6})\+([1-9]\d{0,6})", text)
        if match is None or int(match[2]) < 2:
            raise DataError(f"'{text}': write PROMPT+TOKENS, such as 128+64 for 64 tokens behind a prompt of 128")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.prompt}+{self.tokens}"


@dataclasses.dataclass(frozen=True)
class GenerationTiming:
    """The speed of one candidate; speed-ups are over the baseline in the same round.

    Args:
        prefill: milliseconds of the prompt.
        decode: milliseconds of a token behind it.
        prefill_speedup, decode_speedup: how many times faster than the baseline.
    """

    prefill: Spread
    decode: Spread
    prefill_speedup: Spread
    decode_speedup: Spread


@dataclasses.dataclass(frozen=True)
class Generation:
    """All candidates at one length, the baseline first.

    Args:
        length: of prompt and continuation.
        rounds: that counted.
        timings: one for each candidate.
    """

    length: Length
    rounds: int
    timings: tuple[GenerationTiming, ...]


def load_decoder(candidate: Candidate, threads: int, device: torch.device) -> Runner:
    """A candidate that generates.

    Raises:
        MethodError: a file of another runtime.
        ModelError: the model cannot be loaded, or is no causal language model.
    """
    if candidate.route != "torch":
        raise MethodError(f"'{candidate.name}': --generate runs models in torch")
    if "compile" in candidate.variants:
        raise MethodError(f"'{candidate.name}': with a cache that grows torch.compile would compile for every token")
    runner = load(candidate, threads, device)
    if not getattr(runner.module, "can_generate", lambda: False)() or _config(runner).is_encoder_decoder:
        raise ModelError(
            f"'{candidate.name}' is a {type(runner.module).__name__}: only causal language models generate"
        )
    return runner


def _config(runner: Runner) -> Any:
    return getattr(runner.module, "config", None)


def compare_generation(
    candidates: Sequence[Candidate],
    runners: Sequence[Runner],
    lengths: Sequence[Length],
    *,
    rounds: int | None = None,
    seconds: float = 30.0,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> list[Generation]:
    """Time greedy generation behind a prompt of random words, one text at a time.

    Args:
        candidates, runners: the same models in the same order, the baseline first.
        lengths: of prompt and continuation.
        rounds: of each length; None for as many as fit into the seconds, but 3 at least and 50 at most.
        seconds: for each length.
        seed: of the words.
        device: where the models run.
        progress: progress callback.

    Raises:
        DataError: more tokens than a model has positions.
        ModelError: a model that cannot run.
    """
    found = []
    for length in lengths:
        total = length.prompt + length.tokens
        for candidate, runner in zip(candidates, runners, strict=True):
            if runner.positions is not None and total > runner.positions:
                raise DataError(f"{length} are {total} tokens, and '{candidate.name}' has {runner.positions} positions")
        ids = draw(runners, 1, length.prompt, seed).to(device or "cpu")
        runs = [
            bind(candidate, runner.module, ids, length, device)
            for candidate, runner in zip(candidates, runners, strict=True)
        ]
        phase = f"generate {length}"
        progress(phase, 0, rounds)
        for run in runs:  # uncounted
            run()
        times: list[list[tuple[float, float]]] = []
        order, begun = list(range(len(runs))), time.perf_counter()
        limit = rounds or MOST
        while len(times) < limit and (rounds or len(times) < LEAST or time.perf_counter() - begun < seconds):
            row = [(0.0, 0.0)] * len(runs)
            for place in order:
                row[place] = runs[place]()
            times.append(row)
            order = [*order[1:], *order[:1]]
            progress(phase, len(times), rounds)
        found.append(Generation(length, len(times), _summarized(times)))
    return found


def _summarized(times: Sequence[Sequence[tuple[float, float]]]) -> tuple[GenerationTiming, ...]:
    """Of milliseconds of prompt and token, `(rounds, candidates)`."""
    timings = []
    for place in range(len(times[0])):
        spreads = [Spread.of(row[place][part] for row in times) for part in (0, 1)]
        ratios = [Spread.of(row[0][part] / row[place][part] for row in times) for part in (0, 1)]
        timings.append(GenerationTiming(*spreads, *ratios))
    return tuple(timings)


def bind(
    candidate: Candidate, model: Any, ids: Int[Tensor, "1 prompt"], length: Length, device: torch.device | None
) -> Callable[[], tuple[float, float]]:
    """What generates, and tells the milliseconds of the prompt, and of a token behind it."""
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def run() -> tuple[float, float]:
        try:
            with torch.inference_mode():
                synchronize(device)
                begun = time.perf_counter()
                output = model(input_ids=ids, use_cache=True, **few)
                following = output.logits[:, -1:].argmax(-1)
                synchronize(device)
                read = time.perf_counter()
                for _ in range(length.tokens - 1):
                    output = model(input_ids=following, past_key_values=output.past_key_values, use_cache=True)
                    following = output.logits[:, -1:].argmax(-1)
                synchronize(device)
                ended = time.perf_counter()
        except Exception as error:  # of many types, for models that keep no cache or read more than tokens
            raise ModelError(f"'{candidate.name}' cannot generate {length}: {one_line(error)}") from error
        return 1000 * (read - begun), 1000 * (ended - read) / (length.tokens - 1)

    return run
