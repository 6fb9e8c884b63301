"""Sequential fits: what a matrix reads in the compressed model, and what it is to make of it."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import transformers as tf
from tests import tiny
from tests.fitting.test_statistics import images_and_text, names
from torch import Tensor

import factorformer
from factorformer.fitting.sequential import SHRINKAGE, fit_sequentially
from factorformer.fitting.watch import Watch
from factorformer.layers.dense import dense_weight, is_transposed
from factorformer.layers.surgery import find_blocks

CHAINS = ["bert", "gpt2", "llama", "t5", "roberta"]


@pytest.mark.parametrize("name", tiny.MODELS)
def test_without_errors_every_target_is_the_weight(name: str) -> None:
    """A matrix replaced by its own target changes nothing, so that the next one's is its weight too."""
    model, data = tiny.MODELS[name].build(), [tiny.MODELS[name].inputs(), tiny.MODELS[name].inputs()]
    state = copy.deepcopy(model.state_dict())
    targets: dict[str, Tensor] = {}

    def keep(layer: str, target: Tensor, root: Tensor) -> Tensor:
        assert layer not in targets
        assert torch.equal(root, root.tril())
        targets[layer] = target
        return target

    fit_sequentially(model, names(model), data, keep)
    if name in CHAINS:
        of_encoder = ("EncDecAttention.k", "EncDecAttention.v")  # which has other tokens than the decoder
        assert set(targets) == {layer for layer in names(model) if not layer.endswith(of_encoder)}
    for layer, target in targets.items():
        weight = dense_weight(model.get_submodule(layer))
        torch.testing.assert_close(target.float(), weight, rtol=0, atol=2e-2 * float(weight.abs().max()))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_of_all_blocks_that_are_shared_are_left_out() -> None:
    model = tiny.MODELS["albert"].build()
    fitted: list[str] = []
    fit_sequentially(model, names(model), [tiny.text()], lambda name, target, _: fitted.append(name) or target)
    assert fitted == []


def test_weights_in_several_places_are_left_out_and_stay_tied() -> None:
    model, data = tiny.MODELS["bert"].build(), [tiny.text(8)]
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    layers[1].attention.self = layers[0].attention.self
    fitted: list[str] = []

    def keep(layer: str, target: Tensor, root: Tensor) -> Tensor:
        fitted.append(layer)
        return target

    fit_sequentially(model, names(model), data, keep)
    assert not any("intermediate" in name or "attention.self" in name for name in fitted)
    assert any("attention.output" in name for name in fitted)
    plan = factorformer.plan(model, "fisher", 1.2, exclude="*.intermediate.*", calibration=data)
    notes = factorformer.compress(model, plan, data).notes
    assert any("not of the compressed one" in note and "attention.self" in note for note in notes)
    assert layers[1].intermediate.dense.weight is layers[0].intermediate.dense.weight


@pytest.mark.parametrize("wrapped", [False, True])
def test_decoders_inside_of_others_keep_no_cache(wrapped: bool) -> None:
    """Blocks are called again and again: a cache that grows would change what they do, or make them fail."""

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.MODELS["llama"].build()

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> object:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    model = Wrapper().eval() if wrapped else images_and_text()
    text = {"input_ids": torch.randint(5, 49, (3, 8)), "attention_mask": torch.ones(3, 8).long()}
    text["attention_mask"][-1, -3:] = 0
    targets: dict[str, Tensor] = {}

    def keep(layer: str, target: Tensor, root: Tensor) -> Tensor:
        targets[layer] = target
        return target

    fit_sequentially(model, names(model), [text, text], keep)
    assert len(targets) == 2 * 7
    for layer, target in targets.items():
        weight = dense_weight(model.get_submodule(layer))
        torch.testing.assert_close(target.float(), weight, rtol=0, atol=2e-2 * float(weight.abs().max()))
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    assert all(getattr(config, "use_cache", True) for config in configs)


def test_blocks_that_cannot_be_run_again_are_fitted_out_of_order() -> None:
    model, data = tiny.MODELS["bert"].build(), [tiny.text(8)]
    block = model.bert.encoder.layer[1]
    known = block.forward
    fitted: list[str] = []

    def keep(layer: str, target: Tensor, root: Tensor) -> Tensor:
        fitted.append(layer)
        return target

    def in_the_model_alone(*args: object, **kwargs: object) -> object:
        if fitted:
            raise RuntimeError("called again")
        return known(*args, **kwargs)

    block.forward = in_the_model_alone
    fit_sequentially(model, names(model), data, keep)
    assert set(fitted) == {layer for layer in names(model) if "layer.0." in layer}


def test_decoders_read_what_the_compressed_encoder_writes() -> None:
    model = tiny.MODELS["t5"].build()
    data = {**tiny.text(6, 9), "decoder_input_ids": tiny.text(6, 9, 1)["input_ids"]}
    first = next(name for name in names(model) if name.startswith("encoder"))
    wrong = dense_weight(model.get_submodule(first)).detach() * -3
    moved: dict[str, float] = {}

    def refit(layer: str, target: Tensor, root: Tensor) -> Tensor:
        weight = dense_weight(model.get_submodule(layer))
        moved[layer] = float((target - weight).norm() / weight.norm())
        return wrong if layer == first else weight

    fit_sequentially(model, names(model), [data], refit)
    cross = {layer: size for layer, size in moved.items() if layer.endswith(("EncDecAttention.k", "EncDecAttention.v"))}
    assert len(cross) == 4
    assert min(cross.values()) > 0.02


def test_blocks_read_what_compressed_embeddings_write() -> None:
    model, data = tiny.MODELS["bert"].build().base_model, [tiny.text(8)]
    words = model.get_input_embeddings().weight.detach()
    moved: dict[str, float] = {}

    def keep(layer: str, target: Tensor, root: Tensor) -> Tensor:
        weight = dense_weight(model.get_submodule(layer))
        moved[layer] = float((target - weight).norm() / weight.norm())
        return weight

    wrong = {"embeddings.word_embeddings.weight": words + torch.randn(words.shape) * float(words.std())}
    fit_sequentially(model, names(model), data, keep, wrong)
    assert moved["encoder.layer.0.attention.self.query"] > 0.1
    assert torch.equal(model.get_input_embeddings().weight, words)
    plan = factorformer.plan(model, "fisher", 2, scope="all", calibration=data)
    report = factorformer.compress(model, plan, data)
    assert report.compressed == plan.compressed
    assert torch.isfinite(model(**data[0]).last_hidden_state).all()


@pytest.mark.parametrize(
    ("name", "residual"),
    [
        ("gpt2", ["attn.c_proj", "mlp.c_proj"]),  # whose activation adds to its input what it makes of it
        ("bert", ["attention.output.dense", "output.dense"]),
        ("llama", ["self_attn.o_proj", "mlp.down_proj"]),
    ],
)
def test_what_outputs_are_added_to_is_what_was_there_before(name: str, residual: list[str]) -> None:
    model = tiny.MODELS[name].build()
    block = find_blocks(model)[0]
    inside = [layer for layer in names(model) if layer.startswith(f"{block}.")]
    watch = Watch({model.get_submodule(layer): layer for layer in inside})
    with watch, torch.no_grad():
        model(**tiny.text())
    hidden = torch.zeros(2, 7, tiny.WIDTH)
    found = [stage.name.removeprefix(f"{block}.") for stage in watch.stages(hidden) if stage.residual]
    assert found == residual


def test_experts_are_left_out() -> None:
    sizes = {**tiny._DECODER, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes)).eval()
    fitted: list[str] = []

    def keep(layer: str, target: Tensor, root: Tensor) -> Tensor:
        fitted.append(layer)
        return target

    fit_sequentially(model, names(model), [tiny.text()], keep)
    assert not any("expert" in name for name in fitted)
    assert any("q_proj" in name for name in fitted)


@pytest.mark.parametrize("name", CHAINS)
def test_errors_before_a_matrix_are_made_up_for(name: str) -> None:
    """With a wrong matrix in front, those behind it bring the output nearer to what it was."""
    tiny_model = tiny.MODELS[name]
    model, data = tiny_model.build(), [tiny_model.inputs()]
    layers = names(model)
    generator = torch.Generator().manual_seed(0)
    wrong = {layers[0]: dense_weight(model.get_submodule(layers[0])) * 3}
    noise = torch.randn(wrong[layers[0]].shape, generator=generator)
    wrong[layers[0]] = wrong[layers[0]] + noise * float(wrong[layers[0]].std())
    repaired: dict[str, Tensor] = {}

    def refit(layer: str, target: Tensor, root: Tensor) -> Tensor:
        repaired[layer] = wrong.get(layer, target.float())
        return repaired[layer]

    fit_sequentially(model, layers, data, refit)
    with torch.no_grad():
        expected = next(iter(model(**data[0]).values()))
        errors = []
        for weights in (wrong, repaired):
            twin = copy.deepcopy(model)
            for layer, weight in weights.items():
                module = twin.get_submodule(layer)
                module.weight.data = weight.T if is_transposed(module) else weight
            errors.append(float((next(iter(twin(**data[0]).values())) - expected).norm()))
    assert errors[1] < errors[0]


def test_a_matrix_makes_up_for_half_of_the_error_of_what_its_output_is_added_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The target against its formula, from what two whole models read."""
    monkeypatch.setattr("factorformer.fitting.sequential.fast_products", lambda _: contextlib.nullcontext())
    model, data = tiny.MODELS["bert"].build().base_model, tiny.text(6, 12)
    first, last = "encoder.layer.0.output.dense", "encoder.layer.1.output.dense"
    wrong = torch.randn(dense_weight(model.get_submodule(first)).shape, generator=torch.Generator().manual_seed(0))
    targets: dict[str, Tensor] = {}

    def refit(layer: str, target: Tensor, root: Tensor) -> Tensor:
        targets[layer] = target
        return wrong if layer == first else dense_weight(model.get_submodule(layer))

    fit_sequentially(model, names(model), [data], refit)
    twin = copy.deepcopy(model)
    twin.get_submodule(first).weight.data = wrong
    seen: list[Tensor] = []
    real = data["attention_mask"].bool()

    def see(_: torch.nn.Module, args: tuple[Tensor, ...], __: object) -> None:
        seen.append(args[0][real].double())

    for each in (model, twin):
        each.get_submodule("encoder.layer.1.intermediate.dense").register_forward_hook(see)
        each.get_submodule(last).register_forward_hook(see)
        with torch.no_grad():
            each(**data)
    residual, x, changed_residual, changed = seen
    weight = dense_weight(model.get_submodule(last)).detach().double()
    moment, share = changed.T @ changed / len(x), 1 - SHRINKAGE
    least = SHRINKAGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    wanted = (
        share * (weight @ x.T @ changed + 0.5 * (residual - changed_residual).T @ changed) / len(x) + weight @ least
    )
    expected = wanted @ torch.linalg.inv(share * moment + least)
    assert float((expected - weight).norm() / weight.norm()) > 0.05
    torch.testing.assert_close(targets[last], expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_what_stays_dense_makes_up_for_errors_too() -> None:
    model, data = tiny.MODELS["llama"].build(), [tiny.text(8)]
    before = copy.deepcopy(model)
    plan = factorformer.plan(model, "fisher", 1.1, calibration=data)
    whole = [e.matrix.name for e in plan.entries if e.spec is None and e.matrix.dense is None]
    assert whole
    report = factorformer.compress(model, plan, data)
    moved = [n for n in whole if not torch.equal(model.get_submodule(n).weight, before.get_submodule(n).weight)]
    assert moved
    assert any("matrices that stay dense" in note for note in report.notes)
    assert all(model.get_submodule(name).weight.requires_grad for name in whole)


def test_what_is_left_out_by_name_stays_as_it_was() -> None:
    model, data = tiny.MODELS["llama"].build(), [tiny.text(8)]
    before = copy.deepcopy(model)
    plan = factorformer.plan(model, "fisher", 1.2, exclude="*.mlp.*", calibration=data)
    factorformer.compress(model, plan, data)
    for name, module in before.named_modules():
        if ".mlp." in name and isinstance(module, torch.nn.Linear):
            assert torch.equal(model.get_submodule(name).weight, module.weight)


def test_it_is_said_where_fits_are_not_in_order() -> None:
    for name, said in (("albert", True), ("bert", False)):
        model, batches = tiny.MODELS[name].build(), [tiny.MODELS[name].inputs()]
        plan = factorformer.plan(model, "fisher", 1.5, calibration=batches)
        notes = factorformer.compress(model, plan, batches).notes
        assert any("not of the compressed one" in note for note in notes) == said, name


def test_a_block_that_reads_no_hidden_states_ends_the_chain() -> None:
    class Constant(torch.nn.Module):
        """A block of a model whose forward pass hands it token numbers alone."""

        def __init__(self, model: tf.PreTrainedModel) -> None:
            super().__init__()
            self.encoder = tf.BertModel(model.config).encoder
            self.words = torch.nn.Embedding(99, model.config.hidden_size)
            for layer in self.encoder.layer:
                layer.forward = lambda input_ids, mask=None: self.words(input_ids)

        def forward(self, input_ids: Tensor) -> Tensor:
            states = [layer(input_ids) for layer in self.encoder.layer]
            return torch.stack(states).sum(0)

    model = Constant(tiny.MODELS["bert"].build())
    everything = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    fitted: list[str] = []
    batches = [{"input_ids": torch.arange(8)[None]}]
    fit_sequentially(model, everything, batches, lambda name, target, _: fitted.append(name) or target)
    assert fitted == []
