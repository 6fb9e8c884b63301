"""Block by block, a model becomes what it becomes as a whole; interrupted at any moment, it goes on from there."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tests.tiny import MODELS, logits, text
from torch import Tensor

import factorformer
from factorformer import recipes
from factorformer.errors import BudgetError, CheckpointError, DataError, MethodError, ModelError, OutputError
from factorformer.streaming import compress_checkpoint, stored
from factorformer.streaming.chain import Chain
from factorformer.streaming.unfinished import Run

DRIVEN = [name for name in MODELS if name not in ("albert", "t5", "whisper")]
"""Whose blocks are called one after the other, each once."""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = tf.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def batches() -> list[dict[str, Tensor]]:
    return [text(seed=seed) for seed in range(3)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def as_a_whole(path: Path, method: str, ratio: float, name: str, calibration: Any, **options: Any) -> Tensor:
    model = MODELS[name].auto.from_pretrained(path).eval()
    plan = factorformer.plan(model, method, ratio, calibration=calibration, **options)
    factorformer.compress(model, plan, calibration=calibration)
    return logits(model, MODELS[name].inputs())


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_compression_as_a_whole(name: str, tmp_path: Path) -> None:
    tiny, path = MODELS[name], tmp_path / "model"
    tiny.build().save_pretrained(path)
    for method, calibration in (("svd", None), ("whitened", [tiny.inputs()])):
        output = tmp_path / method
        if calibration is not None and name not in DRIVEN:
            with pytest.raises(ModelError, match=r"block.*methods (that need none|without data) can \(svd\)"):
                compress_checkpoint(path, output, method, tiny.ratio, calibration=calibration)
            assert sorted(part.name for part in tmp_path.iterdir()) == ["model", "svd"]
            continue
        report = compress_checkpoint(path, output, method, tiny.ratio, calibration=calibration)
        assert len(report.errors) == len(report.plan.factorized) == tiny.matrices
        small = tiny.auto.from_pretrained(output).eval()
        assert type(small) is type(tiny.make())
        expected = as_a_whole(path, method, tiny.ratio, name, calibration)
        torch.testing.assert_close(logits(small, tiny.inputs()), expected, rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.glob(".*"))


def gpt_neo() -> tf.PreTrainedModel:
    """Whose blocks have buffers that no file holds."""
    kinds = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return tf.GPTNeoForCausalLM(tf.GPTNeoConfig(**kinds, hidden_size=32, num_heads=4, vocab_size=99)).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "gpt_neo"])
def test_both_sides_of_the_curvature(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is that of the whole model, and factors are, where each is fitted to what the dense model reads."""
    tiny, path, data = MODELS["gpt2" if name == "gpt_neo" else name], tmp_path / "model", batches()
    (gpt_neo() if name == "gpt_neo" else tiny.build()).save_pretrained(path)
    monkeypatch.setattr("factorformer.layers.modes.has_bfloat16_products", lambda: False)
    monkeypatch.setitem(recipes.RECIPES, "fisher", dataclasses.replace(recipes.get("fisher"), sequential=False))
    report = compress_checkpoint(path, tmp_path / "out", "fisher", tiny.ratio, calibration=data)
    model = tiny.auto.from_pretrained(path).eval()
    plan = factorformer.plan(model, "fisher", tiny.ratio, "blocks", calibration=data)
    assert report.plan.predicted == pytest.approx(plan.predicted, rel=1e-5)
    assert report.plan.objective == plan.objective
    assert [str(entry.spec) for entry in report.plan.entries] == [str(entry.spec) for entry in plan.entries]
    factorformer.compress(model, plan, data)
    small = tiny.auto.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(small, tiny.inputs()), logits(model, tiny.inputs()), rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("options", [{"int8": True}, {"int4": True}, {"rank_multiple": 8}, {"exclude": "*.mlp.*"}])
def test_options(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    ratio = 6 if {"int8", "int4"} & options.keys() else 1.3
    report = compress_checkpoint(llama, tmp_path / "out", "whitened", ratio, calibration=batches(), **options)
    expected = as_a_whole(llama, "whitened", ratio, "llama", batches(), **options)
    small = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(small, MODELS["llama"].inputs()), expected, rtol=1e-5, atol=1e-5)
    assert report.ratio == pytest.approx(ratio, rel=0.02) or "int4" in options


def test_blocks_read_what_compressed_ones_make(llama: Path, tmp_path: Path) -> None:
    apart = compress_checkpoint(llama, tmp_path / "apart", ratio=4, calibration=lambda model: batches())
    behind = compress_checkpoint(llama, tmp_path / "behind", ratio=4, calibration=batches(), sequential=True)
    assert apart.method == behind.method == "whitened"
    first, others = {}, {}
    for name, error in apart.errors.items():
        (first if ".layers.0." in name else others)[name] = abs(error - behind.errors[name])
    assert max(first.values()) == 0
    assert min(others.values()) > 0


def interrupted(arguments: tuple[Any, ...], options: dict[str, Any], events: int) -> int:
    """A process that ends by `kill -9` after so many reports of progress; its status."""
    child = os.fork()
    if child == 0:
        seen = 0

        def progress(*_: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == events:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            compress_checkpoint(*arguments, **options, progress=progress)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.fixture
def mpnet(tmp_path: Path) -> Path:
    """Whose blocks return tuples."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    tf.MPNetModel(tf.MPNetConfig(**sizes, vocab_size=99)).save_pretrained(tmp_path / "mpnet")
    return tmp_path / "mpnet"


@pytest.mark.parametrize(
    ("kind", "method", "sequential", "events"),
    [
        ("llama", "whitened", False, 13),  # a block takes 11 of them
        ("llama", "whitened", True, 13),
        ("llama", "fisher", False, 22),  # what is done takes up to 16
        ("mpnet", "whitened", False, 13),
        ("mpnet", "fisher", True, 22),
    ],
)
def test_it_goes_on_after_being_killed(
    kind: str, method: str, sequential: bool, events: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(kind)
    options = {"calibration": batches(), "sequential": sequential}
    compress_checkpoint(path, tmp_path / "whole", method, 3, **options)
    arguments = (path, tmp_path / "parts", method, 3)
    ended, runs = -1, 0
    while ended != 0:
        ended = interrupted(arguments, options, events)
        assert ended in (0, signal.SIGKILL)
        assert (tmp_path / "parts").exists() == (ended == 0)
        runs += 1
        assert runs < 9
    assert runs > 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert sorted(part.name for part in tmp_path.iterdir()) == [kind, "parts", "whole"]


def test_another_run_is_not_gone_on_with(llama: Path, tmp_path: Path) -> None:
    arguments = (llama, tmp_path / "out", "whitened")
    assert interrupted((*arguments, 3), {"calibration": batches()}, 15) == signal.SIGKILL
    left = contents(tmp_path / ".out.streaming")
    assert Run(tmp_path / "out", {}, overwrite=False).method == "whitened"  # which the command line goes on with
    assert "block-00000.safetensors" in left
    with pytest.raises(OutputError, match=r"interrupted run.*other arguments.*\.out\.streaming"):
        compress_checkpoint(*arguments, 2, calibration=batches())
    assert contents(tmp_path / ".out.streaming") == left
    report = compress_checkpoint(*arguments, 2, calibration=batches(), overwrite=True)
    assert report.ratio == pytest.approx(2, rel=0.02)
    assert sorted(part.name for part in tmp_path.iterdir()) == ["llama", "out"]


def test_what_cannot_be(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with pytest.raises(MethodError, match=r"'fwsvd'.*block by block go svd, whitened, fisher, auto, kronecker"):
        compress_checkpoint(llama, output, "fwsvd", calibration=batches())
    with pytest.raises(DataError, match="'whitened' needs calibration data"):
        compress_checkpoint(llama, output, "whitened")
    with pytest.raises(DataError, match="calibration data is empty"):
        compress_checkpoint(llama, output, "whitened", calibration=[])
    output.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        compress_checkpoint(llama, output, "svd")
    output.rmdir()
    model = tf.LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        compress_checkpoint(tmp_path / "broken", output, "svd", 2)
    assert (tmp_path / ".out.streaming").is_dir()  # the first block is done
    compress_checkpoint(llama, output, "svd", 2, overwrite=True)
    with pytest.raises(ModelError, match="compressed already"):
        compress_checkpoint(output, tmp_path / "again", "svd", 2)
    skeleton = stored.skeleton(llama)[0]
    monkeypatch.setattr(stored._compat, "targets", lambda model, names: {})
    with pytest.raises(CheckpointError, match="lack 30 weights of LlamaForCausalLM"):
        stored.Stored(skeleton, stored.files_of(llama))
    monkeypatch.undo()
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight' is stored as F8_E4M3: start from .* full precision"):
        compress_checkpoint(llama, tmp_path / "again", "svd")
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        compress_checkpoint(llama, tmp_path / "again", "svd")
    assert sorted(part.name for part in tmp_path.iterdir()) == ["broken", "llama", "out"]


def test_what_has_no_loss_is_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padding = [{"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}]
    with pytest.raises(DataError, match="nothing to predict"):
        compress_checkpoint(llama, tmp_path / "out", "fisher", 2, calibration=padding)
    with pytest.raises(BudgetError, match="cannot be met"):
        compress_checkpoint(llama, tmp_path / "out", "fisher", 60, calibration=batches())
    finish = Chain.finish

    def sums(self: Chain, batch: Any, hidden: Tensor, earlier: Any = ()) -> Any:
        made = finish(self, batch, hidden, earlier)
        return {"logits": made["logits"] + sum(state.sum() for state in earlier)}

    monkeypatch.setattr(Chain, "finish", sums)
    with pytest.raises(ModelError, match="something else of what blocks before the last one return"):
        compress_checkpoint(llama, tmp_path / "out", "fisher", 2, calibration=batches())
    assert [part.name for part in tmp_path.iterdir()] == ["llama"]


def test_files_are_those_that_transformers_reads(llama: Path, tmp_path: Path) -> None:
    """Of an index, and of nothing beside them; and what says how to generate is kept."""
    model = MODELS["mixtral"].build()
    model.generation_config.update(eos_token_id=[2, 7], do_sample=True, top_p=0.5)
    model.save_pretrained(tmp_path / "mixtral", max_shard_size="20KB")
    assert len(list((tmp_path / "mixtral").glob("model-*.safetensors"))) > 3  # experts of a layer lie in several
    shutil.copy(llama / "model.safetensors", tmp_path / "mixtral" / "model_old.safetensors")
    compress_checkpoint(tmp_path / "mixtral", tmp_path / "out", "svd", MODELS["mixtral"].ratio)
    small = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = as_a_whole(tmp_path / "mixtral", "svd", MODELS["mixtral"].ratio, "mixtral", None)
    torch.testing.assert_close(logits(small, MODELS["mixtral"].inputs()), expected, rtol=1e-5, atol=1e-5)
    assert small.generation_config.eos_token_id == [2, 7]
    assert small.generation_config.top_p == 0.5


def test_what_blocks_share_is_refused(llama: Path, tmp_path: Path) -> None:
    """Whatever one hands to another beside hidden states: it would be lost."""

    def with_more(model: Any) -> list[dict[str, Tensor]]:
        common: dict[str, Tensor] = {}
        for layer in model.model.layers:
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "common": common}), with_kwargs=True
            )
        return batches()

    with pytest.raises(ModelError, match=r"layers\.1' of LlamaForCausalLM does not read what .* or reads more"):
        compress_checkpoint(llama, tmp_path / "out", "whitened", 3, calibration=with_more)
    assert [part.name for part in tmp_path.iterdir()] == ["llama"]


def test_the_model_has_no_weights_but_those_of_a_block(llama: Path, tmp_path: Path) -> None:
    """Whenever something is reported, of all blocks at most one has values."""
    held: list[set[str]] = []

    def watched(make: Callable[[Any], Any]) -> Any:
        def calibration(model: Any) -> Any:
            models.append(model)
            return make(model)

        return calibration

    def progress(*_: Any) -> None:
        blocks = {
            name.split(".")[2] for name, p in models[0].named_parameters() if ".layers." in name and not p.is_meta
        }
        held.append(blocks)

    models: list[Any] = []
    compress_checkpoint(
        llama, tmp_path / "out", "whitened", 3, calibration=watched(lambda _: batches()), progress=progress
    )
    assert set.union(*held) == {"0", "1", "2"}
    assert max(map(len, held)) == 1


MEASURED = """
import sys, torch, transformers, factorformer
from factorformer.streaming.compress import compress_checkpoint

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

small, large, output, method = sys.argv[1:]
batches = [{"input_ids": torch.arange(5, 37)[None]}] if method != "svd" else None
options = {"include": "*.k_proj", "calibration": batches}
compress_checkpoint(small, output + "-small", method, 1.01, **options)
before = peak()
compress_checkpoint(large, output, method, 1.01, **options)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the largest resident set")
@pytest.mark.parametrize("method", ["svd", "whitened", "fisher"])
def test_memory_is_that_of_a_block(method: str, tmp_path: Path) -> None:
    """Of a model of ten blocks, memory holds two at most, and moments in double precision, beside a tiny model."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 99}
    for name, width, layers in (("small", 64, 1), ("large", 1024, 10)):
        config = tf.LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, **sizes)
        tf.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    arguments = [str(tmp_path / name) for name in ("small", "large", "out")]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURED, *arguments, method], stdout=-1, text=True)
    block = (tmp_path / "large" / "model.safetensors").stat().st_size / 10
    most = 4 if method == "fisher" else 3  # blocks, of which two are moments of both sides
    assert 0.5 * block < int(done.stdout) < most * block, (int(done.stdout) / block, block)
