"""``cce-dist doctor``: is everything in place for a run? Asked on every rank, before it starts.

Read it in this order: `command` (the ranks of this machine, and the stages on one rank), `reports` (what a rank found),
the three stages `machine` (with `config`), `groups` and `loss`, `council` (the ranks' reports become one verdict).
"""
