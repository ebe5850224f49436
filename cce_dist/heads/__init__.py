"""Heads: finding a model's classifier, letting its call compute no logits, and storing its rows as a vocabulary shard.

In go a model's modules; out come a head that returns lazy logits, a `ShardOwner` that finds its rows and delivers their
gradient, and embeddings that look up in a shard. The frameworks' own modules are made of these.
"""
