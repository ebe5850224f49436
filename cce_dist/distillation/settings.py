"""The settings of distillation: each is one field here, with its default, its check, and the rule an error states."""

from typing import ClassVar

from pydantic import Field

from cce_dist.loss.settings import Backend, Float, Gradient, LogitSettings, at_temperature


class TemperedSettings(LogitSettings):
    """What makes logits of products, and what they are divided by after the softcap."""

    temperature: Float = Field(default=1.0, gt=0, allow_inf_nan=False, description="a positive float")

    @property
    def scale_and_cap(self) -> tuple[float, float | None]:
        """With the temperature in them."""
        scale = 1.0 if self.logit_scale is None else self.logit_scale
        return at_temperature(scale, self.softcap, self.temperature)


class SelectedSettings(TemperedSettings):
    """Which ids are none, and how the log-sum-exp of all is computed."""

    function: ClassVar[str] = "linear_selected_logits"

    padding_id: int = Field(default=-1, description="an int")
    gradient: Gradient | None = Field(default=None, description='"unbiased", "exact", "filtered" or None')
    backend: Backend = Field(default="auto", description='"auto", "triton" or "torch"')
