"""The plan as a picture: memory and time of the head against the number of GPUs.

In: a job and a calibration. Out: a PNG.
"""

from pathlib import Path

from matplotlib.figure import Figure

from cce_dist.tools.plan.calibration import Calibration
from cce_dist.tools.plan.job import GPUS, Job
from cce_dist.tools.plan.spread import Setting, gathered, plain, tensor_parallel, vocabulary_parallel


def plot(job: Job, calibration: Calibration, path: Path) -> None:
    """Draws memory and time of the head against the number of GPUs, to 4096 or to the job's if they are more."""
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
