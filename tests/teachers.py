"""What the tests of distillation share: logits and divergences in plain torch, and the rows of every rank."""

import torch
from sharded import Runs
from torch import Tensor


def all_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    z = (hidden @ weight.T + (0 if bias is None else bias)) * logit_scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def runs_of(vocab: int, world: int, runs: Runs | None) -> Runs:
    """The rows of all ranks."""
    size = -(-vocab // world)
    return runs or [((min(r * size, vocab), min(r * size + size, vocab)),) for r in range(world)]


def rows_of(x: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """Those of some runs, out of all rows."""
    return torch.cat([x[:0], *(x[start:stop] for start, stop in runs)])


def plain_terms(log_student: Tensor, log_teacher: Tensor, kind: str, beta: float) -> Tensor:
    """What each outcome adds to a divergence, as its formula stands."""
    s, t = log_student.exp(), log_teacher.exp()
    if kind == "forward":
        return t * (log_teacher - log_student)
    if kind == "reverse":
        return s * (log_student - log_teacher)
    log_m = (beta * t + (1 - beta) * s).log()
    return beta * t * (log_teacher - log_m) + (1 - beta) * s * (log_student - log_m)
