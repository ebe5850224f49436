"""Log-probabilities, entropy and statistics of tokens: every option against full logits in fp64, in one process and on
ranks; entropies where they are hard; what is not asked for costs nothing; errors of use.

Shapes: n tokens of a part, D hidden, V rows of the vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankPool
from reference import DEVICE, ROUNDING, TRITON_DTYPES, assert_bitwise, fixed_draws, grad_of, leaf, relative_error
from sharded import Layout, Runs, device_of, local_rows, make_shard, part_of
from torch import Tensor

from cce_dist import TokenLogprobs, VocabShard, linear_cross_entropy, linear_logprobs
from cce_dist.kernels.problem import TILE
from cce_dist.loss.settings import LogprobSettings, check_settings, resolve

STATISTICS = ("top1", "rank", "sum_sq_probs", "mean_logit")
OUTPUTS = ("logprob", "lse", "entropy")
FIELDS = TokenLogprobs._fields
every_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


@dataclass(frozen=True)
class Case:
    """Inputs of one call over all ranks; entry r of a tuple belongs to the r-th part of the tokens.

    Attributes:
        temperature: one for all, or one for each token of each part.
        upstream: of logprob, lse and entropy of each part, [3, n].
    """

    hidden: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor | None
    temperature: float | tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]
    options: Mapping[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def of(self, part: int) -> float | Tensor:
        return self.temperature if isinstance(self.temperature, float) else self.temperature[part]

    def to(self, device: str) -> "Case":
        moved = {name: tuple(x.to(device) for x in getattr(self, name)) for name in ("hidden", "labels", "upstream")}
        heat = self.temperature
        return replace(
            self,
            **moved,
            weight=self.weight.to(device),
            bias=None if self.bias is None else self.bias.to(device),
            temperature=heat if isinstance(heat, float) else tuple(x.to(device) for x in heat),
        )


def make_case(
    tokens: Sequence[int] = (23,),
    vocab: int = 300,
    dim: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    temperature: float | str = 1.0,
    spread: float = 2.0,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random tokens; ``temperature="each"``: one for each token. A row or two have a bias of −inf."""
    draw = torch.Generator().manual_seed(seed)
    weight = (torch.randn(vocab, dim, generator=draw) * (spread / math.sqrt(dim))).to(dtype)
    ruled_out = torch.arange(vocab) % 97 == 5
    bias_V = torch.where(ruled_out, -torch.inf, torch.randn(vocab, generator=draw)).to(dtype) if bias else None
    labels = []
    for n in tokens:
        ids = torch.randint(vocab, (n,), generator=draw)
        ids = torch.where(ruled_out[ids], (ids + 1) % vocab, ids)
        labels.append(torch.where(torch.rand(n, generator=draw) < 0.2, options.get("ignore_index", -100), ids))
    heat = temperature
    if isinstance(heat, str):
        heat = tuple(0.5 + torch.rand(n, generator=draw) for n in tokens)
    return Case(
        tuple(torch.randn(n, dim, generator=draw).to(dtype) for n in tokens),
        tuple(labels),
        weight,
        bias_V,
        heat,
        tuple(torch.randn(3, max(n - options.get("shift", 0), 0), generator=draw) for n in tokens),
        options,
    )


Outcome = dict[str, tuple[Tensor, ...]]
"""`OUTPUTS`, statistics and dhidden of each part; dweight and dbias in blocks of rows."""


def differentiated(
    found: Sequence[TokenLogprobs], case: Case, parts: Sequence[int], leaves: Mapping[str, Sequence[Tensor]]
) -> Outcome:
    """What was found, and the gradient of its products with the upstream."""
    terms = [
        (case.upstream[part].to(x.logprob.dtype) * torch.stack((x.logprob, x.lse, x.entropy))).sum()
        for part, x in zip(parts, found, strict=True)
        if x.entropy is not None
    ]
    torch.stack(terms).sum().backward()
    outcome = {name: tuple(grad_of(x) for x in xs) for name, xs in leaves.items()}
    for name in TokenLogprobs._fields:
        values = tuple(getattr(x, name) for x in found)
        outcome[name] = tuple(x.detach() for x in values if x is not None)
    return outcome


def full_logits(case: Case, dtype: torch.dtype) -> Outcome:
    """With logits, in ``dtype``; statistics only where they are exact."""
    hidden, weight = [leaf(x.to(dtype)) for x in case.hidden], leaf(case.weight.to(dtype))
    bias = None if case.bias is None else leaf(case.bias.to(dtype))
    found = []
    for part, (hidden_nD, labels_n) in enumerate(zip(hidden, case.labels, strict=True)):
        shift = case.options.get("shift", 0)
        kept = max(labels_n.shape[0] - shift, 0)
        labels_n, heat = labels_n[shift:], case.of(part)
        heat = heat if isinstance(heat, float) else heat.to(torch.promote_types(dtype, torch.float32))[:kept, None]
        valid_n = labels_n != case.options.get("ignore_index", -100)
        z_nV = torch.where(valid_n[:, None], hidden_nD[:kept], 0) @ weight.T
        if bias is not None:
            z_nV = z_nV + bias
        z_nV = z_nV.to(torch.promote_types(dtype, torch.float32)) * case.options.get("logit_scale", 1.0)
        if case.options.get("softcap") is not None:
            z_nV = case.options["softcap"] * torch.tanh(z_nV / case.options["softcap"])
        z_nV = z_nV / heat
        safe_n = torch.where(valid_n, labels_n, 0)
        logp_nV = z_nV.log_softmax(-1)
        p_nV = logp_nV.exp()
        top_n = z_nV.argmax(-1)
        own_n = z_nV.gather(-1, safe_n[:, None])
        values = (
            logp_nV.gather(-1, safe_n[:, None])[:, 0],
            z_nV.logsumexp(-1),
            -(p_nV * logp_nV.clamp(min=-1e30)).sum(-1),
            top_n,
            top_n == labels_n,
            (z_nV > own_n).sum(-1),
            p_nV.square().sum(-1),
            z_nV.mean(-1),
        )
        none = {"top1": -1, "rank": -1}
        masked = (torch.where(valid_n, x, none.get(name, 0)) for name, x in zip(FIELDS, values, strict=True))
        found.append(TokenLogprobs(*masked))
    leaves = {"dhidden": hidden, "dweight": [weight], "dbias": [] if bias is None else [bias]}
    return differentiated(found, case, range(len(found)), leaves)


def ours(case: Case, part: int = 0, shard: VocabShard | None = None, **given: Any) -> Outcome:
    """What one process gets for a part."""
    rows = (lambda x: x) if shard is None else (lambda x: local_rows(x, shard))
    hidden, weight = leaf(case.hidden[part]), leaf(rows(case.weight))
    bias = None if case.bias is None else leaf(rows(case.bias))
    found = linear_logprobs(
        hidden,
        weight,
        case.labels[part],
        bias=bias,
        shard=shard,
        temperature=case.of(part),
        entropy=True,
        statistics=STATISTICS,
        **fixed_draws({**case.options, **given}, hidden),
    )
    leaves = {"dhidden": [hidden], "dweight": [weight], "dbias": [] if bias is None else [bias]}
    return differentiated([found], case, [part], leaves)


def assert_no_worse(got: Outcome, case: Case) -> None:
    """All numbers within 1.5 times the error of full logits at the case's dtype, plus rounding, which counts twice in a
    square; ids and ranks are those of fp64, in 16 bits for most tokens."""
    truth, plain = full_logits(case, torch.float64), full_logits(case, case.dtype)
    faults = []
    for name in (*OUTPUTS, "sum_sq_probs", "dhidden", "dweight", "dbias"):
        if not truth[name]:
            continue
        g, t, p = (torch.cat([x.reshape(-1) for x in of[name]]) for of in (got, truth, plain))
        assert g.shape == t.shape, f"{name}: {list(g.shape)}, not {list(t.shape)}"
        roundings = 4 if name == "sum_sq_probs" else 2
        bound = 1.5 * relative_error(p, t) + roundings * ROUNDING[got[name][0].dtype]
        if relative_error(g, t) > bound:
            faults.append(f"{name}: {relative_error(g, t):.2e}, allowed {bound:.2e}")
    for name in ("top1", "is_top1", "rank"):
        g, t = (torch.cat(of[name]).long() for of in (got, truth))
        off = int((g != t).sum())
        if off > (0 if case.dtype in (torch.float32, torch.float64) else g.shape[0] // 2):  # rounding makes ties
            faults.append(f"{name}: {off} of {g.shape[0]} differ")
    assert not faults, "; ".join(faults)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": -0.6},
    "shift": {"shift": 2},
    "ignore_index inside the vocabulary": {"ignore_index": 3},
    "a temperature": {"temperature": 0.7},
    "a temperature and a softcap": {"temperature": 1.7, "softcap": 3.0, "bias": True},
    "temperatures": {"temperature": "each"},
    "all": {"temperature": "each", "softcap": 4.0, "bias": True, "logit_scale": 0.7, "shift": 1, "ignore_index": -7},
}
"""Those of `make_case`."""
WAYS: dict[str, dict[str, Any]] = {
    "exact": {"gradient": "exact"},
    "nothing small": {"gradient": "unbiased", "filter_eps": 1e-30},
    "frequent rows": {"gradient": "unbiased", "filter_eps": 1e-30, "frequent_rows": 40},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_torch_backend_matches_full_logits(dtype: torch.dtype, options: dict[str, Any], way: dict[str, Any]) -> None:
    case = make_case(dtype=dtype, **options).to(DEVICE)
    assert_no_worse(ours(case, backend="torch", **way), case)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "options", [OPTIONS["plain"], OPTIONS["temperatures"], OPTIONS["all"]], ids=["plain", "t", "all"]
)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_triton_backend_matches_full_logits(dtype: torch.dtype, options: dict[str, Any], way: dict[str, Any]) -> None:
    case = make_case(dtype=dtype, **options).to(DEVICE)
    assert_no_worse(ours(case, backend="triton", **way), case)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(st.data())
def test_any_options_match_full_logits(data: st.DataObject) -> None:
    case = make_case(
        (data.draw(st.integers(1, 30)),),
        data.draw(st.integers(2, 500)),
        data.draw(st.integers(1, 20)),
        dtype=torch.float64,
        bias=data.draw(st.booleans()),
        temperature=data.draw(st.sampled_from([1.0, 0.3, 5.0, "each"])),
        spread=data.draw(st.sampled_from([0.1, 2.0, 20.0])),
        softcap=data.draw(st.sampled_from([None, 2.0])),
        shift=data.draw(st.integers(0, 3)),
        seed=data.draw(st.integers(0, 5)),
    ).to(DEVICE)
    got = ours(case, backend="torch", **WAYS[data.draw(st.sampled_from(sorted(WAYS)))])
    truth, upstream = full_logits(case, torch.float64), case.upstream[0].double().norm()
    # What is summed before anything cancels: logits of 100, and gradients of one row or token.
    sizes = {"dhidden": upstream * case.weight.norm(), "dweight": upstream * case.hidden[0].norm(), "dbias": upstream}
    for name, values in truth.items():
        for g, t in zip(got[name], values, strict=True):
            finite = ~t.isinf()  # a bias of −inf is in the mean logit
            assert torch.equal(g[~finite], t[~finite]), name
            g, t = g[finite].double(), t[finite].double()
            size = float(sizes.get(name, 0)) + float(t.norm()) + 1
            assert float((g - t).norm()) <= 1e-12 * size, name


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradcheck(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in ((5, 4), (9, 4), (9,))
    )
    labels = torch.tensor([1, 8, -100, 0, 3])

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = linear_logprobs(
            inputs[0], inputs[1], labels, bias=inputs[2], softcap=2.0, temperature=temperature, entropy=True
        )
        assert found.entropy is not None
        return found.logprob, found.lse, found.entropy

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


# Entropies that are hard


@every_backend
@pytest.mark.parametrize("kind", ["flat", "one-hot", "huge", "all near -200"])
def test_the_entropy_of_extreme_logits(kind: str, backend: str) -> None:
    vocab, draw = 300, torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=draw), torch.randn(vocab, 8, generator=draw)
    bias = torch.zeros(vocab)
    if kind == "flat":
        hidden = torch.zeros_like(hidden)
    if kind == "one-hot":
        bias[17] = 1e4
    if kind == "huge":
        hidden *= 1e4
    if kind == "all near -200":
        bias -= 200
    case = Case((hidden,), (torch.full((6,), 17),), weight, bias, 1.0, (torch.randn(3, 6, generator=draw),), {})
    case = case.to(DEVICE)
    got, truth = ours(case, backend=backend, gradient="exact"), full_logits(case, torch.float64)
    expected = {"flat": math.log(vocab), "one-hot": 0.0}
    if kind in expected:
        assert got["entropy"][0].tolist() == pytest.approx([expected[kind]] * 6, rel=1e-6, abs=0)
    torch.testing.assert_close(got["entropy"][0].double(), truth["entropy"][0], rtol=1e-5, atol=1e-5)
    for name in ("dhidden", "dweight", "dbias"):
        assert got[name][0].isfinite().all()
        floor = 1e-6 * float(case.upstream[0].norm()) * float(hidden.norm() + weight.norm())
        error = float((got[name][0].double() - truth[name][0]).norm())
        assert error <= 1e-5 * float(truth[name][0].norm()) + floor, name


@every_backend
def test_rows_ruled_out_have_no_part_in_the_entropy(backend: str) -> None:
    case = make_case((7,), 300, bias=True).to(DEVICE)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[100:] = -torch.inf
    labels = torch.arange(7, device=DEVICE) * 3
    whole = replace(case, bias=bias, labels=(labels,))
    cut = replace(whole, bias=bias[:100].clone(), weight=case.weight[:100].clone())
    got, wanted = (ours(c, backend=backend, gradient="exact") for c in (whole, cut))
    for name in (*OUTPUTS, "sum_sq_probs"):
        torch.testing.assert_close(got[name][0], wanted[name][0], rtol=1e-6, atol=1e-6)
    assert relative_error(got["dhidden"][0], wanted["dhidden"][0]) < 1e-6
    assert not got["dweight"][0][100:].any()


@every_backend
@pytest.mark.parametrize("gradient", ["exact", "unbiased"])
def test_a_nan_stays_with_its_token(gradient: str, backend: str) -> None:
    case = make_case((8,)).to(DEVICE)
    hidden = case.hidden[0].clone()
    hidden[3, 0] = torch.nan
    case = replace(case, hidden=(hidden,), labels=(torch.arange(8, device=DEVICE),))
    got = ours(case, backend=backend, gradient=gradient)
    for name in ("logprob", "lse", "entropy", "sum_sq_probs", "mean_logit"):
        assert got[name][0].isnan().tolist() == [row == 3 for row in range(8)], name
    assert got["dhidden"][0].isnan().any(1).tolist() == [row == 3 for row in range(8)]
    assert (got["top1"][0][3], got["is_top1"][0][3], got["rank"][0][3]) == (-1, False, -1)
    assert (got["top1"][0] >= 0).sum() == (got["rank"][0] >= 0).sum() == 7


# The sampled gradient (tests/kernels/test_unbiased.py shows that it is unbiased)


@pytest.mark.parametrize("frequent_rows", [0, 40])
def test_the_mean_over_draws_is_the_exact_gradient_of_the_entropy(frequent_rows: int) -> None:
    case = of_entropy(make_case((12,), 6 * TILE, spread=3.0, temperature="each", bias=True, softcap=9.0)).to(DEVICE)
    truth, draws = full_logits(case, torch.float64)["dhidden"][0], 60
    way = {"backend": "torch", "gradient": "unbiased", "filter_eps": 2.0**-3, "frequent_rows": frequent_rows}
    got = [ours(case, seed=seed, **way)["dhidden"][0].double() for seed in range(draws)]
    single = sum(relative_error(x, truth) for x in got) / draws
    assert single > 0.02, "something must be drawn"
    # Independent draws: the error of the mean falls with their square root.
    assert relative_error(torch.stack(got).mean(0), truth) < 2 * single / math.sqrt(draws)


def of_entropy(case: Case) -> Case:
    return replace(case, upstream=tuple(x * torch.tensor([[0.0], [0.0], [1.0]]) for x in case.upstream))


# What is not asked for costs nothing; values do not depend on what is asked for


@every_backend
def test_values_have_the_same_bits_with_and_without_a_gradient(backend: str) -> None:
    case = make_case((20,), 3 * TILE + 5, temperature="each", dtype=torch.float16).to(DEVICE)
    heat = case.of(0)

    def call(needs_grad: bool, **given: Any) -> TokenLogprobs:
        hidden = leaf(case.hidden[0]) if needs_grad else case.hidden[0]
        return linear_logprobs(
            hidden, case.weight, case.labels[0], temperature=heat, backend=backend, entropy=True, **given
        )

    plain = call(False)
    for way in ({"gradient": "exact"}, {"gradient": "unbiased"}, {"gradient": "unbiased", "frequent_rows": 30}):
        found = call(True, **way)
        for name in OUTPUTS:
            assert_bitwise(getattr(found, name).detach(), getattr(plain, name))
    alone = linear_logprobs(case.hidden[0], case.weight, case.labels[0], temperature=heat, backend=backend)
    assert_bitwise(alone.logprob, plain.logprob)
    assert [name for name in TokenLogprobs._fields if getattr(alone, name) is not None] == ["logprob", "lse"]


@every_backend
def test_they_are_the_loss_with_its_sign_changed(backend: str) -> None:
    case = make_case().to(DEVICE)
    given = {"backend": backend, "softcap": 3.0, "gradient": "exact"}
    nll, lse = linear_cross_entropy(
        case.hidden[0], case.weight, case.labels[0], reduction="none", return_lse=True, **given
    )
    found = linear_logprobs(case.hidden[0], case.weight, case.labels[0], **given)
    assert_bitwise(found.logprob, -nll)
    assert_bitwise(found.lse, lse)


def test_a_call_keeps_no_more_for_backward_than_the_loss_does() -> None:
    case = make_case((30,), 600)

    def kept(function: Any, **given: Any) -> int:
        seen: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: seen.update({x.data_ptr(): x.nbytes}) or x, lambda x: x
        ):
            function(leaf(case.hidden[0]), leaf(case.weight), case.labels[0], gradient="exact", **given)
        return sum(seen.values())

    loss = kept(linear_cross_entropy, reduction="none")
    assert kept(linear_logprobs) == loss
    assert kept(linear_logprobs, entropy=True) == loss + 4 * 30
    assert kept(linear_logprobs, entropy="value") == loss


@pytest.mark.parametrize("capability", [(9, 0)])
def test_there_is_no_8_bit_pass(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, shard = torch.zeros(3, 8, dtype=torch.float16, device=DEVICE), VocabShard.whole(1 << 17)
    settings = check_settings({"backend": "triton"}, LogprobSettings)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    method = resolve(settings, hidden, torch.zeros(3, dtype=torch.int64, device=DEVICE), shard, True)
    assert method.first_pass == "full"
    with pytest.raises(ValueError, match='first_pass must be "auto" or "full"; got \'?fp8'):
        check_settings({"first_pass": "fp8"}, LogprobSettings)


def test_the_entropy_takes_a_smaller_eps() -> None:
    hidden, shard, labels = torch.zeros(3, 8), VocabShard.whole(1 << 17), torch.zeros(3, dtype=torch.int64)
    eps = [
        resolve(
            check_settings({"gradient": "unbiased", **given}, LogprobSettings), hidden, labels, shard, True
        ).filter_eps
        for given in ({}, {"entropy": True}, {"entropy": True, "filter_eps": 0.25}, {"entropy": "value"})
    ]
    assert eps[1] == eps[0] / 2
    assert eps[2] == 0.25
    assert eps[3] == eps[0]


@every_backend
def test_an_entropy_for_the_log_has_no_gradient(backend: str) -> None:
    case = make_case().to(DEVICE)
    hidden = leaf(case.hidden[0])
    found, whole = (
        linear_logprobs(hidden, case.weight, case.labels[0], entropy=entropy, backend=backend, gradient="exact")
        for entropy in ("value", True)
    )
    assert found.entropy is not None and whole.entropy is not None
    assert not found.entropy.requires_grad
    assert_bitwise(found.entropy, whole.entropy.detach())
    (got,), (wanted,) = (torch.autograd.grad(x.logprob.sum(), hidden) for x in (found, whole))
    assert_bitwise(got, wanted)


# Shapes and errors


def test_shapes_are_those_of_the_labels_less_the_shift() -> None:
    hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(40, 8), torch.randint(40, (2, 5))
    labels[0, 3] = -100
    found = linear_logprobs(
        hidden, weight, labels, shift=2, entropy=True, statistics=STATISTICS, temperature=torch.tensor([[0.5], [2.0]])
    )
    for name in TokenLogprobs._fields:
        assert getattr(found, name).shape == (2, 3), name
    assert found.logprob[0, 1] == 0 and found.top1 is not None and found.top1[0, 1] == -1
    logits = torch.stack([hidden[0] @ weight.T / 0.5, hidden[1] @ weight.T / 2])[:, :3]
    wanted = logits.log_softmax(-1).gather(-1, labels[:, 2:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(found.logprob, torch.where(labels[:, 2:] == -100, 0, wanted))
    for empty in (labels[:0], labels[:, :0]):
        none = linear_logprobs(
            hidden[: empty.shape[0], : empty.shape[1]], weight, empty, entropy=True, statistics=STATISTICS
        )
        assert none.logprob.shape == empty.shape == none.rank.shape  # type: ignore[union-attr]


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "zero": ({"temperature": 0.0}, "temperature must be a positive float"),
    "negative": ({"temperature": -1.0}, "temperature must be a positive float"),
    "infinite": ({"temperature": math.inf}, "temperature must be a positive float"),
    "a learned one": ({"temperature": torch.ones(4).requires_grad_()}, "that requires no gradient"),
    "of integers": ({"temperature": torch.ones(4, dtype=torch.int64)}, "temperature must be a positive float"),
    "one that is zero": ({"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "positive and finite for every token"),
    "of another shape": (
        {"temperature": torch.ones(3)},
        r"labels' shape \[4\], or one that broadcasts to it, got \[3\]",
    ),
    "unknown statistic": ({"statistics": ("top5",)}, 'statistics must be names out of "top1"'),
    "one twice": ({"statistics": ("top1", "top1")}, "each once"),
    "a word": ({"statistics": "top1"}, "statistics must be names"),
    "entropy of a number": ({"entropy": 1}, 'entropy must be True, "value" or False'),
}


@pytest.mark.parametrize(("given", "says"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_allowed_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        linear_logprobs(torch.randn(4, 8), torch.randn(40, 8), torch.arange(4), **given)


def test_settings_of_the_loss_alone_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="linear_logprobs takes no argument reduction; its settings are gradient"):
        linear_logprobs(torch.randn(4, 8), torch.randn(40, 8), torch.arange(4), reduction="sum")


# On ranks

every_layout = pytest.mark.parametrize("layout", ["replicated", "sharded", "grid"])


def on_rank(case: Case, layout: Layout, runs: Runs | None, given: dict[str, Any]) -> Outcome:
    case = case.to(device_of(given))
    got = ours(case, part_of(dist.get_rank(), layout), make_shard(case, layout, runs), **given)
    return {name: tuple(x.cpu() for x in xs) for name, xs in got.items()}


def assert_ranks_no_worse(
    ranks: RankPool, world: int, case: Case, layout: Layout, runs: Runs | None = None, **given: Any
) -> None:
    by_rank = ranks.run(world, on_rank, case, layout, runs, given)
    number = len(case.labels)
    first = [next(rank for rank in range(world) if part_of(rank, layout) == part) for part in range(number)]
    joined = {name: tuple(x for rank in first for x in by_rank[rank][name]) for name in by_rank[0]}
    vocab = case.weight.shape[0]
    size = -(-vocab // world)
    own = runs or [((min(size * r, vocab), min(size * (r + 1), vocab)),) for r in range(world)]
    for name in ("dweight", "dbias"):
        if by_rank[0][name]:
            whole = torch.zeros_like(case.weight if name == "dweight" else case.bias, dtype=by_rank[0][name][0].dtype)
            for rank in range(world):
                at = 0
                for start, stop in own[rank]:
                    whole[start:stop] = by_rank[rank][name][0][at : at + stop - start]
                    at += stop - start
            joined[name] = (whole,)
    assert_no_worse(joined, case)
    for rank in range(world):  # those that bring the same tokens get the same
        for name in (*OUTPUTS, "top1", "rank", "dhidden"):
            assert_bitwise(by_rank[rank][name][0], joined[name][part_of(rank, layout)])


def parts(world: int, layout: Layout) -> tuple[int, ...]:
    return (13, 4, 21, 9)[: part_of(world - 1, layout) + 1]


@every_layout
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_agree_with_full_logits(ranks: RankPool, world: int, layout: Layout) -> None:
    if layout == "grid" and world != 4:
        pytest.skip("2 x 2 ranks")
    case = make_case(parts(world, layout), 301, **OPTIONS["all"])
    assert_ranks_no_worse(ranks, world, case, layout, gradient="exact")


@every_layout
def test_frequent_rows_on_ranks(ranks: RankPool, layout: Layout) -> None:
    case = make_case(parts(4, layout), 601, temperature="each", bias=True)
    assert_ranks_no_worse(ranks, 4, case, layout, gradient="unbiased", filter_eps=1e-30, frequent_rows=50)


@every_layout
def test_ranks_agree_with_full_logits_in_triton(ranks: RankPool, layout: Layout) -> None:
    world = 4 if layout == "grid" else 2
    case = make_case(parts(world, layout), 301, temperature="each", bias=True)
    assert_ranks_no_worse(ranks, world, case, layout, gradient="exact", backend="triton")


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_uneven_and_empty_shards(ranks: RankPool, layout: Layout) -> None:
    runs = [((0, 37), (200, 290)), (), ((37, 200), (290, 301))]
    case = make_case(parts(3, layout), 301, temperature="each", softcap=5.0)
    assert_ranks_no_worse(ranks, 3, case, layout, runs, gradient="exact")


def test_a_rank_without_tokens(ranks: RankPool) -> None:
    case = make_case((0, 7), 301, temperature="each")
    assert_ranks_no_worse(ranks, 2, case, "sharded", gradient="exact")


def _faults(kind: str) -> str:
    rank, shard = dist.get_rank(), VocabShard.even(40, dist.group.WORLD)
    given: dict[str, Any] = {
        "entropy": {"entropy": rank == 0},
        "statistics": {"statistics": ("top1",) if rank == 0 else ()},
        "temperature": {"temperature": 1.0 + rank},
        "one of each token": {"temperature": torch.ones(4) if rank else 1.0},
        "other temperatures": {"temperature": torch.ones(4) + rank},
        "a fault on one": {"temperature": torch.full((4,), 1.0 - rank)},
        "the loss on one": {},
    }[kind]
    hidden, weight, labels = torch.randn(4, 8), torch.randn(shard.num_rows, 8), torch.arange(4)
    try:
        if kind == "the loss on one" and rank:
            linear_cross_entropy(hidden, weight, labels, shard=shard)
        else:
            linear_logprobs(hidden, weight, labels, shard=shard, **given)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("entropy", "entropy must be equal on all ranks, got rank 0: True, rank 1: False"),
        ("statistics", "statistics must be equal on all ranks"),
        ("temperature", "temperature must be equal on all ranks, got rank 0: 1.0, rank 1: 2.0"),
        ("one of each token", "temperature must be equal on all ranks, got rank 0: 1.0, rank 1: one for each token"),
        ("other temperatures", "temperatures differ between ranks that bring the same tokens"),
        ("a fault on one", "rank 1: temperature must be positive and finite for every token"),
        ("the loss on one", "what is computed must be equal on all ranks"),
    ],
)
def test_ranks_that_differ_all_say_so(ranks: RankPool, kind: str, says: str) -> None:
    for text in ranks.run(2, _faults, kind):
        assert says in text
