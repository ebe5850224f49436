"""Pipeline parallelism by torch.distributed.pipelining: the loss on the last stage, and its vocabulary sharded over the
last stages of several pipelines, against the same step in one process.

Shapes: b sequences of a batch, L tokens, D hidden, V vocabulary.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RankPool
from reference import grad_of, relative_error
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from cce_dist import VocabShard, linear_cross_entropy

MICRO_BATCHES, BATCH, LENGTH, HIDDEN, VOCAB = 2, 4, 6, 16, 101


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, ids_bL: Tensor) -> Tensor:
        return torch.tanh(self.up(self.embed(ids_bL)))


class Last(nn.Module):
    """Its head is among its parameters, which the schedule scales; its output are hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.head = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, hidden_bLD: Tensor) -> Tensor:
        return self.down(hidden_bLD)


def stages() -> tuple[First, Last]:
    torch.manual_seed(0)
    return First(), Last()


def batch(pipeline: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(10 + pipeline)
    ids_bL, labels_bL = (torch.randint(VOCAB, (BATCH, LENGTH), generator=draw) for _ in range(2))
    labels_bL[torch.rand(BATCH, LENGTH, generator=draw) < 0.2] = -100
    return ids_bL, labels_bL


def plain_gradients(pipelines: int) -> tuple[float, dict[str, Tensor]]:
    """Of the mean over micro-batches of the mean over the tokens that all pipelines have in it."""
    first, last = stages()
    total = torch.zeros(())
    for micro in range(MICRO_BATCHES):
        hidden, labels = [], []
        for pipeline in range(pipelines):
            ids_bL, labels_bL = (x.chunk(MICRO_BATCHES)[micro] for x in batch(pipeline))
            hidden.append(last(first(ids_bL)).flatten(0, 1))
            labels.append(labels_bL.flatten())
        total = total + F.cross_entropy(last.head(torch.cat(hidden)), torch.cat(labels)) / MICRO_BATCHES
    total.backward()
    return float(total), {name: grad_of(p) for name, p in nn.ModuleList([first, last]).named_parameters()}


def _step(pipelines: int) -> tuple[float, dict[str, Tensor]]:
    """Ranks 2p and 2p + 1 are pipeline p. The loss of a last stage, and the gradients of this rank's stage."""
    pipeline, stage = divmod(dist.get_rank(), 2)
    own_pipeline = [dist.new_group([2 * p, 2 * p + 1]) for p in range(pipelines)][pipeline]
    last_stages = dist.new_group([2 * p + 1 for p in range(pipelines)])
    first, last = stages()
    module: nn.Module = (first, last)[stage]
    shard: VocabShard | None = None
    if stage == 1 and pipelines > 1:
        shard = VocabShard.even(VOCAB, last_stages, last_stages)
        last.head.weight = nn.Parameter(last.head.weight.detach()[shard.start : shard.stop].clone())

    def loss(hidden_bLD: Tensor, labels_bL: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_bLD, last.head.weight, labels_bL, shard=shard, gradient="exact")

    schedule = ScheduleGPipe(
        PipelineStage(module, stage, 2, torch.device("cpu"), group=own_pipeline), MICRO_BATCHES, loss_fn=loss
    )
    ids_bL, labels_bL = batch(pipeline)
    losses: list[Tensor] = []
    if stage == 0:
        schedule.step(ids_bL)
    else:
        schedule.step(target=labels_bL, losses=losses)
    mean = float(torch.stack(losses).mean()) if losses else 0.0
    return mean, {name: grad_of(p) for name, p in module.named_parameters()}


@pytest.mark.parametrize("pipelines", [1, 2])
def test_a_step_of_a_pipeline_has_the_gradients_of_one_process(ranks: RankPool, pipelines: int) -> None:
    expected_loss, expected = plain_gradients(pipelines)
    got = ranks.run(2 * pipelines, _step, pipelines, timeout=120)
    for name, wanted in expected.items():
        stage, of_stage = name.split(".", 1)
        parts = [gradients[of_stage] for rank, (_, gradients) in enumerate(got) if rank % 2 == int(stage)]
        # Data parallelism averages what each pipeline has; of the rows of the head each has its own, of all tokens.
        whole = torch.cat(parts) / pipelines if of_stage == "head.weight" else torch.stack(parts).mean(0)
        assert relative_error(whole, wanted) < 1e-5, name
    for loss, _ in got[1::2]:
        assert loss == pytest.approx(expected_loss, rel=1e-6)
