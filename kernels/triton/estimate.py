"""Estimate: a summary from 8-bit products (see quantise.py) at twice the rate, good enough to find what matters.

In: `Logits`. Out: an `Estimate`, whose large pairs `refine` then computes in full. The kernel is that of summarise.py,
over a chunk of the classifier at a time, so that its copy is small. It leaves out row blocks of which `refine` would
compute most tiles.

Shapes: N tokens, D hidden, V local rows, v rows of a chunk, T tiles, S splits.
"""

import torch

from ..problem import Estimate, Logits
from .quantise import Common, InEightBits, moments, quantise_hidden, quantise_weight, storage_dtype
from .summarise import begin_chunks, each_chunk, finish, launch
from .tuning import tuning_for

_COPY_BYTES = 128 << 20  # of the classifier's 8-bit copy: enough columns to fill the GPU several times over


def estimate(logits: Logits) -> Estimate:
    """`summarise` with tiles, its logits off by about 4 % of their standard deviation, and sums of their exponentials
    right in the mean; target logits in full."""
    hidden_ND, weight_VD = logits.hidden_ND, logits.weight_VD
    tuning = tuning_for(hidden_ND, weight_VD).for_8_bits()
    chunks = begin_chunks(logits, tuning, weight_VD.shape[1], _COPY_BYTES, want_tiles=True)
    has_softcap = logits.softcap is not None
    of_weight, of_hidden = moments(weight_VD), moments(hidden_ND, logits.token_N, logits.n_valid)
    form = (logits.logit_scale, has_softcap)
    hidden = quantise_hidden(hidden_ND, of_hidden, of_weight, logits.token_N, logits.n_valid, *form)
    common = Common(of_weight.mean_D, of_hidden.mean_D, hidden.column_variance)
    largest_norm = torch.zeros(1, dtype=torch.float32, device=hidden_ND.device)
    copy_vD = torch.empty(
        (chunks.rows, weight_VD.shape[1]),
        dtype=storage_dtype(hidden_ND),
        device=hidden_ND.device,
    )
    for part, partials, lse_tN in each_chunk(logits, chunks):
        memory_vD = copy_vD[: part.weight_VD.shape[0]]
        weight = quantise_weight(part.weight_VD, part.bias_V, part.frequent_V, common, *form, largest_norm, memory_vD)
        launch(
            part._replace(
                hidden_ND=hidden.rows_ND,
                weight_VD=weight.rows_VD,
                bias_V=None,  # in the offsets
            ),
            InEightBits(
                hidden.scale_N,
                weight.scale_V,
                hidden.offset_N,
                weight.offset_V,
                hidden.variance_N,
                hidden.hopeless_N,
                largest_norm,
            ),
            partials,
            lse_tN,
            chunks.blocks_per_split,
            tuning,
        )
    return Estimate(finish(logits, chunks.partials, chunks.tiles), hidden.margin(largest_norm))
