"""Distillation losses vanish at equality, see only real tokens, and do not depend on scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from factorformer.training.distillation import (
    WITHOUT_LABELS,
    DistillationWeights,
    hidden_loss,
    logit_loss,
    mean_pool,
    pooled_loss,
)

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()


def hidden(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed))


@given(classes=st.integers(1, 6), temperature=st.floats(0.5, 8), seed=st.integers(0, 9))
def test_losses_are_zero_at_equality_and_positive_elsewhere(classes: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 3, classes, generator=generator)
    assert logit_loss(teacher, teacher, temperature).abs() < 1e-5
    assert logit_loss(student, teacher, temperature) > 1e-6
    states, others = hidden(seed), hidden(seed + 100)
    assert hidden_loss([states], [states], MASK) == 0
    assert hidden_loss([others], [states], MASK) > 0.1
    assert pooled_loss(states[:, 0], states[:, 0]).abs() < 1e-6
    assert pooled_loss(others[:, 0], states[:, 0]) > 0.01


def test_logit_loss_is_the_divergence_of_softened_predictions() -> None:
    student, teacher = torch.randn(2, 4, 3)
    p, q = (x.div(2).softmax(-1) for x in (student, teacher))
    expected = (q * (q / p).log()).sum(-1).mean() * 4
    torch.testing.assert_close(logit_loss(student, teacher, 2.0), expected)
    # Predictions are the same under a shift of all logits, and so is the loss.
    torch.testing.assert_close(logit_loss(student + 5, teacher - 3, 2.0), expected)


def test_logit_loss_of_a_regression_is_the_squared_error() -> None:
    student, teacher = torch.randn(2, 4, 1)
    torch.testing.assert_close(logit_loss(student, teacher, 2.0), (student - teacher).square().mean())


def test_labels_that_do_not_exclude_each_other_are_followed_one_by_one() -> None:
    student, teacher = torch.randn(2, 4, 3)
    p, q = (x.div(2).sigmoid() for x in (student, teacher))
    divergence = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(logit_loss(student, teacher, 2.0, independent=True), 4 * divergence.sum(-1).mean())
    assert logit_loss(teacher, teacher, 2.0, independent=True).abs() < 1e-6


def test_masked_positions_are_ignored() -> None:
    student, teacher = hidden(0), hidden(1)
    expected, pooled = hidden_loss([student], [teacher], MASK), mean_pool(student, MASK)
    student[~MASK], teacher[~MASK] = 1e6, float("nan")
    assert hidden_loss([student], [teacher], MASK) == expected
    assert torch.equal(mean_pool(student, MASK), pooled)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_large_states_do_not_drown_small_ones(scale: float) -> None:
    student, teacher = hidden(0), hidden(1)
    torch.testing.assert_close(
        hidden_loss([student * scale], [teacher * scale], MASK), hidden_loss([student], [teacher], MASK)
    )


def test_layers_are_averaged() -> None:
    states = [hidden(seed) for seed in range(4)]
    one, two = hidden_loss([states[0]], [states[2]], MASK), hidden_loss([states[1]], [states[3]], MASK)
    torch.testing.assert_close(hidden_loss(states[:2], states[2:], MASK), (one + two) / 2)


def test_models_of_different_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        hidden_loss([hidden()], [hidden(), hidden()], MASK)


def test_mean_pool_is_the_mean_of_real_tokens() -> None:
    states = hidden()
    expected = torch.stack([state[mask].mean(0) for state, mask in zip(states, MASK, strict=True)])
    torch.testing.assert_close(mean_pool(states, MASK), expected)
    nothing = mean_pool(states, torch.zeros_like(MASK))
    assert not nothing.any()


def test_pooled_loss_is_one_minus_the_cosine() -> None:
    student, teacher = torch.randn(2, 4, 5)
    torch.testing.assert_close(pooled_loss(student, teacher), 1 - F.cosine_similarity(student, teacher).mean())
    torch.testing.assert_close(pooled_loss(3 * teacher, teacher), torch.tensor(0.0))
    torch.testing.assert_close(pooled_loss(-teacher, teacher), torch.tensor(2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    student, teacher = hidden(0).to(dtype), hidden(1).to(dtype)
    for loss, exact in (
        (hidden_loss([student], [teacher], MASK), hidden_loss([hidden(0)], [hidden(1)], MASK)),
        (logit_loss(student[:, 0], teacher[:, 0], 2.0), logit_loss(hidden(0)[:, 0], hidden(1)[:, 0], 2.0)),
        (pooled_loss(student[:, 0], teacher[:, 0]), pooled_loss(hidden(0)[:, 0], hidden(1)[:, 0])),
    ):
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.float(), exact, rtol=0.05, atol=0.02)


def test_gradients_reach_the_student_only_through_real_tokens() -> None:
    student = hidden(0).requires_grad_()
    hidden_loss([student], [hidden(1)], MASK).backward()
    assert student.grad is not None
    assert student.grad[MASK].abs().min() > 0
    assert not student.grad[~MASK].any()


def test_without_labels_only_states_and_embeddings_count() -> None:
    assert (WITHOUT_LABELS.labels, WITHOUT_LABELS.logits) == (0, 0)
    assert min(WITHOUT_LABELS.hidden, WITHOUT_LABELS.pooled) > 0
    assert DistillationWeights().labels > 0
