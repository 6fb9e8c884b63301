"""A model whose ranks move for twelve steps."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tests import tiny
from tests.hf.straight_through_worker import examples

import factorformer
from factorformer.hf.callbacks import DynamicRankCallback
from factorformer.planning import Plan
from factorformer.training.dynamic_rank import DynamicRank, DynamicRankSettings

SETTINGS = DynamicRankSettings(warmup=0.2, final=0.2, interval=2, importance_interval=1)


def dense(dropout: float) -> tf.PreTrainedModel:
    """A classifier, always of the same weights."""
    torch.manual_seed(0)
    options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "num_labels": 3}
    return tf.BertForSequenceClassification(
        tf.BertConfig(**{**tiny._ENCODER, "hidden_size": 64, "intermediate_size": 128}, **options)
    ).eval()


@functools.cache
def planned(method: str) -> Plan:
    """Once for each method."""
    return factorformer.plan(dense(0.0), method, ratio=3)


def build(method: str, checkpoint: Path | None = None, dropout: float = 0.1) -> tuple[tf.PreTrainedModel, DynamicRank]:
    """A dense classifier and what shrinks it, from the start or from a checkpoint."""
    plan = planned(method)  # before weights are drawn, so that what is drawn after them is the same each time
    model = dense(dropout)
    calibration = None if checkpoint else [tiny.text(16)]
    return model, DynamicRank(model, plan, calibration, SETTINGS, resume_from=checkpoint)


def trainer(model: tf.PreTrainedModel, ranks: DynamicRank, folder: Path, **options: Any) -> tf.Trainer:
    """Twelve steps."""
    given = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "save_strategy": "steps"}
    given = {"optim": "adamw_torch_fused", **given, **options}
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        learning_rate=2e-3,
        # The same order of examples and the same loss whatever the number of processes.
        train_sampling_strategy="sequential",
        average_tokens_across_devices=False,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **given,
    )
    callbacks: list[tf.TrainerCallback] = [DynamicRankCallback(ranks)]
    return tf.Trainer(model, arguments, train_dataset=examples(), eval_dataset=examples(), callbacks=callbacks)


def main(folder: Path) -> None:
    """What a process of two does, and leaves behind as `ranks-N.pt`."""
    model, ranks = build("rankdyna", dropout=0.0)
    running = trainer(model, ranks, folder / "ranks", per_device_train_batch_size=4, save_steps=50, optim="sgd")
    assert running.args.world_size == 2
    running.train()
    saved = {"model": model.state_dict(), "history": ranks.history.to_dict()}
    torch.save(saved, folder / f"ranks-{running.args.process_index}.pt")
