"""The class that a lazy head has in place of its own, and how it gets it and loses it again.

In go a head, its owner and the settings; in training, a call of the head then gives `LazyLogits`, and in evaluation
what the stock class gives; but in ``generate()``, where the ranks share its rows, `LazyLogits` again.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from cce_dist.config import CCEConfig
from cce_dist.heads import checkpoints, hooks
from cce_dist.heads.find import registered
from cce_dist.heads.lazy.generation import Loop, loop_around
from cce_dist.heads.lazy.logits import LazyLogits
from cce_dist.heads.lazy.materialize import report
from cce_dist.heads.lazy.source import Binding, Source, in_dtype_of_hidden, wide
from cce_dist.heads.owner import ModuleOwner, ShardOwner
from cce_dist.loss import TokenLogprobs
from cce_dist.shard import VocabShard


def make_lazy(head: nn.Module, owner: ShardOwner, config: CCEConfig, linear: type[nn.Module] = nn.Linear) -> None:
    """Swaps the head's class: called in training with grad enabled, it returns `LazyLogits`.

    In evaluation and without grad the stock call runs, but where transformers' ``generate()`` wants the next token of
    a head whose rows several ranks hold: that is chosen without logits. Hooks of users run in both. Parameters, names,
    state_dict and isinstance stay as they are. A pickle of the head holds the stock class; a deepcopy is as lazy as the
    head.

    Args:
        head: an nn.Linear, or of the class ``linear``.
        owner: where its rows live, and where their gradient goes.
        config: settings of the loss, and what happens where real logits are needed (``materialize``).
        linear: whose forward the head has: nn.Linear's, or that of a framework's own linear layer.

    Raises:
        TypeError: the head does more than F.linear(hidden, weight, bias), as one with an adapter does.
        ValueError: the head is lazy already.
        RuntimeError: a torch whose hooks this version does not know.
    """
    hooks.check_torch()
    checkpoints.check_torch()
    stock = type(head)
    if is_lazy(head):
        raise ValueError(
            f"{stock.__name__} is lazy already; undo that first, with make_eager or by unpatching its model."
        )
    if not isinstance(head, linear) or stock.forward is not linear.forward or "forward" in vars(head):
        raise TypeError(
            f"head must be an nn.Linear with the forward of nn.Linear, got {stock.__module__}.{stock.__qualname__}. "
            "Adapters on the output layer other than LoRA, quantisation and device_map replace that forward: leave the "
            "output layer out of them, merge the adapter into it first, or train a copy of the layer (modules_to_save)."
        )
    weight = registered(head, "weight")
    if weight is not None and weight.dtype not in _DTYPES:
        raise TypeError(
            f"head has a weight of {weight.dtype}; taken are fp32, bf16, fp16 and fp64. Leave the output layer out of "
            "quantisation."
        )
    head.__class__ = type(f"CCE{stock.__name__}", (_LazyHead, stock), {"_cce": Binding(stock, owner, config)})


def is_lazy(head: nn.Module) -> bool:
    """Whether `make_lazy` has been here."""
    return isinstance(head, _LazyHead)


def lazy_calls(head: nn.Module) -> int:
    """How often a lazy head has been called and has returned `LazyLogits`; not counted inside a compiled graph."""
    return head._cce.calls if isinstance(head, _LazyHead) else 0


def make_eager(head: nn.Module) -> None:
    """Undoes `make_lazy`.

    Raises:
        ValueError: the head is not lazy, or something else (fully_shard, say) has swapped its class since.
    """
    binding = vars(type(head)).get("_cce")
    if binding is None:
        raise ValueError(
            f"{type(head).__name__} is not a class that make_lazy made. If fully_shard or the like came after "
            "make_lazy, the head cannot be made eager any more: build the model anew."
        )
    head.__class__ = binding.stock


@contextmanager
def fused_evaluation(head: nn.Module) -> Iterator[None]:
    """Inside, a lazy head returns `LazyLogits` in evaluation too, for a loss that needs no memory for logits.

    Raises:
        ValueError: the head is not lazy.
    """
    binding = _binding(head)
    before, binding.in_evaluation = binding.in_evaluation, True
    try:
        yield
    finally:
        binding.in_evaluation = before


def is_in_fp32(head: nn.Module) -> bool:
    """Whether a lazy head's logits are those of fp32 products: the setting ``fp32_head``.

    Raises:
        ValueError: the head is not lazy.
    """
    return _binding(head).config.fp32_head


def shard_of(head: nn.Module) -> VocabShard:
    """Which rows of the vocabulary this rank computes with.

    Raises:
        ValueError: the head is not lazy.
    """
    return _binding(head).owner.shard


def fuse_evaluation_where(head: nn.Module, condition: Callable[[], bool]) -> None:
    """A lazy head returns `LazyLogits` in evaluation too, in every call for which the condition holds.

    Raises:
        ValueError: the head is not lazy.
    """
    _binding(head).fused_where = condition


def _binding(head: nn.Module) -> Binding:
    if not isinstance(head, _LazyHead):
        raise ValueError(f"{type(head).__name__} is not lazy; call make_lazy on it, or patch its model, first.")
    return head._cce


class _LazyHead(nn.Module):
    """Goes before the class of a head. It has __call__, not forward, since FSDP's and ZeRO's hooks hang on __call__."""

    _cce: ClassVar[Binding]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        binding = self._cce
        if args and isinstance(args[0], DTensor):
            args = (_all_tokens(args[0], binding.owner), *args[1:])
        trains = self.training and torch.is_grad_enabled()
        loop = None if trains else self._generation()
        if loop is not None:
            return self._next_token_of(loop, args, kwargs)
        if not (trains or binding.in_evaluation or self._is_fused_here()):
            if self.training and checkpoints.in_forward():
                self._report("is called inside of a reentrant checkpoint", _NO_REENTRANT)
            return self._stock(args, kwargs)
        if trains and checkpoints.in_recomputation():
            return self._stock(args, kwargs)  # as in the forward that is recomputed
        obstacle = self._obstacle()
        if obstacle is not None:
            self._report(*obstacle)
            return self._stock(args, kwargs)
        return hooks.call(self, self._lazy, args, kwargs, hooks.is_of_users)

    def logprobs(self, hidden: Tensor, labels: Tensor, **settings: Any) -> TokenLogprobs:
        """Log-probabilities of labels [...] at hidden states [..., D], in training and evaluation alike.

        What a model does to its logits after this layer (softcap, scale) is not in them: pass it as ``settings``, the
        keywords of `linear_logprobs`, or take `LazyLogits.logprobs` of what the model returns.

        Raises:
            RuntimeError: a call of this layer computes logits, for a reason that has been told.
        """
        with fused_evaluation(self):
            logits = self(hidden)
        if not isinstance(logits, LazyLogits):
            raise RuntimeError(
                f"logprobs() of this {self._cce.stock.__name__} would compute logits of {list(logits.shape)}: see the "
                "warning, or, inside of a checkpoint, move it out."
            )
        return logits.logprobs(labels, **settings)

    def _stock(self, args: Any, kwargs: Any) -> Any:
        """The stock class's call: with ``fp32_head`` of hidden states in fp32, outside of autocast."""
        if not self._cce.config.fp32_head:
            return super().__call__(*args, **kwargs)
        hidden: Tensor = args[0] if args else kwargs["input"]
        with torch.autocast(hidden.device.type, enabled=False):
            return hooks.call(self, partial(in_dtype_of_hidden, self), (wide(hidden),), {}, lambda hook: True)

    def _lazy(self, input: Tensor, in_generation: bool = False) -> LazyLogits:
        if not torch.compiler.is_compiling():
            self._cce.calls += 1
        return LazyLogits(Source(self, self._cce, input, in_generation))

    def _generation(self) -> Loop | None:
        """The loop that wants the next token of a head whose rows several ranks hold; None where there is none."""
        sharded = self._cce.owner.shard.vocab_group is not None
        if not sharded or torch.is_grad_enabled() or torch.compiler.is_compiling() or self._obstacle() is not None:
            return None
        return loop_around(self)

    def _next_token_of(self, loop: Loop, args: Any, kwargs: Any) -> Any:
        """Lazy logits of a step of generation. Of a rank that has finished nobody looks at them: it does here what the
        others do where they choose a token."""
        choice = self._cce.choice
        if loop.has_finished and choice is None:  # the others need real logits
            return self._stock(args, kwargs)
        logits = hooks.call(self, partial(self._lazy, in_generation=True), args, kwargs, hooks.is_of_users)
        if loop.has_finished and choice is not None:
            logits._source.next_token(*choice)
        return logits

    def _is_fused_here(self) -> bool:
        condition = self._cce.fused_where
        return condition is not None and not torch.compiler.is_compiling() and condition()

    def _obstacle(self) -> tuple[str, str] | None:
        """What makes this call something else than F.linear(hidden, weight, bias), and what to do about it."""
        if torch.is_grad_enabled() and hooks.wants_gradients(self):
            return "has backward hooks, its own or those of all modules", "Take those hooks off."
        forward = vars(self).get("forward", type(self).forward)
        if forward is not self._cce.stock.forward and not (forward.__module__ or "").startswith("cce_dist."):
            name = f"{forward.__module__}.{getattr(forward, '__qualname__', type(forward).__name__)}"
            return f"has the forward {name} in place of its own", "Leave the output layer out of what does that."
        weight = registered(self, "weight")
        if weight is not None and type(weight) not in (nn.Parameter, Tensor, DTensor):
            return f"has a weight of the class {type(weight).__name__}", "Leave the output layer out of quantisation."
        return None

    def _report(self, what: str, instead: str) -> None:
        report(
            self._cce.config.materialize,
            f"logits are computed after all: the output layer, called by {{place}} {what}.",
            instead,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Protocol 1's form, legal in all: the one of protocol 2 insists on the class of the object.
        construct, args, *state = cast(tuple[Any, ...], super().__reduce_ex__(min(protocol, 1)))
        return (construct, (self._cce.stock, *args[1:]), *state)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        binding = self._cce
        if not isinstance(binding.owner, ModuleOwner):
            raise TypeError(
                f"the rows of this head belong to a {type(binding.owner).__name__}, which cannot be copied; copy the "
                "model before its head is sharded."
            )
        twin = memo[id(self)] = binding.stock.__new__(binding.stock)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        make_lazy(twin, ModuleOwner(twin, binding.owner.shard), binding.config)
        _binding(twin).fused_where = binding.fused_where
        return twin


def _all_tokens(hidden: DTensor, owner: ShardOwner) -> Tensor:
    """Plain hidden states out of what a tensor-parallel body gives, for a head that every rank has as a whole.

    Raises:
        TypeError: a DTensor that is neither replicated nor split along the sequence, or a head that is sharded.
    """
    if owner.shard.vocab_group is not None:
        raise TypeError(
            f"the hidden states at this output layer are a DTensor, {hidden.placements}, while its rows are sharded by "
            f"a {type(owner).__name__} that knows of no tensor parallelism: pass the mesh of the body's tensor "
            "parallelism to cce_dist.fsdp.shard_head(..., tp=mesh['tp']), or give the layer plain tensors."
        )
    sequence = range(1, hidden.ndim - 1)
    if not all(isinstance(p, Replicate) or (isinstance(p, Shard) and p.dim in sequence) for p in hidden.placements):
        raise TypeError(
            f"the hidden states at this output layer are a DTensor with the placements {hidden.placements}; taken are "
            "those that a tensor-parallel body gives, replicated or split along the sequence of [batch, sequence, "
            "hidden]. Call redistribute(placements=[Replicate()]) on them first, or to_local() if each rank's are its "
            "own."
        )
    return hidden.full_tensor()


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NO_REENTRANT = (
    "Its backward computes them again with a graph of its own, which lazy logits cannot cross: take "
    "checkpoint(..., use_reentrant=False), or leave the output layer and the loss out of the checkpoint."
)
