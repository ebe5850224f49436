"""What the DeepSpeed integration refuses before an engine is made."""

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed")

from cce_dist.config import CCEConfig
from cce_dist.deepspeed.guard import refuse_untested


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(4, 8)


def test_a_model_that_torch_compile_wraps_is_refused_and_one_compiled_in_place_is_not() -> None:
    model = Model()
    wrapped = torch.compile(model)
    model.compile()
    refuse_untested({}, {"model": model}, model.lm_head, CCEConfig())
    with pytest.raises(NotImplementedError, match="wrapped by torch.compile"):
        refuse_untested({}, {"model": wrapped}, model.lm_head, CCEConfig())
