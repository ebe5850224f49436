"""A small trainer of causal language models: the recipe that shows cce_dist at work, and that quickstart runs.

Read it in this order: `settings` (what can be set), `data` (text to batches), `model`, `engines` (DeepSpeed, FSDP2, one
process), `loop` (the optimizer steps), `checkpoint`, `metrics`, `head_memory`. For what can go wrong there are
`together` (errors reach every rank), `signals`, `lock` (a folder, one run) and `restricted` (checkpoints of strangers).
"""
