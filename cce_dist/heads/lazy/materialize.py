"""Real logits after all, where none should be: a warning or an error, as ``materialize`` of the settings says.

In goes what computes them, and what would need none; the text names the line of the user's that asked.
"""

import sys
import warnings
from pathlib import Path
from types import FrameType

import torch

from cce_dist.heads import hooks


class MaterializedLogitsWarning(UserWarning):
    """Logits that should have stayed uncomputed were computed."""


def report(materialize: str, what: str, instead: str) -> None:
    """Warns of real logits, or of a gathered classifier, or raises, by ``materialize``; names the user's line.

    Args:
        materialize: "warn" or "raise", of the settings.
        what: "logits [...] are computed after all: {place} ...".
        instead: a sentence on what needs no logits.
    """
    frame = _call_site()
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name},"
    text = f"{what.replace('{place}', place)} {instead}"
    if materialize == "raise":
        raise RuntimeError(f"materialize='raise' forbids that {text} With materialize='warn' this would be a warning.")
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, MaterializedLogitsWarning, frame.f_code.co_filename, frame.f_lineno, registry=registry)


def _call_site() -> FrameType:
    """The innermost frame that is neither in the files that report nor in torch."""
    theirs = (*_OUR_FILES, str(Path(torch.__file__).parent))
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(theirs):
        frame = frame.f_back
    return frame


_PACKAGE = Path(__file__).parents[2]
_OUR_FILES = (
    str(Path(__file__).parent),
    hooks.__file__,
    str(_PACKAGE / "transformers.py"),
    str(_PACKAGE / "fsdp/in_full.py"),
)
