"""Block shapes of the Triton kernels per (GPU, element size, hidden size), from `tuning.json` beside this file.

`benchmarks/tune.py --write` refreshes the file; nothing is tuned while a user's program runs. A row of it is

    {"gpu": "NVIDIA H200", "element_bytes": 2, "hidden_above": 1024, "hidden_up_to": 3072, "tuning": {"splits": 16}}

with the GPU's name, or "sm_90" for a compute capability, or "interpreter"; without the keys in the middle it serves any
size. ``tuning`` holds what differs from `Tuning`'s defaults. A tensor takes the first row of its GPU's name that fits,
else the first of its capability, else the defaults.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

FILE = Path(__file__).with_name("tuning.json")


class Tuning(NamedTuple):
    """Launch parameters.

    Attributes:
        block_n, block_v, block_d, warps, stages: of summarise, and of the dense probabilities of exact mode: a program
            holds block_n rows by block_v columns of logits, a whole number of tiles.
        row_group: row blocks that run side by side, so that their hidden states stay in L2 while the classifier passes.
        splits: vocabulary splits of summarise.
        flat_below: the largest D for which summarise walks over tiles and D in one loop (in 8 bits: twice that).
        tma: load tiles through tensor descriptors.
        pair_rows: rows of a block of kept pairs in the sparse backward.
        pair_block_d, pair_stages: its steps along D.
        pair_warps, pair_programs: of the sparse backward; programs a multiprocessor.
        chunk_d: columns of D that dE and dC are computed for at a time, a multiple of the next two.
        hidden_block_d: columns of dE that are added at a time.
        weight_block_d, weight_block_k: columns of dC that are accumulated at a time, and rows per step.
        weight_blocks: such blocks of columns that one item of the queue computes; they divide chunk_d.
        few_pair_rows, few_weight_blocks: pair_rows and weight_blocks where frequent rows are computed apart, so that
            tiles keep few tokens.
    """

    block_n: int = 64
    block_v: int = 256
    block_d: int = 32
    warps: int = 8
    stages: int = 2
    row_group: int = 16
    splits: int = 8
    flat_below: int = 0
    tma: bool = False
    pair_rows: int = 64
    pair_block_d: int = 32
    pair_stages: int = 2
    pair_warps: int = 8
    pair_programs: int = 1
    chunk_d: int = 512
    hidden_block_d: int = 32
    weight_block_d: int = 64
    weight_block_k: int = 32
    weight_blocks: int = 1
    few_pair_rows: int = 64
    few_weight_blocks: int = 1

    def for_8_bits(self) -> "Tuning":
        """The same for a summary of 8-bit copies: as many bytes along D."""
        flat = self._replace(flat_below=2 * self.flat_below)
        return flat._replace(block_d=2 * self.block_d) if self.tma else flat

    def for_fp32_rows(self) -> "Tuning":
        """The same for rows of the classifier in fp32 beside hidden states in 16 bits: as many of their bytes along D.

        Their parts take registers: of several programs a multiprocessor's pairs are one's, of all their warps.
        """
        halved = self._replace(block_d=self.block_d // 2)
        if self.pair_programs > 1:
            return halved._replace(pair_warps=self.pair_programs * self.pair_warps, pair_programs=1)
        return halved._replace(pair_block_d=self.pair_block_d // 2, hidden_block_d=self.hidden_block_d // 2)

    def for_few_pairs(self) -> "Tuning":
        """The same for a backward without frequent rows."""
        return self._replace(pair_rows=self.few_pair_rows, weight_blocks=self.few_weight_blocks)


class Row(NamedTuple):
    """A row of the table; None does not limit."""

    gpu: str
    element_bytes: int | None
    hidden_above: int | None
    hidden_up_to: int | None
    tuning: Tuning


_forced: Tuning | None = None


def tuning_for(hidden: torch.Tensor, weight: torch.Tensor) -> Tuning:
    """The launch parameters for hidden states [N, D] and rows [V, D], which may be wider: in fp32 beside bf16."""
    if _forced is not None:
        return _forced
    tuning = choose(gpu_names(hidden.device), hidden.element_size(), hidden.shape[-1])
    return tuning if weight.element_size() == hidden.element_size() else tuning.for_fp32_rows()


@functools.cache
def choose(gpus: tuple[str, ...], element_bytes: int, hidden_size: int, file: Path = FILE) -> Tuning:
    """The first row that fits of the first of ``gpus`` that has one, else the defaults."""
    for gpu in gpus:
        for row in load(file):
            above = row.hidden_above is None or hidden_size > row.hidden_above
            up_to = row.hidden_up_to is None or hidden_size <= row.hidden_up_to
            if row.gpu == gpu and row.element_bytes in (None, element_bytes) and above and up_to:
                return row.tuning
    return Tuning()


@contextmanager
def forced(tuning: Tuning) -> Iterator[None]:
    """Every launch inside uses ``tuning``: for measuring candidates, in one thread."""
    global _forced
    before, _forced = _forced, tuning
    try:
        yield
    finally:
        _forced = before


@functools.cache
def load(file: Path = FILE) -> tuple[Row, ...]:
    """The rows of the file.

    Raises:
        ValueError: naming the file and the row, for an unknown key, a value of a wrong type, or a row that is double.
    """
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(content, list):
        raise ValueError(f"{file} must hold a list of rows, got {type(content).__name__}.")
    rows = tuple(_row(entry, f"{file}, row {number}") for number, entry in enumerate(content, 1))
    keys = [row[:4] for row in rows]
    for number, key in enumerate(keys, 1):
        if key in keys[: number - 1]:
            raise ValueError(f"{file}, row {number}: a row before it has the same gpu, element size and hidden sizes.")
    return rows


def save(rows: list[Row], file: Path = FILE) -> None:
    """Writes the table, one row a line, with only what differs from the defaults."""
    lines = []
    for row in rows:
        entry = {key: value for key, value in row._asdict().items() if value is not None}
        defaults = Tuning._field_defaults
        changed = {key: value for key, value in row.tuning._asdict().items() if value != defaults[key]}
        lines.append("  " + json.dumps({**entry, "tuning": changed}))
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    load.cache_clear()
    choose.cache_clear()


def num_programs(hidden: torch.Tensor) -> int:
    """Programs of a persistent grid: one a multiprocessor."""
    if not hidden.is_cuda:
        return 2
    return torch.cuda.get_device_properties(hidden.device).multi_processor_count


@functools.cache
def gpu_names(device: torch.device) -> tuple[str, ...]:
    """The names under which a device's rows stand, the most exact first."""
    if device.type != "cuda":
        return ("interpreter",)
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


def _row(entry: Any, where: str) -> Row:
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("gpu"), str)
        or not isinstance(entry.get("tuning"), dict)
    ):
        raise ValueError(f'{where} must be an object with "gpu", a string, and "tuning", an object; got {entry!r}.')
    for key in ("element_bytes", "hidden_above", "hidden_up_to"):
        value = entry.get(key)
        if value is not None and not (type(value) is int and value > 0):
            raise ValueError(f"{where}: {key} must be a positive int, got {value!r}.")
    _refuse_unknown(entry, Row._fields, where)
    _refuse_unknown(entry["tuning"], Tuning._fields, f"{where}, tuning")
    for key, value in entry["tuning"].items():
        kind = type(Tuning._field_defaults[key])
        if type(value) is not kind or value < 0:
            raise ValueError(f"{where}: {key} must be of type {kind.__name__} and not negative, got {value!r}.")
    element_bytes, above, up_to = (entry.get(key) for key in ("element_bytes", "hidden_above", "hidden_up_to"))
    return Row(entry["gpu"], element_bytes, above, up_to, Tuning(**entry["tuning"]))


def _refuse_unknown(given: dict[str, Any], allowed: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(allowed)}.")
