"""Distillation by a patched model's logits: what functions on hidden states and rows give, with scale and softcap."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from reference import relative_error
from teachers import plain_terms
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cce_dist import CCEConfig, VocabShard
from cce_dist.heads.lazy import fused_evaluation, make_lazy
from cce_dist.heads.owner import ModuleOwner

VOCAB = 53
EXACT = CCEConfig(gradient="exact", materialize="raise")


def problem() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(2, 7, 12, generator=draw),
        "weight": torch.randn(VOCAB, 12, generator=draw),
        "teacher_hidden": torch.randn(2, 7, 20, generator=draw),
        "teacher_weight": torch.randn(VOCAB, 20, generator=draw),
        "labels": torch.where(torch.rand(2, 7, generator=draw) < 0.3, -100, 1),
        "ids": torch.rand(2, 7, VOCAB, generator=draw).argsort(-1)[..., :5],
    }


def head_of(weight: Tensor, sharded: bool) -> nn.Linear:
    head = nn.Linear(weight.shape[1], VOCAB, bias=False)
    shard = None
    if sharded:
        rows = distribute_tensor(weight, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
        head.weight, shard = nn.Parameter(rows), VocabShard.from_dtensor(rows)
    else:
        head.weight = nn.Parameter(weight.clone())
    make_lazy(head, ModuleOwner(head, shard), EXACT)
    return head


def changed(logits: Any) -> Any:
    """What a model with a softcap and a scale does, and a temperature."""
    return torch.tanh(logits * 0.7 / 3) * 3 / 1.7


def plain(given: dict[str, Tensor]) -> dict[str, Any]:
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    z = changed(hidden @ weight.T)
    log_s = z.log_softmax(-1)
    log_t = (given["teacher_hidden"].double() @ given["teacher_weight"].double().T).log_softmax(-1)
    valid, found = given["labels"] != -100, {"selected": z.gather(-1, given["ids"])}
    found["kl_div"] = plain_terms(log_s, log_t, "reverse", 0.5).sum(-1)[valid].mean()
    top = [log_p.gather(-1, given["ids"]) for log_p in (log_s, log_t)]
    both = [torch.cat([log_p, (1 - log_p.exp().sum(-1, keepdim=True)).log()], -1) for log_p in top]
    found["topk_kl"] = plain_terms(*both, "forward", 0.5).sum(-1).mean()
    return with_gradients(found, hidden, weight)


def with_gradients(found: dict[str, Tensor], hidden: Tensor, weight: Any) -> dict[str, Any]:
    sum(x.sum() for x in found.values()).backward()  # type: ignore[union-attr]
    grad = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
    return {**{name: x.detach() for name, x in found.items()}, "dhidden": hidden.grad, "dweight": grad}


def lazy(given: dict[str, Tensor], sharded: bool) -> dict[str, Any]:
    head, teacher = (head_of(given[name], sharded) for name in ("weight", "teacher_weight"))
    hidden = given["hidden"].clone().requires_grad_()
    with torch.no_grad(), fused_evaluation(teacher.eval()):
        of_teacher = teacher(given["teacher_hidden"])
    log_t = (given["teacher_hidden"] @ given["teacher_weight"].T).log_softmax(-1)
    logits = changed(head(hidden))
    found = {
        "selected": logits.selected(given["ids"]),
        "kl_div": logits.kl_div(of_teacher, given["labels"], kind="reverse"),
        "topk_kl": logits.topk_kl(given["ids"], log_t.gather(-1, given["ids"])),
    }
    return with_gradients(found, hidden, head.weight)


def test_it_is_that_of_the_models_logits() -> None:
    given = problem()
    truth = plain(given)
    for name, x in lazy(given, False).items():
        assert relative_error(x, truth[name]) < 5e-6, name


def test_so_it_is_where_both_heads_are_sharded(ranks: RankPool) -> None:
    given = problem()
    truth = plain(given)
    for got in ranks.run(2, lazy, given, True):
        for name, x in got.items():
            assert relative_error(x, truth[name]) < 5e-6, name


def test_what_is_not_logits_any_more_or_was_computed_is_named() -> None:
    given = problem()
    head = head_of(given["weight"], False)
    logits = head(given["hidden"])
    for name, arguments in {"selected": 1, "topk_kl": 2, "kl_div": 1}.items():
        tensors = (logits,) if name == "kl_div" else (given["ids"],) * arguments
        with pytest.raises(ValueError, match=f"{name}\\(\\) is of the logits that a model returns"):
            getattr(logits.log_softmax(-1), name)(*tensors)
    with pytest.raises(TypeError, match="patch the teacher"):
        logits.kl_div(given["teacher_hidden"] @ given["teacher_weight"].T)
