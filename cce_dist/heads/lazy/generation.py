"""Whether a head is called by transformers' ``generate()``, of whose logits the next token alone is wanted.

Nothing tells a head that: the frames of its call do. In go a head and the frames; out comes what it needs to know of
the loop, or None, also where the loop is another one than this file knows: the head then computes real logits.
"""

import sys
from types import FrameType
from typing import Any, NamedTuple

from torch import nn

from cce_dist.heads.find import running_layer


class Loop(NamedTuple):
    """Greedy decoding or plain sampling, step by step.

    Attributes:
        has_finished: this rank's sequences have ended, and it goes on so that others need not wait for it: what it
            computes is not looked at.
    """

    has_finished: bool


def loop_around(head: nn.Module) -> Loop | None:
    """The loop that runs the model of this head, if what it makes of logits is argmax, or a draw from their softmax.

    Beam search, processors other than the temperature, and scores or logits among the outputs need real logits.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_sample" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            return _loop(frame.f_locals, head)
        frame = frame.f_back
    return None


def _loop(names: dict[str, Any], head: nn.Module) -> Loop | None:
    if not names.keys() >= _KNOWN or running_layer(names["self"]) is not head:
        return None
    returns_them = names["return_dict_in_generate"] and (names["output_scores"] or names["output_logits"])
    if returns_them or any(_name(processor) != _TEMPERATURE for processor in names["logits_processor"]):
        return None
    return Loop(bool(names["synced_gpus"] and names["this_peer_finished"]))


def _name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


_TEMPERATURE = "transformers.generation.logits_process.TemperatureLogitsWarper"
_KNOWN = {
    "self", "logits_processor", "return_dict_in_generate", "output_scores", "output_logits", "synced_gpus",
    "this_peer_finished",
}  # fmt: skip
