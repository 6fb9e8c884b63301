"""Costs are read off models as they were planned, and results have one JSON form."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import factorformer
from factorformer.errors import ModelError
from factorformer.layers.matrix import Cost, Scope
from factorformer.report import Result, inventory, latency
from factorformer.report.tables import show

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def bert() -> PreTrainedModel:
    return BertModel(BertConfig(**SIZES))


def albert() -> PreTrainedModel:
    return AlbertModel(AlbertConfig(**SIZES, embedding_size=16))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16))


@pytest.mark.parametrize("make", [bert, albert, gpt2])
@pytest.mark.parametrize("scope", ["blocks", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_inventory_is_the_plan_that_made_the_model(make: type, scope: Scope, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    plan = factorformer.plan(model, "svd", ratio=1.7, scope=scope)
    before = inventory(model, scope)
    assert (before.original, before.compressed) == (plan.original, plan.original)
    factorformer.compress(model, plan)
    found = inventory(model, scope)
    assert (found.original, found.compressed, found.rest) == (plan.original, plan.compressed, plan.rest)
    assert [(e.matrix, e.spec) for e in found.entries] == [(e.matrix, e.spec) for e in plan.entries]


def test_all_parameters_are_counted_once() -> None:
    model = gpt2()
    assert inventory(model, "all").original.parameters == sum(p.numel() for p in model.parameters())
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2, scope="all"))
    found = inventory(model, "all").compressed
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.bytes == 4 * found.parameters


def test_the_json_form() -> None:
    result = Result(Cost(8, 32, 16), Cost(4, 16, 8), "all", "svd", {"accuracy": 0.5}, {"fit": 1.23456}, 7, "small")
    content = result.to_dict()
    assert content["parameters"] == {"original": 8, "compressed": 4, "ratio": 2.0}
    assert content["flops_per_token"]["ratio"] == 2.0
    assert (content["scope"], content["method"], content["seed"], content["output"]) == ("all", "svd", 7, "small")
    assert content["seconds"] == {"fit": 1.235}
    assert content["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(content)) == content


def test_numbers_that_are_not_finite_are_null() -> None:
    result = Result(Cost(), Cost(), "all", metrics={"pearson": math.nan, "mse": math.inf})
    content = result.to_dict()
    assert content["metrics"] == {"pearson": None, "mse": None}
    assert content["bytes"]["ratio"] is None
    json.dumps(content, allow_nan=False)


def printed(result: Result) -> str:
    console = Console(file=io.StringIO(), width=140)
    show(result, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tables() -> None:
    metrics = {"original_accuracy": 0.75, "accuracy": 0.5, "latency_ms_1": 2.0, "original_latency_ms_1": 5.0}
    text = printed(Result(Cost(8, 32, 16), Cost(4, 16, 8), "blocks", "svd", metrics, output="out[1]"))
    assert "the Transformer blocks" in text
    assert "2.00x" in text
    assert [line.split() for line in text.splitlines() if "accuracy" in line] == [["accuracy", "0.7500", "0.5000"]]
    assert "2.50x" in text
    assert "out[1]" in text
    dense = printed(Result(Cost(8, 32, 16), Cost(8, 32, 16), "all", metrics={"accuracy": 0.5}))
    assert "compressed" not in dense
    assert "0.5000" in dense
    plan = factorformer.plan(bert(), "svd", ratio=2)
    table = printed(Result.of(plan, layers=plan.entries))
    assert "encoder.layer.1.output.dense" in table
    assert "low_rank(rank=" in table


def test_a_model_without_blocks_is_counted_as_a_whole() -> None:
    model = bert()
    model.encoder = nn.Identity()
    found = inventory(model)
    assert found.scope == "all"
    assert found.original.parameters == sum(p.numel() for p in model.parameters())
    with pytest.raises(ModelError, match="no Transformer blocks"):
        inventory(model, "blocks")


def test_int8_is_shown() -> None:
    model = bert()
    plan = factorformer.plan(model, "svd", ratio=4, int8=True, exclude=["*.query"])
    factorformer.compress(model, plan)
    found = inventory(model, "blocks")
    for costs in (plan, found):
        result = Result.of(costs, layers=costs.entries)
        layers = result.to_dict()["layers"]
        assert [layer["values"] for layer in layers] == ["int8" if e.spec else "float32" for e in plan.entries]
        table = printed(result)
        assert table.count(", int8 ") == len(plan.factorized) < len(plan.entries)


def test_latency_is_measured_in_turns() -> None:
    calls: list[str] = []

    class Model(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.weight = name, nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            calls.append(self.name)
            return x * self.weight

    times = latency([Model("a"), Model("b")], {"x": torch.ones(1)}, repeats=3)
    assert calls == ["a", "b", "b", "a"] * 2
    assert all(0 < time < 1000 for time in times)
