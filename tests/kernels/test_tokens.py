"""Numbers of tokens around the kernels: their order, their losses, and their outputs' gradients, in both backends."""

import pytest
import torch
from reference import DEVICE
from torch import Tensor

from cce_dist.kernels import torch_backend
from cce_dist.kernels.problem import Normaliser, Order, OutputGradients
from cce_dist.kernels.triton import backend as triton_backend

BACKENDS = {"torch": torch_backend, "triton": triton_backend}
every_backend = pytest.mark.parametrize("name", BACKENDS)
IGNORED, VOCAB = -100, 1000


def labels_of(tokens: int, ignored: float) -> Tensor:
    draw = torch.Generator().manual_seed(tokens)
    labels_N = torch.randint(VOCAB, (tokens,), generator=draw)
    return labels_N.masked_fill(torch.rand(tokens, generator=draw) < ignored, IGNORED).to(DEVICE)


def order_of(labels_N: Tensor) -> Order:
    return torch_backend.valid_first(labels_N, labels_N, IGNORED, VOCAB).order


@every_backend
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 77, 4096, 9001])  # also several steps of a walk
def test_valid_tokens_come_first_in_their_order(name: str, tokens: int, ignored: float) -> None:
    labels_N = labels_of(tokens, ignored)
    column_N = torch.where(labels_N < VOCAB // 2, labels_N, -1)  # as if the others were another rank's
    order, target_N, legal = BACKENDS[name].valid_first(labels_N, column_N, IGNORED, VOCAB)
    labels, valid = labels_N.tolist(), [n for n, label in enumerate(labels_N.tolist()) if label != IGNORED]
    expected = valid + [n for n in range(tokens) if labels[n] == IGNORED]
    assert order.n_valid.tolist() == [len(valid)]
    assert order.token_N.tolist() == expected
    assert [order.place_N.tolist()[n] for n in expected] == list(range(tokens))
    assert target_N.tolist() == [column_N.tolist()[n] if n in set(valid) else -1 for n in expected]
    assert bool(legal)
    assert {x.dtype for x in (*order, target_N)} == {torch.int32}


@every_backend
@pytest.mark.parametrize("cut", ["every other", "expanded"])
def test_labels_may_lie_apart(name: str, cut: str) -> None:
    labels_N = labels_of(600, 0.3)[::2] if cut == "every other" else labels_of(1, 0.0).expand(300)
    got = BACKENDS[name].valid_first(labels_N, labels_N, IGNORED, VOCAB)
    wanted = torch_backend.valid_first(labels_N.clone(), labels_N.clone(), IGNORED, VOCAB)
    assert torch.equal(got.target_N, wanted.target_N)
    assert all(torch.equal(x, y) for x, y in zip(got.order, wanted.order, strict=True))


@every_backend
@pytest.mark.parametrize("label", [-1, VOCAB, 1 << 40])
def test_a_label_outside_of_the_vocabulary_is_told(name: str, label: int) -> None:
    labels_N = labels_of(5000, 0.3)
    labels_N[4999] = label
    assert not bool(BACKENDS[name].valid_first(labels_N, labels_N, IGNORED, VOCAB).legal)


@every_backend
def test_losses_go_back_to_where_their_tokens_were(name: str) -> None:
    labels_N = labels_of(1500, 0.4)
    order, valid_N = order_of(labels_N), labels_N != IGNORED
    max_N, log_sum_N, logit_N = torch.randn(3, 1500, device=DEVICE)
    normaliser = Normaliser(max_N, log_sum_N, 0.5)
    nll_N, lse_N = BACKENDS[name].losses(normaliser, logit_N, order)
    of_valid = order.token_N[: int(order.n_valid)].long()
    lse = (max_N.double() + log_sum_N.double()) * 0.5
    for got, wanted in ((nll_N, lse - logit_N.double()), (lse_N, lse)):
        torch.testing.assert_close(got[of_valid].double(), wanted[: of_valid.shape[0]], rtol=1e-6, atol=1e-6)
        assert not got[~valid_N].any()
    nll_N += 1  # the one is no view of the other
    assert not lse_N[~valid_N].any()


@every_backend
@pytest.mark.parametrize("largest", [0.0, 1e-40, 1e-30, 0.75, 1.0, 3e4, 3e38])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize(
    ("dtype", "power"), [(torch.bfloat16, 60), (torch.float16, 127), (torch.float32, 127)], ids=str
)
def test_gradients_of_the_outputs_are_scaled_to_at_most_one(
    name: str, largest: float, with_entropy: bool, dtype: torch.dtype, power: int
) -> None:
    labels_N = labels_of(5000, 0.4)
    order = order_of(labels_N)
    draw = torch.Generator().manual_seed(0)
    grads_N3 = (torch.rand(5000, 3, generator=draw) * largest / 16).to(DEVICE)
    grads_N3[int(order.token_N[7]), 0] = largest
    entropy_N = torch.rand(5000, generator=draw).to(DEVICE) if with_entropy else None
    inverse_N = (torch.rand(5000, generator=draw) / 2 + 0.25).to(DEVICE) if with_entropy else None
    grads = OutputGradients(grads_N3[:, 0], grads_N3[:, 1], grads_N3[:, 2] if with_entropy else None)
    got = BACKENDS[name].upstream(grads, order, dtype, torch.float32, entropy_N, inverse_N)
    tokens = order.token_N[: int(order.n_valid)].long()
    nll, lse, entropy = grads_N3.double()[tokens].unbind(1)
    more = [x.double()[: tokens.shape[0]] for x in (entropy_N, inverse_N) if x is not None]
    softmax = nll + lse
    if with_entropy:
        softmax = (softmax - entropy * more[0]) * more[1]
        nll, entropy = nll * more[1], entropy * more[1]
    scale = float(got.scale)
    assert scale == 2.0 ** round(torch.tensor(scale).log2().item())
    greatest = max(float(x.abs().max()) for x in (softmax, nll))
    if largest == 0:
        assert scale == 1
    elif largest > 1e-37:  # smaller ones have no power of two of their own in every backend
        assert greatest / scale < 1 or scale == 2.0**power
        assert greatest / scale >= 0.5
    assert scale <= 2.0**power
    for part, wanted in ((got.softmax_N, softmax), (got.target_N, nll), (got.log_N, -entropy)):
        if part is None:
            assert not with_entropy
            continue
        off = part[: tokens.shape[0]].double() * scale - wanted
        assert off.norm() <= 3e-7 * wanted.norm() + 1e-43 * tokens.shape[0] ** 0.5  # the smallest number is 1e-45
        assert not part[tokens.shape[0] :].any()


@every_backend
def test_what_is_not_finite_stays_so_and_scales_nothing(name: str) -> None:
    labels_N = labels_of(300, 0.0)
    grad_N = torch.full((300,), 0.25, device=DEVICE)
    grad_N[5], grad_N[9] = torch.nan, torch.inf
    got = BACKENDS[name].upstream(OutputGradients(grad_N, None), order_of(labels_N), torch.bfloat16, torch.float32)
    assert float(got.scale) == 0.5
    assert got.target_N[5].isnan() and got.target_N[9].isinf()
    assert got.target_N.isfinite().sum() == 298


@every_backend
def test_gradients_may_be_expanded_or_missing(name: str) -> None:
    labels_N = labels_of(100, 0.3)
    order = order_of(labels_N)
    one = torch.full((), 0.5, device=DEVICE)
    got = BACKENDS[name].upstream(OutputGradients(None, one.expand(100)), order, torch.bfloat16, torch.float32)
    valid = int(order.n_valid)
    assert (got.softmax_N * got.scale)[:valid].eq(0.5).all() and not got.softmax_N[valid:].any()
    assert not got.target_N.any()
    assert got.log_N is None
    none = BACKENDS[name].upstream(OutputGradients(None, None), order, torch.bfloat16, torch.float32)
    assert float(none.scale) == 1 and not none.softmax_N.any()
