"""What runs leave behind: metrics that survive a kill, TensorBoard events, and the report drawn from them."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cce_dist.cli import main
from cce_dist.train import metrics
from cce_dist.train.metrics import Metrics, read
from cce_dist.train.place import Place
from cce_dist.train.settings import Settings

RANK_0 = Place(0, 1, torch.device("cpu"))
PNG = b"\x89PNG\r\n\x1a\n"


def row(step: int, **more: Any) -> dict[str, Any]:
    measured = {"tokens_per_second": 100.0 * step, "peak_memory_bytes": 2 * 10**9}
    return {"step": step, "loss": 8.0 / step, **measured, **more}


def write_run(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"settings": {"engine": "fsdp2", "head": "cce", "steps": 4, **settings}, "ranks": 2, "gradient": "exact"}
    (folder / "run.json").write_text(json.dumps(about))
    return str(folder)


class TestMetrics:
    def test_a_line_that_a_kill_cut_short_does_not_keep_a_run_from_resuming(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2)) + "\n" + json.dumps(row(3))[:-7])
        with Metrics(path, 1, 4, RANK_0) as resumed:
            resumed.log(row(2, loss=7.5))
        assert [(r["step"], r["loss"]) for r in read(path)] == [(1, 8.0), (2, 7.5)]

    def test_a_broken_line_elsewhere_is_an_error_with_its_number(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            read(path)

    def test_the_bar_shows_loss_speed_memory_and_time_left_at_every_step(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(
            metrics, "Console", lambda **kwargs: Console(force_terminal=True, width=140, color_system=None, **kwargs)
        )
        with Metrics(tmp_path / "metrics.jsonl", 0, 4, RANK_0) as bar:
            bar.advance(row(2))
        shown = capsys.readouterr().out
        assert re.search(r"loss 4\.0000 .*2/4 200 tokens/s  peak 2\.00 GB .*ETA", shown)
        assert read(tmp_path / "metrics.jsonl") == []

    def test_where_stdout_is_a_file_there_are_lines_and_no_bar(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with Metrics(tmp_path / "metrics.jsonl", 0, 4, RANK_0) as lines:
            lines.advance(row(1))
            lines.log(row(1))
        assert capsys.readouterr().out == "step 1  loss 8  tokens_per_second 100  peak_memory_bytes 2000000000\n"

    def test_tensorboard_gets_every_figure_that_is_logged(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with Metrics(tmp_path / "metrics.jsonl", 0, 2, RANK_0, tmp_path / "events") as logged:
            for step in (1, 2):
                logged.log(row(step, eval_loss=None))
        events = EventAccumulator(str(tmp_path / "events")).Reload()
        assert set(events.Tags()["scalars"]) == {"loss", "tokens_per_second", "peak_memory_bytes"}
        assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 8.0), (2, 4.0)]

    def test_tensorboard_without_its_package_is_refused_before_anything_starts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        raw = {"output": tmp_path, "model": {"config": {"model_type": "llama"}}, "engine": "none", "tensorboard": True}
        monkeypatch.setattr("cce_dist.train.settings.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install 'cce_dist\[tensorboard\]'"):
            Settings.model_validate(raw)


class _Cells(HTMLParser):
    """The texts of the table's cells, and every tag there is."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th") and data.strip():
            self.cells.append(data)


class TestReport:
    def test_a_png_and_a_page_with_it_inside_and_the_figures_of_each_run(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        one = write_run(tmp_path / "one", [row(1), row(2), row(4, eval_loss=2.5, head_memory_bytes=3_000_000)])
        two = write_run(tmp_path / "two", [row(1, loss=float("nan"))], head="plain")
        assert main(["report", one, two, "--out", str(tmp_path / "out")]) == 0
        image, text = (tmp_path / "out/report.png").read_bytes(), (tmp_path / "out/report.html").read_text()
        assert image.startswith(PNG)
        (inline,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
        assert base64.b64decode(inline) == image
        assert not re.search(r'(src|href)="(?!data:)', text)
        cells = _Cells(text).cells
        first = cells[10:20]
        assert first == ["1: one", "fsdp2", "cce exact", "2", "4 of 4", "2.0000", "2.5000", "200", "2.00", "3.0"]
        assert cells[20:26] == ["2: two", "fsdp2", "plain", "2", "1 of 4", "nan"]
        assert "report.html" in capsys.readouterr().out

    def test_what_comes_from_files_is_text_and_not_markup(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "<img onerror=x> $\\frac{_", [row(1)], engine="<script>alert(1)</script>")
        assert main(["report", run]) == 0
        page = _Cells((Path(run) / "report.html").read_text())
        assert "script" not in page.tags
        assert page.tags.count("img") == 1
        assert page.cells[10:12] == ["1: <img onerror=x> $\\frac{_", "<script>alert(1)</script>"]

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "is not an output folder of the trainer"),
            ("", "has no row yet"),
            ('{"step": 1, "loss": "<b>"}\n', "loss = '<b>'"),
            ('[1]\n{"step": 1, "loss": 2}\n', "line 1: not a JSON object"),
        ],
    )
    def test_what_is_no_run_is_refused_and_nothing_is_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
    ) -> None:
        if content is not None:
            (tmp_path / "metrics.jsonl").write_text(content)
        assert main(["report", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "report.html").exists()
