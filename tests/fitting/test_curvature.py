"""Both sides of the curvature: moments of gradients against brute force, and what fits and predictions make of them."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from tests import tiny
from tests.fitting.test_statistics import examples, names, split
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from factorformer.errors import DataError
from factorformer.fitting import Metric, fit
from factorformer.fitting.batches import fingerprint
from factorformer.fitting.moments import LayerStatistics, SecondMoment
from factorformer.fitting.objective import TEMPERATURE, Objective, objective
from factorformer.fitting.statistics import collect
from factorformer.structures import Dense, DenseSparse, KroneckerSum, LowRank, Structure
from factorformer.tasks.targets import Embeddings

SPECS: list[Structure] = [
    LowRank(3),
    KroneckerSum(2, (4, 4), (5, 3)),
    DenseSparse(6, 3, "rows"),
    DenseSparse(6, 3, "columns"),
    Dense(),
]


def both_sides(model: nn.Module, layers: list[str], batches: object) -> dict[str, LayerStatistics]:
    return collect(model, layers, batches, "fisher")  # type: ignore[arg-type]


def full(moment: SecondMoment | None) -> Tensor:
    assert moment is not None
    return moment.symmetric() / moment.count


def root(width: int, seed: int) -> Tensor:
    """An ill-conditioned lower-triangular root."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * width, width, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, width)
    return torch.linalg.cholesky(x.T @ x / len(x))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as precise as those by hand, on every processor."""
    monkeypatch.setattr("factorformer.fitting.gradient_recorders.fast_products", lambda _: contextlib.nullcontext())


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["bert", "albert", "gpt2"])
def test_moments_of_gradients_equal_brute_force(name: str) -> None:
    model = tiny.MODELS[name].build()
    batch = examples(model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    layers, shift = names(model), int(name == "gpt2")
    outputs: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        model.get_submodule(layer).register_forward_hook(lambda _, __, y, layer=layer: outputs[layer].append(y))
        for layer in layers
    ]
    expected: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    predicted = 0
    for row, single in enumerate(split(batch, 1)):
        for seen in outputs.values():
            seen.clear()
        units = int((single["labels"][:, shift:] != -100).sum())
        loss, predicted = model(**single).loss * units, predicted + units
        real = batch["attention_mask"][row].bool()
        for layer in layers:
            for output in outputs[layer]:
                gradient = (
                    torch.autograd.grad(loss, output, retain_graph=True)[0] if units else torch.zeros_like(output)
                )
                g = gradient[0][real].double()
                expected[layer] = expected.get(layer, 0) + g.T @ g
                calls[layer] = calls.get(layer, 0) + len(g)
    for handle in handles:
        handle.remove()
    for size in (2, 6):
        found = both_sides(model, layers, list(split(batch, size)))
        assert list(found) == layers
        for layer in layers:
            target = expected[layer] / calls[layer]
            torch.testing.assert_close(
                full(found[layer].outputs), target, rtol=0, atol=2e-2 * float(target.abs().max())
            )
            assert found[layer].tokens == calls[layer] / predicted
            assert found[layer].objective == "loss"


class Pooled(nn.Module):
    """An encoder of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.linear(x).tanh()}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("rows", "tokens", "batches", "tolerance"), [(1, 6, 1, 1e-5), (3, 5, 400, 0.05)])
def test_draws_that_count_half_of_the_tokens_add_up(rows: int, tokens: int, batches: int, tolerance: float) -> None:
    """Tokens of one row of equal inputs have one gradient, whose draws a half of them know; others on average."""
    torch.manual_seed(0)
    model, data = Pooled(), []
    for _ in range(batches):
        x = torch.randn(rows, 1 if rows == 1 else tokens, 6).expand(rows, tokens, 6).contiguous()
        mask = torch.ones(rows, tokens, dtype=torch.long)
        mask[: rows - 1, -2:] = 0
        data.append({"x": x, "attention_mask": mask})
    seen: list[Tensor] = []
    handle = model.linear.register_forward_hook(lambda _, __, y: seen.append(y))
    expected, count = torch.zeros(4, 4), 0
    for batch in data:
        output = model(**batch)
        goal = objective(model, batch, output, torch.Generator().manual_seed(fingerprint(batch)))
        for _ in range(goal.draws):
            gradient = torch.autograd.grad(goal.draw(), seen[-1], retain_graph=True)[0][batch["attention_mask"].bool()]
            expected, count = expected + gradient.T @ gradient, count + len(gradient)
    handle.remove()
    found = both_sides(model, ["linear"], data)["linear"]
    assert found.outputs is not None
    assert found.outputs.count == count
    assert found.tokens == pytest.approx(count / goal.draws / rows / batches)
    torch.testing.assert_close(
        full(found.outputs).float(), expected / count, rtol=0, atol=tolerance * float(expected.max() / count)
    )


def test_the_order_of_batches_changes_nothing() -> None:
    model = tiny.MODELS["bert"].build()
    layers = names(model)
    batches = [tiny.text(4, 7, seed) for seed in range(4)]
    first, second = both_sides(model, layers, batches), both_sides(model, layers, batches[::-1])
    for layer in layers:
        for one, other in ((first[layer].inputs, second[layer].inputs), (first[layer].outputs, second[layer].outputs)):
            size = float(full(one).abs().max())
            torch.testing.assert_close(full(one), full(other), rtol=0, atol=1e-5 * size)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.MODELS["bert"].build().train()
    model.get_input_embeddings().weight.requires_grad_(False)
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    random = torch.random.get_rng_state()
    both_sides(model, names(model), [tiny.text()])
    with pytest.raises(DataError, match="cannot run"):
        both_sides(model, names(model), [{"input_ids": torch.zeros(2, 99, dtype=torch.long)}])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(random, torch.random.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


def test_checkpointed_and_half_precision_models_have_the_same_moments() -> None:
    model = tiny.MODELS["llama"].build()
    layers, data = names(model), [tiny.text(6)]
    expected = both_sides(model, layers, data)
    checkpointed = copy.deepcopy(model)
    enable = getattr(checkpointed, "activation_checkpointing_enable", None)  # the newer name
    (enable or checkpointed.gradient_checkpointing_enable)()
    for twin, tolerance in ((checkpointed.train(), 1e-5), (copy.deepcopy(model).to(torch.bfloat16), 0.2)):
        found = both_sides(twin, layers, data)
        for layer in layers:
            target = full(expected[layer].outputs)
            torch.testing.assert_close(
                full(found[layer].outputs), target, rtol=0, atol=tolerance * float(target.abs().max())
            )


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_architecture_is_measured(name: str) -> None:
    model, data = tiny.MODELS[name].build(), tiny.MODELS[name].inputs()
    layers = names(model)
    found = both_sides(model, layers, [data])
    assert found.keys() <= set(layers)
    assert len(found) >= len(layers) / 2
    for measured in found.values():
        assert measured.outputs is not None
        assert measured.outputs.count > 0
        assert torch.isfinite(measured.outputs.root()).all()


def test_layers_that_read_one_tensor_share_its_moment() -> None:
    model = tiny.MODELS["llama"].build()
    found = both_sides(model, names(model), [tiny.text()])
    block = "model.layers.0."
    queries = [found[f"{block}self_attn.{part}_proj"] for part in "qkv"]
    assert len({id(measured.inputs) for measured in queries}) == 1
    assert len({id(measured.outputs) for measured in queries}) == 3
    assert found[f"{block}mlp.gate_proj"].inputs is found[f"{block}mlp.up_proj"].inputs


def test_what_the_loss_does_not_depend_on_is_not_measured() -> None:
    model = tf.BertModel(tf.BertConfig(**tiny._ENCODER)).eval()
    layers = names(model, "all")
    assert "pooler.dense" in layers
    assert "pooler.dense" not in both_sides(model, layers, [tiny.text()])


def test_a_tied_head_counts_with_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorformer.fitting.gradient_recorders.WIDE", 64)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**tiny._DECODER, tie_word_embeddings=True)).eval()
    (name,) = [n for n in names(model, "all") if "embed" in n]
    (measured,) = both_sides(model, [name], [tiny.text(8)]).values()
    assert measured.rows is not None
    assert measured.rows.shape == (tiny.VOCABULARY,)
    assert float(measured.rows.min()) > 0
    # Of the embedding alone, rows that no text has count as a tenth of the mean; the head sees them all.
    untied = tf.LlamaForCausalLM(tf.LlamaConfig(**tiny._DECODER, tie_word_embeddings=False)).eval()
    untied.load_state_dict(model.state_dict() | {"lm_head.weight": model.lm_head.weight})
    apart = both_sides(untied, ["model.embed_tokens", "lm_head"], [tiny.text(8)])
    error = 0.1 * torch.randn(tiny.VOCABULARY, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    rises = [_rise(statistics, error) for statistics in (measured, *apart.values())]
    assert rises[0] == pytest.approx(sum(rises[1:]), rel=0.2)


def _rise(statistics: LayerStatistics, error: Tensor) -> float:
    metric = Metric.of(statistics)
    return metric.scale * float(metric.apply(error.double()).square().sum())


def test_predicted_rises_are_true_where_the_curvature_is() -> None:
    """The curvature of a squared error is constant, and does not depend on labels."""

    class Regression(nn.Module):
        config = tf.BertConfig(problem_type="regression")

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 20, bias=False)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
            logits = self.linear(x)
            return SequenceClassifierOutput(None if labels is None else (logits - labels).square().mean(), logits)

    torch.manual_seed(0)
    model = Regression()
    x = torch.randn(3000, 12) @ torch.randn(12, 12)
    (statistics,) = both_sides(model, ["linear"], [{"x": x}]).values()
    (labelled,) = both_sides(model, ["linear"], [{"x": x, "labels": 20 * torch.randn(3000, 20)}]).values()
    weight = model.linear.weight.detach()
    for spec in (LowRank(4), DenseSparse(8, 2)):
        dense = spec.to_dense((20, 12), fit(weight, spec, Metric.of(statistics))[0])
        true = float((x @ (weight - dense).T).square().mean())
        assert _rise(statistics, weight - dense) == pytest.approx(true, rel=0.05)
        assert _rise(labelled, weight - dense) == pytest.approx(true, rel=0.05)


def test_predicted_rises_of_several_labels_are_those_of_their_mean() -> None:
    class Labels(nn.Module):
        config = tf.BertConfig(problem_type="multi_label_classification")

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 20)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
            logits = self.linear(x)
            loss = None if labels is None else F.binary_cross_entropy_with_logits(logits, labels)
            return SequenceClassifierOutput(loss, logits)

    torch.manual_seed(0)
    model = Labels()
    x = torch.randn(1, 6).expand(8000, 6)
    error = 0.05 * torch.randn(20, 6)
    error = error @ (x[0][:, None] * x[0]) / x[0].square().sum()
    before = model(x[:1]).logits.detach()
    after = before + x[:1] @ error.T
    losses = [F.binary_cross_entropy_with_logits(logits, before.sigmoid()) for logits in (before, after)]
    true = float(losses[1] - losses[0])
    drawn = (torch.rand(8000, 20) < before.sigmoid()).float()
    for batch in ({"x": x}, {"x": x, "labels": drawn}):
        (statistics,) = both_sides(model, ["linear"], [batch]).values()
        assert _rise(statistics, error) == pytest.approx(true, rel=0.1)


def test_predicted_rises_are_those_of_a_softmax() -> None:
    """With one input for all tokens, the two sides are independent, and the divergence is known."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 20)

        def forward(self, x: Tensor) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(logits=self.linear(x)[:, None])

    torch.manual_seed(0)
    model = Classifier()
    x = torch.randn(1, 6).expand(16000, 6)
    (statistics,) = both_sides(model, ["linear"], [{"x": x}]).values()
    error = 0.05 * torch.randn(20, 6)
    logits = model(x[:1]).logits[0].detach()
    before, after = logits.log_softmax(-1), (logits + x[:1] @ error.T).log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum())
    # Shrinkage adds a little in the directions that no input has: it is taken off.
    assert _rise(statistics, error @ (x[0][:, None] * x[0]) / x[0].square().sum()) == pytest.approx(divergence, rel=0.1)


def test_classifiers_are_taken_for_less_certain_than_they_are_of_rows_that_they_know() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
            logits = self.linear(x)
            return SequenceClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)

    torch.manual_seed(0)
    model = Classifier()
    with torch.no_grad():
        model.linear.weight.mul_(10)
    x = torch.randn(1, 6).expand(4000, 6)
    p = (model(x[:1]).logits.detach()[0] / TEMPERATURE).softmax(-1).double()
    for batch in ({"x": x}, {"x": x, "labels": torch.zeros(4000, dtype=torch.long)}):
        (statistics,) = both_sides(model, ["linear"], [batch]).values()
        torch.testing.assert_close(full(statistics.outputs), p.diag() - p[:, None] * p, rtol=0, atol=0.02)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fits_minimize_the_error_on_both_sides(spec: Structure) -> None:
    shape = (20, 12)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    metric = Metric(root(20, 2).T.contiguous(), root(12, 3))
    factors, error = fit(weight, spec, metric)
    stored = spec.to_dense(shape, factors)
    if isinstance(spec, Dense):
        assert torch.equal(stored, weight)
    else:
        assert metric.relative_error(weight, stored) == pytest.approx(error, rel=1e-3)
        for other in (Metric(), Metric(None, metric.columns), Metric(metric.rows)):
            assert error < metric.relative_error(weight, spec.to_dense(shape, fit(weight, spec, other)[0]))


def test_low_rank_is_the_optimum_of_a_search() -> None:
    weight = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    metric = Metric(root(5, 2).T.contiguous(), root(4, 3))
    _, error = fit(weight, LowRank(2), metric)
    found = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        left = torch.randn(5, 2, dtype=torch.float64, generator=generator).requires_grad_()
        right = torch.randn(2, 4, dtype=torch.float64, generator=generator).requires_grad_()
        search = torch.optim.LBFGS([left, right], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def loss(left: Tensor = left, right: Tensor = right, search: torch.optim.Optimizer = search) -> Tensor:
            search.zero_grad()
            value = metric.apply(weight - left @ right).square().sum()
            value.backward()
            return value

        search.step(loss)
        found.append(metric.relative_error(weight, (left @ right).detach()))
    assert error == pytest.approx(min(found), abs=1e-4)
    assert error <= min(found) + 1e-6


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_outputs_that_matter_alike_leave_the_whitened_fit(spec: Structure) -> None:
    shape = (20, 12)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    moment = root(12, 3) @ root(12, 3).T
    inputs = SecondMoment(moment * 500, 500)
    alike = LayerStatistics(inputs, None, SecondMoment(7e-6 * 500 * torch.eye(20, dtype=torch.float64), 500))
    expected, error = fit(weight, spec, Metric.of(LayerStatistics(inputs)))
    factors, found = fit(weight, spec, Metric.of(alike))
    if isinstance(spec, DenseSparse):  # whose local optimum is another one after rounding
        assert found == pytest.approx(error, rel=0.05)
    else:
        assert found == pytest.approx(error, rel=1e-3)
        torch.testing.assert_close(spec.to_dense(shape, factors), spec.to_dense(shape, expected), rtol=1e-3, atol=1e-3)


def test_attention_is_taken_apart_for_short_texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []

    def kernel(backend: object) -> contextlib.AbstractContextManager[None]:
        taken.append(backend)
        return contextlib.nullcontext()

    monkeypatch.setattr("factorformer.layers.modes.sdpa_kernel", kernel)
    monkeypatch.setattr("factorformer.layers.modes.has_bfloat16_products", lambda: True)
    for name, short in (("bert", True), ("vit", False), ("whisper", False)):
        taken.clear()
        model = tiny.MODELS[name].build()
        both_sides(model, names(model), [tiny.MODELS[name].inputs()])
        assert bool(taken) == short, name


def test_models_that_return_tuples_or_differentiate_a_part_alone() -> None:
    model, data = tiny.MODELS["bert"].build(), [tiny.text(4)]
    layers = names(model)
    expected = both_sides(model, layers, data)
    model.config.return_dict = False
    with torch.inference_mode():
        found = both_sides(model, layers, data)
    assert model.config.return_dict is False
    for layer in layers:
        torch.testing.assert_close(full(found[layer].outputs), full(expected[layer].outputs))
    model.config.return_dict = True
    block = model.bert.encoder.layer[0]
    known = block.forward

    def frozen(*args: object, **kwargs: object) -> Tensor:
        with torch.no_grad():
            return known(*args, **kwargs)

    block.forward = frozen
    assert set(both_sides(model, layers, data)) == {layer for layer in layers if "layer.0." not in layer}


def test_every_batch_has_draws_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def noted(model: nn.Module, batch: object, output: object, generator: torch.Generator) -> Objective:
        seeds.append(generator.initial_seed())
        return objective(model, batch, output, generator)  # type: ignore[arg-type]

    monkeypatch.setattr("factorformer.fitting.gradient_recorders.objective", noted)
    model = tiny.MODELS["bert"].build()
    mask = {"attention_mask": torch.ones(2, 7).long()}
    both_sides(model, names(model), [mask | {"input_ids": tiny.text(2, 7, seed)["input_ids"]} for seed in range(3)])
    assert len(set(seeds)) == 3


def test_embeddings_are_pooled_as_users_do() -> None:
    model, data = tf.BertModel(tf.BertConfig(**tiny._ENCODER)).eval(), [tiny.text(4)]
    layers = names(model)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **batch: Tensor) -> dict[str, Tensor]:
            return {"sentence_embedding": model(**batch).last_hidden_state[:, 0]}

    mean = both_sides(model, layers, data)
    with Embeddings(lambda states, mask: states[:, 0]).shown(model):
        found = both_sides(model, layers, data)
    expected = both_sides(First(), [f"inner.{layer}" for layer in layers], data)
    for layer in layers:
        wanted = full(expected[f"inner.{layer}"].outputs)
        torch.testing.assert_close(full(found[layer].outputs), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        assert float((full(mean[layer].outputs) - wanted).norm()) > 0.2 * float(wanted.norm())
    with pytest.raises(KeyError), Embeddings(lambda states, mask: states[:, 0]).shown(model):
        raise KeyError
    again = both_sides(model, layers, data)
    assert all(torch.equal(full(again[layer].outputs), full(mean[layer].outputs)) for layer in layers)


def test_nothing_to_predict_is_an_error() -> None:
    model = tiny.MODELS["llama"].build()
    ids = tiny.text(2)["input_ids"]
    for batch in (
        {"input_ids": ids, "labels": torch.full_like(ids, -100)},
        {"input_ids": ids, "attention_mask": torch.zeros_like(ids)},
    ):
        with pytest.raises(DataError, match=r"nothing to predict|cannot run|NaN"):
            both_sides(model, names(model), [batch])


def test_what_reads_zeros_alone_costs_nothing() -> None:
    statistics = LayerStatistics(SecondMoment(torch.zeros(4, 4), 9), None, SecondMoment(torch.eye(3) * 9, 9))
    assert Metric.of(statistics).scale == 0


def _goal(model: nn.Module, batch: tiny.Inputs) -> tuple[str, float]:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    goal = objective(model, batch, model(**batch), torch.Generator().manual_seed(0))
    goal.draw().backward()
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters())
    return goal.name, goal.units


def test_what_is_differentiated_is_what_the_model_is_for() -> None:
    sizes, batch = tiny._ENCODER, tiny.text(4)
    tokens = float(batch["attention_mask"].sum())
    assert _goal(tf.BertModel(tf.BertConfig(**sizes)).eval(), batch) == ("1 - cosine", 4)
    assert _goal(tf.BertForMaskedLM(tf.BertConfig(**sizes)).eval(), batch) == ("loss", tokens)
    assert _goal(tf.BertForTokenClassification(tf.BertConfig(**sizes, num_labels=5)).eval(), batch) == ("loss", tokens)
    assert _goal(tf.BertForQuestionAnswering(tf.BertConfig(**sizes)).eval(), batch) == ("loss", 4)
    for labels, problem in ((5, None), (5, "multi_label_classification"), (1, None), (3, "regression")):
        config = tf.BertConfig(**sizes, num_labels=labels, problem_type=problem)
        assert _goal(tf.BertForSequenceClassification(config).eval(), batch) == ("loss", 4)
    causal = tf.LlamaForCausalLM(tf.LlamaConfig(**tiny._DECODER)).eval()
    assert _goal(causal, batch) == ("loss", tokens)
    labelled = batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    # The first token of each row is not predicted, whatever the class is called.
    for decoder in (causal, tiny.MODELS["gpt2"].build()):
        assert _goal(decoder, labelled) == ("loss", float((labelled["labels"][:, 1:] != -100).sum()))
    images = tf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=7,
    )
    segments = tf.SegformerForSemanticSegmentation(images).eval()
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    places = segments(**pixels).logits[:, 0].numel()
    assert _goal(segments, pixels) == ("loss", places)
