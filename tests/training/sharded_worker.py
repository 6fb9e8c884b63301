"""One of several processes that hold a compressed model in parts; prints what the first one found, as JSON."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as tf
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import factorformer
from factorformer.errors import ModelError
from factorformer.training.dynamic_rank import DynamicRank
from factorformer.training.straight_through import StraightThrough

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def decoder() -> tf.LlamaForCausalLM:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=99))


def shard(model: Any) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def learn(
    model: nn.Module, batches: list[dict[str, Any]], step: Callable[[int], None] = lambda done: None
) -> list[Any]:
    """The loss of each step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for done, batch in enumerate(batches, 1):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step(done)
        losses.append(float(loss.detach()))
    return losses


def refused(model: Any, batches: list[dict[str, Any]], step: Callable[[int], None]) -> str:
    shard(model)
    try:
        learn(model, batches, step)
    except ModelError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(99, (2, 16))} for _ in range(4)]
    found: dict[str, Any] = {"losses": {}, "refused": {}}
    for method in ("svd", "dense_sparse_plain", "kronecker"):
        model = decoder()
        factorformer.compress(model, factorformer.plan(model, method, 2))
        alone = copy.deepcopy(model)
        shard(model)
        found["losses"][method] = [learn(alone, batches), learn(model, batches)]
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            model.save_pretrained(folder / method, state_dict=whole)
            alone.save_pretrained(folder / f"{method}-alone")
    model = decoder()
    factorformer.compress(model, factorformer.plan(model, "dense_sparse_plain", 2))
    straight = StraightThrough(model)
    found["refused"]["straight-through"] = refused(model, batches, lambda done: straight.after_step(done, 4))
    model = decoder()
    ranks = DynamicRank(model, factorformer.plan(model, "svd", 2))
    found["refused"]["dynamic"] = refused(model, batches, lambda done: ranks.before_step(done, 4))
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
