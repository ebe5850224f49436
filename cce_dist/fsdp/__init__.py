"""FSDP2: each rank's rows of the classifier are its vocabulary shard, and no rank gathers them in training.

Stock FSDP2 all-gathers the classifier for the forward and again for the backward. Here its parameters stay DTensors,
sharded over FSDP's own mesh as FSDP shards them, but outside of FSDP's unshard and reduce cycle. Optimizers,
`clip_grad_norm_`, state dicts and checkpoints therefore see what they see with stock FSDP2. `shard_head` does this to a
model on its way to `fully_shard`, `adopt` to one that a framework has sharded already.

Which ranks share a loss, on a mesh of replicas x shards x tensor parallelism, of which only shards is needed:

- The rows are cut over tensor parallelism first, each part over the shards: the vocabulary group is shards x tp.
- Every data-parallel rank brings its own tokens, the ranks of a tensor-parallel group the same ones. With
  ``sequence_parallel`` each of those brings its slice of the sequence too. Context parallelism needs no word: its ranks
  are among those that FSDP shards over, each with its own tokens; as FSDP averages over them too, a loss that divides
  the sum over a slice by the tokens of the whole sequence is to be multiplied by the number of slices. Where a sequence
  is split, shift the labels before splitting it (``shift_labels`` of Hugging Face models), or each slice loses the
  label of its last token.
- ``vocab_parallel_size`` makes the group smaller. The parameters stay where they are; each rank gathers the rows at its
  place of the other vocabulary groups, and their gradients are reduce-scattered back.

The gradient that FSDP would have reduced arrives complete: summed over the tokens of the vocabulary group by the loss,
over the other vocabulary groups and the replicas of an HSDP mesh here, and divided by what FSDP divides by.

private, in_full ← owner ← sharding: `private` is what torch keeps to itself, `sharding` what a user calls.
"""

from cce_dist.fsdp.sharding import adopt, shard_head

__all__ = ["adopt", "shard_head"]
