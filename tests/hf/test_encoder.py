"""Layers that run in one call equal torch's, whatever is padded, and step aside where somebody looks into them."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import factorformer
from factorformer.errors import FactorformerWarning, ModelError
from factorformer.hf import fused
from factorformer.hf.encoder import FusedForward, FusedModel, _allowed
from factorformer.hf.encoder_layout import stacks_of
from factorformer.hf.fused import fuse
from factorformer.kernels import Dense, cpu
from factorformer.kernels.encoder import Encoder
from factorformer.layers.nn import FactorizedMatrix
from factorformer.structures import LowRank

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
OTHERS = {"vocab_size": 99, "max_position_embeddings": 520}
FAMILIES: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES, **OTHERS)),
    "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**SIZES, **OTHERS)),
    "xlm-roberta": lambda: tf.XLMRobertaModel(tf.XLMRobertaConfig(**SIZES, **OTHERS)),
    "camembert": lambda: tf.CamembertModel(tf.CamembertConfig(**SIZES, **OTHERS)),
    "electra": lambda: tf.ElectraModel(tf.ElectraConfig(**SIZES, **OTHERS, embedding_size=24)),
    "mpnet": lambda: tf.MPNetModel(tf.MPNetConfig(**SIZES, **OTHERS)),
    "distilbert": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(dim=48, n_layers=2, n_heads=4, hidden_dim=80, **OTHERS)
    ),
}
SHAPES = [(1, 1), (1, 5), (2, 7), (1, 40), (3, 33), (33, 12), (2, 130), (1, 512)]
BOUNDS = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.1}
"""Of the error of a token's vector, relative to it."""

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="the kernels are not compiled here")


def made(family: str) -> tf.PreTrainedModel:
    """A model whose layers do something: weights larger than those of a new one, biases and norms of all values."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * (0.1 if "weight" in name else 0.2))
    return model.eval()


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> tf.PreTrainedModel:
    return made(request.param)


@pytest.fixture
def bert() -> tf.PreTrainedModel:
    return made("bert")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled by each stack that runs in one call."""
    ran: list[int] = []
    kernel = cpu.encode
    monkeypatch.setattr(cpu, "encode", lambda *arguments: ran.append(1) or kernel(*arguments))
    return ran


def batch(rows: int, length: int, *, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * length)
    ids = torch.randint(5, 99, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator) if padded else torch.full((rows,), length)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def states(model: tf.PreTrainedModel, inputs: dict[str, Tensor], **others: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **others).last_hidden_state


def assert_close(found: Tensor, expected: Tensor, mask: Tensor, bound: float) -> None:
    """That vectors of real tokens are, and those of others are 0."""
    assert found.shape == expected.shape
    real = mask.bool()
    error = (found - expected)[real].norm(dim=-1) / expected[real].norm(dim=-1)
    assert error.max() <= bound, error.max()
    assert not found[~real].any()


def test_it_equals_torch(model: tf.PreTrainedModel, calls: list[int]) -> None:
    for products, bound in BOUNDS.items():
        twin, tried = fuse(copy.deepcopy(model), products), len(calls)
        for rows, length in SHAPES:
            for padded in (True, False):
                inputs = batch(rows, length, padded=padded)
                expected = states(model, inputs)
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    assert_close(states(twin, inputs), expected, inputs["attention_mask"], bound)
        assert len(calls) == tried + 2 * 3 * len(SHAPES)
    torch.set_num_threads(1)


@pytest.mark.parametrize("method", ["svd", "dense_sparse_plain", "kronecker"])
@pytest.mark.parametrize("integers", ["", "int8", "int4"])
def test_factors(bert: tf.PreTrainedModel, method: str, integers: str, calls: list[int]) -> None:
    stored = {integers: True} if integers else {}
    factorformer.compress(bert, factorformer.plan(bert, method, ratio=6 if integers else 2, **stored))
    inputs = batch(3, 20)
    expected = states(bert, inputs)
    twin, tried = fuse(copy.deepcopy(bert)), len(calls)
    found = states(twin, inputs)
    assert len(calls) == tried + 1
    assert_close(found, expected, inputs["attention_mask"], BOUNDS["int8"] if integers else BOUNDS["float32"])


def test_a_layer_of_each_kind(bert: tf.PreTrainedModel) -> None:
    plan = factorformer.plan(bert, "svd", ratio=3, int8=True, exclude=["*layer.0.attention*"])
    factorformer.compress(bert, plan)
    inputs = batch(3, 20)
    for products in (None, "bfloat16", "int8"):
        found = states(fuse(copy.deepcopy(bert), products), inputs)
        assert_close(found, states(bert, inputs), inputs["attention_mask"], BOUNDS["int8"])


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_masks(family: str, calls: list[int]) -> None:
    model = made(family)
    twin, tried = fuse(copy.deepcopy(model)), len(calls)
    inputs = batch(3, 9)
    left = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    if family == "bert":  # by their place among all
        left["position_ids"] = torch.arange(9).expand(3, 9)
    assert_close(states(twin, left), states(model, left), left["attention_mask"], 1e-5)
    assert len(calls) == tried + 1
    holes = {**inputs, "attention_mask": torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 0]] * 3)}
    found, expected = states(twin, holes), states(model, holes)
    real = holes["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert len(calls) == tried + (2 if family == "bert" else 1)  # MPNet counts what lies between
    triangle = torch.ones(3, 1, 9, 9).tril().bool()
    if family == "bert":
        torch.testing.assert_close(
            states(twin, {**inputs, "attention_mask": triangle}), states(model, {**inputs, "attention_mask": triangle})
        )
        assert len(calls) == tried + 2
    nothing = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    nothing["attention_mask"][1] = 0
    assert not states(twin, nothing)[1].any()


def test_single_layers_can_be_looked_into(model: tf.PreTrainedModel, calls: list[int]) -> None:
    inputs = batch(2, 7)
    twin, tried = fuse(copy.deepcopy(model)), len(calls)
    for asked in ("output_hidden_states", "output_attentions"):
        for each in (model, twin):
            each.set_attn_implementation("eager")
        with torch.no_grad():
            expected, found = (each(**inputs, **{asked: True}) for each in (model, twin))
        name = asked.removeprefix("output_")
        for one, other in zip(expected[name], found[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(calls) == tried
    states(twin, inputs)  # after which hooks of transformers stay
    assert len(calls) == tried + 1
    (stack,) = stacks_of(twin)
    seen: list[int] = []
    handle = stack.layer[0].register_forward_hook(lambda *_: seen.append(1))
    states(twin, inputs)
    assert (len(seen), len(calls)) == (1, tried + 1)
    handle.remove()
    states(twin, inputs)
    assert (len(seen), len(calls)) == (1, tried + 2)


def test_tuples(model: tf.PreTrainedModel) -> None:
    inputs = batch(2, 7, padded=False)
    with torch.no_grad():
        expected, found = model(**inputs, return_dict=False), fuse(copy.deepcopy(model))(**inputs, return_dict=False)
    assert len(found) == len(expected)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled by each forward pass of transformers' own of a base model."""
    seen: list[str] = []
    for kind in {type(make()) for make in FAMILIES.values()}:
        own = kind.forward

        def forward(self: Any, *given: Any, own: Any = own, **others: Any) -> Any:
            seen.append(type(self).__name__)
            return own(self, *given, **others)

        monkeypatch.setattr(kind, "forward", functools.wraps(own)(forward))
    return seen


def test_wrappers_are_left_out(model: tf.PreTrainedModel, wrapped: list[str]) -> None:
    twin = fuse(copy.deepcopy(model))
    wrapped.clear()
    inputs = batch(2, 7)
    plain = states(twin, inputs)
    for others in ({"return_dict": True}, {"output_hidden_states": False}, {"position_ids": None}):  # as callers say
        if "position_ids" not in others or "position_ids" in inspect.signature(type(model).forward).parameters:
            assert torch.equal(states(twin, inputs, **others), plain)
    assert torch.equal(states(twin, {**inputs, "attention_mask": inputs["attention_mask"].bool()}), plain)
    assert not wrapped
    assert inspect.signature(twin.forward).parameters.keys() == inspect.signature(model.forward).parameters.keys()


@pytest.mark.parametrize(
    "head", [tf.BertForSequenceClassification, tf.MPNetForSequenceClassification, tf.DistilBertForMaskedLM]
)
def test_models_with_heads(head: Any, wrapped: list[str]) -> None:
    sizes = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80} if "Distil" in head.__name__ else SIZES
    model = head(head.config_class(**sizes, **OTHERS)).eval()
    twin = fuse(copy.deepcopy(model))
    inputs = batch(3, 8)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        wrapped.clear()
        found = twin(**inputs).logits
    expected, found = (x[real] if x.dim() == 3 else x for x in (expected, found))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not wrapped


def test_the_model_steps_aside(bert: tf.PreTrainedModel, wrapped: list[str]) -> None:
    twin, inputs = fuse(copy.deepcopy(bert)), batch(2, 7, padded=False)

    def own(change: Callable[[Any], Any], *, exact: bool = False) -> None:
        each = []
        for model in (copy.deepcopy(bert), copy.deepcopy(twin)):
            change(model)
            embedded: list[int] = []
            model.embeddings.register_forward_hook(lambda *_, seen=embedded: seen.append(1))
            wrapped.clear()
            with torch.no_grad():
                each.append(model(**{k: v.clone() for k, v in inputs.items()}, return_dict=True))
            assert wrapped == ["BertModel"]
            assert len(embedded) == 1
        torch.testing.assert_close(each[0].last_hidden_state, each[1].last_hidden_state, rtol=1e-3, atol=1e-3)

    own(lambda model: setattr(model.config, "is_decoder", True))
    own(lambda model: setattr(model.config, "output_hidden_states", True))
    own(lambda model: model.bfloat16())
    own(lambda model: model.encoder.layer[0].register_forward_hook(lambda *_: None))
    own(lambda model: vars(model.encoder).pop("forward", None))
    own(lambda model: setattr(model, "encoder", copy.deepcopy(model.encoder)))


def test_what_others_have_made_of_a_model_stays(bert: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = bert.forward
    bert.forward = functools.wraps(own)(lambda *given, **others: calls.append(1) or own(*given, **others))
    patched = bert.forward
    fuse(bert)
    assert bert.forward is patched
    assert isinstance(vars(bert.encoder)["forward"], FusedForward)
    del bert.forward
    fuse(bert)
    known = bert.forward
    right = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda *arguments: -right(*arguments))
    for module in (bert, bert.encoder):
        vars(module).pop("forward")
    expected = states(bert, batch(2, 7, padded=False))
    vars(bert)["forward"] = known
    with pytest.warns(FactorformerWarning, match="are not run in one call"):
        fuse(bert, "int8")
    assert bert.forward is known
    del bert.forward
    torch.testing.assert_close(states(bert, batch(2, 7, padded=False)), expected, rtol=1e-4, atol=1e-4)


def test_weights_that_change(bert: tf.PreTrainedModel, calls: list[int]) -> None:
    inputs = batch(2, 7, padded=False)
    twin, tried = fuse(copy.deepcopy(bert)), len(calls)

    def both(change: Callable[[Any], None]) -> None:
        for each in (bert, twin):
            with torch.no_grad():
                change(each.encoder.layer[1].intermediate)
        torch.testing.assert_close(states(twin, inputs), states(bert, inputs), rtol=1e-4, atol=1e-4)

    both(lambda block: None)
    both(lambda block: block.dense.weight.mul_(2))
    both(lambda block: setattr(block.dense.bias, "data", torch.ones(80)))
    both(lambda block: setattr(block.dense, "weight", nn.Parameter(torch.full((80, 48), 0.01))))
    other = nn.Linear(48, 80)
    both(lambda block: setattr(block, "dense", copy.deepcopy(other)))
    assert len(calls) == tried + 5
    both(lambda block: setattr(block, "dense", nn.Sequential(copy.deepcopy(other))))  # which nothing here knows
    assert len(calls) == tried + 5


def test_rounding_that_begins(bert: tf.PreTrainedModel) -> None:
    factorformer.compress(bert, factorformer.plan(bert, "svd", ratio=2))
    inputs, twin = batch(2, 7, padded=False), fuse(copy.deepcopy(bert))
    before = states(twin, inputs)
    for each in (bert, twin):
        for layer in each.modules():
            if isinstance(layer, FactorizedMatrix):
                layer.fake_quantize(4)
    torch.testing.assert_close(states(twin, inputs), states(bert, inputs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(states(twin, inputs), before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("columns", [True, False])
def test_structures_that_the_kernels_cannot_read(
    bert: tf.PreTrainedModel, columns: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of others: matrices that are stored as their transpose, or more of them than kernels multiply in one go."""
    factorformer.compress(bert, factorformer.plan(bert, "svd", ratio=2))
    inputs, chain = batch(2, 7, padded=False), LowRank.chain
    expected = states(bert, inputs)

    def other(self: LowRank, factors: Any) -> list[Dense]:
        *first, last = chain(self, factors)
        if columns:
            return [*first, Dense(last.weight.T.contiguous(), columns=True)]
        return [*first, *(Dense(torch.eye(last.weight.shape[1])) for _ in range(cpu.LONGEST)), last]

    monkeypatch.setattr(LowRank, "chain", other)
    fuse(bert)
    tried = len(calls)
    torch.testing.assert_close(states(bert, inputs), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == tried + 1


def test_embeddings_that_somebody_changed(bert: tf.PreTrainedModel, calls: list[int]) -> None:
    inputs, twin = batch(2, 7, padded=False), fuse(copy.deepcopy(bert))
    for each in (bert, twin):
        each.embeddings.LayerNorm = nn.Identity()
    tried = len(calls)
    torch.testing.assert_close(states(twin, inputs), states(bert, inputs), rtol=1e-4, atol=1e-4)
    assert len(calls) == tried + 1
    hook = twin.embeddings.register_forward_hook(lambda module, args, output: output.double())
    with pytest.raises(RuntimeError, match="dtype"):  # as torch does
        states(twin, inputs)
    hook.remove()
    torch.testing.assert_close(states(twin, inputs), states(bert, inputs), rtol=1e-4, atol=1e-4)


def test_masks_elsewhere_are_not_read() -> None:
    assert _allowed(torch.ones(1, 1, 1, 4, dtype=torch.bool), 1, 4) is not None
    assert _allowed(torch.ones(1, 1, 1, 4, dtype=torch.bool, device="meta"), 1, 4) is None


def test_it_is_made_a_method_once_more(bert: tf.PreTrainedModel, calls: list[int]) -> None:
    """As accelerate does when it unwraps a model."""
    inputs = batch(2, 7, padded=False)
    expected, tried = states(fuse(bert), inputs), len(calls)
    bert.forward = types.MethodType(bert.forward, bert)
    assert torch.equal(states(bert, inputs), expected)
    with torch.no_grad():
        assert torch.equal(bert(inputs["input_ids"], inputs["attention_mask"])[0], expected)
    assert len(calls) == tried + 2


def test_a_fused_optimizer(bert: tf.PreTrainedModel) -> None:
    """Whose writes no tensor counts."""
    inputs = batch(2, 7, padded=False)
    fuse(bert, "int8")
    before = states(bert, inputs)
    bert.train()
    optimizer = torch.optim.AdamW(bert.parameters(), lr=0.1, fused=True)
    bert(**inputs).last_hidden_state.square().sum().backward()
    optimizer.step()
    after = states(bert.eval(), inputs)
    assert (after - before).norm() > 0.1 * before.norm()
    assert torch.equal(after, states(fuse(copy.deepcopy(bert), "int8"), inputs))


def test_compiled_training_is_seen(bert: tf.PreTrainedModel) -> None:
    """Fused optimizers change weights, of which no tensor tells, and compiled passes are traced but once."""
    fuse(bert)
    inputs = batch(2, 9)
    states(bert, inputs)
    compiled = torch.compile(bert, backend="eager")
    optimizer = torch.optim.AdamW(bert.parameters(), lr=0.01, fused=True)
    for _ in range(2):
        compiled(**inputs).last_hidden_state.square().sum().backward()
        optimizer.step()
        assert torch.equal(states(bert, inputs), states(fuse(copy.deepcopy(bert)), inputs))


def test_dropout_and_patches_inside(bert: tf.PreTrainedModel, calls: list[int]) -> None:
    inputs = batch(2, 9)
    known, tried = states(fuse(bert), inputs), len(calls)
    for module in bert.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(states(bert, inputs), states(bert, inputs))
    bert.eval()
    attention = bert.encoder.layer[1].attention.self
    attention.forward = lambda *_, **__: (torch.zeros(2, 9, 48), None)
    assert not torch.allclose(states(bert, inputs), known)
    assert len(calls) == tried
    del attention.forward
    assert torch.equal(states(bert, inputs), known)


def test_layers_of_other_sizes_and_makes(bert: tf.PreTrainedModel, calls: list[int]) -> None:
    inputs = batch(3, 40)
    block = bert.encoder.layer[1]
    block.intermediate.dense, block.output.dense = nn.Linear(48, 700), nn.Linear(700, 48)
    twin, tried = fuse(copy.deepcopy(bert)), len(calls)
    found = states(twin, inputs)
    assert len(calls) == tried + 1
    assert_close(found, states(bert, inputs), inputs["attention_mask"], BOUNDS["float32"])

    class Other(type(block.attention.self)):
        pass

    for change in (
        lambda layer: setattr(layer.attention.self, "value", nn.Linear(48, 52)),
        lambda layer: setattr(layer, "attention", nn.Identity()),
        lambda layer: setattr(layer.attention.self, "__class__", Other),
        lambda layer: setattr(layer.output, "forward", lambda x, y: y),
        lambda layer: setattr(layer.output, "LayerNorm", nn.LayerNorm(48, elementwise_affine=False)),
    ):
        twin = copy.deepcopy(bert)
        assert stacks_of(twin)
        change(twin.encoder.layer[0])
        assert not stacks_of(twin)


def test_training_and_other_types(bert: tf.PreTrainedModel, calls: list[int]) -> None:
    inputs = batch(2, 7)
    twin, tried = fuse(copy.deepcopy(bert)), len(calls)
    for each in (bert, twin):
        each(**inputs).last_hidden_state.square().sum().backward()
    for (name, one), (_, other) in zip(bert.named_parameters(), twin.named_parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-3, msg=name)
    half = [states(each.bfloat16(), inputs) for each in (bert, twin)]
    torch.testing.assert_close(half[0], half[1], rtol=0, atol=0)
    assert len(calls) == tried


def test_copies_and_files(model: tf.PreTrainedModel, tmp_path: Path) -> None:
    inputs = batch(2, 7)
    twin = fuse(copy.deepcopy(model))
    expected = states(twin, inputs)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), fuse(twin)):
        assert torch.equal(states(other, inputs), expected)
        (stack,) = stacks_of(other)
        assert stack.forward.stack is stack
        assert isinstance(other.forward, FusedModel)
        assert other.forward.model is other
        assert other.forward.layers is stack.forward
    twin.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not any("forward" in vars(m) for m in loaded.modules())
    torch.testing.assert_close(states(loaded, inputs), states(model, inputs))


def test_what_is_not_known_is_said(bert: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"'int7'.*'int8'.*allowed: float32, bfloat16, int8"):
        fuse(bert, "int7")  # type: ignore[arg-type]
    other = tf.BertModel(tf.BertConfig(**SIZES, **OTHERS, hidden_act="relu"))
    with pytest.warns(FactorformerWarning, match="BertModel does not run in one call.*int8.*not known"):
        fuse(other, "int8")
    assert not stacks_of(other)
    with pytest.warns(FactorformerWarning, match="BertModel does not run in one call: its layers are not known"):
        fuse(other)
    with pytest.warns(FactorformerWarning, match="does not run in one call.*it is bfloat16 on cpu, not float32"):
        fuse(made("bert").bfloat16(), "int8")
    decoder = tf.BertLMHeadModel(tf.BertConfig(**SIZES, **OTHERS, is_decoder=True))
    assert not stacks_of(decoder)
    right = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda *arguments: -right(*arguments))
    with pytest.warns(FactorformerWarning, match="layers of BertModel are not run in one call.*differ by"):
        fuse(bert)
    monkeypatch.undo()
    inputs = batch(2, 7, padded=False)
    assert torch.equal(states(bert, inputs), states(copy.deepcopy(bert), inputs))


def test_rounding_that_a_random_batch_magnifies(bert: tf.PreTrainedModel) -> None:
    """As all-mpnet-base-v2 does, whose layers were not run in one call in bfloat16."""
    with torch.no_grad():
        for layer in bert.encoder.layer:
            layer.attention.self.query.weight *= 2000
            layer.attention.self.value.weight *= 10
    inputs = batch(2, 16)
    exact, mask = states(bert, inputs), inputs["attention_mask"].bool()
    for products, least in (("bfloat16", 0.08), ("int8", 0.15)):
        twin = fuse(copy.deepcopy(bert), products)
        assert stacks_of(twin)
        assert (states(twin, inputs) - exact)[mask].norm() > least * exact[mask].norm()


def test_a_type_that_is_refused_leaves_others(bert: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "ROUGHLY", 0.0)
    with pytest.warns(FactorformerWarning, match="rounding to int8 would change"):
        fuse(bert, "int8")
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(bert, "bfloat16")
    (stack,) = stacks_of(bert)
    assert isinstance(stack.forward, FusedForward)


def test_what_is_no_number_is_no_agreement() -> None:
    one = torch.ones(2)
    assert fused._deviation([one, one], [one, one]) == 0
    assert fused._deviation([one, one], [one, one * float("nan")]) == float("inf")


def test_time_is_told(bert: tf.PreTrainedModel) -> None:
    fuse(bert)
    states(bert, batch(2, 30, padded=False))
    (stack,) = stacks_of(bert)
    encoder = stack.forward.encoder
    assert encoder is not None
    with encoder.watched() as seconds:
        assert not seconds
        states(bert, batch(2, 30, padded=False))
    assert seconds["products"] > 0
    assert seconds["attention"] > 0
    assert sum(seconds.values()) < 60
