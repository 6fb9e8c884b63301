"""A model that trains straight through for twelve steps."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tests import tiny
from torch import Tensor

import factorformer
from factorformer.hf.callbacks import StraightThroughCallback
from factorformer.training.straight_through import StraightThrough, StraightThroughSettings

SETTINGS = StraightThroughSettings(interval=1, freeze=0.6)


@functools.cache
def compressed(method: str) -> tuple[tf.PreTrainedModel, Any, tf.PreTrainedModel]:
    """A compressed classifier, the statistics of its inputs and what it was."""
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(
        tf.BertConfig(**{**tiny._ENCODER, "hidden_size": 64, "intermediate_size": 128}, num_labels=3)
    ).eval()
    dense = copy.deepcopy(model)
    plan = factorformer.plan(model, method, ratio=2)
    report = factorformer.compress(model, plan, [tiny.text(16)], keep_statistics=True)
    return model, report.statistics, dense


def build(method: str) -> tuple[tf.PreTrainedModel, StraightThrough]:
    """A compressed classifier in its training form."""
    model, statistics, dense = copy.deepcopy(compressed(method))
    return model, StraightThrough(model, statistics, dense, SETTINGS)


def examples() -> list[dict[str, Tensor]]:
    inputs, labels = tiny.text(32), torch.arange(32) % 3
    return [{**{key: value[i] for key, value in inputs.items()}, "labels": labels[i]} for i in range(32)]


def trainer(model: tf.PreTrainedModel, straight: StraightThrough, folder: Path, **options: Any) -> tf.Trainer:
    """Twelve steps at a rate that moves supports."""
    given = {"num_train_epochs": 3, "per_device_train_batch_size": 8, **options}
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        learning_rate=0.02,
        optim="adamw_torch_fused",
        save_strategy="steps",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **given,
    )
    return tf.Trainer(
        model=model, args=arguments, train_dataset=examples(), callbacks=[StraightThroughCallback(straight)]
    )


def main(folder: Path) -> None:
    """What a process of two does, and leaves behind as `straight-N.pt`."""
    model, straight = build("dsformer")
    running = trainer(model, straight, folder / "straight", save_steps=50)
    assert running.args.world_size == 2
    running.train()
    torch.save(model.state_dict(), folder / f"straight-{running.args.process_index}.pt")
