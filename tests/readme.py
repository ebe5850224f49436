"""README and the other pages, and what they show of the commands' output."""

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
"""By path."""
README = PAGES["README.md"]


def shown(command: str) -> list[str]:
    """The lines that a page shows of the output of a command, which is named from its beginning; "…" stands for some
    that it leaves out."""
    pages = "\n".join(PAGES.values())
    (block,) = re.findall(rf"<!-- output: {command}.*? -->\n```text\n(.*?)```", pages, re.S)
    return [line.rstrip() for line in block.splitlines() if line != "…"]


def missing(lines: Iterable[str], printed: str) -> list[str]:
    """From the first of these lines on that the printed ones lack: they must hold all, in this order."""
    rest = iter([line.rstrip() for line in printed.splitlines()])
    return [line for line in lines if line not in rest]
