"""Milliseconds of collectives: links within a node as `benchmarks/ranks.py` measured them, networks by datasheets.

In: a job, the bytes that a collective moves, its ranks, what was measured. Out: its time.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cce_dist.tools.plan.job import GPUS, Job


class Links(NamedTuple):
    """What GPUs of a node reach.

    Attributes:
        share: of the datasheet's bandwidth.
        latency_ms: of an exchange, for each doubling of its ranks.
        gpu, ranks: what was measured; ranks 0: nothing, the figures are assumptions.
    """

    share: float = 1.0
    latency_ms: float = 0.01
    gpu: str = ""
    ranks: int = 0


def measured_links(results: Sequence[tuple[str, Mapping[str, Any]]], gpu: str) -> Links:
    """From contents of `benchmarks/ranks.py`, each with its GPU: the last of ``gpu``, or else the last of any."""
    timed = [(key, content) for key, content in results if content["ranks"] > 1 and "links" in content]
    for key, content in [(key, content) for key, content in timed if key == gpu][-1:] or timed[-1:]:
        found, ranks = content["links"], content["ranks"]
        rate = (found["all_gather_gb_s"] + found["reduce_scatter_gb_s"]) / 2
        latency_ms = found["all_reduce_ms"] / 2 / math.ceil(math.log2(ranks))  # an all-reduce is two exchanges
        return Links(1e9 * rate / GPUS[key].link, latency_ms, key, ranks)
    return Links()


def exchange_ms(job: Job, links: Links, size: float, ranks: int, per_node: int | None = None) -> float:
    """An all-gather to, or a reduce-scatter of, ``size`` bytes; an all-reduce is two of them."""
    if ranks == 1:
        return 0.0
    gpu = GPUS[job.gpu]
    within = min(ranks, job.gpus_per_node) if per_node is None else per_node
    network = gpu.network if job.network is None else job.network
    reached = links.share * gpu.link
    bandwidth = reached if ranks <= within else min(reached, within * network)
    return 1e3 * size * (ranks - 1) / ranks / bandwidth + links.latency_ms * math.ceil(math.log2(ranks))


def replicas_ms(job: Job, links: Links, size: float, group: int) -> float:
    """The same among the ranks at one place of each group; ``size`` bytes are what a group's rank holds."""
    replicas = job.gpus // group
    within = replicas if job.gpus <= job.gpus_per_node else max(job.gpus_per_node // group, 1)
    return exchange_ms(job, links, size, replicas, min(within, replicas))
