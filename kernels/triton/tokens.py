"""Numbers of tokens, before and after what computes logits: the valid ones to the front, their losses back to where
they were, and the outputs' gradients as the kernels take them. One launch each, where torch takes ten to twenty: what
a launch costs the host shows wherever the GPU waits for it.

Grid: one program that walks over the tokens, where each token's number depends on all others (two walks over 8 to 20
bytes a token: 10 µs for 8192, which the GPU spends once a call); of the losses, a program a block.

Shapes: N tokens.
"""

import torch
import triton
import triton.language as tl

from ..problem import Normaliser, Order, Ordered, OutputGradients, Upstream, largest_scale
from .operands import LAUNCH

_WALK, _WALK_WARPS = 4096, 16
_BLOCK = 1024


@triton.jit
def _order_kernel(order, target_N, legal_ptr, labels_N, column_N, ignore_index, vocab_size, N, BLOCK: tl.constexpr):
    count = tl.zeros((), tl.int32)
    illegal = tl.zeros((), tl.int32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        label = tl.load(labels_N + n, mask=n < N, other=0)
        valid = (n < N) & (label != ignore_index)
        count += tl.sum(valid.to(tl.int32))
        illegal += tl.sum((valid & ((label < 0) | (label >= vocab_size))).to(tl.int32))
    tl.store(order.n_valid, count)
    tl.store(legal_ptr, (illegal == 0).to(tl.int32))
    before = tl.zeros((), tl.int32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        label = tl.load(labels_N + n, mask=n < N, other=0)
        column = tl.load(column_N + n, mask=n < N, other=-1)
        valid = (n < N) & (label != ignore_index)
        up_to = before + tl.cumsum(valid.to(tl.int32), 0)
        place = tl.where(valid, up_to - 1, count + n - up_to)
        tl.store(order.place_N + n, place, mask=n < N)
        tl.store(order.token_N + place, n, mask=n < N)
        tl.store(target_N + place, tl.where(valid, column, -1).to(tl.int32), mask=n < N)
        before += tl.sum(valid.to(tl.int32))


def valid_first(labels_N: torch.Tensor, column_N: torch.Tensor, ignore_index: int, vocab_size: int) -> Ordered:
    """See `torch_backend.valid_first`."""
    tokens, labels_N, column_N = labels_N.shape[0], labels_N.contiguous(), column_N.contiguous()
    token_N, place_N, target_N = (labels_N.new_empty(tokens, dtype=torch.int32) for _ in range(3))
    order = Order(token_N, place_N, labels_N.new_empty(1, dtype=torch.int32))
    legal = labels_N.new_empty((), dtype=torch.int32)
    _order_kernel[(1,)](
        order,
        target_N,
        legal,
        labels_N,
        column_N,
        ignore_index,
        vocab_size,
        tokens,
        BLOCK=_WALK,
        num_warps=_WALK_WARPS,
        **LAUNCH,
    )
    return Ordered(order, target_N, legal)


@triton.jit
def _losses_kernel(nll_N, lse_N, max_N, log_sum_N, target_logit_N, order, unit, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(order.place_N + n, mask=n < N, other=0)
    valid = (n < N) & (place < tl.load(order.n_valid))
    highest = tl.load(max_N + place, mask=valid, other=0.0) * unit
    log_sum = tl.load(log_sum_N + place, mask=valid, other=0.0) * unit
    # By way of the max, which is nearer to both.
    tl.store(nll_N + n, (highest - tl.load(target_logit_N + place, mask=valid, other=0.0)) + log_sum, mask=n < N)
    tl.store(lse_N + n, highest + log_sum, mask=n < N)


def losses(normaliser: Normaliser, target_logit_N: torch.Tensor, order: Order) -> tuple[torch.Tensor, torch.Tensor]:
    """See `torch_backend.losses`."""
    # Apart, for callers that write to one of them.
    nll_N, lse_N = (torch.empty_like(normaliser.max_N) for _ in range(2))
    tokens = nll_N.shape[0]
    if tokens:
        _losses_kernel[(triton.cdiv(tokens, _BLOCK),)](
            nll_N,
            lse_N,
            normaliser.max_N,
            normaliser.log_sum_N,
            target_logit_N,
            order,
            normaliser.unit,
            tokens,
            BLOCK=_BLOCK,
            **LAUNCH,
        )
    return nll_N, lse_N


@triton.jit
def _grad_of(grad_N, stride, token, valid):
    grad = tl.where(valid, 0.0, 0.0)
    if grad_N is not None:
        grad = tl.load(grad_N + token.to(tl.int64) * stride, mask=valid, other=0.0).to(tl.float32)
    return grad


@triton.jit
def _parts(nll_N, nll_stride, lse_N, lse_stride, of_entropy_N, entropy_stride, order, entropy_N, inverse_N, n, N):
    """Of tokens n of the order: what the softmax, the target and the softmax's logarithm are multiplied with."""
    valid = (n < N) & (n < tl.load(order.n_valid))
    token = tl.load(order.token_N + n, mask=valid, other=0)
    target = _grad_of(nll_N, nll_stride, token, valid)
    softmax = target + _grad_of(lse_N, lse_stride, token, valid)
    log = tl.where(valid, 0.0, 0.0)
    if entropy_N is not None:
        log -= _grad_of(of_entropy_N, entropy_stride, token, valid)
        softmax += log * tl.load(entropy_N + n, mask=valid, other=0.0)
    if inverse_N is not None:
        inverse = tl.load(inverse_N + n, mask=valid, other=0.0)
        target, softmax, log = target * inverse, softmax * inverse, log * inverse
    return softmax, target, log


@triton.jit
def _finite_abs(x):
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)  # also of NaN


@triton.jit
def _upstream_kernel(
    softmax_N,
    target_N,
    log_N,
    scale_ptr,
    nll_N,
    nll_stride,
    lse_N,
    lse_stride,
    of_entropy_N,
    entropy_stride,
    order,
    entropy_N,
    inverse_N,
    N,
    LARGEST_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        softmax, target, log = _parts(
            nll_N, nll_stride, lse_N, lse_stride, of_entropy_N, entropy_stride, order, entropy_N, inverse_N, n, N
        )
        largest = tl.maximum(largest, tl.maximum(_finite_abs(softmax), _finite_abs(target)))
        largest = tl.maximum(largest, _finite_abs(log))
    # The next power of two, by its exponent's bits; 1 for 0.
    size = tl.max(largest, 0)
    exponent = tl.minimum((size.to(tl.int32, bitcast=True) >> 23) + 1, 127 + LARGEST_SCALE)
    exponent = tl.where(size == 0.0, 127, exponent)
    tl.store(scale_ptr, (exponent << 23).to(tl.float32, bitcast=True))
    # Its inverse in two, since that of 2^127 is no normal number.
    half = (exponent - 127) >> 1
    inverse = ((127 - half) << 23).to(tl.float32, bitcast=True)
    other = ((254 - exponent + half) << 23).to(tl.float32, bitcast=True)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        softmax, target, log = _parts(
            nll_N, nll_stride, lse_N, lse_stride, of_entropy_N, entropy_stride, order, entropy_N, inverse_N, n, N
        )
        tl.store(softmax_N + n, softmax * inverse * other, mask=n < N)
        tl.store(target_N + n, target * inverse * other, mask=n < N)
        if log_N is not None:
            tl.store(log_N + n, log * inverse * other, mask=n < N)


def upstream(
    gradients: OutputGradients,
    order: Order,
    hidden_dtype: torch.dtype,
    entropy_N: torch.Tensor | None = None,
    inverse_temperature_N: torch.Tensor | None = None,
) -> Upstream:
    """See `torch_backend.upstream`; in fp32."""
    tokens = order.token_N.shape[0]
    new = order.token_N.new_empty
    softmax_N, target_N = (new(tokens, dtype=torch.float32) for _ in range(2))
    log_N = None if entropy_N is None else new(tokens, dtype=torch.float32)
    scale = new((), dtype=torch.float32)
    strided = [x for grad_N in gradients for x in ((None, 0) if grad_N is None else (grad_N, grad_N.stride(0)))]
    _upstream_kernel[(1,)](
        softmax_N,
        target_N,
        log_N,
        scale,
        *strided,
        order,
        entropy_N,
        inverse_temperature_N,
        tokens,
        LARGEST_SCALE=largest_scale(hidden_dtype, torch.float32),
        BLOCK=_WALK,
        num_warps=_WALK_WARPS,
        **LAUNCH,
    )
    return Upstream(softmax_N, target_N, scale, log_N)
