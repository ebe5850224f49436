"""The loss in plain torch, and what a test compares with it.

A `Problem` is one loss over all ranks: parts of tokens (one per rank that brings its own; one in a single process or
under tensor parallelism), one classifier, an upstream gradient for every part. `plain_outcome` computes it with full
logits, in fp64 for the truth or at the problem's own dtype for the error that plain torch makes; `cce_outcome` with
cce_dist in this process (tests/sharded.py does it on ranks). All give an `Outcome`, in parts.

`assert_no_worse` holds an outcome to the project's bound: by relative norm, at most 1.5 times the error of plain torch
at that dtype, plus rounding. Upstream gradients are such that a token's gradient is of order 1, whatever the reduction:
absolute tolerances, of which there are none, would let a gradient of zeros pass.

Values are drawn on the CPU, so that they are the same on every machine, and moved to `DEVICE`; outcomes stay there.

Shapes: n tokens of a part, N of all parts, D hidden, V classifier rows with padding.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cce_dist import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the tests of one process run."""

GPU_BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
TRITON_DTYPES = [torch.float32, torch.float16, GPU_BF16]
"""What the triton backend is tested with: the products of the interpreter are wrong in bf16."""

# Half a unit in the last place; fp64 also pays for being compared with itself.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Problem:
    """Inputs of one loss; entry r of a tuple belongs to the r-th part of the tokens.

    Attributes:
        hidden: [..., D] each.
        labels: [...] each, global ids.
        weight, bias: all rows, [V, D] and [V], padding rows last.
        vocab_size: rows without padding.
        options: ignore_index, shift, softcap, logit_scale, reduction, num_valid_tokens, label_smoothing and z_loss of
            `linear_cross_entropy`.
        upstream: of each part's loss, in its shape.
        lse_upstream: of each part's log-sum-exps, or empty.
    """

    hidden: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor | None
    vocab_size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    upstream: tuple[Tensor, ...] = ()
    lse_upstream: tuple[Tensor, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden[0].dtype

    def to(self, device: str) -> "Problem":
        return replace(
            self,
            hidden=tuple(x.to(device) for x in self.hidden),
            labels=tuple(x.to(device) for x in self.labels),
            weight=self.weight.to(device),
            bias=None if self.bias is None else self.bias.to(device),
            upstream=tuple(x.to(device) for x in self.upstream),
            lse_upstream=tuple(x.to(device) for x in self.lse_upstream),
        )


class Outcome(NamedTuple):
    """Entry r of ``loss``, ``lse`` and ``dhidden`` is of part r; ``dweight`` and ``dbias`` come in blocks of rows."""

    loss: tuple[Tensor, ...]
    lse: tuple[Tensor, ...]
    dhidden: tuple[Tensor, ...]
    dweight: tuple[Tensor, ...]
    dbias: tuple[Tensor, ...]

    def to(self, device: str) -> "Outcome":
        return Outcome(*(tuple(x.to(device) for x in field) for field in self))


def make_problem(
    shapes: Sequence[tuple[int, ...]] = ((3, 17),),
    vocab_size: int = 600,
    dim: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    padding_rows: int = 0,
    ignored: float = 0.2,
    spread: float = 2.0,
    lse_gradient: bool = False,
    seed: int = 0,
    device: str = DEVICE,
    **options: Any,
) -> Problem:
    """Random tokens in parts of ``shapes``; ``spread`` is the standard deviation of the logits."""
    draw = torch.Generator().manual_seed(seed)
    rows = vocab_size + padding_rows
    weight = (torch.randn(rows, dim, generator=draw) * (spread / math.sqrt(dim))).to(dtype)
    bias_V = torch.randn(rows, generator=draw).to(dtype) if bias else None
    hidden = tuple(torch.randn(*shape, dim, generator=draw).to(dtype) for shape in shapes)
    labels = []
    for shape in shapes:
        ids = torch.randint(vocab_size, shape, generator=draw)
        is_ignored = torch.rand(shape, generator=draw) < ignored
        labels.append(torch.where(is_ignored, options.get("ignore_index", -100), ids))
    problem = Problem(hidden, tuple(labels), weight, bias_V, vocab_size, options)
    return with_upstream(problem, draw, lse_gradient).to(device)


def with_upstream(problem: Problem, draw: torch.Generator, lse_gradient: bool) -> Problem:
    """Random upstream gradients, different for every part, of order 1 per token whatever the reduction."""
    reduction, shift = problem.options.get("reduction", "mean"), problem.options.get("shift", 0)
    result = torch.float64 if problem.dtype == torch.float64 else torch.float32
    count = problem.options.get("num_valid_tokens")
    if count is None:
        count = sum(int((labels != problem.options.get("ignore_index", -100)).sum()) for labels in problem.labels)
    tokens = [(labels[..., shift:] if shift else labels).shape for labels in problem.labels]
    if reduction == "none":
        upstream = [torch.randn(shape, generator=draw) for shape in tokens]
    else:
        size = max(float(count), 1.0) if reduction == "mean" else 1.0
        upstream = [size * (0.5 + torch.rand((), generator=draw)) for _ in tokens]
    lse_upstream = [torch.randn(shape, generator=draw).to(result) for shape in tokens] if lse_gradient else []
    return replace(problem, upstream=tuple(u.to(result) for u in upstream), lse_upstream=tuple(lse_upstream))


def plain_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, valid), each [..., L - shift], from full logits rounded to hidden's dtype; 0 where not valid."""
    shift = options.get("shift", 0)
    hidden = hidden[..., : max(labels.shape[-1] - shift, 0), :] if shift else hidden
    labels = labels[..., shift:] if shift else labels
    valid = labels != options.get("ignore_index", -100)
    logits = torch.where(valid[..., None], hidden, 0) @ weight.to(hidden.dtype).T
    if bias is not None:
        logits = logits + bias.to(hidden.dtype)
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    if options.get("logit_scale") is not None:
        logits = logits * options["logit_scale"]
    if options.get("softcap") is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    lse = logits.logsumexp(-1)
    nll = -logits.log_softmax(-1).gather(-1, torch.where(valid, labels, 0)[..., None])[..., 0]
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    loss = (1 - smoothing) * nll + z_loss * lse**2
    if smoothing:  # −log p of all classes
        loss = loss + smoothing * -logits.log_softmax(-1).mean(-1)
    return torch.where(valid, loss, 0), torch.where(valid, lse, 0), valid


def plain_outcome(problem: Problem, dtype: torch.dtype | None = None) -> Outcome:
    """The outcome with full logits; in ``dtype``, from inputs as rounded as the problem's own, if it is given."""
    dtype = dtype or problem.dtype
    hidden = [leaf(x.to(dtype)) for x in problem.hidden]
    # A classifier of a wider dtype is rounded to that of the hidden states first: that is part of the operation.
    weight = leaf(problem.weight.to(problem.dtype).to(dtype))
    bias = None if problem.bias is None else leaf(problem.bias.to(dtype))
    rows = slice(problem.vocab_size)
    tokens = [
        plain_tokens(x, weight[rows], labels, None if bias is None else bias[rows], problem.options)
        for x, labels in zip(hidden, problem.labels, strict=True)
    ]
    reduction, count = problem.options.get("reduction", "mean"), problem.options.get("num_valid_tokens")
    if reduction == "none":
        losses = [nll for nll, _, _ in tokens]
    elif reduction == "sum" or count is not None:
        losses = [nll.sum() / (1 if count is None else count) for nll, _, _ in tokens]
    else:
        sums, counts = ([x[i].sum() for x in tokens] for i in (0, 2))
        mean = torch.stack(sums).sum() / torch.stack(counts).sum()
        losses = [mean for _ in tokens]
    lses = [lse for _, lse, _ in tokens]
    objective(losses, lses, problem).backward()
    return Outcome(
        tuple(x.detach() for x in losses),
        tuple(x.detach() for x in lses),
        tuple(grad_of(x) for x in hidden),
        (grad_of(weight),),
        () if bias is None else (grad_of(bias),),
    )


def cce_outcome(problem: Problem, **settings: Any) -> Outcome:
    """The outcome of `cce_dist.linear_cross_entropy` in this process; the problem has one part.

    An int as ``seed`` gives the same draws at each call.
    """
    (hidden,), (labels,) = [leaf(x) for x in problem.hidden], problem.labels
    weight, bias = leaf(problem.weight), None if problem.bias is None else leaf(problem.bias)
    loss, lse = linear_cross_entropy(
        hidden, weight, labels, bias=bias, return_lse=True, **fixed_draws({**problem.options, **settings}, hidden)
    )
    objective([loss], [lse], problem).backward()
    dbias = () if bias is None else (grad_of(bias),)
    return Outcome((loss.detach(),), (lse.detach(),), (grad_of(hidden),), (grad_of(weight),), dbias)


def fixed_draws(settings: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
    """The settings, an int as ``seed`` made a tensor: of an int the loss makes a sequence of draws."""
    if settings.get("seed") is None:
        return settings
    return {**settings, "seed": torch.tensor(settings["seed"], dtype=torch.int64, device=hidden.device)}


def objective(losses: Sequence[Tensor], lses: Sequence[Tensor], problem: Problem) -> Tensor:
    """Σ over parts of loss · upstream + lse · lse_upstream: its gradient is what an outcome holds."""
    terms = [(loss * u.to(loss.dtype)).sum() for loss, u in zip(losses, problem.upstream, strict=True)]
    if problem.lse_upstream:
        terms += [(lse * u.to(lse.dtype)).sum() for lse, u in zip(lses, problem.lse_upstream, strict=True)]
    return torch.stack(terms).sum()


def relative_error(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖ in fp64; 0 where both are zero, infinite where only the truth is or something is NaN."""
    difference = float((got.double() - truth.double()).norm())
    if difference == 0:
        return 0.0
    scale = float(truth.double().norm())
    error = difference / scale if scale else math.inf
    return math.inf if math.isnan(error) else error


def assert_no_worse(got: Outcome, problem: Problem) -> None:
    """Holds ``got`` to 1.5 times the error of plain torch at the problem's dtype, plus rounding."""
    assert_within(got, plain_outcome(problem, torch.float64), plain_outcome(problem))


def assert_within(got: Outcome, truth: Outcome, plain: Outcome) -> None:
    """As `assert_no_worse`, with the truth and plain torch's outcome at hand.

    All parts together keep to 1.5 times plain torch's error; each one alone, where a few numbers may be lucky in plain
    torch, to 4 times. The error of a scalar is compared with that of the log-sum-exps, which are many.
    """
    token_error = _error(plain.lse, truth.lse)
    faults = []
    for name in Outcome._fields:
        parts = list(zip(getattr(got, name), getattr(truth, name), getattr(plain, name), strict=True))
        if not parts:
            continue
        for rank, (g, t, _) in enumerate(parts):
            assert g.shape == t.shape, f"{name}[{rank}] has shape {list(g.shape)}, not {list(t.shape)}"
        rounding = ROUNDING[parts[0][0].dtype]
        is_scalar = parts[0][1].ndim == 0
        overall = token_error if is_scalar else _error(getattr(plain, name), getattr(truth, name))
        checks = [
            (f"{name}[{rank}]", relative_error(g, t), 4 * max(overall, relative_error(p, t)))
            for rank, (g, t, p) in enumerate(parts)
        ]
        if not is_scalar:
            checks.append((name, _error(getattr(got, name), getattr(truth, name)), 1.5 * overall))
        faults += [
            f"{what}: relative error {error:.2e}, allowed {bound + rounding:.2e}"
            for what, error, bound in checks
            if not error <= bound + rounding
        ]
    assert not faults, "; ".join(faults)


def assert_rounding_only(got: Outcome, problem: Problem) -> None:
    """For one token or one column, where plain torch's error may be small by luck, and gradients cancel to nothing.

    Holds ``got`` to 1.5 times that error plus the rounding of what is summed before anything cancels: 4 fp32 roundings
    of logits of the size of Σ_d |e_d c_d|, and one rounding of each term to the result's dtype.
    """
    truth, plain = plain_outcome(problem, torch.float64), plain_outcome(problem)
    (hidden,), (labels,) = problem.hidden, problem.labels
    shift = problem.options.get("shift", 0)
    if shift:
        hidden, labels = hidden[..., : labels.shape[-1] - shift, :], labels[..., shift:]
    valid = labels != problem.options.get("ignore_index", -100)
    e = torch.where(valid[..., None], hidden, 0).double().abs().reshape(-1, hidden.shape[-1])
    c = problem.weight[: problem.vocab_size].double().abs()
    scale = abs(problem.options.get("logit_scale") or 1.0)
    bias = 0.0 if problem.bias is None else problem.bias[: problem.vocab_size].double().abs()
    z_size = ((e @ c.T + bias) * scale).amax(1)
    # |P| before the target's part is subtracted is at most |upstream| of loss and lse, spread over the columns.
    p = scale * problem.upstream[0].double().abs().reshape(-1).expand(e.shape[0]) * valid.reshape(-1)
    if problem.lse_upstream:
        p = p + scale * problem.lse_upstream[0].double().abs().reshape(-1) * valid.reshape(-1)
    c_size = c.amax(0).norm()
    fp32, own = 4 * ROUNDING[torch.float32] * (1 + z_size), ROUNDING[problem.dtype]
    sizes = {
        "loss": fp32,
        "lse": fp32,
        "dhidden": 2 * p * c_size * (fp32 + own),
        "dweight": 2 * p * e.norm(dim=1) * (fp32 + own),
        "dbias": 2 * p * (fp32 + own),
    }
    for name in Outcome._fields:
        for g, t, q in zip(getattr(got, name), getattr(truth, name), getattr(plain, name), strict=True):
            allowed = 1.5 * float((q.double() - t).norm()) + float(sizes[name].sum())
            error = float((g.double() - t).norm())
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, of {float(t.norm()):.2e}"


def assert_repeats(got: Tensor, expected: Tensor) -> None:
    """The same gradient computed again: bitwise, but on a GPU up to the order of the sparse backward's atomic sums.

    That is a few fp32 roundings, of which some move a 16-bit result to the next number.
    """
    if DEVICE == "cpu":
        assert_bitwise(got, expected)
        return
    assert got.dtype == expected.dtype
    error = relative_error(got, expected)
    assert error <= 1e-6 + torch.finfo(got.dtype).eps / 8, f"differs by {error:.1e}"


def assert_bitwise(got: Tensor, expected: Tensor) -> None:
    """Equal to the last bit, NaN where NaN is expected; else the first element that differs is named."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    differs = ~((got == expected) | (got.isnan() & expected.isnan()))
    if differs.any():
        where = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differs.sum())} of {got.numel()} elements differ, the first at {list(where)}: "
            f"{got[where].item()!r}, expected {expected[where].item()!r}"
        )


def generator_state() -> Tensor:
    """Of the default generator of `DEVICE`."""
    return torch.get_rng_state() if DEVICE == "cpu" else torch.cuda.get_rng_state()


def assert_weights_close(
    got: Mapping[str, Tensor], truth: Mapping[str, Tensor], bound: float, exclude: Iterable[str] = ()
) -> None:
    """Compares trained weights: relative norm per tensor, its denominator at least 1e-6 of the norm of all weights.

    ``exclude`` names tensors by a part of their name: AdamW turns the noise of gradients that are zero in exact
    arithmetic, such as those of key biases, into steps of the learning rate.
    """
    assert set(got) == set(truth), f"names differ: {sorted(set(got) ^ set(truth))}"
    names = [name for name in truth if not any(part in name for part in exclude)]
    total = math.sqrt(sum(float(truth[name].double().norm()) ** 2 for name in truth))
    faults = []
    for name in names:
        difference = float((got[name].double() - truth[name].double()).norm())
        error = difference / max(float(truth[name].double().norm()), 1e-6 * total)
        if not error <= bound:
            faults.append(f"{name}: relative error {error:.2e}, allowed {bound:.2e}")
    assert not faults, "; ".join(faults)


def _error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """`relative_error` of all parts together."""
    if not truth:
        return 0.0
    return relative_error(torch.cat([x.reshape(-1) for x in got]), torch.cat([x.reshape(-1) for x in truth]))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def grad_of(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad
