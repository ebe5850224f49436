"""Functions with others' arguments: results and gradients are those of full logits, in one process and on ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import grad_of, leaf, relative_error
from torch import Tensor
from torch.nn import functional as F

from cce_dist.compat import apple, verl

VOCAB, WIDTH, TOKENS = 96, 24, 29


def problem(vocab: int = VOCAB) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(vocab, (TOKENS,), generator=draw)
    return {
        "hidden": torch.randn(TOKENS, WIDTH, generator=draw),
        "weight": torch.randn(vocab, WIDTH, generator=draw) * 0.5,
        "labels": labels,
        "upstream": torch.randn(2, TOKENS, generator=draw),
    }


# verl's: log-probabilities and entropies of tensor-parallel ranks, which sum the hidden gradient themselves


def verl_outcome(hidden: Tensor, rows: Tensor, given: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    hidden, rows = leaf(hidden), leaf(rows)
    logprobs, entropy = verl.linear_cross_entropy(hidden, rows, given["labels"], 1.5, "none", group)
    (given["upstream"][0] * logprobs + given["upstream"][1] * entropy).sum().backward()
    return {
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "hidden": grad_of(hidden),
        "rows": grad_of(rows),
    }


def verl_truth(given: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden, weight = leaf(given["hidden"].double()), leaf(given["weight"].double())
    log_p = (hidden @ weight.T / 1.5).log_softmax(-1)
    logprobs, entropy = log_p.gather(-1, given["labels"][:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (given["upstream"][0] * logprobs + given["upstream"][1] * entropy).sum().backward()
    return {"logprobs": logprobs, "entropy": entropy, "hidden": grad_of(hidden), "rows": grad_of(weight)}


def test_verls_function_gives_log_probabilities_and_entropies() -> None:
    given = problem()
    got, truth = verl_outcome(given["hidden"], given["weight"], given, None), verl_truth(given)
    for name, wanted in truth.items():
        assert relative_error(got[name], wanted.detach()) < 1e-6, name


def _verl_on_ranks(given: dict[str, Tensor]) -> dict[str, Tensor]:
    group, size = dist.group.WORLD, VOCAB // dist.get_world_size()
    first = dist.get_rank() * size
    for _ in range(2):  # the second call finds the shard of the first
        got = verl_outcome(given["hidden"], given["weight"][first : first + size], given, group)
    dist.all_reduce(got["hidden"])  # as the backward of a gathered sequence does
    return got


@pytest.mark.parametrize("world", [2, 4])
def test_verls_function_on_ranks_leaves_the_hidden_gradient_to_be_summed(ranks: RankPool, world: int) -> None:
    given = problem()
    truth = verl_truth(given)
    for rank, got in enumerate(ranks.run(world, _verl_on_ranks, given)):
        size = VOCAB // world
        truth_here = {**truth, "rows": truth["rows"][rank * size : (rank + 1) * size]}
        for name, wanted in truth_here.items():
            assert relative_error(got[name], wanted.detach()) < 1e-6, name


def test_another_reduction_of_verls_is_refused() -> None:
    given = problem()
    with pytest.raises(ValueError, match="reduction must be \"none\", got 'mean'"):
        verl.linear_cross_entropy(given["hidden"], given["weight"], given["labels"], 1.0, "mean")


# Apple's: the loss, with any rows of the vocabulary on each rank


def apple_truth(given: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden, weight = leaf(given["hidden"].double()), leaf(given["weight"].double())
    logits = 3 * torch.tanh(hidden @ weight.T / 3)
    loss = F.cross_entropy(logits[:-1], given["labels"][1:], ignore_index=7, reduction="sum")
    loss.backward()
    return {"loss": loss.detach(), "hidden": grad_of(hidden), "rows": grad_of(weight)}


def apple_outcome(hidden: Tensor, rows: Tensor, labels: Tensor, **options: Any) -> dict[str, Tensor]:
    hidden, rows = leaf(hidden), leaf(rows)
    loss = apple.linear_cross_entropy(
        hidden, rows, labels, None, 7, softcap=3.0, reduction="sum", shift=True, impl="cce_exact", **options
    )
    loss.backward()
    return {"loss": loss.detach(), "hidden": grad_of(hidden), "rows": grad_of(rows)}


def test_apples_function_gives_the_loss() -> None:
    given = problem()
    got = apple_outcome(given["hidden"], given["weight"], given["labels"])
    for name, wanted in apple_truth(given).items():
        assert relative_error(got[name], wanted) < 1e-6, name
    for settings in ({"filter_eps": None}, {"filter_e_grad": False}, {"impl": "torch_compile"}, {"accum_c_fp32": True}):
        loss, lse = apple.linear_cross_entropy(
            given["hidden"], given["weight"], given["labels"], return_lse=True, **settings
        )
        logits = given["hidden"] @ given["weight"].T
        torch.testing.assert_close(loss, F.cross_entropy(logits, given["labels"]))
        torch.testing.assert_close(lse, logits.logsumexp(-1))
    with pytest.raises(ValueError, match="impl must be one of cce, .*, torch_compile; got 'fast'"):
        apple.linear_cross_entropy(given["hidden"], given["weight"], given["labels"], impl="fast")


def _apple_on_ranks(given: dict[str, Tensor], reduce_e_grad: bool) -> dict[str, Tensor]:
    options = apple.VocabParallelOptions.from_vocab(given["weight"].shape[0], reduce_e_grad=reduce_e_grad)
    rows = given["weight"][options.start : options.stop]
    for _ in range(2):
        got = apple_outcome(given["hidden"], rows, given["labels"], vocab_parallel_options=options)
    if not reduce_e_grad:
        dist.all_reduce(got["hidden"])
    return {**got, "span": torch.tensor([options.start, options.stop])}


def _two_vocabularies(by_hand: bool) -> list[dict[str, Tensor]]:
    """Of which the first rank holds the same rows, and the second one another number."""
    got = []
    for vocab in (10, 9, 10):
        given = problem(vocab)
        options = apple.VocabParallelOptions.for_vocab(vocab)
        if by_hand:
            options = apple.VocabParallelOptions(options.start, options.stop)
        rows = given["weight"][options.start : options.stop]
        got.append(apple_outcome(given["hidden"], rows, given["labels"], vocab_parallel_options=options))
    return got


@pytest.mark.parametrize("by_hand", [True, False])
def test_vocabularies_that_share_a_ranks_rows_are_told_apart(ranks: RankPool, by_hand: bool) -> None:
    for of_rank in ranks.run(2, _two_vocabularies, by_hand):
        for got, vocab in zip(of_rank, (10, 9, 10), strict=True):
            truth = apple_truth(problem(vocab))
            assert relative_error(got["loss"], truth["loss"]) < 1e-6
            assert relative_error(got["hidden"], truth["hidden"]) < 1e-6


@pytest.mark.parametrize("reduce_e_grad", [True, False])
@pytest.mark.parametrize(("world", "vocab"), [(3, 101), (4, 3)])
def test_apples_function_on_ranks_with_uneven_rows(
    ranks: RankPool, world: int, vocab: int, reduce_e_grad: bool
) -> None:
    given = problem(vocab)
    truth, end = apple_truth(given), 0
    for got in ranks.run(world, _apple_on_ranks, given, reduce_e_grad):
        start, stop = got.pop("span").tolist()
        assert start == end
        end = stop
        for name, wanted in {**truth, "rows": truth["rows"][start:stop]}.items():
            assert relative_error(got[name], wanted) < 2e-6, name
    assert end == vocab
