"""``cce-dist report``: what one or several runs of the trainer logged, as a PNG and as one self-contained HTML file.

In: folders of the trainer, with metrics.jsonl and run.json. Out: report.png and report.html. Everything that comes from
the runs' files is data: validated as numbers, escaped as text.
"""

import base64
import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import BaseModel, ValidationError

from cce_dist.train.metrics import read


class Row(BaseModel):
    """The columns of metrics.jsonl that are drawn; a run may log more."""

    step: int
    loss: float
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    head_memory_bytes: int | None = None


class Run(NamedTuple):
    """A folder of the trainer; ``about`` is empty for one whose run.json is missing."""

    name: str
    about: dict[str, Any]
    rows: list[Row]


HEADER = ("run", "engine", "head", "ranks", "steps", "final loss", "held-out loss", "tokens/s", "peak GB", "head MB")


def write_report(folders: Sequence[Path], out: Path) -> tuple[Path, Path]:
    """Writes ``out``/report.png and ``out``/report.html.

    Args:
        folders: outputs of the trainer, finished or not.
        out: made if it is not there.

    Raises:
        ValueError: a folder without metrics, or with some that are not the trainer's.
    """
    runs = [load(folder, number) for number, folder in enumerate(folders, 1)]
    out.mkdir(parents=True, exist_ok=True)
    png, page = out / "report.png", out / "report.html"
    draw(runs, png)
    page.write_text(_page(runs, png.read_bytes()), encoding="utf-8")
    return png, page


def load(folder: Path, number: int) -> Run:
    """One run; its name is numbered, so that runs of equal names differ."""
    try:
        rows = [Row.model_validate(row) for row in read(folder / "metrics.jsonl")]
        about_file = folder / "run.json"
        about = json.loads(about_file.read_text()) if about_file.exists() else {}
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise ValueError(f"{folder}/metrics.jsonl: {key} = {fault['input']!r}: {fault['msg']}.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not an output folder of the trainer: {error}.") from None
    if not rows:
        raise ValueError(f"{folder}/metrics.jsonl has no row yet: nothing was logged.")
    return Run(f"{number}: {folder.resolve().name}", about if isinstance(about, dict) else {}, rows)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Loss, speed and memory over steps; held-out losses are points."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    loss, speed, memory = figure.subplots(1, 3)
    for index, run in enumerate(runs):
        style = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":", "-.")[index // 10 % 4]}
        style["marker"] = "." if len(run.rows) < 50 else ""
        loss.plot(*_series(run, "loss"), label=run.name, **style)
        loss.plot(*_series(run, "eval_loss"), "o", color=style["color"])
        speed.plot(*_series(run, "tokens_per_second"), **style)
        steps, held = _series(run, "peak_memory_bytes")
        memory.plot(steps, [number / 1e9 for number in held], **style)
    for axes, title in (
        (loss, "loss (points: held-out)"),
        (speed, "tokens/s, all ranks"),
        (memory, "peak memory of rank 0, GB"),
    ):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    for axes in (speed, memory):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # room for a line that is flat
    for text in loss.legend(fontsize="small").get_texts():
        text.set_parse_math(False)  # a folder may have dollars in its name
    figure.savefig(path, dpi=110)


def summary(run: Run) -> tuple[str, ...]:
    """The run's line of the table, in the order of `HEADER`."""
    settings = run.about.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    held_out = _series(run, "eval_loss")[1]
    speeds, peaks, heads = (
        _series(run, name)[1] for name in ("tokens_per_second", "peak_memory_bytes", "head_memory_bytes")
    )
    planned = settings.get("steps", "?")
    return (
        run.name,
        str(settings.get("engine", "?")),
        "plain" if settings.get("head") == "plain" else f"cce {run.about.get('gradient') or '?'}",
        str(run.about.get("ranks", "?")),
        f"{run.rows[-1].step} of {planned}",
        f"{run.rows[-1].loss:.4f}",
        f"{held_out[-1]:.4f}" if held_out else "",
        f"{statistics.median(speeds):,.0f}" if speeds else "",
        f"{max(peaks) / 1e9:.2f}" if peaks else "",
        f"{max(heads) / 1e6:.1f}" if heads else "",
    )


def _series(run: Run, name: str) -> tuple[list[int], list[float]]:
    points = [(row.step, getattr(row, name)) for row in run.rows if getattr(row, name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _page(runs: Sequence[Run], png: bytes) -> str:
    body = "\n".join(_table_row(summary(run), "td") for run in runs)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>cce_dist: {len(runs)} run(s)</title>
<style>body {{ font: 15px sans-serif; margin: 2em }} img {{ max-width: 100% }} td, th {{ padding: 3px 12px;
text-align: right; border-bottom: 1px solid #ccc }} td:first-child, th:first-child {{ text-align: left }}</style></head>
<body><h1>Training runs</h1>
<table>
{_table_row(HEADER, "th")}
{body}
</table>
<p>Tokens/s: the median logged step, all ranks. Peak: of rank 0's device, or of its process where there is no GPU.
Head: the most bytes alive at once between the last hidden states and their gradient, where it was measured.</p>
<img alt="loss, tokens/s and memory over steps" src="data:image/png;base64,{base64.b64encode(png).decode()}">
</body></html>
"""


def _table_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
