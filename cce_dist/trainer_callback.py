"""The Hugging Face Trainer, and the trainers of TRL: one line makes them train with cce_dist."""

import sys
import warnings
from types import FrameType
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from cce_dist.config import CCEConfig, choose_config
from cce_dist.heads.announce import unannounced
from cce_dist.heads.find import output_layer
from cce_dist.heads.lazy import fuse_evaluation_where, is_lazy, report, shard_of
from cce_dist.heads.liger import refuse_liger_arguments, refuse_liger_forward
from cce_dist.missing import named
from cce_dist.transformers import patch

with named("cce_dist.trainer_callback", "transformers", "accelerate", extra="train"):
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class CCECallback(TrainerCallback):
    """``Trainer(..., callbacks=[CCECallback()])``: the model trains without logits, however the trainer wraps it.

    In a single process, under DDP and under FSDP2 (accelerate's, or the model's own from ``distributed_config``) the
    output layer is patched when training begins. With DeepSpeed the section "cce_dist" of its JSON counts, which
    ``TrainingArguments(deepspeed=...)`` or accelerate names, or else the settings given here.

    Args:
        config: settings of the loss; None: the defaults, or DeepSpeed's section.
        settings: the same by keyword, as in ``CCECallback(gradient="exact")``.

    Raises:
        ValueError: a bad setting, or config and settings together; when the trainer is built, settings here as well as
            in DeepSpeed's section, or arguments that make Liger compute the loss.
    """

    def __init__(self, config: CCEConfig | None = None, **settings: Any) -> None:
        self._config = choose_config(config, settings, where="CCECallback")
        self._is_given = config is not None or bool(settings)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the engine is built: DeepSpeed's config gets its section, and ``deepspeed.initialize`` reads it."""
        if self._is_enabled(args):
            refuse_liger_arguments(args)
            trainer = self._trainer()
            if getattr(args, "precompute_ref_log_probs", False) and trainer:
                from cce_dist.trl import before_precomputing

                before_precomputing(trainer, lambda model: self._fuse_untrained(model, trainer))
        config = self._deepspeed_config(args)
        if config is None:
            return
        from cce_dist.deepspeed.engine import SECTION, install

        if self._is_given and SECTION in config:
            raise ValueError(
                f'settings of cce_dist stand in CCECallback(...) and in the section "{SECTION}" of the DeepSpeed '
                "config: leave one of them out."
            )
        # No defaults: backend="auto" would be among them, which accelerate takes for a blank of its own.
        config.setdefault(SECTION, self._settings(args).model_dump(exclude_defaults=True))
        if getattr(args, "cast_lm_head_to_fp32", False):
            config[SECTION].setdefault("fp32_head", True)
        install()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the model is wrapped and before the first step."""
        model: nn.Module = kwargs["model"]
        if not self._is_enabled(args):
            return
        refuse_liger_arguments(args)
        refuse_liger_forward(model)
        if args.n_gpu > 1:
            raise ValueError(
                "cce_dist does not work under nn.DataParallel, which the Trainer takes where one process sees several "
                "GPUs: start it with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        if getattr(args, "loss_type", None) == "chunked_nll":
            raise ValueError(
                'loss_type="chunked_nll" of TRL multiplies by lm_head.weight, past the output layer that cce_dist '
                'patches: set loss_type="nll", which computes no logits either with cce_dist.'
            )
        has_engine = self._deepspeed_config(args) is not None
        if not has_engine and not is_lazy(output_layer(model)):
            patch(model, self._settings(args))
        head = output_layer(model)
        trainer: Any = self._trainer()
        if has_engine:
            if trainer is not None and not hasattr(getattr(trainer.model_wrapped, "optimizer", None), "step"):
                raise ValueError(
                    "evaluate() or predict() before train() has made the Trainer build a DeepSpeed engine without an "
                    "optimizer, in which it cannot train, with cce_dist or without: evaluate after train(), set "
                    "eval_on_start=True, or evaluate with a Trainer of its own."
                )
            if not is_lazy(head):
                raise ValueError(
                    "cce_dist is not active in this DeepSpeed engine, which was built before CCECallback could say so: "
                    "give it to the trainer's constructor, callbacks=[CCECallback(...)], not to add_callback."
                )
        if is_lazy(head):
            if trainer is not None:
                _preprocess_in_the_step(trainer)
            fuse_evaluation_where(head, _no_logits_are_kept)
            self._check_trl_trainer(trainer, head)
        self._fuse_trl_forward(model, args)
        if trainer is not None:
            self._fuse_reference(trainer)

    def _check_trl_trainer(self, trainer: Any, head: Any) -> None:
        """Looks for a trainer that computes past the output layer, whose weight may be a part of the rows."""
        if "trl.trainer.utils" not in sys.modules:
            return
        from cce_dist.trl import multiplies_by_the_weight

        name, weight = multiplies_by_the_weight(trainer), head.weight
        if name is None or isinstance(weight, DTensor):  # FSDP2's is gathered where it is read, which is told there
            return
        what, rows = f"TRL's {name} multiplies by lm_head.weight itself, past the output layer", shard_of(head)
        if weight.numel() and weight.shape[0] != rows.vocab_size:
            raise ValueError(
                f"{what}, of which this rank holds {weight.shape[0]} of {rows.vocab_size} rows: train it without "
                "vocab_parallel_size and tensor parallelism of the output layer."
            )
        report(self._config.materialize, f"{what}, so that cce_dist does nothing for it.", "Leave CCECallback out.")

    def _fuse_trl_forward(self, model: nn.Module, args: TrainingArguments) -> None:
        """Puts our forward around one of TRL's, where the model has such."""
        if "trl.trainer.utils" not in sys.modules:
            return
        from cce_dist.trl import fuse_forward, trl_forward_of, wants_entropy_bonus

        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        trl_forward = trl_forward_of(base)
        if trl_forward is not None:
            fuse_forward(base, trl_forward, output_layer(model), wants_entropy_bonus(args))

    def _fuse_reference(self, trainer: Trainer) -> None:
        """A reference model of TRL's, by the same computation as the policy: bf16 logits would round differently."""
        reference = getattr(trainer, "ref_model", None)
        if isinstance(reference, nn.Module):
            self._fuse_untrained(reference, trainer)

    def _fuse_untrained(self, model: nn.Module, trainer: Trainer) -> None:
        args = trainer.args
        if trainer.is_deepspeed_enabled:  # its engine has made the output layer lazy, or is about to
            self._fuse_trl_forward(trainer.accelerator.unwrap_model(model), args)
            return
        try:
            with unannounced():
                if not is_lazy(output_layer(model)):
                    patch(model, self._settings(args))
        except (TypeError, ValueError) as error:
            warnings.warn(
                f"the log-probabilities of the reference model are TRL's, which round otherwise in 16 bits than those "
                f"of cce_dist for the policy, because its output layer cannot be patched: {error}",
                stacklevel=2,
            )
        else:
            self._fuse_trl_forward(model, args)

    def _trainer(self) -> Trainer | None:
        """The trainer that calls: callbacks are given its model, but not its reference model."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, Trainer) and self in caller.callback_handler.callbacks:
                return caller
            frame = frame.f_back
        return None

    def _settings(self, args: TrainingArguments) -> CCEConfig:
        """With a reference the full first pass: that of evaluation, to which the 8-bit one of training is no equal.
        TRL's ``cast_lm_head_to_fp32`` is ``fp32_head``."""
        has_reference = hasattr(args, "sync_ref_model") or hasattr(args, "precompute_ref_log_probs")
        changes: dict[str, Any] = {}
        if has_reference and self._config.first_pass == "auto":
            changes["first_pass"] = "full"
        if getattr(args, "cast_lm_head_to_fp32", False):
            changes["fp32_head"] = True
        return self._config.model_copy(update=changes)

    def _deepspeed_config(self, args: TrainingArguments) -> dict[str, Any] | None:
        """The one that the engine is built with, from ``args`` or from accelerate's launcher or plugin."""
        trainer: Any = self._trainer()
        plugin = getattr(args, "deepspeed_plugin", None) if trainer is None else trainer.accelerator.deepspeed_plugin
        return None if plugin is None else plugin.deepspeed_config

    def _is_enabled(self, args: TrainingArguments) -> bool:
        section = (self._deepspeed_config(args) or {}).get("cce_dist", {})
        return bool(section.get("enabled", self._config.enabled))


def _preprocess_in_the_step(trainer: Any) -> None:
    """Has ``preprocess_logits_for_metrics`` called where a step of evaluation ends, not once the logits were padded to
    those of other ranks: of lazy logits an argmax, for the accuracy, needs none."""
    preprocess = trainer.preprocess_logits_for_metrics
    stock_step = getattr(trainer.prediction_step, "_cce_stock", trainer.prediction_step)
    if preprocess is None or preprocess is _as_it_is:
        return

    def step(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        loss, logits, labels = stock_step(*args, **kwargs)
        return loss, None if logits is None else preprocess(logits, labels), labels

    step._cce_stock = stock_step  # type: ignore[attr-defined]
    trainer.prediction_step, trainer.preprocess_logits_for_metrics = step, _as_it_is


def _as_it_is(preprocessed: Any, labels: Any) -> Any:
    return preprocessed


def _no_logits_are_kept() -> bool:
    """Whether this is inside of a Trainer's ``prediction_step`` that drops the logits, or has them preprocessed at
    once: no callback says when it begins.

    Generation, and evaluation of the user's own, get the real logits that they expect.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("transformers.generation."):
            return False
        if frame.f_code.co_name == "prediction_step" and "prediction_loss_only" in frame.f_code.co_varnames:
            preprocess = getattr(frame.f_locals.get("self"), "preprocess_logits_for_metrics", None)
            return bool(frame.f_locals["prediction_loss_only"]) or preprocess is _as_it_is
        frame = frame.f_back
    return False
