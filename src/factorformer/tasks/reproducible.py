"""A `Trainer` that an interrupted run goes on with as if it had never stopped: batches, log, seconds."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from factorformer.hf.compat import load_weights
from factorformer.tasks.trainer import FastTrainer, run


class EpochSampler(LengthGroupedSampler):
    """Batches of rows of similar length, in an order that depends on seed and epoch alone.

    Where the Trainer makes the sampler, it draws from torch's global generator, whose state at the start of an epoch is
    in no checkpoint: an epoch resumed halfway would go on with other batches. Here it goes on as the interrupted one
    would have, and models with other dropout see the same batches. Batches are shuffled too: their lengths do not run
    from long to short.

    Args:
        lengths: of the rows.
        batch_size: rows in a batch.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.draw, self.seed, self.epoch = torch.Generator(), seed, 0
        super().__init__(batch_size, lengths=list(lengths), generator=self.draw)

    def set_epoch(self, epoch: int) -> None:
        """Called by the `Trainer` before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.draw.manual_seed(self.seed + self.epoch)
        order = list(super().__iter__())
        starts = range(0, len(order) - self.batch_size + 1, self.batch_size)
        for batch in torch.randperm(len(starts), generator=self.draw).tolist():
            yield from order[starts[batch] :][: self.batch_size]
        yield from order[len(starts) * self.batch_size :]


class ReproducibleTrainer(FastTrainer):
    """A `Trainer` with reproducible batches, and the seconds of training in its log.

    Its `train_dataset` has a column `length`, the tokens of each row.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = Clock()
        self.add_callback(self.clock)

    def measured(self, metrics: dict[str, float]) -> dict[str, float]:
        """Log metrics, once for each time that they are asked for."""
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_train_dataloader(self) -> DataLoader:
        """Batches whose rows and hidden tokens depend on seed and epoch alone, and not on where a run was resumed."""
        assert isinstance(self.train_dataset, datasets.Dataset)
        args, rows = self.args, self.train_dataset.remove_columns("length")
        sampler = EpochSampler(self.train_dataset["length"], args.train_batch_size, args.seed)

        def collate(rows: list[dict[str, Any]]) -> Any:
            state = torch.default_generator.get_state()
            torch.default_generator.manual_seed(random.Random(f"{args.seed} {sampler.epoch} {rows[0]}").getrandbits(63))
            try:
                return self.data_collator(rows)
            finally:
                torch.default_generator.set_state(state)

        options: dict[str, Any] = {"dataset": rows, "pin_memory": args.dataloader_pin_memory, "collate_fn": collate}
        return self.accelerator.prepare(DataLoader(**options, batch_size=args.train_batch_size, sampler=sampler))


class Clock(TrainerCallback):
    """Writes the seconds of training into the log; a resumed run goes on where the log of its checkpoint ends."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin where the log ends."""
        self.started = time.perf_counter() - max((row["seconds"] for row in state.log_history), default=0.0)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the seconds."""
        state.log_history[-1]["seconds"] = round(self.seconds, 2)


def finish(trainer: ReproducibleTrainer, checkpoint: Path | None, steps: int) -> list[dict[str, Any]]:
    """Train from the start or from a checkpoint to the last step; the log of the whole run."""
    if checkpoint is not None:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] >= steps:  # the Trainer would make one step more
            load_weights(trainer, checkpoint)
            return state["log_history"]
    run(trainer, checkpoint)
    return trainer.state.log_history
