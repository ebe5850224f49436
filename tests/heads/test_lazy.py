"""Lazy logits: recorded operations give the stock loss and gradients; all others the stock result, with a warning."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import DEVICE
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrize, prune
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from cce_dist import CCEConfig, VocabShard
from cce_dist.heads.lazy import LazyLogits, MaterializedLogitsWarning, fused_evaluation, make_eager, make_lazy
from cce_dist.heads.owner import ModuleOwner

BATCH, LENGTH, HIDDEN, VOCAB = 2, 7, 12, 53
EXACT = CCEConfig(gradient="exact", materialize="raise")
WARN = CCEConfig(gradient="exact", materialize="warn")


def _head(config: CCEConfig | None, bias: bool = True) -> nn.Linear:
    """The same weights every time; lazy if there is a config."""
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB, bias=bias).to(DEVICE)
    if config is not None:
        make_lazy(head, ModuleOwner(head), config)
    return head


def _hidden() -> Tensor:
    return torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()


def _labels(vocab: int = VOCAB) -> Tensor:
    labels = torch.randint(vocab, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    labels[0, :3] = -100
    return labels.to(DEVICE)


def _vocab_vector() -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)).to(DEVICE)


def _outcome(use: Callable[[Any, Tensor], Tensor], config: CCEConfig | None, **options: Any) -> list[Tensor | None]:
    """The result of a use of logits, and the gradients of a weighted sum of it."""
    head, hidden = _head(config, **options), _hidden()
    result = use(head(hidden), _labels())
    if result.requires_grad:
        (result * torch.linspace(1, 2, result.numel(), device=DEVICE).view(result.shape)).nansum().backward()
    return [result.detach(), hidden.grad, *(p.grad for p in head.parameters())]


def _assert_same(got: list[Tensor | None], wanted: list[Tensor | None], bound: float = 2e-6) -> None:
    for x, y in zip(got, wanted, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert x.shape == y.shape
            assert torch.equal(x.isnan(), y.isnan())
            assert (x - y).nan_to_num().double().norm() <= bound * y.nan_to_num().double().norm()


def _shifted(logits: Any, labels: Tensor, **options: Any) -> Tensor:
    """The loss as models have it: shifted by one token, flattened."""
    logits = logits[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels[..., 1:].reshape(-1), **options)


def _flat(logits: Any, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), **options)


def _selected(logits: Any, labels: Tensor) -> Tensor:
    """In the words of TRL's selective_log_softmax."""
    chosen = torch.gather(logits, dim=-1, index=labels[..., None])
    lse = torch.stack([torch.logsumexp(of_one, dim=-1) for of_one in logits])
    return (chosen - lse[..., None]).squeeze(-1)


def _selected_in_16_bits(logits: Any, labels: Tensor) -> Tensor:
    of_each = []
    for of_one, ids in zip(logits, labels[..., None], strict=True):
        of_each.append(F.log_softmax(of_one, dim=-1).gather(dim=-1, index=ids))
    return torch.stack(of_each).squeeze(-1)


def _smoothed(logits: Any, labels: Tensor) -> Tensor:
    """Of transformers.trainer_pt_utils.LabelSmoother."""
    log_p, labels = -F.log_softmax(logits[..., :-1, :].contiguous(), dim=-1), labels[..., 1:, None]
    ignored, labels = labels.eq(-100), labels.clamp(min=0)
    nll, rest = log_p.gather(dim=-1, index=labels), log_p.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(ignored, 0.0)
    rest.masked_fill_(ignored, 0.0)
    count = ignored.numel() - ignored.long().sum()
    return 0.9 * nll.sum() / count + 0.1 * rest.sum() / (count * log_p.shape[-1])


FUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean": _flat,
    "sum": lambda z, y: _flat(z, y, reduction="sum"),
    "none": lambda z, y: _flat(z, y, reduction="none"),
    "module": lambda z, y: nn.CrossEntropyLoss()(z.reshape(-1, VOCAB), y.view(-1)),
    "label smoothing": lambda z, y: _flat(z * 0.5 + _vocab_vector(), y, label_smoothing=0.1),
    "label smoothing in the words of transformers": lambda z, y: _smoothed(z, y),
    "label smoothing with a softcap": lambda z, y: _flat(torch.tanh(z), y, label_smoothing=0.1),
    "class weights": lambda z, y: _flat(z, y, weight=_vocab_vector().abs()),
    "class weights by their place": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), _vocab_vector().abs()),
    "class weights, smoothed": lambda z, y: _flat(z, y, weight=_vocab_vector().abs(), label_smoothing=0.1),
    "class weights, smoothed, with a softcap": lambda z, y: _flat(
        torch.tanh(z), y, weight=_vocab_vector().abs(), label_smoothing=0.1, reduction="sum"
    ),
    "class weights, smoothed, of a truncated vocabulary": lambda z, y: _flat(
        z[..., :40], y.clamp(max=39), weight=_vocab_vector()[:40].abs(), label_smoothing=0.1
    ),
    "class weights, sum": lambda z, y: _flat(z, y, weight=_vocab_vector().abs(), reduction="sum"),
    "another ignore_index": lambda z, y: _flat(z, y.clamp(min=5), ignore_index=5),
    "shift": _shifted,
    "cast": lambda z, y: _flat(z.float().to(torch.float32).to(DEVICE).to(z.device, torch.float32), y),
    "scale": lambda z, y: _flat(z * 0.5 / 3, y),
    "scale from the left": lambda z, y: _flat(0.5 * z, y),
    "scale that is a tensor": lambda z, y: _flat(torch.mul(torch.tensor(0.5), z), y),
    "softcap": lambda z, y: _flat(torch.tanh(z / 0.7) * 0.7, y),
    "scale, softcap, temperature": lambda z, y: _flat((z * 2 / 0.7).tanh() * 0.7 / 0.3, y),
    "negative softcap": lambda z, y: _flat(torch.tanh(z / 0.7) * -0.7, y),
    "tanh alone": lambda z, y: _flat(nn.Tanh()(z), y),
    "bias": lambda z, y: _flat(z + _vocab_vector(), y),
    "bias after a scale": lambda z, y: _flat(_vocab_vector()[None] + z * 0.3, y),
    "bias before a softcap": lambda z, y: _flat(torch.tanh((z + _vocab_vector()) / 0.7) * 0.7, y),
    "truncated vocabulary": lambda z, y: _shifted(z[..., :40], y.clamp(max=39)),
    "truncated from the end": lambda z, y: _flat(z[:, :, :-13], y.clamp(max=39)),
    "truncated after a bias": lambda z, y: _flat((z + _vocab_vector())[..., :40], y.clamp(max=39)),
    "bias after truncation": lambda z, y: _flat(z[..., :40] + _vocab_vector()[:40], y.clamp(max=39)),
    "masked positions": lambda z, y: F.cross_entropy(z[y != -100], y[y != -100]),
    "positions by number": lambda z, y: F.cross_entropy(z[torch.tensor([0, 1]), 4], y[:, 4]),
    "one sequence": lambda z, y: F.cross_entropy(z[1], y[1]),
    "one token": lambda z, y: F.cross_entropy(z[1, 2], y[1, 2]),
    "one token, the ellipsis last": lambda z, y: F.cross_entropy(z[1, 2, ...], y[1, 2]),
    "flatten": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "nll_loss": lambda z, y: F.nll_loss(F.log_softmax(z.view(-1, VOCAB), -1), y.view(-1), reduction="sum"),
    "gather": lambda z, y: z.gather(-1, y.clamp(min=0)[..., None]),
    "log_softmax, gathered": lambda z, y: torch.gather(z.float().log_softmax(-1), 2, y.clamp(min=0)[..., None]),
    "logsumexp": lambda z, _: torch.logsumexp(z[:, :-1] / 0.7, dim=-1),
    "logsumexp of a softcap": lambda z, _: (torch.tanh(z / 0.7) * 0.7).logsumexp(-1),
    "log-probabilities in the words of TRL": lambda z, y: _selected(z, y.clamp(min=0)),
    "the same of 16 bits": lambda z, y: _selected_in_16_bits(z, y.clamp(min=0)),
    "entropy": lambda z, _: _entropy(z),
    "entropy of a temperature": lambda z, _: _entropy(z[:, 1:] / 0.6),
    "both": lambda z, y: _selected(z, y.clamp(min=0)) - 0.1 * _entropy(z),
    "no label at all": lambda z, y: _flat(z, torch.full_like(y, -100)),
}  # fmt: skip


@pytest.mark.parametrize("use", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_what_models_do_to_logits_is_part_of_the_fused_loss(use: Callable[..., Tensor], bias: bool) -> None:
    _assert_same(_outcome(use, EXACT, bias=bias), _outcome(use, None, bias=bias))


def _masked_in_place(logits: Any, labels: Tensor) -> Tensor:
    logits[:, :, 50:] = -3.0
    return _flat(logits, labels)


def _scaled_in_place(logits: Any, labels: Tensor) -> Tensor:
    logits /= 3
    return _flat(logits.mul_(2.0), labels) + logits.sum()


NOT_FUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "softmax": lambda z, _: z.softmax(-1),
    "log_softmax": lambda z, _: F.log_softmax(z[..., :-1, :].float(), dim=-1),
    "gather of two ids": lambda z, y: torch.gather(z, 2, y.clamp(min=0)[..., None].expand(-1, -1, 2)),
    "gather of some tokens": lambda z, y: torch.gather(z, 2, y.clamp(min=0)[:, :3, None]),
    "nll_loss of logits": lambda z, y: F.nll_loss(z.flatten(0, 1), y.flatten()),
    "logsumexp of the tokens": lambda z, _: z.logsumexp(1),
    "argmax over everything": lambda z, _: z.argmax().float(),
    "argmax of negated log-probabilities": lambda z, _: (-F.log_softmax(z, -1)).argmax(-1).float(),
    "argmax that keeps the dimension": lambda z, _: z.argmax(-1, keepdim=True).float(),
    "comparison": lambda z, _: (z > 0).float(),
    "attribute": lambda z, _: z.mT,
    "operator": lambda z, _: -z ** 2 @ torch.ones(VOCAB, device=DEVICE),
    "iteration over the vocabulary": lambda z, _: next(iter(z[0, 0])),
    "concatenation": lambda z, _: torch.cat([z, z * 2]),
    "product of two": lambda z, _: z * z,
    "a scale of zero": lambda z, y: _flat(z * 0, y),
    "a scale for each token": lambda z, y: _flat(z * y[..., None], y),
    "a scale that is trained": lambda z, y: _flat(z * torch.tensor(2.0, device=DEVICE, requires_grad=True), y),
    "divided into": lambda z, _: 1.0 / z,
    "bias after a softcap": lambda z, y: _flat(torch.tanh(z) + _vocab_vector(), y),
    "two softcaps": lambda z, y: _flat(torch.tanh(torch.tanh(z)), y),
    "other rows first": lambda z, y: _flat(z[..., 3:], y.clamp(max=40)),
    "every other row": lambda z, y: _flat(z[..., ::2], y.clamp(max=20)),
    "another shape": lambda z, _: z.view(-1),
    "bits": lambda z, _: z.detach().view(torch.int32).float(),
    "class dimension in the middle": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "class probabilities": lambda z, _: F.cross_entropy(z[0], torch.full((LENGTH, VOCAB), 1 / VOCAB, device=DEVICE)),
    "written in place": _masked_in_place,
    "scaled in place": _scaled_in_place,
}  # fmt: skip


@pytest.mark.parametrize("use", NOT_FUSED.values(), ids=NOT_FUSED)
def test_any_other_use_gives_the_stock_result_and_one_warning(use: Callable[..., Tensor]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = _outcome(use, WARN)
    # A process's first product on a GPU may come with a warning of torch.
    assert sum(issubclass(w.category, MaterializedLogitsWarning) for w in caught) == 1
    _assert_same(got, _outcome(use, None))
    with pytest.raises(RuntimeError, match="materialize='raise'"):
        _outcome(use, EXACT)


def _entropy(logits: Any) -> Tensor:
    """In pieces and in the words of TRL."""
    flat = logits.reshape(-1, logits.shape[-1])
    log_ps = [F.log_softmax(piece, dim=-1) for piece in flat.split(5, dim=0)]
    return torch.cat([-(torch.exp(log_p) * log_p).sum(-1) for log_p in log_ps]).reshape(logits.shape[:-1])


STATISTICS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda z: z,
    "shifted": lambda z: z[..., :-1, :].float(),
    "scale, softcap": lambda z: torch.tanh(z * 2 / 0.7) * 0.7,
    "bias after a scale": lambda z: z * 0.3 + _vocab_vector(),
    "truncated": lambda z: z[1:, ..., :40],
    "masked positions": lambda z: z[_labels() != -100],
}


@pytest.mark.parametrize("form", STATISTICS.values(), ids=STATISTICS)
def test_entropy_and_argmax_for_the_log_need_no_logits(form: Callable[[Any], Any]) -> None:
    stock, lazy = form(_head(None)(_hidden())), form(_head(EXACT)(_hidden()))
    with torch.no_grad():
        _assert_same([_entropy(lazy)], [_entropy(stock)])
        _assert_same([lazy.argmax(dim=-1)], [stock.argmax(dim=-1)])
        statistics = lazy.statistics()
        wanted = [stock.argmax(-1), _entropy(stock), stock.softmax(-1).square().sum(-1).log(), stock.mean(-1)]
        _assert_same(list(statistics), wanted)
    assert len(lazy._source._statistics) == 1  # entropy and argmax share one pass


def test_pieces_of_a_call_share_one_pass() -> None:
    lazy = _head(EXACT)(_hidden())
    _selected(lazy, _labels().clamp(min=0))
    assert len(lazy._source._measured) == 1
    _entropy(lazy)
    torch.logsumexp(lazy[0], -1)
    with torch.no_grad():
        torch.logsumexp(lazy, -1)
    assert [found.entropy is not None for _, _, found in lazy._source._measured] == [False, True, False]


@pytest.mark.parametrize("trains", [True, False])
def test_a_lazy_head_gives_log_probabilities_of_hidden_states(trains: bool) -> None:
    labels, stock, lazy, hidden = _labels(), _head(None), _head(EXACT).train(trains), [_hidden(), _hidden()]
    found = lazy.logprobs(hidden[0], labels, softcap=3.0, entropy=True)  # type: ignore[operator]
    logits = torch.tanh(stock(hidden[1]) / 3) * 3
    wanted = _selected(logits, labels.clamp(min=0)) * (labels != -100)
    for x in (found.logprob, wanted):
        x.sum().backward()
    got = [found.logprob, hidden[0].grad, *(p.grad for p in lazy.parameters())]
    _assert_same(got, [wanted, hidden[1].grad, *(p.grad for p in stock.parameters())])
    with torch.no_grad():
        assert torch.equal(lazy.logprobs(_hidden(), labels, softcap=3.0).logprob, found.logprob)  # type: ignore[operator]


def test_a_lazy_head_whose_call_gives_logits_refuses_log_probabilities() -> None:
    lazy = _head(WARN)
    lazy.register_full_backward_hook(lambda *_: None)
    with pytest.warns(MaterializedLogitsWarning), pytest.raises(RuntimeError, match="would compute logits of"):
        lazy.logprobs(_hidden(), _labels())  # type: ignore[operator]


def test_a_pass_over_all_tokens_of_a_call_may_be_longer_than_its_losses() -> None:
    short = EXACT.model_copy(update={"max_tokens": BATCH * (LENGTH - 1)})
    wanted = _head(None)(_hidden())[:, :-1].logsumexp(-1)
    _assert_same([_head(short)(_hidden())[:, :-1].logsumexp(-1)], [wanted])


def test_kernels_that_read_memory_are_told_that_there_is_none() -> None:
    """TRL's own asks for the last stride, which must not be 1, before it reads the logits."""
    assert _head(EXACT)(_hidden()).stride(-1) == 0


def test_logprobs_of_lazy_logits_are_those_of_stock_logits() -> None:
    stock, labels = _head(None), _labels()
    lazy, hidden = _head(EXACT), [_hidden(), _hidden()]
    found = (torch.tanh(lazy(hidden[0])[:, :-1] / 3) * 3).logprobs(labels[:, 1:], temperature=0.8, entropy=True)
    logits = torch.tanh(stock(hidden[1])[:, :-1] / 3) * 3 / 0.8
    valid = labels[:, 1:] != -100
    wanted = (_selected(logits, labels[:, 1:].clamp(min=0)) * valid, _entropy(logits) * valid)
    for x in ((found.logprob, found.entropy), wanted):
        (x[0] + 0.3 * x[1]).sum().backward()
    got = [found.logprob, found.entropy, hidden[0].grad, *(p.grad for p in lazy.parameters())]
    _assert_same(got, [*wanted, hidden[1].grad, *(p.grad for p in stock.parameters())])
    with pytest.raises(ValueError, match="logprobs\\(\\) is of the logits that a model returns"):
        lazy(_hidden()).log_softmax(-1).logprobs(labels)
    with pytest.raises(ValueError, match="labels must have hidden's shape"):
        lazy(_hidden()).logprobs(labels[:, 1:])


def _something_else_of_log_probs(logits: Any) -> list[Tensor]:
    log_p = logits.log_softmax(-1)
    other = (logits * 2).log_softmax(-1)
    return [log_p * log_p, log_p.exp() * other, log_p.exp() * log_p[:1], log_p * 2, (log_p.exp() * log_p).sum(0),
            F.cross_entropy(log_p.flatten(0, 1), _labels().flatten()), log_p[..., 3:]]  # fmt: skip


@torch.no_grad()
def test_what_is_not_the_entropy_is_what_it_is_for_stock() -> None:
    head, hidden = _head(None), _hidden()
    make_lazy(head, ModuleOwner(head), WARN)
    with fused_evaluation(head), pytest.warns(MaterializedLogitsWarning):
        got = _something_else_of_log_probs(head(hidden))
    _assert_same([x + 0 for x in got], list(_something_else_of_log_probs(_head(None)(hidden))))


@torch.no_grad()
def test_a_draw_from_the_softmax_needs_no_logits_and_several_do() -> None:
    head = _head(EXACT)
    with fused_evaluation(head):
        logits, stock = (x(_hidden()) / 0.01 for x in (head, _head(None)))
    for flat, wanted in ((logits.flatten(0, 1), stock.flatten(0, 1)), (logits[0, 2], stock[0, 2])):
        p, most_likely = F.softmax(flat, dim=-1, dtype=torch.float32), wanted.argmax(-1, keepdim=True)
        assert torch.equal(torch.multinomial(p, num_samples=1), most_likely)
        assert torch.equal(p.multinomial(1), most_likely)
        with pytest.raises(RuntimeError, match="in multinomial"):
            torch.multinomial(p, 2)
        with pytest.raises(RuntimeError, match="in multinomial"):
            torch.multinomial(p, 1, generator=torch.Generator(DEVICE))


def test_the_warning_names_the_line_that_needed_logits() -> None:
    logits = _head(WARN)(_hidden())
    with pytest.warns(MaterializedLogitsWarning) as caught:
        F.softmax(logits, dim=-1)  # this line
    (warning,) = caught
    assert warning.filename == __file__
    line = test_the_warning_names_the_line_that_needed_logits.__code__.co_firstlineno + 3
    assert f"{__file__}:{line}, in {test_the_warning_names_the_line_that_needed_logits.__name__}," in str(
        warning.message
    )


class _Products(TorchDispatchMode):
    """Counts matrix products with all rows of the head."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += "mm" in str(function) and result.shape[-1] == VOCAB
        return result


def test_logits_are_computed_once_and_the_hooks_of_the_call_run_once() -> None:
    head = _head(WARN)
    calls: list[Any] = []
    head.register_forward_hook(lambda _, args, output: calls.append(output))
    with _Products() as products:
        logits = head(_hidden())
        assert products.count == 0
        with pytest.warns(MaterializedLogitsWarning) as caught:
            (logits.softmax(-1), logits[..., :-1, :].argmax(-1, keepdim=True), (logits / 2).float().exp())
    assert len(caught) == products.count == 1
    assert calls == [logits]


def test_logits_first_read_without_grad_still_carry_gradients_later() -> None:
    head = _head(WARN)
    logits = head(_hidden())
    with pytest.warns(MaterializedLogitsWarning), torch.no_grad():
        assert not logits.exp().requires_grad
    logits.exp().sum().backward()
    assert head.weight.grad is not None


class _WithLoss(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        return _flat(self.head(hidden), _labels())


def _checkpointed(config: CCEConfig | None, around_the_loss: bool, reentrant: bool) -> list[Any]:
    head, hidden = _head(config), _hidden()
    if around_the_loss:
        loss = checkpoint(_WithLoss(head), hidden, use_reentrant=reentrant)
    else:
        loss = _flat(checkpoint(head, hidden, use_reentrant=reentrant), _labels())
    loss.backward()
    return [loss.detach(), hidden.grad, head.weight.grad, head.bias.grad]


@pytest.mark.parametrize("around_the_loss", [True, False], ids=["head and loss", "head alone"])
def test_a_checkpoint_around_the_head(around_the_loss: bool) -> None:
    wanted = _checkpointed(None, around_the_loss, True)
    _assert_same(_checkpointed(EXACT, around_the_loss, False), wanted)
    with pytest.warns(MaterializedLogitsWarning, match=f"{__file__}.*reentrant checkpoint.*use_reentrant=False"):
        got = _checkpointed(WARN, around_the_loss, True)
    _assert_same(got, wanted)
    with pytest.raises(RuntimeError, match="reentrant checkpoint"):
        _checkpointed(EXACT, around_the_loss, True)


def test_deepspeeds_checkpoint_around_the_head() -> None:
    checkpointing = pytest.importorskip("deepspeed.runtime.activation_checkpointing.checkpointing")
    outcomes = []
    for config in (WARN, None):
        head, hidden = _head(config), _hidden()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = _flat(checkpointing.checkpoint(head, hidden), _labels())
        assert sum(issubclass(w.category, MaterializedLogitsWarning) for w in caught) == (config is WARN)
        loss.backward()
        outcomes.append([loss.detach(), hidden.grad, head.weight.grad])
    _assert_same(*outcomes)


@dataclass
class _Output:
    """As a model's output; `_as_lightning_moves` does with it what Lightning's ModelParallelStrategy does."""

    loss: Any
    logits: Any


def _as_lightning_moves(data: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """In the words of lightning_utilities' apply_to_collection: dataclasses are deep-copied, then their fields set."""
    if isinstance(data, Tensor):
        return function(data)
    if is_dataclass(data) and not isinstance(data, type):
        fields_of = {f.name: getattr(data, f.name) for f in fields(data)}
        result = copy.deepcopy(data, memo={id(value): value for value in fields_of.values()})
        for name, value in fields_of.items():
            setattr(result, name, _as_lightning_moves(value, function))
        return result
    return data


def test_outputs_that_lightning_copies_train_as_they_are() -> None:
    outcomes, seen = [], []
    for config in (EXACT, None):
        head, hidden = _head(config), _hidden()
        output = _Output(None, head(hidden) * 0.5)
        before = output.logits

        def moved(x: Tensor) -> Tensor:
            y = x.clone()
            y.register_hook(seen.append)  # as where FSDP2's root waits for the backward
            return y

        output = _as_lightning_moves(output, moved)
        loss = _flat(output.logits, _labels())
        loss.backward()
        outcomes.append([loss.detach(), hidden.grad, head.weight.grad, head.bias.grad])
        if config is EXACT:
            assert isinstance(output.logits, LazyLogits)
            assert output.logits is not before
            assert len(seen) == 1
    _assert_same(*outcomes)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_of_the_same_call(copied: Callable[[Any], Any]) -> None:
    head, hidden = _head(EXACT), _hidden()
    logits = head(hidden)
    twin = copied({"logits": logits[..., :40]})["logits"]
    assert twin.shape == (BATCH, LENGTH, 40)
    _flat(twin, _labels(40)).backward()
    plain_head, plain_hidden = _head(None), _hidden()
    _flat(plain_head(plain_hidden)[..., :40], _labels(40)).backward()
    _assert_same([hidden.grad, head.weight.grad], [plain_hidden.grad, plain_head.weight.grad])
    twin = copied(logits)
    twin.hidden_XD = torch.zeros(3, HIDDEN, device=DEVICE)
    assert (logits.shape, twin.shape) == ((BATCH, LENGTH, VOCAB), (3, VOCAB))


VALUES = {"H", "T", "mH", "mT", "data", "imag", "real", "grad_fn", "grad_dtype"}  # the last one: of leaves alone
METHODS = (
    "element_size", "is_complex", "is_contiguous", "is_floating_point", "is_signed", "is_conj", "is_neg",
    "is_inference", "get_device", "nelement", "ndimension", "numel", "dim",
)  # fmt: skip


def test_every_attribute_that_is_metadata_needs_no_logits() -> None:
    lazy, stock = (_head(config)(_hidden())[:, 1:].bfloat16() for config in (EXACT, None))
    names = [
        name for name in dir(Tensor)
        if name != "volatile"  # which warns
        and not name.startswith("_") and name not in VALUES and not callable(getattr(Tensor, name))
    ]  # fmt: skip
    assert {"is_cuda", "layout", "is_sparse", "itemsize", "nbytes", "is_meta", "is_leaf"} <= set(names)
    missing = object()
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the grad of what is no leaf
            wanted = getattr(stock, name, missing)
        assert getattr(lazy, name, missing) == wanted, name
    for name in METHODS:
        assert getattr(lazy, name)() == getattr(stock.contiguous(), name)(), name
    assert torch.is_complex(lazy) == torch.is_complex(stock)
    assert torch.result_type(lazy, torch.ones(1, device=DEVICE)) == torch.float32
    assert lazy.is_same_size(stock)
    with pytest.raises(RuntimeError, match="the attribute real"):
        _ = lazy.real


def test_metadata_needs_no_logits() -> None:
    logits = _head(EXACT)(_hidden())[:, 1:].bfloat16()
    assert isinstance(logits, LazyLogits)
    assert logits.shape == logits.size() == (BATCH, LENGTH - 1, VOCAB)
    assert (logits.ndim, logits.dim(), len(logits)) == (3, 3, BATCH)
    assert logits.size(-1) == VOCAB
    assert logits.numel() == BATCH * (LENGTH - 1) * VOCAB
    assert (logits.dtype, logits.device.type, logits.requires_grad) == (torch.bfloat16, DEVICE, True)
    assert logits.is_floating_point()
    assert not hasattr(logits, "no_such_attribute")
    assert repr(logits) == f"LazyLogits(shape=[2, 6, 53], dtype=torch.bfloat16, device={logits.device})"


def _halve_input(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0] / 2


def _shift_input_by_name(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (), {"input": (args[0] if args else kwargs["input"]) * 0.3 + 1}


def _scale_output(module: nn.Module, args: Any, output: Any) -> Any:
    return torch.tanh(output / 0.7) * 0.7


def _weigh_output(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    assert kwargs.keys() <= {"input"}
    return output + _vocab_vector()


def _prune(head: nn.Linear) -> None:
    prune.l1_unstructured(head, "weight", 0.5)
    prune.l1_unstructured(head, "weight", 0.5)


HOOKS: dict[str, Callable[[nn.Linear], Any]] = {
    "a pre-hook": lambda head: head.register_forward_pre_hook(_halve_input),
    "a pre-hook with keywords": lambda head: head.register_forward_pre_hook(_shift_input_by_name, with_kwargs=True),
    "two pre-hooks": lambda head: [head.register_forward_pre_hook(_halve_input) for _ in range(2)],
    "a hook": lambda head: head.register_forward_hook(_scale_output),
    "a hook with keywords": lambda head: head.register_forward_hook(_weigh_output, with_kwargs=True),
    "hooks on both sides": lambda head: [
        head.register_forward_hook(_scale_output), head.register_forward_pre_hook(_halve_input),
        head.register_forward_hook(_weigh_output, with_kwargs=True, prepend=True),
    ],
    "a hook that is called always": lambda head: head.register_forward_hook(_scale_output, always_call=True),
    "a pre-hook on all modules": lambda head: torch_modules.register_module_forward_pre_hook(_halve_input),
    "a hook on all modules": lambda head: torch_modules.register_module_forward_hook(_scale_output),
    "pruning": lambda head: _prune(head),
    "weight_norm": lambda head: nn.utils.parametrizations.weight_norm(head),
    "old weight_norm": lambda head: old_weight_norm(head),
    "spectral_norm": lambda head: nn.utils.parametrizations.spectral_norm(head),
    "old spectral_norm": lambda head: nn.utils.spectral_norm(head),
    "a parametrized bias": lambda head: parametrize.register_parametrization(head, "bias", nn.Softplus()),
}  # fmt: skip


def _two_steps(hook: Callable[[nn.Linear], Any], config: CCEConfig | None, use: Callable[..., Any]) -> list[Any]:
    """Losses, and gradients of hidden states and of all that the head trains, in each of two optimizer steps."""
    head = _head(config)
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        handles = hook(head)
    try:
        optimizer, outcome = torch.optim.SGD(head.parameters(), lr=1.0), []
        for _ in range(2):
            hidden = _hidden()
            loss = use(head(hidden), _labels())
            loss.backward()
            outcome += [loss.detach(), hidden.grad, *(p.grad.clone() for p in head.parameters())]
            optimizer.step()
            optimizer.zero_grad()
    finally:
        for handle in handles if isinstance(handles, list) else [handles]:
            if isinstance(handle, RemovableHandle):
                handle.remove()
    return outcome


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_what_changes_input_output_or_parameters_of_the_call_counts(hook: Callable[[nn.Linear], Any]) -> None:
    _assert_same(_two_steps(hook, EXACT, _flat), _two_steps(hook, None, _flat), 1e-5)

    def real(logits: Any, labels: Tensor) -> Tensor:
        return (
            -logits.softmax(-1).log().flatten(0, 1)[torch.arange(labels.numel()), labels.flatten().clamp(min=0)].sum()
        )

    with pytest.warns(MaterializedLogitsWarning):
        got = _two_steps(hook, WARN, real)
    _assert_same(got, _two_steps(hook, None, real), 1e-5)


def test_the_head_is_called_by_keyword_too() -> None:
    for hook in (_shift_input_by_name, None):
        heads = [_head(config) for config in (EXACT, None)]
        if hook is not None:
            for head in heads:
                head.register_forward_pre_hook(hook, with_kwargs=True)
        lazy, stock = (_flat(head(input=_hidden()), _labels()) for head in heads)
        _assert_same([lazy], [stock])


def test_a_hook_may_give_something_else_than_logits() -> None:
    head = _head(EXACT)
    head.register_forward_hook(lambda module, args, output: args[0].sum())
    assert torch.equal(head(_hidden()), _hidden().sum())


def test_hooks_that_are_called_always_are_called_after_an_error() -> None:
    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise ValueError("the hook's own")

    seen: list[Any] = []
    head = _head(EXACT)
    head.register_forward_hook(fail)
    head.register_forward_hook(lambda module, args, output: seen.append(output), always_call=True)
    with pytest.raises(ValueError, match="the hook's own"):
        head(_hidden())
    assert len(seen) == 1


def _swapped_for_the_call(head: nn.Linear, parameters: dict[str, Tensor]) -> Tensor:
    logits = torch.func.functional_call(head, parameters, (_hidden(),))
    return _flat(logits, _labels())


def test_parameters_swapped_in_for_one_call_are_those_of_the_loss() -> None:
    grads = []
    for config in (EXACT, None):
        head = _head(config)
        other = {"weight": (head.weight.detach() * 2).requires_grad_(), "bias": head.bias.detach() + 1}
        loss = _swapped_for_the_call(head, other)
        loss.backward()
        assert head.weight.grad is None
        grads.append([loss.detach(), other["weight"].grad])
    _assert_same(*grads)


class _Reader:
    """An owner that reads its rows out of a framework's storage, as those of FSDP2 and ZeRO-3 do."""

    def __init__(self, head: nn.Linear) -> None:
        self.head, self.shard, self.reads = head, VocabShard.whole(VOCAB), 0

    def local_weight(self) -> Tensor:
        self.reads += 1
        return self.head.weight

    def local_bias(self) -> Tensor | None:
        return self.head.bias


def test_an_owner_is_asked_for_its_rows_when_the_loss_runs_and_parameters_must_be_the_same_then() -> None:
    head = _head(None)
    owner = _Reader(head)
    make_lazy(head, owner, EXACT)
    logits = head(_hidden())
    assert owner.reads == 0  # what it gathers lives no longer than the loss needs it
    _assert_same([_flat(logits, _labels())], [_flat(_head(None)(_hidden()), _labels())])
    with pytest.raises(RuntimeError, match="have been replaced between its call and the use"):
        _swapped_for_the_call(head, {"weight": head.weight.detach() * 2})
    for name in ("bias", "weight"):
        prune.identity(head, name)
        with pytest.raises(RuntimeError, match="computed for each call.*_Reader"):
            head(_hidden())
        prune.remove(head, name)


def _backward_hook(head: nn.Linear) -> RemovableHandle:
    return head.register_full_backward_hook(lambda module, of_input, of_output: (of_input[0] * 2,))


def _own_forward(head: nn.Linear) -> None:
    head.forward = lambda input: F.linear(input, head.weight * 2, head.bias)  # type: ignore[method-assign]


class _Doubled(Tensor):
    """As a quantised weight: F.linear on it is something of its own."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return super().__torch_function__(function, types, (args[0] * 2, *args[1:]), kwargs).as_subclass(Tensor)
        return super().__torch_function__(function, types, args, kwargs)


def _own_weight(head: nn.Linear) -> None:
    head.weight = nn.Parameter(head.weight.detach().as_subclass(_Doubled))  # type: ignore[arg-type]


REAL: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "a backward hook": (_backward_hook, "backward hooks"),
    "a backward pre-hook": (
        lambda head: head.register_full_backward_pre_hook(lambda module, of_output: (of_output[0] * 2,)),
        "backward hooks",
    ),
    "a backward hook on all modules": (
        lambda head: torch_modules.register_module_full_backward_hook(lambda module, x, y: (x[0] * 2,)),
        "backward hooks",
    ),
    "a forward of its own": (_own_forward, "has the forward .*_own_forward"),
    "a weight of a class of its own": (_own_weight, "a weight of the class _Doubled"),
}


@pytest.mark.parametrize(("change", "text"), REAL.values(), ids=REAL)
def test_a_call_that_is_more_than_a_product_gives_real_logits_and_says_so(change: Any, text: str) -> None:
    with pytest.warns(MaterializedLogitsWarning, match=text):
        got = _two_steps(change, WARN, _flat)
    _assert_same(got, _two_steps(change, None, _flat))
    with pytest.raises(RuntimeError, match=text):
        _two_steps(change, EXACT, _flat)


def test_what_is_written_to_between_call_and_loss_is_refused() -> None:
    for text, write in (("parameters", lambda h, x: h.weight), ("hidden states", lambda h, x: x)):
        head, hidden = _head(EXACT), _hidden().detach()
        logits = head(hidden)
        with torch.no_grad():
            write(head, hidden).mul_(2)  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match=f"{text}.*changed in place"):
            _flat(logits, _labels())


def test_a_call_without_a_graph_gives_a_loss_without_one() -> None:
    head = _head(EXACT)
    with torch.no_grad(), fused_evaluation(head):
        logits = head(_hidden())
    assert not logits.requires_grad
    assert not _flat(logits, _labels()).requires_grad


def test_output_hooks_find_the_hidden_states_and_may_replace_them() -> None:
    head, hidden = _head(EXACT), _hidden()
    leaves, structure = tree_flatten({"logits": head(hidden)[..., :-1, :] * 0.5})
    assert [leaf.data_ptr() for leaf in leaves] == [hidden.data_ptr()]
    seen: list[Tensor] = []
    replaced = hidden.clone()
    replaced.register_hook(seen.append)
    logits = tree_unflatten([replaced], structure)["logits"]
    _flat(logits, _labels()[:, 1:].contiguous()).backward()
    plain_head, plain_hidden = _head(None), _hidden()
    _flat((plain_head(plain_hidden)[..., :-1, :] * 0.5).contiguous(), _labels()[:, 1:].contiguous()).backward()
    _assert_same([hidden.grad, head.weight.grad], [plain_hidden.grad, plain_head.weight.grad])
    assert len(seen) == 1


def test_a_hook_that_casts_outputs_does_not_change_the_dtype_of_the_computation() -> None:
    head = _head(EXACT).bfloat16()
    leaves, structure = tree_flatten(head(_hidden().bfloat16()))
    cast = tree_unflatten([leaves[0].float()], structure)
    assert torch.equal(_flat(cast, _labels()), _flat(head(_hidden().bfloat16()), _labels()))


def test_autocast_at_the_call_of_the_head_decides_the_dtype() -> None:
    def logits(config: CCEConfig | None) -> Any:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return _head(config)(_hidden())

    exact = _flat(_head(None)(_hidden()), _labels())
    fused, stock = (_flat(logits(config).float(), _labels()) for config in (EXACT, None))
    assert fused != exact
    assert (fused - exact).abs() <= (stock - exact).abs()
    with pytest.warns(MaterializedLogitsWarning):
        real = logits(WARN) + 0
    assert real.dtype == torch.bfloat16
    assert torch.equal(real, logits(None))


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode"])
def test_outside_of_training_the_stock_head_runs_with_its_hooks(mode: str) -> None:
    head = _head(EXACT)
    calls: list[None] = []
    head.register_forward_hook(lambda *_: calls.append(None))
    context = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    head.train(mode != "eval")
    with context():
        logits = head(_hidden())
    assert type(logits) is Tensor
    assert torch.equal(logits, _head(None)(_hidden()))
    assert len(calls) == 1


def test_fused_evaluation_gives_the_loss_without_logits() -> None:
    head = _head(EXACT).eval()
    with torch.no_grad():
        with fused_evaluation(head):
            logits = head(_hidden())
        assert isinstance(logits, LazyLogits)
        _assert_same([_flat(logits, _labels())], [_flat(head(_hidden()), _labels())])
    assert type(head(_hidden())) is Tensor
    with pytest.raises(ValueError, match="is not lazy"), fused_evaluation(_head(None)):
        pass


def test_the_head_keeps_its_identity() -> None:
    plain, head = _head(None), _head(EXACT)
    assert isinstance(head, nn.Linear)
    assert vars(head).keys() == vars(plain).keys()
    assert head.state_dict().keys() == plain.state_dict().keys()
    make_eager(head)
    assert type(head) is nn.Linear
    assert type(head(_hidden())) is Tensor


def test_a_pickle_holds_the_stock_head() -> None:
    head = _head(EXACT)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(head)), torch.load(file, weights_only=False)):
        assert type(loaded) is nn.Linear
        assert torch.equal(loaded(_hidden()), _head(None)(_hidden()))


def test_a_deepcopy_is_lazy_with_weights_of_its_own() -> None:
    head = _head(EXACT)
    twin = copy.deepcopy(nn.ModuleDict({"tied": head, "head": head}))
    assert twin["head"] is twin["tied"]
    assert type(twin["head"]) is not type(head)
    _flat(twin["head"](_hidden()), _labels()).backward()
    assert head.weight.grad is None
    assert twin["head"].weight.grad is not None
    make_eager(twin["head"])
    assert isinstance(head(_hidden()), LazyLogits)


class _Adapted(nn.Linear):
    """As a LoRA layer that inherits from nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_a_head_that_computes_something_else_is_refused() -> None:
    replaced = nn.Linear(HIDDEN, VOCAB)
    replaced.forward = lambda input: input  # type: ignore[method-assign]
    for head in (
        _Adapted(HIDDEN, VOCAB),
        nn.Embedding(VOCAB, HIDDEN),
        nn.Sequential(nn.Linear(HIDDEN, VOCAB)),
        replaced,
    ):
        with pytest.raises(TypeError, match="Adapters on the output layer"):
            make_lazy(head, ModuleOwner(nn.Linear(HIDDEN, VOCAB)), EXACT)


def test_an_adapter_around_a_lazy_head_is_honoured_and_reported() -> None:
    def use(logits: Any, _: Tensor) -> Tensor:
        return logits + _hidden() @ torch.ones(HIDDEN, VOCAB, device=DEVICE)

    with pytest.warns(MaterializedLogitsWarning, match="__add__"):
        got = _outcome(use, WARN)
    _assert_same(got, _outcome(use, None))


def test_lazy_twice_or_eager_too_often_is_an_error() -> None:
    head = _head(EXACT)
    with pytest.raises(ValueError, match="is lazy already"):
        make_lazy(head, ModuleOwner(head), EXACT)
    make_eager(head)
    with pytest.raises(ValueError, match="not a class that make_lazy made"):
        make_eager(head)


class _Slices:
    """An owner whose ranks each take some rows of a weight that all hold; the gradient is zero in other rows."""

    def __init__(self, head: nn.Linear, runs: tuple[tuple[int, int], ...], tokens: bool) -> None:
        self.head = head
        group = dist.group.WORLD
        self.shard = VocabShard(runs, VOCAB, group, group if tokens else None)

    def _rows(self, x: Tensor) -> Tensor:
        return torch.cat([x[:0], *(x[start:stop] for start, stop in self.shard.runs)])

    def local_weight(self) -> Tensor:
        return self._rows(self.head.weight)

    def local_bias(self) -> Tensor | None:
        return self._rows(self.head.bias)


SHARDED = (
    *("mean", "none", "shift", "softcap", "bias after a scale", "truncated after a bias", "bias after truncation"),
    *("class weights, smoothed", "class weights, smoothed, of a truncated vocabulary"),
)
RUNS = {
    2: ([(0, 20)], [(20, VOCAB)]),
    3: ([(0, 10), (45, VOCAB)], [], [(10, 45)]),
}


def _sharded_outcomes(name: str, tokens: bool) -> list[Tensor | None]:
    """Gradients of head and hidden; with ``tokens`` each rank has its own, ranks' hidden scaled by 1, 2, ..."""
    rank, world = dist.get_rank(), dist.get_world_size()
    head, hidden = _head(None), (_hidden() * (1 + rank * tokens)).detach().requires_grad_()
    make_lazy(head, _Slices(head, tuple(RUNS[world][rank]), tokens), EXACT)
    result = FUSED[name](head(hidden), _labels())
    result.sum().backward()
    for p in head.parameters():
        dist.all_reduce(p.grad)
    return [result.detach(), hidden.grad, head.weight.grad, head.bias.grad]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("tokens", [False, True], ids=["replicated tokens", "own tokens"])
def test_a_sharded_vocabulary_gives_the_same(ranks: RankPool, world: int, tokens: bool) -> None:
    for name in SHARDED:
        whole, losses = _head(None), []
        hiddens = [(_hidden() * (1 + rank * tokens)).detach().requires_grad_() for rank in range(world)]
        for hidden in hiddens if tokens else hiddens[:1]:
            losses.append(FUSED[name](whole(hidden), _labels()))
            losses[-1].sum().backward()
        for rank, outcome in enumerate(ranks.run(world, _sharded_outcomes, name, tokens)):
            part = rank * tokens
            wanted = [losses[part].detach(), hiddens[part].grad, whole.weight.grad, whole.bias.grad]
            _assert_same(outcome, wanted)


def _faulty_class_weights(fault: str) -> str:
    """What the rank is told where rank 0 alone has a label out of range, or weights that rank 1 has not."""
    rank = dist.get_rank()
    head, labels, weight = _head(None), _labels(), _vocab_vector().abs()
    make_lazy(head, _Slices(head, tuple(RUNS[2][rank]), tokens=True), EXACT)
    if rank == 0 and fault == "label":
        labels[1, 1] = VOCAB + 3
    try:
        _flat(head(_hidden()), labels, weight=weight if rank == 0 or fault == "label" else None, label_smoothing=0.1)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("fault", "told"), [("label", f"got [{VOCAB + 3}]"), ("weights", "with class_weights")])
def test_every_rank_is_told_of_a_fault_beside_class_weights(ranks: RankPool, fault: str, told: str) -> None:
    for text in ranks.run(2, _faulty_class_weights, fault):
        assert told in text


def _sharded_statistics(name: str, tokens: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(sharded, whole); with ``tokens`` rank r has 7, 3, ... tokens of its own, and reads them in other pieces."""
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden = _hidden()[:, : LENGTH - 4 * rank if tokens else LENGTH] * (1 + rank * tokens)
    lazy, whole = _head(None), _head(None)
    make_lazy(lazy, _Slices(lazy, tuple(RUNS[world][rank]), tokens), EXACT)
    sharded, stock = STATISTICS[name](lazy(hidden)), STATISTICS[name](whole(hidden))
    with torch.no_grad():
        got = [_entropy(sharded), sharded.argmax(-1), sharded.statistics().mean_logit]
        return got, [_entropy(stock), stock.argmax(-1), stock.mean(-1)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("tokens", [False, True], ids=["replicated tokens", "own tokens"])
def test_a_sharded_vocabulary_gives_the_same_entropy_and_argmax(ranks: RankPool, world: int, tokens: bool) -> None:
    for name in ("shifted", "scale, softcap", "bias after a scale", "truncated"):
        for got, wanted in ranks.run(world, _sharded_statistics, name, tokens and world == 2):
            _assert_same(got, wanted)


def _trained_bias_on_a_shard() -> str:
    head = _head(None)
    make_lazy(head, _Slices(head, tuple(RUNS[2][dist.get_rank()]), tokens=False), EXACT)
    try:
        _flat(head(_hidden()) + _vocab_vector().requires_grad_(), _labels())
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_trained_bias_beside_a_sharded_head_is_not_fused(ranks: RankPool) -> None:
    assert all("a trained bias" in text for text in ranks.run(2, _trained_bias_on_a_shard))


def _tensor_parallel_losses() -> dict[str, Any]:
    """Of a head that every rank has as a whole, behind a body whose hidden states are DTensors."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    whole = _hidden().detach()[:, :6]
    labels = _labels()[:, :6].contiguous()
    found: dict[str, Any] = {}
    stock = _head(None)
    hidden = whole.clone().requires_grad_()
    loss = _flat(stock(hidden), labels)
    loss.backward()
    wanted = [loss.detach(), hidden.grad, stock.weight.grad]
    for name, placement in {"replicated": Replicate(), "sequence": Shard(1)}.items():
        for labels_are in ("plain", "replicated", "split"):
            head = _head(EXACT)
            hidden = distribute_tensor(whole, mesh, [placement]).requires_grad_()
            y: Any = labels
            if labels_are != "plain":
                y = distribute_tensor(labels, mesh, [Replicate() if labels_are == "replicated" else Shard(1)])
            loss = _flat(head(hidden), y)
            loss.backward()
            _assert_same([loss.detach(), hidden.grad.full_tensor(), head.weight.grad], wanted)
            with torch.no_grad():
                assert torch.equal(head(hidden.detach()), stock(whole))
            found[f"{name}, labels {labels_are}"] = True
    own = distribute_tensor(whole, mesh, [Shard(1)]).to_local()  # sequence parallel: each rank its slice
    split = F.cross_entropy(
        _head(EXACT)(own).flatten(0, 1), distribute_tensor(labels, mesh, [Shard(1)]).flatten(), reduction="sum"
    )
    dist.all_reduce(split)
    _assert_same([split / (labels != -100).sum()], wanted[:1])
    for name, placement in {"batch": Shard(0), "hidden": Shard(2), "partial": Partial()}.items():
        hidden = DTensor.from_local(whole, mesh, [placement], run_check=False)
        with pytest.raises(TypeError, match="hidden states at this output layer are a DTensor.*redistribute"):
            _head(EXACT)(hidden)
        found[name] = True
    with pytest.raises(TypeError, match="target is a DTensor"):
        _flat(_head(EXACT)(whole), DTensor.from_local(labels, mesh, [Partial()], run_check=False))
    sharded = _head(None)
    make_lazy(sharded, _Slices(sharded, tuple(RUNS[2][dist.get_rank()]), tokens=False), EXACT)
    with pytest.raises(TypeError, match="shard_head"):
        sharded(distribute_tensor(whole, mesh, [Replicate()]))
    return found


def test_what_a_tensor_parallel_body_gives_is_taken_and_other_dtensors_are_refused(ranks: RankPool) -> None:
    for found in ranks.run(2, _tensor_parallel_losses):
        assert len(found) == 9
