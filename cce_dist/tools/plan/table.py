"""The plan as text: the table of all settings, the recommendation with its reasons, and what the figures rest on.

In: a job, a calibration and the memory that the head may take. Out: lines on stdout, and what is recommended.
"""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from cce_dist.tools.plan.calibration import Calibration
from cce_dist.tools.plan.job import GPUS, Job
from cce_dist.tools.plan.spread import Setting, by_budget, recommend, settings


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
    if job.gradient == "exact":
        own = min((setting for setting in found if setting.name.startswith("cce_dist")), key=lambda x: x.step)
        console.print(_trade(job, calibration, int(own.name.split()[1])), soft_wrap=True)
    links = calibration.links
    said = f"as measured on {links.ranks} {links.gpu}, networks by datasheets" if links.ranks else "by datasheets"
    console.print(
        f"Basis: one GPU's times fitted to benchmarks/results ({calibration.gpu}, {', '.join(calibration.shapes)}; "
        f"within {calibration.error:.0%}){'' if calibration.gpu == job.gpu else ', scaled by datasheets'}. Links "
        f"{said}, nothing overlapped.\nFormulas and assumptions: docs/plan.md.",
        soft_wrap=True,
    )
    return best


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
                f"  {stock.name} takes {stock.step / best.step:.2f} times as long and "
                f"{stock.bytes.total / best.bytes.total:.2f} times the memory."
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


def _trade(job: Job, calibration: Calibration, group: int) -> str:
    """Memory against time: what forward keeps, backward need not compute again."""
    product = 1e3 * 2 * job.tokens * job.vocab * job.hidden * calibration.product
    product *= GPUS[calibration.gpu].flops / GPUS[job.gpu].flops
    steps = [
        f"{budget}: {setting.bytes.logits / 1e6:.0f} MB kept, "
        f"{setting.compute:.1f} ms ({setting.compute / product:.2f}x)"
        for budget, setting in by_budget(job, calibration, group)
    ]
    return f"Exact by workspace_mb, cce_dist {group} (x: of one product hidden · weightᵀ): {'; '.join(steps)}."


def _short(setting: Setting) -> str:
    return f"{setting.name} {setting.step:.1f} ms, {setting.bytes.total / 1e9:.2f} GB"
