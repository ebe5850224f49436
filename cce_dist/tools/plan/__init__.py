"""``cce-dist plan``: bytes and milliseconds of the head on each rank, for each way to spread it, before a run.

An analytic model of few terms, whose formulas and assumptions are in docs/plan.md. What one GPU takes is fitted to the
measurements in benchmarks/results. Links are not measured: their bandwidths are those of datasheets.

Read it in this order: `job` (what is planned), `calibration` (one GPU's times), `memory`, `links`, `spread` (every way
to spread the head, and which one is best), `table` and `plot`.

Letters: N tokens that a rank's loss works on, n of them its own, V vocabulary, v rows that it works on, D hidden, W
ranks, g ranks that share one copy of the classifier (vocab_parallel_size). Times are in ms, sizes in bytes.
"""
