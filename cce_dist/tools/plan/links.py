"""Milliseconds of collectives, by the datasheets' bandwidths: nothing here is measured.

In: a job, the bytes that a collective moves, and its ranks. Out: its time.
"""

import math

from cce_dist.tools.plan.job import GPUS, Job

LATENCY_MS = 0.01
"""Of a collective, for each doubling of its ranks: an assumption."""


def exchange_ms(job: Job, size: float, ranks: int, per_node: int | None = None) -> float:
    """An all-gather to, or a reduce-scatter of, ``size`` bytes; an all-reduce is two of them."""
    if ranks == 1:
        return 0.0
    gpu = GPUS[job.gpu]
    within = min(ranks, job.gpus_per_node) if per_node is None else per_node
    network = gpu.network if job.network is None else job.network
    bandwidth = gpu.link if ranks <= within else min(gpu.link, within * network)
    return 1e3 * size * (ranks - 1) / ranks / bandwidth + LATENCY_MS * math.ceil(math.log2(ranks))


def replicas_ms(job: Job, size: float, group: int) -> float:
    """The same among the ranks at one place of each group; ``size`` bytes are what a group's rank holds."""
    replicas = job.gpus // group
    within = replicas if job.gpus <= job.gpus_per_node else max(job.gpus_per_node // group, 1)
    return exchange_ms(job, size, replicas, min(within, replicas))
