"""``python -m cce_dist.train --config FILE [key=value ...]``, alone or under torchrun."""

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from cce_dist.cli import train

# torchrun then ends with the error of the rank that failed first.
sys.exit(record(train)(sys.argv[1:]))
