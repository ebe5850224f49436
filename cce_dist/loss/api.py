"""The public loss: its settings, and what the ranks say to each other.

The path of a token: `cross_entropy` has `call.begin` check, agree with the other ranks' hosts on the call
(`shard.agreement`) and flatten; `autograd.LinearCrossEntropy` gathers the ranks' tokens where they differ, puts the
valid ones first (`tokens`), has the backend summarise this rank's rows (`kernels`), and merges the shards' log-sum-exps
and target logits (`collectives`); after a first pass in 8 bits they are refined and merged again. Backward hands the
backend the global log-sum-exp, keeps dC on its rank and sums dE over the ranks, while the backend computes dC. While
torch.compile traces, `graph` puts all of it into one operator.

Collectives of a call, with N tokens in all, n of each of W ranks, D hidden; fp32 where no dtype is named:

| layout         | forward                                           | backward                                       |
|----------------|---------------------------------------------------|------------------------------------------------|
| single process | none                                              | none                                           |
| tensor         | MAX [N] (+ 2 numbers, which compare labels),      | dE: all-reduce [N, D], beside dC               |
| parallel       | SUM [2, N]                                        |                                                |
| own tokens     | all-gather hidden [n, D] in its dtype and labels  | all-gather upstream [n, 2];                    |
|                | [n] in int64; MAX [N], SUM [2, N]                 | dE: reduce-scatter [N, D], beside dC           |
| FSDP x TP      | as own tokens: gathered over the token group,     | as own tokens, over the token group; then dE:  |
|                | MAX and SUM over all                              | all-reduce [n, D] over those with equal tokens |

With frequent rows ([K, D], `frequent`) on several ranks there are also, forward: SUM [K, D] in weight's dtype, beside
the 8-bit pass, and 2 numbers in the MAX, which compare the choice; backward: SUM [K, D], beside the other rows.
The 8-bit pass adds a MAX and a SUM of the same sizes before the refinement; a mean over ranks, a SUM of two fp64
numbers in forward and of one in backward; label smoothing, a SUM [D + 2] in forward over the vocabulary group, and one
number more of each token in backward; class weights, an all-gather of the labels over the token group and a SUM [N];
statistics, another all-gather of hidden, a MAX, a SUM and a MIN of a few numbers a token, and for "rank" two SUMs more.
With an adapter a is gathered and da reduced as hidden and dE are, and there is a second SUM for label smoothing, [R +
2], and for the frequent rows, [K, R]. Before all of them the hosts exchange seven integers.

Shapes: n tokens of this rank, D hidden, V local rows of the classifier.
"""

from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from cce_dist.loss.cross_entropy import cross_entropy
from cce_dist.loss.graph import linear_cross_entropy_in_graph
from cce_dist.loss.settings import CallSettings, Statistic, takes_settings
from cce_dist.loss.statistics import LabelStatistics
from cce_dist.shard import VocabShard


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    return_lse: Literal[False] = False,
    statistics: Iterable[Statistic],
    **settings: Any,
) -> tuple[Tensor, LabelStatistics]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    return_lse: Literal[True],
    statistics: Iterable[Statistic],
    **settings: Any,
) -> tuple[Tensor, Tensor, LabelStatistics]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    return_lse: Literal[False] = False,
    **settings: Any,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    return_lse: Literal[True],
    **settings: Any,
) -> tuple[Tensor, Tensor]: ...
@takes_settings(CallSettings)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    **settings: Any,
) -> Any:
    """Cross-entropy of z = softcap·tanh(logit_scale·(hidden · weightᵀ + bias) / softcap) against labels.

    Source of the method: "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009. Every rank of
    ``shard.vocab_group`` must make the call in every step, also with no token or no valid label. Settings may change
    from call to call, on all ranks alike.

    Args:
        hidden: [..., D], fp32, fp16, bf16 (or fp64 with the torch backend); cast to the autocast dtype under autocast.
            A DTensor on a 1-D mesh, as a tensor-parallel body gives it: the ranks of ``token_group`` bring the tokens
            that they hold, other ranks all tokens.
        weight: [V, D], this rank's rows; cast to hidden's dtype, its gradient returns in its own. A DTensor must be
            Shard(0) on a 1-D mesh: rows and group come from it, and its gradient is a DTensor.
        labels: [...], integers in [0, vocab_size) over the GLOBAL vocabulary, or the ignored one. Ranks that bring the
            same tokens must bring the same labels, which is checked (on CUDA by a device-side assertion).
        bias: [V], this rank's.
        shard: which global rows these are, and the process groups. None: all rows, in this process alone.
        adapter: (a [..., R], B [V, R]) of a low-rank adapter (LoRA, arXiv 2106.09685), R at most D: hidden · weightᵀ +
            a · Bᵀ takes the place of hidden · weightᵀ. a = scaling · hidden · Aᵀ is the caller's, in autograd, of this
            rank's tokens (where ranks bring the same ones, the same on each); B has this rank's rows. Both are cast to
            hidden's dtype and get gradients; weight must be frozen.
        ignore_index: the label of tokens that have none.
        shift: position l of hidden is compared with label l + shift, along labels' last axis.
        softcap, logit_scale: None leaves them out.
        reduction: "none": [..., L - shift], 0 where ignored. "sum": over this rank's tokens. "mean": over the valid
            tokens of ``shard.count_group``, the same value on every rank of it; NaN where there is no valid token.
        label_smoothing: of this share the loss is the mean over all labels, with their weights, as F.cross_entropy has
            it. Beside a softcap it takes four more products of the logits' size, chunk by chunk; not with an adapter.
        z_loss: times lse², this is added to the loss of each token (PaLM, arXiv 2204.02311, section 5; with
            ``return_lse`` it can be told apart).
        class_weights: [V], this rank's: a token's cross-entropy counts as much as its label's entry, and "mean" divides
            by the sum of these, as F.cross_entropy has it. No gradient is theirs.
        token_weights: [...], floats that the tokens' losses are multiplied with; "mean" still divides by the number of
            valid tokens, by the sum of class weights, or by ``num_valid_tokens``. No gradient is theirs.
        grad_accumulator: [V, D] in fp32 (fp64 for fp64), Megatron's main_grad: dC, the undivided sum over the tokens of
            all ranks, is added to it in backward, and weight gets no gradient.
        num_valid_tokens: with "mean", divide this rank's sum by this instead (an int, or a 0-d tensor).
        gradient: "exact"; "unbiased": negligible parts of the softmax are sampled, exact in expectation; "filtered":
            they are replaced by their mean. None: "exact" with the torch backend, "unbiased" with Triton's kernels or
            where ``filter_eps`` is given.
        tail: False: "filtered" drops the negligible parts, as the paper does.
        filter_eps: softmax mass below which 128 consecutive rows are negligible to a token; 0 makes any mode exact;
            None (or "auto"): chosen by mode and vocabulary.
        seed: of the sampling. None: from the number of `torch.manual_seed` and the bits of the tokens' losses, so that
            a call with the same inputs samples the same, any other one otherwise, and no generator is advanced. An int:
            the start of a sequence, which all calls of this process with that int go on with, also those of a captured
            CUDA graph. A 0-d int64 tensor on hidden's device: its value at the time of the call; the caller changes it.
        backend: "triton" (CUDA), "torch" (any device), "auto": triton on CUDA.
        first_pass: "fp8": forward finds the parts of the softmax that matter from 8-bit copies of hidden and weight,
            then computes those in full: half the time, and an error of the loss below that of bf16 logits. "full": all
            in hidden's precision. "auto": fp8 where it was measured to pay (16-bit training on Hopper, with a filter).
        fp32_head: True: rows of another dtype than hidden's, such as fp32 ones beside hidden states in bf16, are not
            rounded to it, and autocast casts nothing: logits are those of fp32 products. Forward is a full pass then.
            Gradients are as near as without it: of 16-bit probabilities, hidden states, and rows where dE is summed.
            Hidden states in fp16 are refused.
        frequent_rows: so many rows of the classifier, those that most labels named so far, are computed densely, shared
            out over the ranks by tokens; the filter has the others. Each rank gets these rows, and no others; they
            are chosen by counts that are not in checkpoints. None: 4096 with Triton's kernels on CUDA and 32768 rows
            or more; 0: none. Only with a filter.
        workspace_mb: megabytes (2^20 bytes) on this rank for probabilities, at least 256 bytes a token (fp32: 512).
            None: chosen by mode. With gradient="exact" forward keeps the exponentials of as many logits as fit beside
            256 MB, or of all where they fit, and backward computes only the others again: Triton's kernels, bf16 or
            fp32. "logits": of all, 2·N·V bytes in bf16 for N tokens and V rows of this rank.
        max_tokens: the most tokens that any rank of the token group brings; None: the ranks exchange it per call.
        agreement: "every_call": the hosts exchange a few numbers in each call, so that what any of them knows of a
            fault is an error on every rank. "first_call": only in the first call with given settings; later the others
            wait for a rank that has raised until their group's timeout. It needs ``max_tokens`` with a token group, and
            no group that moves CPU tensors, but for a mean over more ranks than the vocabulary's. The replay of a CUDA
            graph exchanges nothing.
        statistics: also return, without a gradient, what these names say of each token, out of "top1" (with which comes
            whether that is the label: token accuracy), "rank", "sum_sq_probs" and "mean_logit": as in
            `linear_logprobs`, a pass over chunks of logits, for "rank" two. None asked for: at no cost.
        return_lse: also return the log-sum-exp [..., L - shift] (fp32, differentiable, 0 where ignored).

    Returns:
        The loss in fp32 (fp64 for fp64); (loss, lse) with ``return_lse``; with ``statistics`` these come last, as
        `LabelStatistics`.

    Raises:
        ValueError, TypeError: for arguments that do not fit, on every rank of the vocabulary group (there a
            ValueError), before anything is computed. On CUDA a label out of range is a device-side assertion, on every
            rank. A ``shard`` that is none, and what happens in backward, concern the rank alone.
    """
    if torch.compiler.is_compiling():
        return linear_cross_entropy_in_graph(hidden, weight, labels, bias, shard, return_lse, settings, adapter)
    return cross_entropy(hidden, weight, labels, bias, shard, return_lse, settings, adapter=adapter)
