"""Pytrees: private to torch, imported here alone."""

import torch

try:
    from torch.utils._pytree import register_pytree_node, tree_map
except ImportError as error:
    raise RuntimeError(
        f"torch {torch.__version__} has no pytrees that cce_dist knows: {error}. Use torch 2.13, which it is tested on."
    ) from error

__all__ = ["register_pytree_node", "tree_map"]
