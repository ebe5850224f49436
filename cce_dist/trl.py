"""TRL 1.15 and later: its trainers ask the model itself for log-probabilities, and get them from the fused loss.

``trl.trainer.utils.add_fused_lm_head`` replaces the forward of a trainer's model. The replacement multiplies the hidden
states by ``lm_head.weight``, past the output layer's own call: a patched layer is not used, and one that is a
vocabulary shard would be gathered, with a wrong gradient. `fuse_forward` puts a forward around it that gives the same
outputs by way of the output layer, until the model is unpatched. Earlier versions of TRL need nothing: they read the
logits that the model returns.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import trl
from torch import Tensor, nn
from torch.nn import functional as F
from trl.trainer import utils

from cce_dist.device_check import device_check
from cce_dist.heads.lazy import LazyLogits, fused_evaluation, is_in_fp32

_PAST_THE_HEAD = ("AsyncDistillationTrainer", "DistillationTrainer")
_OUTPUTS = {"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"}


def fuse_forward(model: nn.Module, trl_forward: Any, head: nn.Module, entropy_bonus: bool = False) -> None:
    """Replaces the forward of a TRL trainer's model: ``model(..., fused_lm_head=True)`` then runs the fused loss.

    Log-probabilities are those of `linear_logprobs`, of the full pass in training and without a gradient alike. What
    SFT trains, which asks for ``is_top1``, is the loss.

    Args:
        model: as `add_fused_lm_head` got it, without PEFT's wrapper.
        trl_forward: the function that TRL made, which ``model.forward`` is or wraps.
        head: the output layer, lazy.
        entropy_bonus: whether the entropy is to have a gradient; it then takes a smaller eps, see `linear_logprobs`.

    Raises:
        RuntimeError: a TRL whose forward this version does not know.
        ValueError: TRL's ``cast_lm_head_to_fp32`` with a head that has not ``fp32_head``.
    """
    settings = inspect.getclosurevars(trl_forward).nonlocals
    temperature, outputs, to_fp32 = (settings.get(x) for x in ("temperature", "outputs", "cast_lm_head_to_fp32"))
    if temperature is None or outputs is None or to_fp32 is None or not set(outputs) <= _OUTPUTS:
        raise RuntimeError(
            f"cce_dist.trl does not know the forward that TRL {trl.__version__} gives to its models, with "
            f"{sorted(settings)} and outputs={outputs}. It was written for TRL 1.15 and 1.16; use one of those, or "
            "leave out cce_dist's callback."
        )
    if to_fp32 and not is_in_fp32(head):
        raise ValueError(
            "cast_lm_head_to_fp32=True needs an output layer that is patched with fp32_head=True: CCECallback does "
            "that, and so does patch(model, fp32_head=True)."
        )
    forward_before: Any = model.forward

    @functools.wraps(getattr(forward_before, "__func__", forward_before))
    def forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return forward_before(*args, **kwargs, **{name: x for name, x in given.items() if x is not None})
        with fused_evaluation(head):
            result = forward_before(*args, **{**kwargs, "use_cache": False})
        logits: Any = result.logits if temperature == 1.0 else result.logits / temperature
        if shift_labels is None:
            assert labels is not None
            logits, shift_labels = logits[:, :-1], labels[:, 1:]
        aux_loss = getattr(result, "aux_loss", None)
        fused = _fused_output(logits, shift_labels.to(logits.device), outputs, num_items_in_batch, entropy_bonus)
        if aux_loss is not None:
            coefficient = getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0)  # type: ignore[union-attr, operator]
            fused.loss, fused.aux_loss = fused.loss + coefficient * aux_loss, aux_loss
        return fused

    forward._cce_before = forward_before  # type: ignore[attr-defined]  # for unpatch
    model.forward = MethodType(forward, model)  # type: ignore[method-assign]


def multiplies_by_the_weight(trainer: Any) -> str | None:
    """The name of a trainer of TRL's that computes logits from ``lm_head.weight``, past the output layer's call."""
    of_trl = [kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.startswith("trl.")]
    return next((name for name in of_trl if name in _PAST_THE_HEAD), None)


def before_precomputing(trainer: Any, act: Callable[[nn.Module], None]) -> None:
    """Calls ``act(model)`` with the model of which a trainer is about to compute a reference's log-probabilities.

    Raises:
        RuntimeError: a trainer that computes them in a way that this version does not know.
    """
    stock = getattr(trainer, "_precompute_ref_logps", None)
    if stock is None:
        raise RuntimeError(
            f"cce_dist.trl does not know how the {type(trainer).__name__} of TRL {trl.__version__} precomputes a "
            "reference's log-probabilities: set precompute_ref_log_probs=False, or leave out cce_dist's callback."
        )

    def precompute(*args: Any, **kwargs: Any) -> Any:
        act(trainer.ref_model or trainer.model)
        return stock(*args, **kwargs)

    trainer._precompute_ref_logps = precompute


def trl_forward_of(model: nn.Module) -> Any:
    """The forward that TRL gave to a model, also inside of accelerate's wrappers; None where it gave none."""
    function: Any = vars(model).get("forward")
    while function is not None:
        function = getattr(function, "__func__", function)
        module = getattr(function, "__globals__", {}).get("__name__")
        if module == __name__:
            return None
        if module == utils.__name__:
            return function
        function = getattr(function, "__wrapped__", None)
    return None


def _fused_output(
    logits: LazyLogits,
    labels: Tensor,
    outputs: tuple[str, ...],
    num_items_in_batch: Tensor | int | None,
    entropy_bonus: bool,
) -> Any:
    """What TRL's own forward returns for logits [B, L, V] and labels [B, L]: [B, L] each, 0 where ignored."""
    mask = labels != -100
    flat: Any = logits.flatten(0, 1)
    rest = set(outputs) - {"log_probs"}
    if "is_top1" in outputs and not entropy_bonus:  # SFT's, which trains the loss
        log_probs, entropy = -F.cross_entropy(flat, labels.flatten(), reduction="none").view(labels.shape), None
    else:
        wanted: Any = "entropy" in outputs and (True if entropy_bonus else "value")
        found = flat.logprobs(labels.flatten(), entropy=wanted)
        log_probs, entropy = found.logprob.view(labels.shape), found.entropy
        rest -= {"entropy"}
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    fused = utils.FusedCausalLMOutput(loss=loss, log_probs=log_probs, label_mask=mask)
    if entropy is not None:
        entropy = entropy.view(labels.shape)
        fused.entropy = entropy if entropy_bonus else _ForTheLog.apply(entropy, log_probs)
    if not rest:
        return fused
    statistics = flat[mask.flatten()].statistics()

    def everywhere(x_n: Tensor) -> Tensor:
        return x_n.new_zeros(mask.shape).masked_scatter_(mask, x_n)

    if "entropy" in rest:
        fused.entropy = _ForTheLog.apply(everywhere(statistics.entropy), log_probs)
    if "log_sum_sq_probs" in outputs:
        fused.log_sum_sq_probs = everywhere(statistics.log_sum_sq_probs)
    if "mean_logits" in outputs:
        fused.mean_logits = everywhere(statistics.mean_logit)
    if "is_top1" in outputs:
        fused.is_top1 = everywhere(statistics.argmax == labels[mask])
    return fused


class _ForTheLog(torch.autograd.Function):
    """A value that belongs to the graph, so that a loss which wants its gradient fails instead of going without.

    A gradient of zeros is none: DDP that looks for unused parameters gives one to every output that the loss leaves
    out. On CUDA the assertion is the device's, and the gradient NaN, since to look at it would be to wait for it.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, _anchor: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:  # type: ignore[override]
        if grad.is_cuda:
            device_check((grad == 0).all(), NO_BONUS)
            return None, torch.zeros_like(grad).masked_fill_(grad != 0, torch.nan)
        if grad.count_nonzero():
            raise NotImplementedError(NO_BONUS)
        return None, None


NO_BONUS = (
    "cce_dist computes the entropy of TRL's fused head for the log only, without a gradient, where the trainer's "
    "arguments (entropy_coef, use_adaptive_entropy) ask for no bonus: set one of them, or call "
    "fuse_forward(..., entropy_bonus=True)."
)


def wants_entropy_bonus(args: Any) -> bool:
    """Whether the arguments of a TRL trainer ask for a loss on the entropy."""
    return bool(getattr(args, "entropy_coef", 0) or getattr(args, "use_adaptive_entropy", False))
