"""What one rank finds in a stage, and what a stage is; how findings of many ranks are put into words.

In: each rank's findings. Out: `Report`, which crosses between processes as JSON, and lines of text for the table.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Faults = list[tuple[str, str]]
"""(check, what is wrong and what to do) pairs."""


class Report(NamedTuple):
    """What one rank found in a stage."""

    facts: dict[str, Any]
    faults: Faults
    warnings: Faults
    notes: Faults
    """What is worth knowing and nothing to mend."""


class Stage(NamedTuple):
    """``examine`` runs on every rank; ``compare`` on rank 0, with the reports by rank, and finds what is wrong between
    them; ``describe`` makes the rows (check, result) of the table."""

    name: str
    examine: Callable[[], Report]
    compare: Callable[[Mapping[int, Report]], tuple[Faults, Faults]]
    describe: Callable[[Mapping[int, Report]], list[tuple[str, str]]]


def by_text(found: Mapping[int, Faults]) -> Faults:
    """One fault for all ranks that say the same."""
    ranks = defaultdict(list)
    for rank, faults in sorted(found.items()):
        for fault in faults:
            ranks[tuple(fault)].append(rank)
    return [(check, f"{ranks_text(who)}: {text}") for (check, text), who in ranks.items()]


def minority(said: Mapping[int, str]) -> str:
    """Who differs from what most ranks say; empty where all agree."""
    (most, _), *others = Counter(said.values()).most_common()
    if not others:
        return ""
    odd = "; ".join(f"{ranks_text([r for r, v in said.items() if v == value])}: {value}" for value, _ in others)
    return f"{odd}, where the others have {most}"


def ranks_text(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0-7, 9``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'' if len(ranks) == 1 else 's'} {text}"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
