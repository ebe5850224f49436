"""DeepSpeed: a section "cce_dist" in the config JSON gives the engine a vocabulary-parallel classifier.

    import cce_dist.deepspeed

    engine, optimizer, loader, scheduler = cce_dist.deepspeed.initialize(model=model, config="ds.json")

`initialize` takes what `deepspeed.initialize` takes. After `install()`, `deepspeed.initialize` itself honours the
section, so that accelerate, the Hugging Face Trainer and existing scripts need one line.

`engine` reads the section and gives the head an owner of its rows: that of `zero3`, out of `slices`, or one of
`sharded`, for a classifier that `experts` or `tensor_parallel` cuts. What is private to DeepSpeed `guard` checks.
"""

from cce_dist.missing import named

with named("cce_dist.deepspeed", "deepspeed", extra="deepspeed"):
    from cce_dist.deepspeed.engine import initialize, install, installed, uninstall

__all__ = ["initialize", "install", "installed", "uninstall"]
