"""The loss of a call from what its tokens' cross-entropies and log-sum-exps are: options, weights, reduction.

In: what `linear_cross_entropy` got. Out: what it returns.

Shapes: n tokens of this rank, D hidden, V local rows of the classifier.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cce_dist.loss.autograd import Call, LinearCrossEntropy
from cce_dist.loss.call import begin
from cce_dist.loss.capped_mean import CappedMeanLogit
from cce_dist.loss.reduction import reduced
from cce_dist.loss.settings import CallSettings
from cce_dist.loss.statistics import label_statistics
from cce_dist.loss.tokens import shifted, unflatten
from cce_dist.loss.weights import weights_of_labels
from cce_dist.shard import VocabShard
from cce_dist.shard.agreement import A_LOSS


@torch.compiler.disable(reason="the loss is an operator of the graph, but of DTensors, statistics, accumulators")
def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    shard: VocabShard | None,
    return_lse: bool,
    settings: Mapping[str, Any],
    counted: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """See `linear_cross_entropy`, whose arguments and errors these are; ``counted``: see `begin`."""
    inputs, labels = begin(hidden, weight, labels, bias, shard, settings, CallSettings, A_LOSS, counted, adapter)
    call, chosen = inputs.call, inputs.call.settings
    assert isinstance(chosen, CallSettings)
    nll_n, lse_n, _, smoothed_n = LinearCrossEntropy.apply(*inputs)
    if chosen.label_smoothing and chosen.softcap is not None:
        mean_logit_n, mean_weight = CappedMeanLogit.apply(*inputs[:4])
        smoothed_n = mean_weight * lse_n - mean_logit_n
    class_n = None
    if chosen.class_weights is not None:
        class_n = weights_of_labels(chosen.class_weights, call, nll_n.dtype)
    loss_n = _with_options(nll_n, lse_n, smoothed_n, class_n, call.labels_n, chosen)
    loss = _reduce(loss_n, class_n, labels, call, chosen)

    def shaped(values_n: Tensor) -> Tensor:
        return unflatten(values_n, labels, chosen.shift)

    lse = (shaped(lse_n),) if return_lse else ()
    statistics = (label_statistics(inputs, shaped),) if chosen.statistics else ()
    return (loss, *lse, *statistics) if lse or statistics else loss


def _with_options(
    nll_n: Tensor,
    lse_n: Tensor,
    smoothed_n: Tensor | None,
    class_n: Tensor | None,
    labels_n: Tensor,
    settings: CallSettings,
) -> Tensor:
    """The loss of each token, 0 where ignored; ``class_n``: the weight of its label; ``smoothed_n``: the mean loss over
    all labels, with their weights."""
    loss_n = nll_n if class_n is None else nll_n * class_n
    if smoothed_n is not None:
        loss_n = torch.lerp(loss_n, smoothed_n, settings.label_smoothing)
    if settings.z_loss:
        loss_n = loss_n + settings.z_loss * lse_n.square()
    if settings.token_weights is not None:
        weights_n = shifted(settings.token_weights, settings.shift, 0).reshape(-1)
        loss_n = loss_n * weights_n.to(loss_n.dtype).masked_fill(labels_n == settings.ignore_index, 0.0)
    return loss_n


def _reduce(loss_n: Tensor, class_n: Tensor | None, labels: Tensor, call: Call, settings: CallSettings) -> Tensor:
    if settings.reduction == "none":
        return unflatten(loss_n, labels, settings.shift)
    counted_n = call.labels_n != settings.ignore_index if class_n is None else class_n
    return reduced(loss_n, counted_n, settings.reduction, settings.num_valid_tokens, call.shard)
