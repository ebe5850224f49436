"""What one token, one row or one call may not do to others."""

import copy

import pytest
import torch
from reference import DEVICE, generator_state

from cce_dist import VocabShard, linear_cross_entropy
from cce_dist.loss.settings import Gradient

every_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def problem(tokens: int = 8, vocab: int = 600, width: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(DEVICE).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(DEVICE).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator).to(DEVICE)


@every_backend
@pytest.mark.parametrize("gradient", ["exact", "filtered", "unbiased"])
def test_a_nan_token_leaves_the_others_hidden_gradients_alone(gradient: str, backend: str) -> None:
    hidden, weight, labels = problem()
    with torch.no_grad():
        hidden[3, 0] = torch.nan
    loss = linear_cross_entropy(
        hidden, weight, labels, gradient=gradient, filter_eps=0.5, softcap=5.0, reduction="sum", backend=backend
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad.isnan().any(1).tolist() == [row == 3 for row in range(8)]


@every_backend
def test_an_infinite_upstream_gradient_stays_with_its_token(backend: str) -> None:
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden, weight, labels, gradient="exact", reduction="none", backend=backend)
    upstream = torch.ones(8, device=DEVICE)
    upstream[5] = torch.inf
    (grad,) = torch.autograd.grad(loss, hidden, upstream)
    assert grad.isfinite().all(1).tolist() == [row != 5 for row in range(8)]


@every_backend
def test_rows_that_a_bias_of_minus_infinity_rules_out_do_not_hide_very_negative_logits(backend: str) -> None:
    hidden, weight, labels = problem()
    bias = torch.full((600,), -200.0, device=DEVICE)
    bias[256:512] = -torch.inf
    labels = labels % 256
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, gradient="exact", backend=backend)
    expected = torch.nn.functional.cross_entropy((hidden @ weight.T + bias).double(), labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("gradient", ["exact", "unbiased", "filtered"])
def test_no_random_number_of_torch_is_taken(gradient: Gradient) -> None:
    hidden, weight, labels = problem()
    before = generator_state()
    linear_cross_entropy(hidden, weight, labels, gradient=gradient).backward()
    assert torch.equal(before, generator_state())


def test_labels_of_eight_bits_shift_like_those_of_64() -> None:
    hidden, weight, labels = problem()
    labels = labels % 256
    wide = linear_cross_entropy(hidden, weight, labels, shift=1)
    assert torch.equal(linear_cross_entropy(hidden, weight, labels.to(torch.uint8), shift=1), wide)


def test_a_frozen_classifier_and_no_valid_label_make_an_empty_queue() -> None:
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(
        hidden, weight.detach(), torch.full_like(labels, -100), reduction="sum", backend="triton"
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_part_of_the_rows_without_a_group_is_refused() -> None:
    hidden, weight, labels = problem()
    with pytest.raises(
        ValueError, match=r"without vocab_group this process must hold all 600 rows, got \(\(0, 300\),\)"
    ):
        linear_cross_entropy(hidden, weight[:300], labels, shard=VocabShard(((0, 300),), 600, None))


def test_a_copy_of_a_shard_is_the_shard() -> None:
    shard = VocabShard.whole(600)
    assert copy.deepcopy({"shard": shard})["shard"] is shard
