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
from transformers.pytorch_utils import Conv1D

import factorformer
from factorformer.errors import ModelError
from factorformer.hf import fused
from factorformer.hf.fused import ATTENTION, FusedGELU, fuse
from factorformer.kernels import cpu
from factorformer.layers.nn import FactorizedLinear

# Of layers that are not known `fuse` says so.
pytestmark = pytest.mark.filterwarnings("ignore:.* does not run in one call")

NAMES = ["bert", "roberta", "distilbert", "vit", "gpt2", "llama", "t5", "modernbert", "whisper"]
compiled = pytest.mark.skipif(not cpu.AVAILABLE, reason="the kernels are not compiled here")


@pytest.fixture(scope="module")
def classifier() -> tf.PreTrainedModel:
    """A compressed BERT."""
    model = MODELS["roberta"].build()
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    return model.eval()


@pytest.fixture(scope="module")
def blocks() -> tf.PreTrainedModel:
    """A compressed model whose layers do not run in one call, with blocks of a product and its GELU."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = tf.ErnieForSequenceClassification(tf.ErnieConfig(**sizes, vocab_size=99, max_position_embeddings=24))
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    return model.eval()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_results_are_the_same(name: str) -> None:
    model, inputs = MODELS[name].build(), MODELS[name].inputs()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.weight.mul_(4)  # states that are so large that one GELU can be told from another
    twin = fuse(copy.deepcopy(model))
    allowed = 1e-5 * float(logits(model, inputs).abs().max())
    before, after = logits(model, inputs), logits(twin, inputs)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == before.shape[:2]:  # what is made of padding is nothing in particular
        before, after = before[mask.bool()], after[mask.bool()]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=allowed)
    expected, found = model(**inputs).logits, twin(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=allowed)
    for each in (expected, found):
        each.square().sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients
    for key, parameter in twin.named_parameters():
        if key in gradients:
            size = float(gradients[key].abs().max())
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-4 * max(size, 1))


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
def test_the_kernel_attends_and_blocks_are_fused(blocks: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = copy.deepcopy(blocks), MODELS["roberta"].inputs()
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
    twin = fuse(copy.deepcopy(model))
    assert twin.config._attn_implementation != model.config._attn_implementation or name == "t5"
    for beams in (1, 2):
        expected = model.generate(**inputs, **settings, num_beams=beams)
        assert torch.equal(twin.generate(**inputs, **settings, num_beams=beams), expected)


SPARSE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 51,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
}


def test_sparse_attention_that_asks_for_its_name_stays() -> None:
    torch.manual_seed(0)
    model = tf.DeepseekV32ForCausalLM(tf.DeepseekV32Config(**SPARSE)).eval()
    inputs = {"input_ids": torch.randint(5, 50, (2, 12))}
    expected = logits(model, inputs)
    twin = fuse(copy.deepcopy(model))
    assert twin.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(twin, inputs), expected)


def test_a_deviation_or_an_unknown_argument_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["bert"].build()
    right = tf.AttentionInterface._global_mapping[ATTENTION]

    def wrong(module: nn.Module, query: torch.Tensor, *rest: object, **others: object) -> object:
        output, weights = right(module, query, *rest, **others)
        return -3 * output, weights

    def asked(module: nn.Module, *rest: object, **others: object) -> object:
        return right(module, *rest, **others, indices=torch.zeros(1))

    for instead in (wrong, asked):
        with monkeypatch.context() as patch:
            patch.setitem(tf.AttentionInterface._global_mapping, ATTENTION, instead)
            assert fuse(copy.deepcopy(model)).config._attn_implementation == "sdpa"
    assert fuse(model).config._attn_implementation == ATTENTION


@compiled
def test_the_kernel_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2, 3, 8)
    ran: list[int] = []
    kernel = cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *a: ran.append(1) or kernel(*a))
    layer = nn.Module()
    for others in ({}, {"sliding_window": 4}, {"block_indices": None}):
        fused.attention(layer, query, query, query, None, is_causal=False, **others)
    assert len(ran) == 3
    fused.attention(layer, query, query, query, None, is_causal=False, block_indices=torch.zeros(1))
    assert len(ran) == 3


@pytest.mark.usefixtures("no_shape_checks")
def test_other_things_than_models() -> None:
    with pytest.raises(ModelError, match=r"fuse.*Linear.*SentenceTransformer"):
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


def test_factors_multiplied_out_after_fusing_keep_the_activation(blocks: tf.PreTrainedModel) -> None:
    inputs = MODELS["roberta"].inputs()
    expected = logits(copy.deepcopy(blocks).dequantize(), inputs)
    twin = fuse(copy.deepcopy(blocks))
    assert any(isinstance(m, FactorizedLinear) and m.gelu for m in twin.modules())
    torch.testing.assert_close(logits(twin.dequantize(), inputs), expected, rtol=1e-4, atol=1e-4)
