"""The public function for log-probabilities of tokens, their entropy, and what is logged beside them.

The path of a token is that of the loss (`api`): the log-probability is the loss with its sign changed, the entropy
comes from the same pass. Forward takes the full precision of the hidden states, never 8 bits, so that values with and
without a gradient have the same bits; without a gradient it keeps nothing.

Collectives are those of the loss (see `api`), the packed SUM with one number a token more for the entropy, and so the
all-gather of upstream gradients in backward, where the entropy has one; and with one
temperature for each token an all-gather of those, or, where ranks bring the same tokens, two numbers more in the MAX.
Statistics gather the hidden states again, and make a MAX, a SUM and a MIN of a few numbers a token; "rank" two SUMs
more. With ``exact_sums`` the SUM is of int64, [3, N]; where shards cut tiles an all-reduce of their rows comes first
(see `cce_dist.loss.exact_sums`).

Shapes: L tokens of a sequence, D hidden, V local rows of the classifier, n tokens of this rank.
"""

from typing import Any, NamedTuple

from torch import Tensor

from cce_dist.loss.autograd import LinearCrossEntropy
from cce_dist.loss.call import begin
from cce_dist.loss.settings import LogprobSettings, takes_settings
from cce_dist.loss.statistics import label_statistics
from cce_dist.loss.tokens import unflatten
from cce_dist.shard import VocabShard


class TokenLogprobs(NamedTuple):
    """Of each token, [..., L - shift]; in fp32 (fp64 for fp64), 0 where the label is ignored.

    With p the softmax of the token's logits z over the whole vocabulary, after scale, softcap and temperature:

    Attributes:
        logprob: log p of the label; differentiable.
        lse: log Σ exp z; differentiable.
        entropy: −Σ p log p, in nats; differentiable with ``entropy=True``. None unless it is asked for.
        top1: int64, the most likely id, the first of several; −1 where ignored, or where logits are no numbers. This
            and what follows are None unless they are in ``statistics``, and have no gradient.
        is_top1: bool, whether that is the label; given with ``top1``.
        rank: int64, how many ids are more likely than the label; −1 as for ``top1``.
        sum_sq_probs: Σ p².
        mean_logit: Σ z / vocab_size.
    """

    logprob: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    top1: Tensor | None = None
    is_top1: Tensor | None = None
    rank: Tensor | None = None
    sum_sq_probs: Tensor | None = None
    mean_logit: Tensor | None = None


@takes_settings(LogprobSettings)
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shard: VocabShard | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    **settings: Any,
) -> TokenLogprobs:
    """log softmax(z / temperature) of labels, without forming z = softcap·tanh(logit_scale·(hidden · weightᵀ + bias) /
    softcap).

    What is not asked for costs nothing. Every rank of ``shard.vocab_group`` must make the call in every step, also with
    no token. Settings that `linear_cross_entropy` has too mean the same here, and so do its arguments; a gradient mode
    counts where something requires a gradient.

    Args:
        hidden: [..., D].
        weight: [V, D], this rank's rows.
        labels: [...], global ids, or the ignored one.
        bias: [V], this rank's.
        shard: which global rows these are, and the process groups. None: all rows, in this process alone.
        adapter: (a [..., R], B [V, R]), see `linear_cross_entropy`. Not with ``exact_sums``.
        ignore_index, shift, softcap, logit_scale, tail, seed, backend, fp32_head, frequent_rows, workspace_mb,
            max_tokens, agreement: see `linear_cross_entropy`.
        gradient: "exact", "unbiased" or "filtered", see there; of the entropy too. "filtered" is meant for losses: the
            entropy gets much of its gradient from what it leaves to a mean.
        filter_eps: see there; None: with ``entropy=True`` half of what the loss takes.
        first_pass: "auto" or "full": there is none in 8 bits.
        temperature: what the logits are divided by, after the softcap: a positive float, or a tensor of them that
            broadcasts to labels, one for each position of hidden. It gets no gradient. A float is part of what ranks
            agree on: one that changes with each step is better a tensor.
        entropy: True: the entropy of each token's distribution is wanted. "value": without a gradient, as for a log.
        exact_sums: the same bits of ``logprob`` and ``lse`` for a token whatever the other tokens of the call, its
            place among them, and the number of ranks and their layout, on one kind of device and of software: tiles of
            128 rows of the whole vocabulary are summed apart, and added in whole numbers. ``logprob`` is never above 0.
            This summation adds at most 1e-5 to what logits in fp32 are off. Of a (token, tile) 8 bytes are kept in
            forward; where the gradient is not "exact" the filter's pass comes on top; there are no frequent rows. The
            gradient's own bits depend on the batch as before. Not with ``entropy`` or ``statistics``.
        statistics: what else, out of "top1", "rank", "sum_sq_probs" and "mean_logit": a pass over chunks of logits, for
            "rank" two, without a gradient. Its products are the library's, whose last bits may differ from those of the
            log-probabilities.

    Returns:
        `TokenLogprobs`.

    Raises:
        ValueError, TypeError: as `linear_cross_entropy`, on every rank. On CUDA a temperature that is not positive is a
            device-side assertion.
    """
    inputs, labels = begin(
        hidden, weight, labels, bias, shard, settings, LogprobSettings, "log-probabilities of tokens", None, adapter
    )
    nll_n, lse_n, entropy_n, _ = LinearCrossEntropy.apply(*inputs)
    checked = inputs.call.settings
    assert isinstance(checked, LogprobSettings)

    def shaped(values_n: Tensor) -> Tensor:
        return unflatten(values_n, labels, checked.shift)

    found = TokenLogprobs(shaped(-nll_n), shaped(lse_n), None if entropy_n is None else shaped(entropy_n))
    return found._replace(**label_statistics(inputs, shaped)._asdict()) if checked.statistics else found
