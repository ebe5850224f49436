"""Statistics of the logits beside the loss: those of real logits in fp64, over several chunks, and where it is hard."""

import pytest
import torch
from torch import Tensor

from cce_dist import VocabShard
from cce_dist.loss.statistics import token_statistics


def _statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    whole = VocabShard.whole(weight.shape[0])
    return list(token_statistics(hidden, weight, bias=bias, shard=whole, logit_scale=1.0, softcap=None))


def _reference(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    p = logits.softmax(-1)
    return [logits.argmax(-1), -torch.special.xlogy(p, p).sum(-1), p.square().sum(-1).log(), logits.mean(-1)]


@pytest.mark.parametrize(("tokens", "vocab"), [(5, 2048), (9, 5001), (4100, 2060), (0, 50), (1, 1)])
def test_chunks_make_no_difference(tokens: int, vocab: int) -> None:
    hidden, weight = torch.randn(tokens, 8), torch.randn(vocab, 8)
    for got, wanted in zip(_statistics(hidden, weight), _reference(hidden, weight), strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=2e-6, atol=2e-6)


def test_logits_all_near_minus_200_or_far_apart() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(3000, 8)
    for given in ((hidden, weight, torch.full((3000,), -200.0)), (hidden * 1e4, weight, None)):
        for got, wanted in zip(_statistics(*given), _reference(*given), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5, check_dtype=False)


def test_rows_ruled_out_by_a_bias_of_minus_infinity_have_no_part() -> None:
    hidden, weight, bias = torch.randn(4, 8), torch.randn(3000, 8), torch.zeros(3000)
    bias[:2500] = -torch.inf
    argmax, entropy, squares, mean = _statistics(hidden, weight, bias)
    wanted = _reference(hidden, weight[2500:])
    assert torch.equal(argmax, wanted[0] + 2500)
    torch.testing.assert_close(torch.stack([entropy, squares]).double(), torch.stack(wanted[1:3]), rtol=2e-6, atol=0)
    assert (mean == -torch.inf).all()


def test_a_nan_stays_with_its_token() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(3000, 8)
    hidden[2] = torch.nan
    argmax, *numbers = _statistics(hidden, weight)
    assert all(x.isnan().tolist() == [False, False, True, False] for x in numbers)
    assert (argmax < 3000).all()
