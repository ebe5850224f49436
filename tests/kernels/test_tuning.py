"""The tuning table: which row a tensor takes, and what a broken file says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cce_dist.kernels.triton import tuning
from cce_dist.kernels.triton.tuning import Row, Tuning


def _file(folder: Path, content: Any) -> Path:
    path = folder / "tuning.json"
    path.write_text(json.dumps(content))
    return path


def test_the_packaged_table_serves_the_interpreter_and_hopper_in_16_bits() -> None:
    assert tuning.tuning_for(torch.empty(4, 16), torch.empty(4, 16)) == Tuning(
        block_n=32, block_d=32, splits=3, flat_below=64, pair_rows=32, chunk_d=64, few_pair_rows=32
    )
    hopper = tuning.choose(("an unknown GPU", "sm_90"), 2, 4096)
    assert hopper.tma and (hopper.block_n, hopper.block_d, hopper.stages) == (128, 64, 4)
    assert tuning.choose(("an unknown GPU", "sm_90"), 4, 4096) == Tuning()
    assert tuning.choose(("an unknown GPU", "sm_80"), 2, 4096) == Tuning()


def test_the_gpus_own_row_comes_first_where_its_limits_are_kept(tmp_path: Path) -> None:
    rows = [
        {"gpu": "sm_90", "tuning": {"splits": 1}},
        {"gpu": "H", "element_bytes": 2, "hidden_above": 1024, "hidden_up_to": 3072, "tuning": {"splits": 2}},
        {"gpu": "H", "element_bytes": 2, "hidden_up_to": 1024, "tuning": {"splits": 3}},
    ]
    file = _file(tmp_path, rows)
    sizes = [(2, 1024), (2, 1025), (2, 3072), (2, 3073), (4, 64)]
    chosen = [tuning.choose(("H", "sm_90"), size, hidden, file).splits for size, hidden in sizes]
    assert chosen == [3, 2, 2, 1, 1]


def test_what_is_saved_is_loaded_and_only_differences_are_stored(tmp_path: Path) -> None:
    rows = [Row("H", 2, None, 1024, Tuning(splits=4, tma=True)), Row("sm_90", None, None, None, Tuning())]
    file = tmp_path / "tuning.json"
    tuning.save(rows, file)
    assert tuning.load(file) == tuple(rows)
    stored = json.loads(file.read_text())
    assert stored[0] == {"gpu": "H", "element_bytes": 2, "hidden_up_to": 1024, "tuning": {"splits": 4, "tma": True}}
    assert stored[1] == {"gpu": "sm_90", "tuning": {}}
    tuning.save(list(tuning.load()), file)
    assert file.read_text() == tuning.FILE.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must hold a list of rows, got dict"),
        ([{"tuning": {}}], "row 1 must be an object with"),
        ([{"gpu": "H", "tuning": {}, "speed": 1}], "row 1: unknown key 'speed'; known are gpu, element_bytes"),
        ([{"gpu": "H", "tuning": {"blok_n": 64}}], "row 1, tuning: unknown key 'blok_n'; known are block_n"),
        ([{"gpu": "H", "tuning": {"block_n": "64"}}], "block_n must be of type int and not negative, got '64'"),
        ([{"gpu": "H", "tuning": {"block_n": True}}], "block_n must be of type int and not negative, got True"),
        ([{"gpu": "H", "tuning": {"tma": 1}}], "tma must be of type bool and not negative, got 1"),
        ([{"gpu": "H", "tuning": {"splits": -1}}], "splits must be of type int and not negative, got -1"),
        ([{"gpu": "H", "hidden_up_to": 0, "tuning": {}}], "hidden_up_to must be a positive int, got 0"),
        ([{"gpu": "H", "tuning": {}}] * 2, "row 2: a row before it has the same"),
    ],
)
def test_a_broken_table_is_refused_with_file_and_row(tmp_path: Path, content: Any, message: str) -> None:
    file = _file(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        tuning.load(file)
    assert str(file) in str(caught.value)
    file.write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        tuning.load(file)


def test_a_forced_row_holds_inside_its_context_only() -> None:
    hidden = torch.empty(4, 16)
    before = tuning.tuning_for(hidden, hidden)
    with tuning.forced(Tuning(splits=5)):
        assert tuning.tuning_for(hidden, hidden).splits == 5
    assert tuning.tuning_for(hidden, hidden) == before
