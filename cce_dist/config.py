"""One validated settings object, filled by the DeepSpeed JSON section, by YAML and by keyword arguments alike."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from cce_dist.loss.settings import Gradient, LossSettings, choose_gradient

_OF_THE_LOSS = tuple(LossSettings.model_fields)  # torch.compile cannot look into pydantic's fields


class CCEConfig(LossSettings):
    """Settings of the loss, and of how it enters a model. An unknown key or a bad value raises, naming the key, the
    value and what is allowed.

    Where a key is ``None`` the loss chooses (``gradient`` by backend, ``filter_eps`` by mode, ``workspace_mb`` by mode
    and number of tokens). The string "auto" is not a number here: accelerate rejects it inside a DeepSpeed JSON.
    """

    enabled: bool = True
    vocab_parallel_size: int | None = Field(default=None, ge=1)
    materialize: Literal["warn", "raise"] = "warn"

    def logprobs_kwargs(self) -> dict[str, Any]:
        """Those of `linear_logprobs`, which has no pass in 8 bits to choose."""
        return {name: value for name, value in self.loss_kwargs().items() if name != "first_pass"}

    def loss_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `linear_cross_entropy` that these settings fix."""
        return {name: getattr(self, name) for name in _OF_THE_LOSS}

    def gradient_on(self, device: torch.device) -> Gradient:
        """The gradient that these settings mean on a device, in 16- and 32-bit training."""
        triton = self.backend == "triton" or (self.backend == "auto" and device.type == "cuda")
        return self.gradient or choose_gradient("triton" if triton else "torch", self.filter_eps)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str) -> "CCEConfig":
        """Validates a section of a config file.

        Args:
            mapping: the section as read from JSON or YAML.
            where: the section's name for the error text, such as ``the section "cce_dist" of ds.json``.

        Raises:
            ValueError: an unknown key, or a value that is not allowed; all faults in one text.
        """
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{where} must be a mapping of settings, got {type(mapping).__name__}: {mapping!r}.")
        try:
            return cls.model_validate(dict(mapping))
        except ValidationError as error:
            by_key = {str(fault["loc"][0]): fault for fault in reversed(error.errors())}  # of a union's the first
            faults = "\n".join(f"  {_describe(key, fault)}" for key, fault in reversed(by_key.items()))
            known = ", ".join(cls.model_fields)
            raise ValueError(f"{where} is not valid:\n{faults}\nKnown keys: {known}.") from None


def misspelt_section(config: Mapping[Any, Any]) -> str | None:
    """The key of a DeepSpeed config without the section "cce_dist" that is meant for it, if one is."""
    keys = [key for key in config if isinstance(key, str)]
    meant = [key for key in keys if key.lower().replace("-", "").replace("_", "") in ("ccedist", "cce")]
    return next(iter(meant or get_close_matches("cce_dist", keys, cutoff=0.7)), None)


def choose_config(config: CCEConfig | None, settings: Mapping[str, Any], where: str) -> CCEConfig:
    """Settings given as a config or by keyword.

    Raises:
        TypeError: a config of another type.
        ValueError: both, or a bad setting.
    """
    if not isinstance(config, CCEConfig | None):
        raise TypeError(
            f"config of {where} must be a CCEConfig or None, got {type(config).__name__}: {config!r}. Settings also go "
            f'by keyword, as in {where}(..., gradient="exact").'
        )
    if config is not None and settings:
        raise ValueError(
            f"{where} takes config or settings by keyword, not both; got config and {', '.join(settings)}."
        )
    return config or CCEConfig.from_mapping(settings, where=f"{where}(...)")


def _describe(key: str, fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key (value {fault['input']!r}); remove it or correct its name."
    return f"{key} = {fault['input']!r}: {fault['msg']}."
