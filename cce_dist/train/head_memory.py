"""The memory of the head, by the same rule for every head: the most bytes alive at once in storages that were allocated
between the model's last hidden states and their gradient.

That span holds all of the head and the loss, forward and backward, and nothing else: logits, gathered weights, gathered
hidden states, gradients, workspaces. Storages are counted as long as they live, at the size they have, so memory that
FSDP and ZeRO release in place is counted only while it is held.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeadMemory(TorchDispatchMode):
    """Within it, one forward and backward of a Hugging Face causal language model is measured: ``peak`` in bytes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._body: nn.Module = model.base_model  # type: ignore[assignment]
        self._inside = False
        self._allocated: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __enter__(self) -> "HeadMemory":
        self._hook = self._body.register_forward_hook(self._body_is_done)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def _body_is_done(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._inside = True
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        hidden.register_hook(self._head_is_done)

    def _head_is_done(self, _grad: Tensor) -> None:
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with the local tensors
        before = set(_storages((args, kwargs))) if self._inside else set()
        result = func(*args, **(kwargs or {}))
        if self._inside:
            self._allocated.update(storage for storage in _storages(result) if storage not in before)
            self.peak = max(self.peak, sum(storage.nbytes() for storage in self._allocated))
        return result


def _storages(tree: Any) -> Iterable[torch.UntypedStorage]:
    """The storages behind a tree of tensors; those of meta tensors are no memory."""
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_meta)
