"""What is found in a model, and what replaces it."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers as tf
from tests.tiny import BLOCKS, MODELS, logits, text
from torch import nn
from transformers.pytorch_utils import Conv1D

import factorformer
from factorformer.errors import DataError, ModelError
from factorformer.layers.dense import dense_weight
from factorformer.layers.matrix import Cost, Matrix
from factorformer.layers.nn import FactorizedEmbedding, FactorizedLinear, FactorizedMatrix
from factorformer.layers.surgery import (
    factorize,
    factorized_like,
    find_blocks,
    find_matrices,
    replace_module,
)
from factorformer.planning import Entry, Plan
from factorformer.structures import LowRank, largest_rank

BERT = [f"attention.self.{part}" for part in ("query", "key", "value")] + [
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
LLAMA = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
T5_ENCODER = [f"layer.0.SelfAttention.{part}" for part in "qkvo"] + [
    f"layer.1.DenseReluDense.{part}" for part in ("wi", "wo")
]
T5_DECODER = (
    T5_ENCODER[:4]
    + [f"layer.1.EncDecAttention.{part}" for part in "qkvo"]
    + [f"layer.2.DenseReluDense.{part}" for part in ("wi", "wo")]
)
OPT = [f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")] + ["fc1", "fc2"]
WHISPER_DECODER = OPT[:4] + [f"encoder_attn.{part}_proj" for part in ("k", "v", "q", "out")] + OPT[4:]

BLOCKS_OF: dict[str, dict[str, list[str]]] = {
    "bert": {"bert.encoder.layer.{}": BERT},
    "roberta": {"roberta.encoder.layer.{}": BERT},
    "distilbert": {
        "distilbert.transformer.layer.{}": [f"attention.{p}_lin" for p in ("q", "k", "v", "out")]
        + ["ffn.lin1", "ffn.lin2"]
    },
    "gpt2": {"transformer.h.{}": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]},
    "opt": {"model.decoder.layers.{}": OPT},
    "llama": {"model.layers.{}": LLAMA},
    "llama-tied": {"model.layers.{}": LLAMA},
    "qwen3": {"model.layers.{}": LLAMA},
    "t5": {"encoder.block.{}": T5_ENCODER, "decoder.block.{}": T5_DECODER},
    "vit": {"vit.layers.{}": [f"attention.{p}_proj" for p in "qkvo"] + ["mlp.fc1", "mlp.fc2"]},
    "whisper": {"model.encoder.layers.{}": OPT, "model.decoder.layers.{}": WHISPER_DECODER},
    "modernbert": {"model.layers.{}": ["attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"]},
    "mixtral": {"model.layers.{}": LLAMA[:4]},
    "albert": {
        "albert.encoder.albert_layer_groups.{}": [
            f"albert_layers.0.{part}"
            for part in (*(f"attention.{p}" for p in ("query", "key", "value", "dense")), "ffn", "ffn_output")
        ]
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_and_their_matrices(name: str) -> None:
    model = MODELS[name].build()
    count = 1 if name == "albert" else BLOCKS
    expected = {pattern.format(i): parts for pattern, parts in BLOCKS_OF[name].items() for i in range(count)}
    assert find_blocks(model) == list(expected)
    found = [matrix for matrix in find_matrices(model)[0] if matrix.dense is None]
    assert len(found) == MODELS[name].matrices
    assert {m.name for m in found} == {f"{block}.{part}" for block, parts in expected.items() for part in parts}
    for matrix in found:
        module = model.get_submodule(matrix.name)
        assert matrix.shape == tuple(dense_weight(module).shape)
        assert matrix.products == (BLOCKS if name == "albert" else 1)
        assert (matrix.lookups, matrix.aliases, matrix.dtype) == (0, (), "float32")


def test_shapes_are_out_by_in() -> None:
    shapes = {m.name.rpartition(".")[2]: m.shape for m in find_matrices(MODELS["llama"].build())[0]}
    assert shapes["q_proj"] == (32, 32)
    assert shapes["k_proj"] == shapes["v_proj"] == (16, 32)  # grouped queries
    assert shapes["gate_proj"] == (64, 32)
    assert shapes["down_proj"] == (32, 64)
    shapes = {m.name.removeprefix("transformer.h.0."): m.shape for m in find_matrices(MODELS["gpt2"].build())[0]}
    assert shapes["attn.c_attn"] == (96, 32)  # stored by Conv1D as 32 x 96
    assert shapes["mlp.c_proj"] == (32, 128)


OUTSIDE = {
    "bert": {
        "bert.embeddings.word_embeddings": ("cls.predictions.decoder",),
        "bert.embeddings.position_embeddings": (),
        "cls.predictions.transform.dense": (),
    },
    "llama": {"model.embed_tokens": (), "lm_head": ()},
    "llama-tied": {"model.embed_tokens": ("lm_head",)},
    "t5": {"shared": ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")},
    "whisper": {"model.decoder.embed_tokens": ("proj_out",)},
    "opt": {"model.decoder.embed_tokens": ("lm_head",)},
    "vit": {},
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_matrices_outside_the_blocks(name: str) -> None:
    model = MODELS[name].build()
    inside = {matrix.name for matrix in find_matrices(model)[0]}
    found = [matrix for matrix in find_matrices(model, "all")[0] if matrix.dense is None]
    assert {m.name: m.aliases for m in found if m.name not in inside} == OUTSIDE[name]


@pytest.mark.parametrize("name", MODELS)
def test_roles(name: str) -> None:
    """Of matrices in blocks, by the table above; embeddings and heads, tied or not, are embeddings."""
    model = MODELS[name].build()
    found = {matrix.name: matrix for matrix in find_matrices(model, "all")[0] if matrix.dense is None}
    for block, parts in BLOCKS_OF[name].items():
        for part in parts:
            attention = part in BERT[:4] or any(part.startswith(prefix) for prefix in ATTENTION)
            role = "attention" if attention else "feed_forward"
            assert {found[f"{block.format(i)}.{part}"].role for i in range(1 if name == "albert" else BLOCKS)} == {role}
    heads = {"lm_head", "proj_out"}
    for matrix in found.values():
        if isinstance(model.get_submodule(matrix.name), nn.Embedding) or matrix.name in heads:
            assert matrix.role == "embedding"
    outside = {n: found[n].role for n in OUTSIDE.get(name, {})}
    assert outside.pop("cls.predictions.transform.dense", "feed_forward") == "feed_forward"
    assert set(outside.values()) <= {"embedding"}


ATTENTION = (
    "attention.",
    "attn.",
    "self_attn.",
    "encoder_attn.",
    "layer.0.Self",
    "layer.1.EncDec",
    "albert_layers.0.a",
)


def test_the_head_of_an_untied_model_is_an_embedding() -> None:
    found = {matrix.name: matrix for matrix in find_matrices(MODELS["llama"].build(), "all")[0]}
    for name in ("model.embed_tokens", "lm_head"):
        assert (found[name].role, found[name].aliases) == ("embedding", ())


STAYS_DENSE = {
    "mixtral": {
        "model.layers.0.mlp.experts.gate_up_proj": "expert weights fused in a 3-D parameter, left dense",
        "model.layers.0.mlp.experts.down_proj": "expert weights fused in a 3-D parameter, left dense",
        "model.layers.0.mlp.gate.weight": "not a linear layer or embedding, left dense",
    },
    # Subclasses of nn.Embedding add an offset or ignore their input.
    "opt": {"model.decoder.embed_positions.weight": "not a linear layer or embedding, left dense"},
    "whisper": {
        "model.decoder.embed_positions.weight": "not a linear layer or embedding, left dense",
        "model.encoder.embed_positions": "a fixed table, left dense",
        "model.encoder.conv1.weight": "a convolution, left dense",
    },
    "vit": {
        "vit.embeddings.cls_token": "not a linear layer or embedding, left dense",
        "vit.embeddings.patch_embeddings.projection.weight": "a convolution, left dense",
        "classifier": "a side below 16, too small to gain",
    },
    "t5": {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "a side below 16, too small to gain"},
    "bert": {"bert.embeddings.token_type_embeddings": "a side below 16, too small to gain"},
}


@pytest.mark.parametrize("name", STAYS_DENSE)
def test_what_stays_dense_and_why(name: str) -> None:
    found = {matrix.name: matrix for matrix in find_matrices(MODELS[name].build(), "all")[0]}
    for matrix, reason in STAYS_DENSE[name].items():
        assert found[matrix].dense == reason
        multiplied = "expert" in reason or "convolution" in reason or "gate" in matrix or matrix == "classifier"
        assert (found[matrix].cost(None).flops > 0) == multiplied


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_a_matrix_or_the_rest(name: str) -> None:
    model = MODELS[name].build()
    matrices, rest = find_matrices(model, "all")
    values = sum(m.shape[0] * m.shape[1] for m in matrices)
    assert values + rest.parameters == model.num_parameters()
    assert rest == Cost(rest.parameters, 4 * rest.parameters, 0)


@pytest.mark.parametrize(("name", "scope"), [*((name, "all") for name in MODELS), ("bert", "blocks")])
def test_at_nearly_full_rank_outputs_are_nearly_the_same(name: str, scope: str) -> None:
    """Which they are only if every layer is read and replaced in its own orientation."""
    model, inputs = MODELS[name].build(), MODELS[name].inputs()
    for parameter in model.parameters():  # matrices of a low rank that nothing is lost of
        if parameter.dim() == 2 and min(parameter.shape) >= 16:
            left, values, right = torch.linalg.svd(parameter.detach(), full_matrices=False)
            values[4:] = 0
            parameter.data.copy_(left * values @ right)
    expected = logits(model, inputs)
    matrices, rest = find_matrices(model, scope)  # type: ignore[arg-type]
    specs = [None if m.dense else LowRank(min(largest_rank(m.shape), 8)) for m in matrices]
    entries = tuple(Entry(m, spec, "") for m, spec in zip(matrices, specs, strict=True))
    report = factorformer.compress(model, Plan("svd", scope, 2, entries, rest))  # type: ignore[arg-type]
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert max(report.errors.values()) < 1e-3
    assert set(report.errors) == {m.name for m in matrices if m.dense is None}


def test_conv1d_becomes_a_linear_layer_with_its_bias() -> None:
    model = MODELS["gpt2"].build()
    old = model.transformer.h[0].attn.c_attn
    assert isinstance(old, Conv1D)
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=1.2))
    new = model.transformer.h[0].attn.c_attn
    assert isinstance(new, FactorizedLinear)
    assert new.shape == (96, 32)
    assert new.bias is old.bias
    assert (new.to_dense() - old.weight.T).norm() < 0.53 * old.weight.norm()  # worst of three seeds 0.41, times 1.3


def test_a_shared_layer_is_replaced_once_and_stays_shared() -> None:
    model = MODELS["albert"].build()
    report = factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    assert len(report.errors) == 6
    modules = [module for module in model.modules() if isinstance(module, FactorizedMatrix)]
    assert len(modules) == 6
    calls = []
    modules[0].register_forward_hook(lambda *_: calls.append(1))
    logits(model, text())
    assert len(calls) == BLOCKS


def test_a_module_with_several_parents_is_replaced_everywhere() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.other = nn.Sequential(self.one)

    model, new = Twice(), nn.Identity()
    replace_module(model, model.one, new)
    assert model.one is new
    assert model.other[0] is new


def test_a_shared_linear_is_one_matrix() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    model["b"].weight = model["a"].weight
    (matrix,), _ = find_matrices(model, "all")
    assert (matrix.name, matrix.aliases, matrix.products) == ("a", ("b",), 2)
    layer = FactorizedLinear(LowRank(3), (32, 32))
    factorize(model, matrix, LowRank(3), {name: t.detach() for name, t in layer.factors.items()})
    assert all(model["a"].factors[name] is model["b"].factors[name] for name in ("weight", "right"))
    assert model["a"].bias is not model["b"].bias


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_weights_become_frozen_factors(frozen: bool) -> None:
    model = MODELS["bert"].build()
    model.bert.encoder.layer[0].requires_grad_(not frozen)
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    flags = {p.requires_grad for p in model.bert.encoder.layer[0].parameters()}
    assert flags == {not frozen}
    assert {p.requires_grad for p in model.bert.encoder.layer[1].parameters()} == {True}


@pytest.mark.parametrize("training", [True, False])
def test_new_layers_have_the_mode_type_and_device_of_the_old(training: bool) -> None:
    model = MODELS["bert"].build().to(torch.bfloat16).train(training)
    factorformer.compress(model, factorformer.plan(model, "svd", ratio=2, scope="all"))
    assert {module.training for module in model.modules()} == {training}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_embedding_keeps_its_attributes() -> None:
    old = nn.Embedding(40, 32, padding_idx=3)
    new = factorized_like(old, LowRank(4), (40, 32))
    assert isinstance(new, FactorizedEmbedding)
    assert (new.padding_idx, new.num_embeddings, new.embedding_dim) == (3, 40, 32)


# Errors


def test_a_model_without_blocks() -> None:
    with pytest.raises(ModelError, match=r"blocks.*Linear.*scope='all'"):
        find_matrices(nn.Linear(32, 32))
    assert len(find_matrices(nn.Sequential(nn.Linear(32, 32)), "all")[0]) == 1


def test_a_model_that_is_compressed_already() -> None:
    model = MODELS["bert"].build()
    plan = factorformer.plan(model, "svd", ratio=2)
    factorformer.compress(model, plan)
    with pytest.raises(ModelError, match=r"compressed already .*query"):
        factorformer.plan(model, "svd", ratio=2)
    with pytest.raises(ModelError, match="compressed already"):
        factorformer.compress(model, plan)


def broken(model: tf.PreTrainedModel, name: str, value: float) -> tf.PreTrainedModel:
    model.get_submodule(name).weight.data[0, 0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(value: float) -> None:
    name = "bert.encoder.layer.1.attention.self.key"
    model = broken(MODELS["bert"].build(), name, value)
    types = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match=f"'{name}'.*NaN"):
        factorformer.compress(model, factorformer.plan(model, "svd", ratio=2))
    assert [type(module) for module in model.modules()] == types
    assert not hasattr(model.config, "quantization_config")


def test_a_plan_for_another_model() -> None:
    plan = factorformer.plan(MODELS["bert"].build(), "svd", ratio=2)
    with pytest.raises(ModelError, match=r"does not fit.*'bert\."):
        factorformer.compress(MODELS["roberta"].build(), plan)
    wider = tf.BertForMaskedLM(tf.BertConfig(**{**MODELS["bert"].build().config.to_dict(), "hidden_size": 64}))
    with pytest.raises(ModelError, match=r"\(32, 32\).*the model.*\(64, 64\)"):
        factorformer.compress(wider, plan)
    tied = factorformer.plan(MODELS["llama-tied"].build(), "svd", ratio=2, scope="all")
    with pytest.raises(ModelError, match=r"tied to \['lm_head'\]"):
        factorformer.compress(MODELS["llama"].build(), tied)


def test_a_plan_that_keeps_everything() -> None:
    model = MODELS["bert"].build()
    with pytest.raises(ModelError, match="nothing to compress"):
        factorformer.compress(model, factorformer.plan(model, "svd", ratio=1))


def test_an_entry_that_must_stay_dense() -> None:
    model = MODELS["mixtral"].build()
    experts = Matrix("model.layers.0.mlp.experts.down_proj", (128, 64))
    plan = Plan("svd", "blocks", 2, (Entry(experts, LowRank(4), ""),), Cost())
    with pytest.raises(ModelError, match=r"experts\.down_proj'.*expert weights"):
        factorformer.compress(model, plan)


# Methods that need data


@pytest.mark.parametrize("method", ["whitened", "fwsvd"])
def test_methods_that_need_data_say_so(method: str) -> None:
    model = MODELS["roberta"].build()
    with pytest.raises(DataError, match=f"'{method}' .*calibration.*'svd'"):
        factorformer.compress(model, factorformer.plan(model, method, ratio=2))
    assert not [module for module in model.modules() if isinstance(module, FactorizedMatrix)]


@pytest.mark.parametrize("scope", ["blocks", "all"])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *itertools.product(["roberta", "bert", "t5", "gpt2", "albert", "mixtral", "whisper"], ["whitened", "fwsvd"]),
        ("bert", None),
    ],
)
def test_data_aware_methods_run_everywhere(name: str, method: str | None, scope: str) -> None:
    tiny = MODELS[name]
    model, inputs = tiny.build(), tiny.inputs()
    if method == "fwsvd":
        labels = inputs.get("decoder_input_ids", text()["input_ids"]).contiguous()
        inputs["labels"] = torch.tensor([0, 1]) if name == "roberta" else labels
    plan = factorformer.plan(model, method, ratio=tiny.ratio, scope=scope)  # type: ignore[arg-type]
    report = factorformer.compress(model, plan, calibration=[inputs])
    assert report.method == (method or "fisher")
    assert report.ratio == plan.ratio
    assert set(report.errors) == {entry.matrix.name for entry in plan.factorized}
    assert all(0 <= error <= 1 for error in report.errors.values())
    assert set(report.seconds) == {"calibrate", "fit"}
    assert torch.isfinite(logits(model, tiny.inputs())).all()


def test_without_calibration_the_default_is_plain() -> None:
    one, other = MODELS["bert"].build(), MODELS["bert"].build()
    assert factorformer.compress(one, factorformer.plan(one, ratio=2)).method == "svd"
    factorformer.compress(other, factorformer.plan(other, "svd", ratio=2))
    assert torch.equal(logits(one, text()), logits(other, text()))


def test_progress_is_told() -> None:
    model, seen = MODELS["bert"].build(), []
    plan = factorformer.plan(model, "whitened", ratio=2)
    factorformer.compress(model, plan, [text(), text(seed=1)], progress=lambda *step: seen.append(step))
    assert seen[:2] == [("calibrate", 1, None), ("calibrate", 2, None)]
    assert seen[2:] == [("fit", i + 1, 12) for i in range(12)]


def test_whitened_keeps_more_of_the_output_than_svd() -> None:
    outputs = {}
    for method in ("svd", "whitened"):
        model = MODELS["llama"].build()
        for module in model.modules():  # inputs whose channels differ in size, as in trained models
            if hasattr(module, "variance_epsilon"):
                module.weight.data.copy_(torch.logspace(-1.5, 0.5, 32))
        expected = logits(model, text(8, 12))
        factorformer.compress(model, factorformer.plan(model, method, ratio=2), [text(64, 12, seed=9)])
        outputs[method] = (logits(model, text(8, 12)) - expected).norm() / expected.norm()
    assert outputs["whitened"] < 0.8 * outputs["svd"]


def test_a_head_tied_to_an_embedding_of_another_kind_stays_dense_with_it() -> None:
    config = tf.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99, max_position_embeddings=40, scale_embedding=True,
    )  # fmt: skip
    model = tf.BartForConditionalGeneration(config)
    report = factorformer.compress(model, factorformer.plan(model, "svd", 1.3, "all"))
    head = model.lm_head
    assert type(head) is torch.nn.Linear
    assert head.weight is model.get_input_embeddings().weight
    stored = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert stored == report.compressed.bytes


def test_calls_of_albert_layers_when_groups_do_not_divide_them() -> None:
    config = tf.AlbertConfig(
        hidden_size=32, num_hidden_layers=5, num_hidden_groups=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=99, embedding_size=16,
    )  # fmt: skip
    model = tf.AlbertModel(config)
    matrices, _ = find_matrices(model, "blocks")
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(torch.zeros(1, 3, dtype=torch.long))
    assert {m.name: m.products for m in matrices} == {m.name: calls[m.name] for m in matrices}
