"""Whether the code that runs is inside of a reentrant activation checkpoint, torch's or DeepSpeed's.

Such a checkpoint runs forward without a graph and again in backward with one, which ends at its outputs. That backward
is under way is private state of torch's, touched here and nowhere else. Read on torch 2.13. In goes nothing but the
stack; out comes yes or no, by which a lazy head decides whether its call may be lazy.
"""

import sys
from pathlib import Path
from types import FrameType

import torch

_FILES = (str(Path("torch/utils/checkpoint.py")), str(Path("activation_checkpointing/checkpointing.py")))


def check_torch() -> None:
    """Looks for what this file uses.

    Raises:
        RuntimeError: this torch does not say whether a backward is under way.
    """
    if not hasattr(torch._C, "_current_graph_task_id"):
        raise RuntimeError(
            f"cce_dist does not know how torch {torch.__version__} tells that a backward is under way: "
            "torch._C._current_graph_task_id is not there. Use torch 2.13, which it is tested on."
        )


def in_forward() -> bool:
    """Whether a reentrant checkpoint runs its forward, or runs it again, somewhere up the stack."""
    if torch.compiler.is_compiling():
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("forward", "backward") and code.co_filename.endswith(_FILES):
            return True
        frame = frame.f_back
    return False


def in_recomputation() -> bool:
    """Whether a reentrant checkpoint runs its forward again; cheap where no backward is under way."""
    is_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    return is_backward and in_forward()
