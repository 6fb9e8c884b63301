"""A fused model computes the same in less time, trains the same, and saves the same files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers as tf
from tests.tiny import MODELS, logits
from torch import nn

import factorformer
from factorformer.errors import ModelError
from factorformer.hf import fused
from factorformer.hf.fused import ATTENTION, FusedGELU, fuse
from factorformer.kernels import cpu
from factorformer.layers.nn import FactorizedLinear

NAMES = ["bert", "roberta", "distilbert", "vit", "gpt2", "llama", "t5", "modernbert", "whisper"]
compiled = pytest.mark.skipif(not cpu.AVAILABLE, reason="the kernels are not compiled here")


@pytest.fixture(scope="module")
def classifier() -> tf.PreTrainedModel:
    """A compressed BERT."""
    model = MODELS["roberta"].build()
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    return model.eval()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_results_are_the_same(name: str) -> None:
    model, inputs = MODELS[name].build(), MODELS[name].inputs()
    twin = fuse(copy.deepcopy(model))
    torch.testing.assert_close(logits(twin, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)
    expected, found = model(**inputs).logits, twin(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for each in (expected, found):
        each.square().sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients
    for key, parameter in twin.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-4)


def test_files_are_the_same(name: str, tmp_path: Path) -> None:
    model = MODELS[name].build()
    model.save_pretrained(tmp_path / "before")
    fuse(fuse(model)).save_pretrained(tmp_path / "after")
    before, after = ({f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("before", "after"))
    assert before == after
    assert not any(ATTENTION.encode() in data for file, data in after.items() if file.endswith(".json"))


def test_bf16(name: str) -> None:
    model = MODELS[name].build().bfloat16()
    inputs = {k: t.bfloat16() if t.is_floating_point() else t for k, t in MODELS[name].inputs().items()}
    expected = logits(model, inputs)
    torch.testing.assert_close(logits(fuse(model), inputs), expected, rtol=0, atol=0)


@compiled
def test_the_kernel_attends_and_blocks_are_fused(
    classifier: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = copy.deepcopy(classifier), MODELS["roberta"].inputs()
    expected = logits(model, inputs)
    state = torch.random.get_rng_state()
    fuse(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    ran = []
    kernel = cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *a: ran.append(1) or kernel(*a))
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert len(ran) == model.config.num_hidden_layers
    gelus = [m for m in model.modules() if isinstance(m, FactorizedLinear) and m.gelu]
    assert len(gelus) == model.config.num_hidden_layers


def test_copies_and_pickles(classifier: tf.PreTrainedModel) -> None:
    model, inputs = fuse(copy.deepcopy(classifier)), MODELS["roberta"].inputs()
    expected = logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fuse(model)):
        assert torch.equal(logits(twin, inputs), expected)


def test_saved_and_loaded_again(classifier: tf.PreTrainedModel, tmp_path: Path) -> None:
    inputs = MODELS["roberta"].inputs()
    expected = logits(classifier, inputs)
    fuse(copy.deepcopy(classifier)).save_pretrained(tmp_path)
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-4, atol=1e-5)
    assert loaded.config._attn_implementation != ATTENTION
    assert not any(isinstance(m, FusedGELU) for m in loaded.modules())


def test_training_goes_on(classifier: tf.PreTrainedModel) -> None:
    inputs = {**MODELS["roberta"].inputs(), "labels": torch.tensor([0, 1])}
    losses = []
    for model in (copy.deepcopy(classifier), fuse(copy.deepcopy(classifier))):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = []
        for _ in range(4):
            loss = model(**inputs).loss
            steps.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(steps)
    assert losses[1][-1] < losses[1][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "whisper"])
def test_generated_tokens_are_the_same(name: str) -> None:
    model, inputs = MODELS[name].build(), MODELS[name].inputs()
    inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    if "attention_mask" in inputs:  # decoders are padded on the left
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(fuse(model).generate(**inputs, **settings), expected)
    assert torch.equal(
        model.generate(**inputs, **settings, num_beams=2), model.generate(**inputs, **settings, num_beams=2)
    )


@pytest.mark.usefixtures("no_shape_checks")
def test_other_things_than_models() -> None:
    with pytest.raises(ModelError, match=r"fuse takes a model of transformers, not a Linear: of a SentenceTransformer"):
        fuse(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_blocks_that_do_more_are_left_alone() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = FactorizedLinear(factorformer.LowRank(rank=2), (8, 8))
            self.act = FusedGELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.act(x)) + x

    class Picky(Residual):
        def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.act(self.linear(x.pop("x")))

    for block in (Residual(), Picky()):
        fused._fuse_pair(block)
        assert not block.linear.gelu
        assert isinstance(block.act, FusedGELU)


def test_factors_multiplied_out_after_fusing_keep_the_activation(classifier: tf.PreTrainedModel) -> None:
    inputs = MODELS["roberta"].inputs()
    expected = logits(copy.deepcopy(classifier).dequantize(), inputs)
    twin = fuse(copy.deepcopy(classifier))
    assert any(isinstance(m, FactorizedLinear) and m.gelu for m in twin.modules())
    torch.testing.assert_close(logits(twin.dequantize(), inputs), expected, rtol=1e-4, atol=1e-4)
