"""axolotl: one line under ``plugins:`` of its YAML makes its trainers train with cce_dist.

    plugins:
      - cce_dist.axolotl.CCEPlugin
    cce_dist:
      gradient: unbiased

axolotl imports the class by that path, asks it for a pydantic model that its own config is extended by, and puts the
plugin's callbacks into the trainer that it builds: `CCECallback`.
"""

import logging
from collections.abc import Mapping
from typing import Any
from weakref import finalize

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator, model_validator
from transformers import PreTrainedModel, TrainerCallback

from cce_dist.config import CCEConfig
from cce_dist.trainer_callback import CCECallback

_SECTION = 'the section "cce_dist" of the axolotl config'
_OTHER_LOSSES = (
    "chunked_cross_entropy",
    "cut_cross_entropy",
    "flash_attn_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
)


class CCEArgs(BaseModel):
    """What the plugin adds to axolotl's config: the section ``cce_dist``, with the keys of `CCEConfig`."""

    cce_dist: CCEConfig | None = None

    @field_validator("cce_dist", mode="before")
    @classmethod
    def _settings(cls, section: Any) -> CCEConfig | None:
        return section if section is None else CCEConfig.from_mapping(section, _SECTION)

    @model_validator(mode="before")
    @classmethod
    def _no_other_loss(cls, config: Any) -> Any:
        section = config.get("cce_dist") or {}
        enabled = not isinstance(section, Mapping) or section.get("enabled", True)
        others = [key for key in _OTHER_LOSSES if config.get(key)]
        if enabled and others:
            raise ValueError(
                f"{', '.join(others)} of the axolotl config has the loss computed past the output layer that cce_dist "
                "patches: leave it out, or the plugin cce_dist.axolotl.CCEPlugin."
            )
        return config


class CCEPlugin(BasePlugin):
    """``plugins: [cce_dist.axolotl.CCEPlugin]``: settings under ``cce_dist:``; with ``enabled: false`` nothing is done.

    In a single process, under DDP, FSDP2 and DeepSpeed alike it is `CCECallback` that is given to the trainer; its
    errors are those named there. A section "cce_dist" of the DeepSpeed JSON counts where the YAML has none.

    Raises:
        ValueError: when axolotl validates its config: an unknown key or a bad value under ``cce_dist:``, by name;
            another option that replaces the loss.
    """

    _naming: finalize | None = None  # of the log's records, while a trainer has the callback

    def get_input_args(self) -> str:
        """Where axolotl finds the model that it extends its config by."""
        return f"{__name__}.{CCEArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Mapping[str, Any], model: PreTrainedModel) -> list[TrainerCallback]:
        """The callback; before the trainer is made, so that DeepSpeed's config gets its section in time."""
        section = cfg.get("cce_dist")
        callback = CCECallback() if section is None else CCECallback(CCEConfig.from_mapping(section, _SECTION))
        self._naming = _name_as_axolotls_while_it_lives(callback)
        return [callback]

    def post_train(self, cfg: Mapping[str, Any], model: PreTrainedModel) -> None:
        """Leaves logging as it was, before the callback goes."""
        if self._naming is not None:
            self._naming()


def _name_as_axolotls_while_it_lives(callback: CCECallback) -> finalize:
    """axolotl drops what others than its own loggers say below WARNING: "cce_dist is active" would be lost.

    Calling what is returned ends it, as the end of the callback does, which goes with its trainer when a run raises.
    """

    def named_as_axolotls(record: logging.LogRecord) -> bool:
        record.name = f"axolotl.{record.name.removeprefix('axolotl.')}"
        return True

    logger = logging.getLogger("cce_dist")
    logger.filters.insert(0, named_as_axolotls)  # before axolotl's own, which every logger made after it has
    return finalize(callback, logger.removeFilter, named_as_axolotls)
