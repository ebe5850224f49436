"""Every way to spread the head over the GPUs, with its bytes and milliseconds; and which of them is best.

In: a job and a calibration. Out: `Setting`s, the plain one first, and the recommended one.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from cce_dist.loss.settings import LARGE_VOCABULARY, MANY_FREQUENT
from cce_dist.tools.plan.calibration import STOCK, Calibration, compute_ms, spared_ms
from cce_dist.tools.plan.job import ELEMENT, GPUS, Job, group_sizes
from cce_dist.tools.plan.links import exchange_ms, replicas_ms
from cce_dist.tools.plan.memory import OPTIMIZER, Bytes, budget_of, loss_bytes


class Setting(NamedTuple):
    """One way to spread the head. ``compute`` and ``links`` in ms, of forward and backward, not overlapped."""

    name: str
    bytes: Bytes
    compute: float
    links: float

    @property
    def step(self) -> float:
        return self.compute + self.links


def settings(job: Job, calibration: Calibration) -> list[Setting]:
    """Every way to spread the head over the job's GPUs, the plain one first.

    Raises:
        ValueError: a method that was not measured.
    """
    group = min(job.gpus, job.gpus_per_node)
    stock = [plain(job, calibration), gathered(job, calibration)] if job.gpus > 1 else [plain(job, calibration)]
    parallel = [tensor_parallel(job, calibration, group)] if group > 1 else []
    return stock + parallel + [vocabulary_parallel(job, calibration, size) for size in group_sizes(job)]


def plain(job: Job, calibration: Calibration) -> Setting:
    """A whole classifier on every rank, and logits; its gradient is all-reduced over all ranks."""
    size = ELEMENT * job.vocab * job.hidden
    return Setting(
        "plain",
        Bytes(size, size, OPTIMIZER / ELEMENT * size, logits=_logits(job, calibration)),
        compute_ms(calibration, STOCK, job.gpu, job.tokens, job.vocab, job.hidden),
        2 * exchange_ms(job, calibration.links, size, job.gpus),
    )


def gathered(job: Job, calibration: Calibration) -> Setting:
    """FSDP or ZeRO-3 with the stock head: gathered for forward and for backward, its gradient reduce-scattered."""
    size = ELEMENT * job.vocab * job.hidden
    share = size / job.gpus
    return Setting(
        "FSDP gather",
        Bytes(share, share, OPTIMIZER / ELEMENT * share, rows=2 * size, logits=_logits(job, calibration)),
        compute_ms(calibration, STOCK, job.gpu, job.tokens, job.vocab, job.hidden),
        3 * exchange_ms(job, calibration.links, size, job.gpus),
    )


def tensor_parallel(job: Job, calibration: Calibration, group: int) -> Setting:
    """Vocabulary-parallel logits over ``group`` ranks with sequence parallelism, data-parallel replicas beyond."""
    share = ELEMENT * job.vocab * job.hidden / group
    states = ELEMENT * group * job.tokens * job.hidden
    tokens = group * job.tokens
    links = 2 * exchange_ms(job, calibration.links, states, group) + 3 * 2 * exchange_ms(
        job, calibration.links, 4 * tokens, group
    )
    return Setting(
        f"tensor parallel {group}",
        Bytes(share, share, OPTIMIZER / ELEMENT * share, hidden=2 * states, logits=_logits(job, calibration)),
        compute_ms(calibration, STOCK, job.gpu, tokens, -(-job.vocab // group), job.hidden),
        links + 2 * replicas_ms(job, calibration.links, share, group),
    )


def vocabulary_parallel(job: Job, calibration: Calibration, group: int) -> Setting:
    """cce_dist: ``group`` ranks share one copy of the classifier, which is stored over all ranks."""
    tokens, rows = group * job.tokens, -(-job.vocab // group)
    method = f"cce_dist {job.gradient}"
    share, held = (ELEMENT * job.vocab * job.hidden / ranks for ranks in (job.gpus, group))
    hidden, summaries, workspace = loss_bytes(tokens, rows, job.hidden, job.gradient, job.workspace_mb, group)
    own, all_states = job.tokens * job.hidden, tokens * job.hidden
    measured = compute_ms(calibration, method, job.gpu, tokens, rows, job.hidden, share=1 / group)
    kept, _ = budget_of(tokens, rows, job.gradient, job.workspace_mb)
    measured -= spared_ms(calibration, method, job.gpu, tokens, kept, job.hidden) if kept else 0.0
    passes = 1e3 * (all_states - own) * _BYTES_OF_PASSES / GPUS[job.gpu].bandwidth
    forward = exchange_ms(job, calibration.links, ELEMENT * all_states + 8 * tokens, group) + 2 * exchange_ms(
        job, calibration.links, 12 * tokens, group
    )
    backward = exchange_ms(job, calibration.links, 8 * tokens, group) + exchange_ms(
        job, calibration.links, 4 * all_states, group
    )
    if job.gradient != "exact" and job.vocab >= LARGE_VOCABULARY and group > 1:
        frequent = MANY_FREQUENT * job.hidden
        forward += 2 * exchange_ms(job, calibration.links, ELEMENT * frequent, group)
        backward += 2 * exchange_ms(job, calibration.links, 4 * frequent, group)
    return Setting(
        f"cce_dist {group}",
        Bytes(
            share,
            share,
            OPTIMIZER / ELEMENT * share,
            rows=2 * held if group < job.gpus else 0.0,
            hidden=hidden,
            logits=summaries,
            workspace=workspace,
        ),
        measured + passes,
        forward + backward + 2 * replicas_ms(job, calibration.links, held, group),
    )


BUDGETS: tuple[int | Literal["logits"], ...] = (256, 1024, 2048, 4096, "logits")


def by_budget(job: Job, calibration: Calibration, group: int) -> list[tuple[int | Literal["logits"], Setting]]:
    """The exact loss of one group size at each budget that its tokens allow and that changes something."""
    found: list[tuple[int | Literal["logits"], Setting]] = []
    for budget in BUDGETS:
        with_budget = job._replace(workspace_mb=budget)
        if group in group_sizes(with_budget):
            setting = vocabulary_parallel(with_budget, calibration, group)
            if not found or setting.bytes != found[-1][1].bytes:
                found.append((budget, setting))
    return found


_BYTES_OF_PASSES = 32
"""Memory traffic of the gathered hidden states and of their fp32 gradient beside the kernels, an element."""


def _logits(job: Job, calibration: Calibration) -> float:
    if STOCK not in calibration.logit_bytes:
        raise ValueError(f"{STOCK!r} was not measured; there is {', '.join(calibration.forward)}.")
    return calibration.logit_bytes[STOCK] * job.tokens * job.vocab


def recommend(found: Sequence[Setting], memory: float) -> Setting | None:
    """The fastest that fits ``memory`` bytes; among those within 5 % of it, the smallest. None: nothing fits."""
    fitting = [setting for setting in found if setting.bytes.total <= memory]
    if not fitting:
        return None
    fastest = min(setting.step for setting in fitting)
    return min((s for s in fitting if s.step <= 1.05 * fastest), key=lambda s: (s.bytes.total, s.step))
