"""One small model of each kind that was once converted by half, or computed something else."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from tests.tiny import MODELS, logits
from torch import Tensor, nn
from transformers import PreTrainedModel

import factorformer
from factorformer import registration
from factorformer.errors import BudgetError, CheckpointError, ModelError
from factorformer.layers.bypass import bypassed
from factorformer.layers.dense import dense_shape
from factorformer.layers.nn import FactorizedEmbedding, FactorizedMatrix
from factorformer.layers.surgery import find_matrices, replace_module, unchanged_on_error

WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 51}
CLIP = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
IDS = torch.randint(5, 50, (2, 8), generator=torch.Generator().manual_seed(0))


def mamba() -> PreTrainedModel:
    return tf.MambaForCausalLM(tf.MambaConfig(**{**WIDE, "hidden_size": 256}, state_size=8)).eval()


def mamba2() -> PreTrainedModel:
    sizes = {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2, "chunk_size": 8}
    return tf.Mamba2ForCausalLM(tf.Mamba2Config(**WIDE, **sizes)).eval()


def clip() -> PreTrainedModel:
    text = {**CLIP, "vocab_size": 51, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3}
    config = tf.CLIPConfig(text_config=text, vision_config={**CLIP, "image_size": 32, "patch_size": 8})
    return tf.CLIPModel(config).eval()


def falcon() -> PreTrainedModel:
    return tf.FalconForCausalLM(
        tf.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=51)
    ).eval()


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    layers = {name: module for name, module in model.named_modules() if dense_shape(module) is not None}
    return bypassed(model, layers, **options)


def again(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def test_trials_leave_logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.root.manager.disable)
    logging.disable(logging.CRITICAL)
    reasons(MODELS["bert"].build())
    assert logging.root.manager.disable == logging.CRITICAL


def test_a_weight_that_mamba_multiplies_by_itself_stays_dense(tmp_path: Path) -> None:
    model = mamba()
    plan = factorformer.plan(model, "svd", ratio=2)
    kept = {entry.matrix.name: entry.reason for entry in plan.entries if "dt_proj" in entry.matrix.name}
    assert len(kept) == 2
    assert all("reads its weight" in reason for reason in kept.values())
    assert any("out_proj" in entry.matrix.name for entry in plan.factorized)  # read in training alone
    factorformer.compress(model, plan)
    assert torch.equal(logits(model, {"input_ids": IDS}), logits(again(model, tmp_path), {"input_ids": IDS}))


def test_a_head_whose_type_mamba2_casts_to_is_not_stored_in_int8() -> None:
    model = mamba2()
    assert reasons(model) == {}
    assert set(reasons(model, int8=True)) == {"lm_head"}
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=4, scope="all", int8=True))
    inputs = {"input_ids": IDS}
    expected = logits(copy.deepcopy(model).dequantize(), inputs)
    assert (logits(model, inputs) - expected).norm() < 0.2 * expected.norm()


def test_a_head_that_loading_would_tie_to_int8_embeddings_is_refused(tmp_path: Path) -> None:
    model = mamba2().backbone
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=4, scope="all", int8=True))
    model.save_pretrained(tmp_path)
    tf.Mamba2Model.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"Mamba2ForCausalLM.*'lm_head'.*int8"):
        tf.Mamba2ForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)


def test_in_int8_no_ordinary_model_loses_a_layer() -> None:
    for name, tiny in MODELS.items():
        found = set(reasons(tiny.build(), int8=True))  # T5 reads `wo.weight.dtype`, but knows of int8
        assert found == ({"model.encoder.embed_positions"} if name == "whisper" else set()), name


def test_a_table_that_initialization_makes_stays_dense(tmp_path: Path) -> None:
    whisper = MODELS["whisper"].build()
    sinusoids = tf.DistilBertModel(
        tf.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=51, sinusoidal_pos_embds=True)
    )
    for model, name in ((whisper, "model.encoder.embed_positions"), (sinusoids, "embeddings.position_embeddings")):
        model.get_submodule(name).requires_grad_(True)  # as it is once the model was loaded
        factorformer.compress(model, factorformer.plan(model, "svd", ratio=1.7, scope="all"))
        assert type(model.get_submodule(name)) is nn.Embedding
        loaded = again(model, tmp_path / name)
        assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    learned = tf.DistilBertModel(tf.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=51))
    assert reasons(learned) == {}


def test_a_branch_that_no_trial_takes_is_read() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(32, 32) for _ in range(3))
            self.many = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
            self.called = nn.Linear(32, 32)

        def forward(this, x: Tensor) -> Tensor:  # any name will do
            if len(x) > 100:
                layer = this.one
                x = F.linear(x, layer.weight)
                for layer in (this.two, this.three):
                    x = F.linear(x, layer.weight)
                for _, layer in enumerate(this.many):
                    x = F.linear(x, layer.weight)
                layer = this.called
            return this.called(x)

    assert set(reasons(nn.Sequential(Named()))) == {f"0.{name}" for name in ("one", "two", "three", "many.0", "many.1")}


def test_hooks_are_not_lost() -> None:
    model = MODELS["bert"].build()
    layers = [layer.intermediate.dense for layer in model.bert.encoder.layer]
    layers[0].register_forward_hook(lambda _, inputs, output: 2 * output)
    layers[1].forward = lambda x: torch.zeros(*x.shape[:-1], layers[1].out_features)  # as accelerate does
    model.bert.encoder.layer[0].output.dense.register_full_backward_hook(lambda *_: None)
    plan = factorformer.plan(model, "svd", ratio=1.3)
    kept = [entry for entry in plan.entries if entry.spec is None]
    assert len(kept) == 2
    assert all("intermediate.dense" in entry.matrix.name and "hooks" in entry.reason for entry in kept)
    factorformer.compress(model, plan)
    assert [layer.intermediate.dense for layer in model.bert.encoder.layer] == layers


def test_a_sentence_encoder_keeps_the_modules_that_it_saves_itself(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as st

    bert = tf.BertModel(MODELS["bert"].build().config)
    bert.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    tf.BertTokenizer.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "bert")
    width = bert.config.hidden_size
    parts = [st.Transformer(str(tmp_path / "bert")), st.Pooling(width), st.Dense(width, 48)]
    encoder = SentenceTransformer(modules=parts, device="cpu")
    factorformer.compress(encoder, factorformer.plan(encoder, "svd", ratio=1.5, scope="all"))
    assert any(isinstance(module, FactorizedMatrix) for module in encoder.modules())
    encoder.save_pretrained(str(tmp_path / "out"))
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert torch.equal(torch.tensor(loaded.encode(["a b"])), torch.tensor(encoder.encode(["a b"])))


def test_a_model_without_input_embeddings(tmp_path: Path) -> None:
    model = clip()
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    inputs = {"input_ids": IDS, "pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        expected, found = model(**inputs), again(model, tmp_path)(**inputs)
    assert torch.equal(found.logits_per_text, expected.logits_per_text)


def test_linear_layers_of_another_class(tmp_path: Path) -> None:
    model = falcon()
    assert type(model.transformer.h[0].mlp.dense_h_to_4h) is not nn.Linear
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    assert torch.equal(logits(model, {"input_ids": IDS}), logits(again(model, tmp_path), {"input_ids": IDS}))
    assert torch.isfinite(logits(copy.deepcopy(model).dequantize(), {"input_ids": IDS})).all()


class Called(nn.Module):
    """Two layers, of which the first is used in ways of their own by the classes below."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.up, self.down = False, nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.use(x))

    def use(self, x: Tensor) -> Tensor:
        return self.down(x)


class PassedOn(Called):
    def use(self, x: Tensor) -> Tensor:
        layer = self.down
        return F.linear(x, layer.weight)


class InPlace(Called):
    def use(self, x: Tensor) -> Tensor:
        next(iter(self.down.parameters())).data.div_(2)
        return self.down(x)


class OnAnotherDevice(Called):
    def use(self, x: Tensor) -> Tensor:
        return F.linear(x, self.down.weight) if x.device.type == "xpu" else self.down(x)


class BySetting(Called):
    def use(self, x: Tensor) -> Tensor:
        if self.slow and x.dim() > 1:
            return x @ self.down.weight
        return self.down(x)


class InTraining(Called):
    def use(self, x: Tensor) -> Tensor:
        if self.training:
            return x @ self.down.weight
        return self.down(x)


class AskedForItsPlace(Called):
    def use(self, x: Tensor) -> Tensor:
        return self.down(x.to(self.down.weight.device)[..., : self.down.weight.shape[0]])


def test_ways_to_use_a_weight() -> None:
    batch = {"input": torch.randn(2, 3, 32)}
    for kind in (Called, BySetting, InTraining, AskedForItsPlace):
        assert reasons(nn.Sequential(kind(), kind()), batch=batch) == {}, kind
    for kind in (PassedOn, InPlace, OnAnotherDevice):
        assert set(reasons(nn.Sequential(kind(), kind()), batch=batch)) == {"0.down", "1.down"}, kind


def test_attention_and_fast_paths_of_torch_stay_dense() -> None:
    model = nn.ModuleList([nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)])
    assert {matrix.dense is not None for matrix in find_matrices(model, "all")[0]} == {True}


def test_a_trial_leaves_the_model_alone() -> None:
    model = MODELS["bert"].build().train()
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    find_matrices(model, "all", bits=8)
    assert not calls
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before


def test_a_large_model_is_tried_without_memory() -> None:
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(num_hidden_layers=2))  # layers of 7B
    assert reasons(model, int8=True) == {}


class Scaled(nn.Embedding):
    scale = 2.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).softmax(-1)


class Wide(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float())


class Clamped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-100, 100))


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout(input, 0.5, self.training))


class Second(nn.Linear):
    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(input) * scale


class Same(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


def test_subclasses_count_if_they_compute_the_same() -> None:
    assert dense_shape(Same(32, 48)) == dense_shape(Same(32, 48, bias=False)) == (48, 32)
    once = Scaled(32, 16)
    once.scale = 1.0
    assert dense_shape(once) == (32, 16)
    for other in (Scaled(32, 16), Router(32, 48), Wide(32, 48), Clamped(32, 48), Noisy(32, 48), Second(32, 48)):
        assert dense_shape(other) is None, type(other)
    assert dense_shape(nn.Embedding(32, 16, max_norm=1.0)) is None
    assert dense_shape(nn.utils.parametrizations.weight_norm(nn.Linear(32, 48))) is None


def test_a_module_under_two_names_of_one_parent_is_replaced_under_both() -> None:
    layer = nn.Linear(32, 48)
    model = nn.ModuleList([layer] * 3)
    new = FactorizedEmbedding(factorformer.LowRank(1), (4, 4))
    replace_module(model, layer, new)
    assert all(child is new for child in model)


def test_one_pattern_may_be_a_string() -> None:
    model = MODELS["bert"].build()
    listed = factorformer.plan(model, "svd", ratio=1.2, include=["*.attention.*"])
    assert factorformer.plan(model, "svd", ratio=1.2, include="*.attention.*") == listed
    with pytest.raises(ModelError, match=r"'\*\.nothing\.\*'"):
        factorformer.plan(model, "svd", ratio=1.2, exclude="*.nothing.*")


def test_where_nothing_can_be_factorized_the_reasons_are_told() -> None:
    model = nn.Sequential(nn.Linear(32, 8), Router(32, 48))
    with pytest.raises(BudgetError, match=r"side below.*'0'.*not a linear layer.*'1"):
        factorformer.plan(model, "svd", ratio=2, scope="all")


@pytest.mark.parametrize("verb", ["compress", "initialize", "quantize", "hold_floats"])
def test_whatever_raises_leaves_the_model_as_it_was(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama-tied"].build()
    plan = factorformer.plan(model, "svd", ratio=6, scope="all", int8=True)
    if verb in ("quantize", "hold_floats"):
        factorformer.compress(model, plan, hold_floats=verb == "quantize")
    inputs = MODELS["llama-tied"].inputs()
    expected, before = logits(model, inputs), {name: id(module) for name, module in model.named_modules()}
    state, config = list(model.state_dict()), copy.deepcopy(vars(model.config))
    attach = registration.attach

    def broken(model: nn.Module) -> None:
        attach(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(registration, "attach", broken)
    arguments = (model, plan) if verb in ("compress", "initialize") else (model,)
    with pytest.raises(KeyboardInterrupt):
        getattr(factorformer, verb)(*arguments)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert list(model.state_dict()) == state
    assert vars(model.config).keys() == config.keys()
    assert torch.equal(logits(model, inputs), expected)
    monkeypatch.undo()
    getattr(factorformer, verb)(*arguments)
    assert any(isinstance(module, FactorizedMatrix) for module in model.modules())


def test_a_compressed_model_that_does_not_run_is_given_back_dense() -> None:
    class Proud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            assert type(self.one).__name__ == "Linear", "another layer"
            return self.one(x)

    class Strict(tf.BertModel):
        def forward(self, input_ids: Any = None, **options: Any) -> Any:
            assert type(self.encoder.layer[0].output.dense).__name__ == "Linear", "another layer"
            return super().forward(input_ids, **options)

    bert = Strict(MODELS["bert"].build().config)
    with pytest.raises(ModelError, match=r"Strict.*another layer"):
        factorformer.compress(bert, factorformer.plan(bert, "svd", ratio=2))  # found without calibration data
    assert not any(isinstance(module, FactorizedMatrix) for module in bert.modules())
    model = Proud()
    batches = [{"x": torch.randn(8, 64)}]
    plan = factorformer.plan(model, "whitened", ratio=1.97, scope="all", calibration=batches)
    with pytest.raises(ModelError, match=r"Proud.*another layer"):
        factorformer.compress(model, plan, calibration=batches)
    assert type(model.one) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_in_8_bits_are_refused(dtype: torch.dtype) -> None:
    model = MODELS["bert"].build()
    layer = model.bert.encoder.layer[1].output.dense
    layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
    with pytest.raises(ModelError, match=rf"layer\.1\.output\.dense' is {dtype}"):
        factorformer.plan(model, "svd", ratio=2)


def test_a_matrix_without_values_is_named() -> None:
    model = MODELS["bert"].build()
    model.bert.encoder.layer[1].output.dense.to("meta")
    plan = factorformer.plan(model, "svd", ratio=2)
    with pytest.raises(ModelError, match=r"layer\.1\.output\.dense.*meta"):
        factorformer.compress(model, plan)
    assert not any(isinstance(module, FactorizedMatrix) for module in model.modules())


def test_frozen_layers_stay_frozen_through_int8() -> None:
    model = MODELS["bert"].build()
    model.bert.encoder.layer[0].requires_grad_(False)
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=6, int8=True))
    assert factorformer.hold_floats(model)
    for place, layer in enumerate(model.bert.encoder.layer):
        matrices = [module for module in layer.modules() if isinstance(module, FactorizedMatrix)]
        assert {factor.requires_grad for m in matrices for factor in m.factors.values()} == {place > 0}


def test_unchanged_on_error_gives_attributes_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    first = model[0]

    def change() -> None:
        with unchanged_on_error(model):
            model[0], model.note, first.bias = nn.Identity(), "new", None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert model[0] is first
    assert first.bias is not None
    assert not hasattr(model, "note")
