"""Sensitivities are those of the definition, for every architecture, and leave the model as it was."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tests.tiny import MODELS, Tiny, text
from torch import Tensor, nn

from factorformer.errors import DataError
from factorformer.layers.dense import dense_weight
from factorformer.layers.surgery import find_matrices
from factorformer.planning.evidence.sensitivity import measure_sensitivities


def shrunk(model: nn.Module, part: float = 0.9):
    """Every weight scaled: its squared relative error is known."""
    return lambda name: (part * dense_weight(model.get_submodule(name)), (1 - part) ** 2)


@pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS.keys())
def test_every_architecture_is_measured_and_left_as_it_was(tiny: Tiny) -> None:
    model = tiny.build().train()
    names = [m.name for m in find_matrices(model, "all")[0] if m.dense is None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    done: list[int] = []
    found = measure_sensitivities(model, names, shrunk(model), [tiny.inputs()], done.append)
    assert list(found) == names
    assert done == list(range(1, len(names) + 1))
    assert all(value >= 0 for value in found.values())
    assert all(value > 0 for value in found.values())  # what makes logits only is compared as well
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


class Product(nn.Module):
    """Two matrices in a row, without anything between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.second(self.first(x))


def test_of_a_linear_model_they_are_known() -> None:
    model, x = Product(), torch.randn(3, 20, 6)
    mask = torch.ones(3, 20)
    mask[1, 9:] = 0
    found = measure_sensitivities(model, ["first", "second"], shrunk(model), [{"x": x, "attention_mask": mask}])
    y = model(x).detach()[mask.bool()]
    expected = float(y.square().sum() / (y - y.mean(0)).square().sum())
    assert found == pytest.approx({"first": expected, "second": expected}, rel=1e-4)


def test_padding_does_not_count() -> None:
    model = MODELS["bert"].build()
    names = [m.name for m in find_matrices(model)[0]]
    inputs = text(4, 10)
    inputs["attention_mask"][:, 7:] = 0
    noisy = {**inputs, "input_ids": inputs["input_ids"].clone()}
    noisy["input_ids"][:, 7:] = 5
    cut = {key: value[:, :7] for key, value in inputs.items()}
    results = [measure_sensitivities(model, names, shrunk(model), [batch]) for batch in (inputs, noisy, cut)]
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    assert results[0] == pytest.approx(results[2], rel=1e-3)


def test_rows_come_from_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorformer.planning.evidence.sensitivity.ROWS", 6)
    model, seen = Product(), []
    model.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    measure_sensitivities(model, ["first"], shrunk(model), [{"x": torch.randn(5, 2, 6)} for _ in range(4)])
    assert seen == [2, 2, 1, 2] * 2  # every third row, without labels, before and after


def vectors(kind: str) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    """A model, its inputs, and the matrices behind its last hidden states."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = tf.BertConfig(
        **sizes, vocab_size=99, num_labels=2 if kind.endswith("Answering") else 9, tie_word_embeddings=False
    )
    model = getattr(tf, kind)(config).eval()
    behind = {
        "BertForMaskedLM": ["cls.predictions.transform.dense", "cls.predictions.decoder"],
        "BertForTokenClassification": ["classifier"],
        "BertForQuestionAnswering": ["qa_outputs"],
        "BertForPreTraining": ["cls.predictions.transform.dense", "cls.predictions.decoder"],
        "BertForSequenceClassification": ["bert.pooler.dense", "classifier"],
    }
    return model, text(4, 9), behind[kind]


def test_what_is_behind_the_states_is_measured_by_the_logits() -> None:
    for kind in ("MaskedLM", "TokenClassification", "QuestionAnswering", "PreTraining", "SequenceClassification"):
        model, inputs, names = vectors(f"BertFor{kind}")
        inputs["attention_mask"][:, 7:] = 0
        noisy = {**inputs, "input_ids": inputs["input_ids"].clone()}
        noisy["input_ids"][:, 7:] = 5
        found, again = (measure_sensitivities(model, names, shrunk(model), [batch]) for batch in (inputs, noisy))
        assert all(value > 0 for value in found.values()), kind
        assert found == pytest.approx(again, rel=1e-3), kind  # padding does not count


def test_many_logits_are_compared_at_some_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama"].build()
    whole = measure_sensitivities(model, ["lm_head"], shrunk(model), [text(32, 20)])["lm_head"]
    monkeypatch.setattr("factorformer.planning.evidence.sensitivity.LOGITS", 99 * 100)
    assert measure_sensitivities(model, ["lm_head"], shrunk(model), [text(32, 20)])["lm_head"] == pytest.approx(
        whole, rel=0.2
    )


def test_what_the_output_does_not_depend_on_is_not_measured() -> None:
    model = tf.BertModel(tf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99))
    found = measure_sensitivities(model, ["pooler.dense"], shrunk(model), [text()])
    assert found == {"pooler.dense": 0.0}


def test_an_exact_replacement_has_none() -> None:
    model = Product()
    assert measure_sensitivities(
        model, ["first"], lambda name: (dense_weight(model.first), 0.0), [{"x": torch.randn(2, 3, 6)}]
    ) == {"first": 0.0}


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = Product().train()
    before = model.first.weight.clone()

    def fail(name: str) -> tuple[Tensor, float]:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        measure_sensitivities(model, ["first"], fail, [{"x": torch.randn(2, 3, 6)}])
    assert torch.equal(model.first.weight, before)
    assert model.training
    with pytest.raises(RuntimeError, match=r"shape|size"):
        measure_sensitivities(model, ["first"], lambda _: (torch.zeros(7, 9), 1.0), [{"x": torch.randn(2, 3, 6)}])
    assert torch.equal(model.first.weight, before)


def test_no_data_is_refused() -> None:
    with pytest.raises(DataError, match="calibration data is empty"):
        measure_sensitivities(Product(), ["first"], shrunk(Product()), [])


class Silent(Product):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.first(x).argmax()


def test_a_model_must_return_something() -> None:
    with pytest.raises(DataError, match="Silent returned no tensor"):
        measure_sensitivities(Silent(), ["first"], shrunk(Product()), [{"x": torch.randn(2, 3, 6)}])


def test_a_logit_for_each_token_is_told_from_those_for_each_row() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = tf.ElectraForPreTraining(tf.ElectraConfig(**sizes, vocab_size=99, embedding_size=32))
    batches = [text(2, length) for length in (7, 5)]
    names = ["discriminator_predictions.dense"]
    assert measure_sensitivities(model, names, shrunk(model), batches)[names[0]] > 0
