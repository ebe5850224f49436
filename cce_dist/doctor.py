"""``python -m cce_dist.doctor [--config FILE]``, alone or under torchrun: the command of `cce_dist.tools.doctor`."""

import sys

from cce_dist.tools.doctor.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
