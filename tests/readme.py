"""README, and what it shows of the commands' output."""

import re
from collections.abc import Iterable
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def shown(command: str) -> list[str]:
    """The lines that README shows of the output of a command, which is named from its beginning; "…" stands for some
    that it leaves out."""
    (block,) = re.findall(rf"<!-- output: {command}.*? -->\n```text\n(.*?)```", README, re.S)
    return [line.rstrip() for line in block.splitlines() if line != "…"]


def missing(lines: Iterable[str], printed: str) -> list[str]:
    """From the first of these lines on that the printed ones lack: they must hold all, in this order."""
    rest = iter([line.rstrip() for line in printed.splitlines()])
    return [line for line in lines if line not in rest]
