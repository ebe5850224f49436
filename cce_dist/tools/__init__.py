"""What a person asks before and after a run: ``doctor``, ``plan``, ``report``. Each is a command of `cce_dist.cli`."""
