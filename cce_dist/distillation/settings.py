"""The settings of distillation: each is one field here, with its default, its check, and the rule an error states."""

from typing import Annotated, ClassVar

from pydantic import Field, InstanceOf
from torch import Tensor

from cce_dist.kernels.two_heads import Kind
from cce_dist.loss.settings import (
    MAY_DIFFER,
    Backend,
    Float,
    FunctionSettings,
    Gradient,
    LogitSettings,
    Reduction,
    at_temperature,
)


class TemperedSettings(LogitSettings):
    """What makes logits of products, and what they are divided by after the softcap."""

    temperature: Float = Field(default=1.0, gt=0, allow_inf_nan=False, description="a positive float")

    @property
    def scale_and_cap(self) -> tuple[float, float | None]:
        """With the temperature in them."""
        scale = 1.0 if self.logit_scale is None else self.logit_scale
        return at_temperature(scale, self.softcap, self.temperature)


class KeptSettings(TemperedSettings):
    """Which ids are none, and what computes."""

    function: ClassVar[str] = "linear_kept_logprobs"

    padding_id: int = Field(default=-1, description="an int")
    backend: Backend = Field(default="auto", description='"auto", "triton" or "torch"')


class SelectedSettings(KeptSettings):
    """The same, and how the log-sum-exp of all is computed."""

    function: ClassVar[str] = "linear_selected_logits"

    gradient: Gradient | None = Field(default=None, description='"unbiased", "exact", "filtered" or None')


class TopkSettings(TemperedSettings):
    """Of which logits."""

    function: ClassVar[str] = "linear_topk"


class DivergenceSettings(FunctionSettings):
    """Which divergence, and from the tokens' to the call's."""

    kind: Kind = Field(default="forward", description='"forward", "reverse" or "jsd"')
    beta: Float | None = Field(default=None, gt=0, lt=1, description="a float between 0 and 1, or None")
    reduction: Reduction = Field(default="mean", description='"mean", "sum" or "none"')
    num_valid_tokens: Annotated[int, Field(ge=0)] | InstanceOf[Tensor] | None = Field(
        default=None, description="an int, 0 or more, a 0-d tensor or None", json_schema_extra=MAY_DIFFER
    )

    @property
    def mixed(self) -> float:
        """The teacher's share of the mixture."""
        return 0.5 if self.beta is None else self.beta

    def check(self) -> dict[str, bool]:
        """What must be alike of those that may differ, by name.

        Raises:
            ValueError: where settings do not go together.
        """
        if self.beta is not None and self.kind != "jsd":
            raise ValueError(f'beta goes with kind="jsd"; got {self.kind!r}.')
        if self.num_valid_tokens is not None and self.reduction != "mean":
            raise ValueError(f'num_valid_tokens goes with reduction="mean"; got {self.reduction!r}.')
        if isinstance(self.num_valid_tokens, Tensor) and self.num_valid_tokens.ndim:
            shape = list(self.num_valid_tokens.shape)
            raise ValueError(f"num_valid_tokens must be 0-d as a tensor; got shape {shape}.")
        return {"whether there is num_valid_tokens": self.num_valid_tokens is not None}


class TopkKLSettings(SelectedSettings, DivergenceSettings):
    """The same from a teacher's stored ids, and what becomes of the others."""

    function: ClassVar[str] = "linear_topk_kl"

    tail_bucket: bool = Field(default=True, description="True or False")


class KLDivSettings(DivergenceSettings):
    """The same between two heads, which tokens count, and the memory for it."""

    function: ClassVar[str] = "linear_kl_div"

    temperature: Float = Field(default=1.0, gt=0, allow_inf_nan=False, description="a positive float")
    student_softcap: Float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="a positive float or None"
    )
    student_logit_scale: Float | None = Field(default=None, allow_inf_nan=False, description="a finite float or None")
    teacher_softcap: Float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="a positive float or None"
    )
    teacher_logit_scale: Float | None = Field(default=None, allow_inf_nan=False, description="a finite float or None")
    ignore_index: int = Field(default=-100, description="an int")
    shift: int = Field(default=0, ge=0, description="an int, 0 or more")
    backend: Backend = Field(default="auto", description='"auto", "triton" or "torch"')
    workspace_mb: int | None = Field(default=None, ge=1, description="an int, 1 or more, or None")

    @property
    def student_form(self) -> tuple[float, float | None]:
        """Scale and softcap of the student's products, with the temperature in them."""
        return self._form(self.student_logit_scale, self.student_softcap)

    @property
    def teacher_form(self) -> tuple[float, float | None]:
        """The same of the teacher's."""
        return self._form(self.teacher_logit_scale, self.teacher_softcap)

    def _form(self, scale: float | None, softcap: float | None) -> tuple[float, float | None]:
        return at_temperature(1.0 if scale is None else scale, softcap, self.temperature)


class NuclearNormSettings(LogitSettings):
    """Of which logits."""

    function: ClassVar[str] = "logits_nuclear_norm"
