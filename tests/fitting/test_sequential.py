"""Sequential fits: what a matrix reads in the compressed model, and what it is to make of it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from tests import tiny
from tests.fitting.test_statistics import names
from torch import Tensor

import factorformer
from factorformer.fitting.sequential import fit_sequentially
from factorformer.layers.dense import dense_weight, is_transposed

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

    fitted = fit_sequentially(model, names(model), data, keep)
    assert fitted == targets.keys()
    if name in CHAINS:
        of_encoder = ("EncDecAttention.k", "EncDecAttention.v")  # which has other tokens than the decoder
        assert fitted == {layer for layer in names(model) if not layer.endswith(of_encoder)}
    for layer, target in targets.items():
        weight = dense_weight(model.get_submodule(layer))
        torch.testing.assert_close(target.float(), weight, rtol=0, atol=2e-2 * float(weight.abs().max()))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_of_all_blocks_that_are_shared_are_left_out() -> None:
    model = tiny.MODELS["albert"].build()
    assert fit_sequentially(model, names(model), [tiny.text()], lambda *_: pytest.fail("called")) == set()


def test_experts_are_left_out() -> None:
    sizes = {**tiny._DECODER, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes)).eval()
    fitted = fit_sequentially(model, names(model), [tiny.text()], lambda _, target, __: target)
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


def test_what_stays_dense_makes_up_for_errors_too() -> None:
    model, data = tiny.MODELS["llama"].build(), [tiny.text(8)]
    before = copy.deepcopy(model)
    plan = factorformer.plan(model, "fisher", 1.1, calibration=data)
    whole = [e.matrix.name for e in plan.entries if e.spec is None and e.matrix.dense is None]
    assert whole
    factorformer.compress(model, plan, data)
    moved = [n for n in whole if not torch.equal(model.get_submodule(n).weight, before.get_submodule(n).weight)]
    assert moved
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
        assert any("not the compressed one" in note for note in notes) == said, name


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
    fitted = fit_sequentially(model, everything, [{"input_ids": torch.arange(8)[None]}], lambda name, target, _: target)
    assert fitted == set()
