"""Logits that are not computed: a model's own code runs unchanged, and F.cross_entropy on them is the fused loss.

`make_lazy` swaps the class of one output layer. In training its call returns `LazyLogits`: the hidden states, and what
the model has done to the logits since (scale, softcap, bias, views, slices, casts). Where `F.cross_entropy` meets
them, `linear_cross_entropy` runs on the hidden states. `linear_logprobs` answers log_softmax gathered at one id a
token, gather, logsumexp, nll_loss and the entropy −(exp(log_softmax)·log_softmax).sum, with their gradients; a chunked
pass argmax, and the entropy under no_grad; `linear_next_token` a multinomial of softmax. Any other use computes the
real logits with the stock forward and warns, or raises, naming the call site: there is no silent fallback.

The loss is of the logits that the head's call would have given. Forward hooks and pre-hooks run in that call, on lazy
logits, whose hidden states and parameters are those of that moment (pruning, parametrizations and PEFT change the
weight for a call). A call that does anything else, or whose gradients hooks wait for, gives real logits and says so.
FSDP2's and ZeRO-3's own hooks on the head, which gather it, run where real logits are computed.

In evaluation the stock forward runs, but for the steps of transformers' ``generate()`` on a sharded head: greedy or
sampled, each takes `linear_next_token` where nothing else is wanted of the logits.

Imports run one way: form (what was done to logits) ← source (one call of a head) ← logits (what torch's functions make
of lazy logits) ← head (the swapped class) ← adapter (PEFT's LoRA around it); generation (the loop that calls a head) ←
head.
"""

from cce_dist.heads.lazy.adapter import check_adapter, make_adapted, make_plain
from cce_dist.heads.lazy.head import (
    fuse_evaluation_where,
    fused_evaluation,
    is_in_fp32,
    is_lazy,
    lazy_calls,
    make_eager,
    make_lazy,
    shard_of,
)
from cce_dist.heads.lazy.logits import LazyLogits
from cce_dist.heads.lazy.materialize import MaterializedLogitsWarning, report

__all__ = [
    "LazyLogits",
    "MaterializedLogitsWarning",
    "check_adapter",
    "fuse_evaluation_where",
    "fused_evaluation",
    "is_in_fp32",
    "is_lazy",
    "lazy_calls",
    "make_adapted",
    "make_eager",
    "make_lazy",
    "make_plain",
    "report",
    "shard_of",
]
