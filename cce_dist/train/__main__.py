"""``python -m cce_dist.train --config FILE [key=value ...]``, alone or under torchrun."""

import sys

from cce_dist.cli import train

sys.exit(train(sys.argv[1:]))
