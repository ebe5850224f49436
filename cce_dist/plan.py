"""``cce-dist plan``: bytes and milliseconds of the head on each rank, for each way to spread it, before a run.

An analytic model of few terms, whose formulas and assumptions are in docs/plan.md. What one GPU takes is fitted to the
measurements in benchmarks/results. Links are not measured: their bandwidths are those of datasheets.

Letters: N tokens that a rank's loss works on, n of them its own, V vocabulary, v rows that it works on, D hidden, W
ranks, g ranks that share one copy of the classifier (vocab_parallel_size). Times are in ms, sizes in bytes.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from cce_dist.config import CCEConfig
from cce_dist.kernels.problem import TILE
from cce_dist.loss.settings import default_workspace_mb, least_workspace_mb

MEASURED = Path(__file__).parent / "measured"
"""The result files of `benchmarks/loss.py`: a link to benchmarks/results."""


class Gpu(NamedTuple):
    """Datasheet figures: dense 16-bit FLOP/s, bytes/s of its memory, bytes of it; bytes/s in one direction to the GPUs
    of its node, and of its share of the node's network."""

    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float


GPUS = {
    "a100": Gpu(312e12, 2.039e12, 80e9, 300e9, 25e9),
    "h100": Gpu(989e12, 3.35e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989e12, 4.8e12, 141e9, 450e9, 50e9),
    "b200": Gpu(2250e12, 8e12, 180e9, 900e9, 50e9),
}
LATENCY_MS = 0.01
"""Of a collective, for each doubling of its ranks: an assumption."""

ELEMENT = 2
"""Bytes of a weight, a gradient and a hidden state in 16-bit training."""
_PAIR_ROWS, _CHUNK_D, _AT_ONCE_D = 128, 512, 1024
"""The sparse backward's work items, as on Hopper (kernels/tuning.json): an 8-byte entry of its queue each."""
OPTIMIZER = 12
"""Bytes of AdamW's state a weight: fp32 weight and two moments."""
STOCK = "torch.compile"
"""The measured method that the heads with logits are planned with."""


class Job(NamedTuple):
    """What is planned: ``tokens`` of one rank in one micro-step; ``network`` None: the GPU's usual share."""

    vocab: int
    hidden: int
    tokens: int
    gpus: int
    gpu: str
    gpus_per_node: int = 8
    gradient: str = "unbiased"
    workspace_mb: int | None = None
    network: float | None = None


class Bytes(NamedTuple):
    """Of one rank, at the head's peak.

    Attributes:
        weight, gradient, optimizer: what the rank stores.
        rows: copies of weights that were gathered, and gradients that are not yet reduced.
        hidden: hidden states of all tokens that the rank works on, and their gradient, where there are others' too.
        logits: logits, or what stands for them from forward to backward.
        workspace: what backward takes beside.
    """

    weight: float = 0.0
    gradient: float = 0.0
    optimizer: float = 0.0
    rows: float = 0.0
    hidden: float = 0.0
    logits: float = 0.0
    workspace: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


class Setting(NamedTuple):
    """One way to spread the head. ``compute`` and ``links`` in ms, of forward and backward, not overlapped."""

    name: str
    bytes: Bytes
    compute: float
    links: float

    @property
    def step(self) -> float:
        return self.compute + self.links


class Calibration(NamedTuple):
    """Fitted coefficients, in seconds for each unit of a term (`_dense_terms`, `_sparse_terms`), by method.

    Attributes:
        gpu: a key of `GPUS`, the one that was measured.
        product: of hidden · weightᵀ alone, in seconds a FLOP.
        logit_bytes: peak memory per logit of the methods that form logits.
        error: the largest relative deviation of a fitted forward or forward + backward from its measurement.
    """

    gpu: str
    product: float
    forward: dict[str, tuple[float, float]]
    backward: dict[str, tuple[float, float]]
    logit_bytes: dict[str, float]
    error: float
    shapes: tuple[str, ...]


def calibrate(files: Sequence[Path], gpu: str) -> Calibration:
    """Fits the model to result files of `benchmarks/loss.py`: those of ``gpu``, or else those of any known GPU.

    Raises:
        ValueError: no usable measurement; a file that is not such a result.
    """
    by_gpu: dict[str, dict[str, Any]] = {}
    for file in sorted(files):
        try:
            content = json.loads(file.read_text())
            key = next((key for key in GPUS if re.search(rf"\b{key}\b", content["gpu"].lower())), None)
            shapes = content["shapes"]
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as fault:
            raise ValueError(f"{file} is not a result of benchmarks/loss.py: {fault!r}.") from None
        if key is not None and content.get("steps") != 0:  # 0: inputs of an untrained model, flat softmaxes
            by_gpu.setdefault(key, {}).update(shapes)  # of a shape that several files hold, the last one's
    if not by_gpu:
        raise ValueError(
            f"no measurement of a GPU among {', '.join(GPUS)} in {[str(file) for file in files]}; pass result files of "
            "benchmarks/loss.py with --measured."
        )
    measured = gpu if gpu in by_gpu else max(by_gpu, key=lambda key: len(by_gpu[key]))
    results = by_gpu[measured]
    forward, backward, logit_bytes, error = {}, {}, {}, 0.0
    names = [name for name in next(iter(results.values()))["methods"] if name == STOCK or name.startswith("cce_dist")]
    for name in names:
        rows = [(_shape(r), r["methods"][name]) for r in results.values() if "both_ms" in r["methods"].get(name, {})]
        if not rows:
            continue
        forward_ms, both_ms = ([row[key] for _, row in rows] for key in ("forward_ms", "both_ms"))
        terms = _sparse_terms if _is_sparse(name) else _dense_terms
        forward[name] = _fit([_dense_terms(*shape) for shape, _ in rows], forward_ms)
        backward_ms = [both - first for both, first in zip(both_ms, forward_ms, strict=True)]
        backward[name] = _fit([terms(*shape) for shape, _ in rows], backward_ms)
        if name == STOCK:
            logit_bytes[name] = sum(r["peak_mb"] * 1e6 / (n * v) for (n, v, _), r in rows) / len(rows)
        for (shape, _), first, both in zip(rows, forward_ms, both_ms, strict=True):
            fitted = 1e3 * _dot(forward[name], _dense_terms(*shape))
            whole = fitted + 1e3 * _dot(backward[name], terms(*shape))
            error = max(error, abs(fitted / first - 1), abs(whole / both - 1))
    flops = [(2 * math.prod(_shape(r)), r["gemm_ms"] / 1e3) for r in results.values()]
    product = sum(seconds / count for count, seconds in flops) / len(flops)
    return Calibration(measured, product, forward, backward, logit_bytes, error, tuple(results))


def compute_ms(
    calibration: Calibration, method: str, gpu: str, tokens: int, rows: int, hidden: int, share: float = 1.0
) -> float:
    """Forward and backward of one GPU's loss on ``tokens`` by ``rows`` of the classifier.

    Args:
        share: of the (token, tile) pairs that the sparse backward keeps, those that fall on this GPU's rows.

    Raises:
        ValueError: the method was not measured.
    """
    if method not in calibration.forward:
        raise ValueError(f"{method!r} was not measured; there is {', '.join(calibration.forward)}.")
    measured, planned = GPUS[calibration.gpu], GPUS[gpu]
    arithmetic, memory = measured.flops / planned.flops, measured.bandwidth / planned.bandwidth
    dense = _dense_terms(tokens, rows, hidden)
    seconds = _dot(calibration.forward[method], dense) * arithmetic
    if _is_sparse(method):
        pairs, passes = _sparse_terms(tokens, rows, hidden)
        seconds += _dot(calibration.backward[method], (share * pairs, passes)) * memory
    else:
        seconds += _dot(calibration.backward[method], dense) * arithmetic
    return seconds * 1e3


def loss_bytes(
    tokens: int, rows: int, hidden: int, gradient: str, workspace_mb: int | None, ranks: int
) -> tuple[float, ...]:
    """What the loss holds beside its inputs and dC, for 16-bit ``tokens`` by ``rows`` of the classifier.

    Returns:
        The hidden states of all ranks that it saves and the fp32 dE; the summaries of the tiles that it saves; what the
        rest of backward takes at its peak: the workspace, and the tail's (R E) and the queue of pairs, or two copies of
        the hidden states; or the copy of dE at the end (in 16 bits, or in fp32 where ``ranks`` reduce-scatter it).
    """
    exact = gradient == "exact"
    elements = tokens * hidden
    tiles = -(-rows // TILE)
    workspace = workspace_mb if workspace_mb is not None else default_workspace_mb(tokens, ELEMENT, exact)
    chunks = 0 if hidden <= _AT_ONCE_D else -(-hidden // _CHUNK_D)
    queue = 8 * tiles * -(-tokens // _PAIR_ROWS) * (1 + chunks)
    beside = 2 * ELEMENT * elements if exact else ELEMENT * tiles * hidden + queue
    at_work = (workspace << 20) + beside
    at_end = (ELEMENT if ranks == 1 else 4) * elements
    summaries = 0 if exact else ELEMENT * tiles * tokens
    gathered = 0 if ranks == 1 else ELEMENT * elements
    return float(gathered + 4 * elements), float(summaries), float(max(at_work, at_end))


def check(job: Job) -> None:
    """Raises ValueError where a field of the job is not one that can be planned."""
    if job.gpu not in GPUS:
        raise ValueError(f"--gpu must be one of {', '.join(sorted(GPUS))}, got {job.gpu!r}.")
    if job.gpus > job.gpus_per_node and job.gpus % job.gpus_per_node:
        raise ValueError(
            f"--gpus must be a multiple of --gpus-per-node {job.gpus_per_node} (whole nodes), got {job.gpus}."
        )
    if job.vocab < job.gpus:
        raise ValueError(f"the classifier's {job.vocab} rows are fewer than the {job.gpus} GPUs; plan for fewer.")
    if not group_sizes(job):
        least = least_workspace_mb(job.tokens, ELEMENT)
        raise ValueError(f"workspace_mb must be at least {least} for {job.tokens} tokens, got {job.workspace_mb}.")


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
        2 * _exchange_ms(job, size, job.gpus),
    )


def gathered(job: Job, calibration: Calibration) -> Setting:
    """FSDP or ZeRO-3 with the stock head: gathered for forward and for backward, its gradient reduce-scattered."""
    size = ELEMENT * job.vocab * job.hidden
    share = size / job.gpus
    return Setting(
        "FSDP gather",
        Bytes(share, share, OPTIMIZER / ELEMENT * share, rows=2 * size, logits=_logits(job, calibration)),
        compute_ms(calibration, STOCK, job.gpu, job.tokens, job.vocab, job.hidden),
        3 * _exchange_ms(job, size, job.gpus),
    )


def tensor_parallel(job: Job, calibration: Calibration, group: int) -> Setting:
    """Vocabulary-parallel logits over ``group`` ranks with sequence parallelism, data-parallel replicas beyond."""
    share = ELEMENT * job.vocab * job.hidden / group
    states = ELEMENT * group * job.tokens * job.hidden
    tokens = group * job.tokens
    links = 2 * _exchange_ms(job, states, group) + 3 * 2 * _exchange_ms(job, 4 * tokens, group)
    return Setting(
        f"tensor parallel {group}",
        Bytes(share, share, OPTIMIZER / ELEMENT * share, hidden=2 * states, logits=_logits(job, calibration)),
        compute_ms(calibration, STOCK, job.gpu, tokens, -(-job.vocab // group), job.hidden),
        links + 2 * _replicas_ms(job, share, group),
    )


def vocabulary_parallel(job: Job, calibration: Calibration, group: int) -> Setting:
    """cce_dist: ``group`` ranks share one copy of the classifier, which is stored over all ranks."""
    tokens, rows = group * job.tokens, -(-job.vocab // group)
    method = f"cce_dist {job.gradient}"
    share, held = (ELEMENT * job.vocab * job.hidden / ranks for ranks in (job.gpus, group))
    hidden, summaries, workspace = loss_bytes(tokens, rows, job.hidden, job.gradient, job.workspace_mb, group)
    own, all_states = job.tokens * job.hidden, tokens * job.hidden
    measured = compute_ms(calibration, method, job.gpu, tokens, rows, job.hidden, share=1 / group)
    passes = 1e3 * (all_states - own) * _BYTES_OF_PASSES / GPUS[job.gpu].bandwidth
    forward = _exchange_ms(job, ELEMENT * all_states + 8 * tokens, group) + 2 * _exchange_ms(job, 12 * tokens, group)
    backward = _exchange_ms(job, 8 * tokens, group) + _exchange_ms(job, 4 * all_states, group)
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
        forward + backward + 2 * _replicas_ms(job, held, group),
    )


_BYTES_OF_PASSES = 32
"""Memory traffic of the gathered hidden states and of their fp32 gradient beside the kernels, an element."""


def group_sizes(job: Job) -> list[int]:
    """Values of vocab_parallel_size: the divisors of the ranks that are powers of two, a whole node, and all ranks;
    without those whose loss would refuse the job's ``workspace_mb``."""
    powers = [1 << bit for bit in range(job.gpus.bit_length())]
    divisors = sorted({size for size in (*powers, job.gpus_per_node, job.gpus) if job.gpus % size == 0})
    given = math.inf if job.workspace_mb is None else job.workspace_mb
    return [size for size in divisors if given >= least_workspace_mb(size * job.tokens, ELEMENT)]


def recommend(found: Sequence[Setting], memory: float) -> Setting | None:
    """The fastest that fits ``memory`` bytes; among those within 5 % of it, the smallest. None: nothing fits."""
    fitting = [setting for setting in found if setting.bytes.total <= memory]
    if not fitting:
        return None
    fastest = min(setting.step for setting in fitting)
    return min((s for s in fitting if s.step <= 1.05 * fastest), key=lambda s: (s.bytes.total, s.step))


def print_plan(job: Job, calibration: Calibration, memory: float) -> Setting | None:
    """Prints the table, the recommendation and what the figures rest on; returns what is recommended."""
    found = settings(job, calibration)
    best = recommend(found, memory)
    console = Console(highlight=False)
    console.width = max(console.width, 110)
    nodes = -(-job.gpus // job.gpus_per_node)
    console.print(
        f"Head: vocabulary {job.vocab:,}, hidden {job.hidden:,}, 16-bit; {job.tokens:,} tokens a GPU.\n"
        f"GPUs: {job.gpus:,} {job.gpu} in {nodes:,} node(s) of {min(job.gpus, job.gpus_per_node)}. "
        f"Gradient: {job.gradient}."
    )
    console.print(_table(found, best, memory))
    for line in _reasons(job, found, best, memory):
        console.print(line, soft_wrap=True)
    console.print(
        f"Basis: one GPU's times fitted to benchmarks/results ({calibration.gpu}, {', '.join(calibration.shapes)}; "
        f"within {calibration.error:.0%}){'' if calibration.gpu == job.gpu else ', scaled by datasheets'}. Links are "
        "NOT measured: datasheet bandwidths, nothing overlapped.\nFormulas and assumptions: docs/plan.md.",
        soft_wrap=True,
    )
    return best


def plot(job: Job, calibration: Calibration, path: Path) -> None:
    """Draws memory and time of the head against the number of GPUs, to 4096 or to the job's if they are more."""
    from matplotlib.figure import Figure

    largest = max(4096, job.gpus)
    nodes = largest // job.gpus_per_node
    counts = [1, *(job.gpus_per_node << bit for bit in range(nodes.bit_length()) if 1 << bit <= nodes)]
    curves: dict[str, list[tuple[int, Setting]]] = {}
    for count in counts:
        at = job._replace(gpus=count)
        node = min(count, job.gpus_per_node)
        drawn = {
            "plain": plain(at, calibration),
            "FSDP gather": gathered(at, calibration),
            f"tensor parallel {job.gpus_per_node}": tensor_parallel(at, calibration, node),
            "cce_dist 1 (rows gathered)": vocabulary_parallel(at, calibration, 1),
            f"cce_dist {job.gpus_per_node} (a node)": vocabulary_parallel(at, calibration, node),
            "cce_dist, all ranks": vocabulary_parallel(at, calibration, count),
        }
        for name, setting in drawn.items():
            curves.setdefault(name, []).append((count, setting))
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    memory, time = figure.subplots(1, 2)
    for index, (name, points) in enumerate(curves.items()):
        ranks = [count for count, _ in points]
        style = {"marker": ".", "color": f"C{index}", "linestyle": "-" if name.startswith("cce_dist") else "--"}
        memory.plot(ranks, [setting.bytes.total / 1e9 for _, setting in points], label=name, **style)
        time.plot(ranks, [setting.step for _, setting in points], **style)
    memory.axhline(GPUS[job.gpu].memory / 1e9, color="black", linewidth=0.8, label=f"memory of one {job.gpu}")
    for axes, title in (
        (memory, "memory of the head, GB a rank"),
        (time, "forward + backward, ms (links: datasheets)"),
    ):
        axes.set(title=title, xlabel="GPUs", xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
    memory.legend(fontsize="small")
    figure.suptitle(f"V = {job.vocab:,}, D = {job.hidden:,}, {job.tokens:,} tokens a GPU, {job.gpu}, {job.gradient}")
    figure.savefig(path, dpi=110)


def read_model(folder: Path) -> tuple[int, int]:
    """(vocabulary, hidden) of a folder with a Hugging Face config.json.

    Raises:
        ValueError: no such file, or it does not say.
    """
    file = folder / "config.json" if folder.is_dir() else folder
    config = _read_json(file)
    text = config.get("text_config")  # of a multimodal model
    config = text if isinstance(text, dict) else config
    found = []
    for key in ("vocab_size", "hidden_size"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{file} has no {key} (got {value!r}); pass --vocab and --hidden instead of --model.")
        found.append(value)
    return found[0], found[1]


def read_deepspeed(file: Path) -> tuple[CCEConfig, int | None]:
    """(the section "cce_dist", or its defaults; sequences of a micro-batch) of a DeepSpeed JSON.

    Raises:
        ValueError: not such a file, or a section that is not valid.
    """
    config = _read_json(file)
    section = CCEConfig.from_mapping(config.get("cce_dist", {}), f'the section "cce_dist" of {file}')
    micro = config.get("train_micro_batch_size_per_gpu")
    return section, micro if isinstance(micro, int) and micro > 0 else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content


def _table(found: Sequence[Setting], best: Setting | None, memory: float) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), caption=_CAPTION, caption_justify="left")
    table.add_column("setting", no_wrap=True)
    for column in (
        "weight",
        "grad",
        "optim",
        "rows",
        "hidden",
        "logits",
        "work",
        "total",
        "compute",
        "links",
        "step",
        "",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for setting in found:
        fits = setting.bytes.total <= memory
        table.add_row(
            setting.name,
            *(f"{size / 1e9:.2f}" if size else "" for size in setting.bytes),
            f"{setting.bytes.total / 1e9:.2f}",
            *(f"{ms:.1f}" for ms in (setting.compute, setting.links, setting.step)),
            "<--" if setting is best else "" if fits else "too big",
        )
    return table


_CAPTION = (
    "GB and ms of one rank, forward and backward of one micro-step. The number is the tensor-parallel size, or "
    "vocab_parallel_size. rows: gathered weights and gradients not yet reduced; hidden: hidden states and their "
    "gradient; logits: logits, or the summaries in their place; work: what backward takes beside."
)


def _reasons(job: Job, found: Sequence[Setting], best: Setting | None, memory: float) -> Iterable[str]:
    if best is None:
        least = min(found, key=lambda setting: setting.bytes.total)
        yield (
            f"Nothing fits {memory / 1e9:.3g} GB: {least.name} is the smallest, {least.bytes.total / 1e9:.2f} GB. "
            "Bring fewer tokens in a micro-step, or more GPUs."
        )
        return
    yield f"Recommended: {best.name}, {best.step:.1f} ms and {best.bytes.total / 1e9:.2f} GB a rank."
    others = [setting for setting in found if setting is not best]
    fitting = [setting for setting in others if setting.bytes.total <= memory]
    near = [s.name for s in fitting if s.step <= 1.05 * best.step and s.bytes.total > best.bytes.total]
    if near:
        yield f"  It is the smallest of those within 5 % of the fastest ({', '.join(near)})."
    for stock in others:
        if not stock.name.startswith("cce_dist"):
            yield (
                f"  Against {stock.name}: {stock.step / best.step:.2f}x its time, "
                f"{stock.bytes.total / best.bytes.total:.2f}x its memory."
            )
    sizes = [setting for setting in found if setting.name.startswith("cce_dist")]
    if best in sizes:
        at = sizes.index(best)
        if at:
            yield f"  Smaller groups hold and exchange more rows: {_short(sizes[at - 1])}."
        if at + 1 < len(sizes):
            yield f"  Larger groups move and keep more hidden states: {_short(sizes[at + 1])}."
        if job.gpus > 1:
            size = int(best.name.split()[1])
            yield (
                f'  Set it with "cce_dist": {{"vocab_parallel_size": {size}}} in DeepSpeed\'s JSON (ZeRO-3), or with '
                f"CCEConfig(vocab_parallel_size={size}) for FSDP2."
            )


def _short(setting: Setting) -> str:
    return f"{setting.name} {setting.step:.1f} ms, {setting.bytes.total / 1e9:.2f} GB"


def _logits(job: Job, calibration: Calibration) -> float:
    if STOCK not in calibration.logit_bytes:
        raise ValueError(f"{STOCK!r} was not measured; there is {', '.join(calibration.forward)}.")
    return calibration.logit_bytes[STOCK] * job.tokens * job.vocab


def _exchange_ms(job: Job, size: float, ranks: int, per_node: int | None = None) -> float:
    """An all-gather to, or a reduce-scatter of, ``size`` bytes; an all-reduce is two of them."""
    if ranks == 1:
        return 0.0
    gpu = GPUS[job.gpu]
    within = min(ranks, job.gpus_per_node) if per_node is None else per_node
    network = gpu.network if job.network is None else job.network
    bandwidth = gpu.link if ranks <= within else min(gpu.link, within * network)
    return 1e3 * size * (ranks - 1) / ranks / bandwidth + LATENCY_MS * math.ceil(math.log2(ranks))


def _replicas_ms(job: Job, size: float, group: int) -> float:
    """The same among the ranks at one place of each group; ``size`` bytes are what a group's rank holds."""
    replicas = job.gpus // group
    within = replicas if job.gpus <= job.gpus_per_node else max(job.gpus_per_node // group, 1)
    return _exchange_ms(job, size, replicas, min(within, replicas))


def _is_sparse(method: str) -> bool:
    return method in ("cce_dist unbiased", "cce_dist filtered")


def _dense_terms(tokens: int, vocab: int, hidden: int) -> tuple[float, float]:
    """Products of hidden · weightᵀ's size, and passes over the logits."""
    return float(tokens) * vocab * hidden, float(tokens) * vocab


def _sparse_terms(tokens: int, vocab: int, hidden: int) -> tuple[float, float]:
    """Kept pairs, a number of them for each token, times D; and passes over the classifier."""
    return float(tokens) * hidden, float(vocab) * hidden


def _shape(result: Mapping[str, Any]) -> tuple[int, int, int]:
    return result["num_tokens"], result["vocab_size"], result["hidden_size"]


def _dot(coefficients: Sequence[float], terms: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(coefficients, terms, strict=True))


def _fit(terms: Sequence[Sequence[float]], ms: Sequence[float]) -> tuple[float, float]:
    """Non-negative coefficients, in seconds, by least squares of the relative deviations."""
    relative = torch.tensor(terms, dtype=torch.float64) / torch.tensor(ms, dtype=torch.float64)[:, None] * 1e3
    columns = relative.shape[1]
    best, least = (0.0, 0.0), math.inf
    subsets = itertools.chain.from_iterable(itertools.combinations(range(columns), k) for k in range(1, columns + 1))
    for chosen in subsets:
        if len(chosen) > len(ms):
            continue  # as many measurements as coefficients are needed
        scale = relative[:, chosen].amax(0)
        found = torch.linalg.lstsq(relative[:, chosen] / scale, torch.ones(len(ms), 1, dtype=torch.float64)).solution
        solution = found[:, 0] / scale
        deviation = float((relative[:, chosen] @ solution - 1).square().sum())
        if bool((solution >= 0).all()) and deviation < least:
            filled = [0.0] * columns
            for column, value in zip(chosen, solution.tolist(), strict=True):
                filled[column] = value
            best, least = (filled[0], filled[1]), deviation
    return best
