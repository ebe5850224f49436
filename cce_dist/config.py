"""One validated settings object, filled by the DeepSpeed JSON section, by YAML and by keyword arguments alike."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Gradient = Literal["unbiased", "exact", "filtered"]
Backend = Literal["auto", "triton", "torch"]
FirstPass = Literal["auto", "full", "fp8"]
Agreeing = Literal["every_call", "first_call"]


class CCEConfig(BaseModel):
    """Settings of the loss. An unknown key or a bad value raises, naming the key, the value and what is allowed.

    Where a key is ``None`` the loss chooses (``gradient`` by backend, ``filter_eps`` by mode, ``workspace_mb`` by mode
    and number of tokens).
    The string "auto" is not a value here: accelerate rejects it inside a DeepSpeed JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    gradient: Gradient | None = None
    tail: bool = True
    filter_eps: float | None = Field(default=None, ge=0.0, lt=1.0)
    backend: Backend = "auto"
    first_pass: FirstPass = "auto"
    workspace_mb: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(default=None, ge=1)
    agreement: Agreeing = "every_call"
    vocab_parallel_size: int | None = Field(default=None, ge=1)
    materialize: Literal["warn", "raise"] = "warn"

    def loss_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `linear_cross_entropy` that these settings fix."""
        return {
            "gradient": self.gradient,
            "tail": self.tail,
            "filter_eps": "auto" if self.filter_eps is None else self.filter_eps,
            "backend": self.backend,
            "first_pass": self.first_pass,
            "workspace_mb": self.workspace_mb,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "agreement": self.agreement,
        }

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
            faults = "\n".join(f"  {_describe(fault)}" for fault in error.errors())
            known = ", ".join(cls.model_fields)
            raise ValueError(f"{where} is not valid:\n{faults}\nKnown keys: {known}.") from None


def _describe(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key (value {fault['input']!r}); remove it or correct its name."
    return f"{key} = {fault['input']!r}: {fault['msg']}."
