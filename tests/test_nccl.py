"""What NCCL does otherwise than gloo, on as many GPUs as ranks: groups that move no CPU tensors, streams of their own,
and the end of ranks that wait for one that is gone.

That the loss, FSDP2 and DeepSpeed compute the right thing with NCCL is what their own tests show, whose ranks have a
GPU each where there are as many (`ranks.py`).
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import Command
from runs import RENDEZVOUS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

HEAD = """
import json, os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from cce_dist import VocabShard, linear_cross_entropy

rank = int(os.environ["RANK"])
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group(sys.argv[1], timeout=timedelta(seconds=20))
WORLD = dist.group.WORLD
TOKENS, VOCAB, DIM = 300, 5000, 128
draw = torch.Generator().manual_seed(0)
hidden = torch.randn(2, TOKENS, DIM, generator=draw).cuda()
weight = (torch.randn(VOCAB, DIM, generator=draw) / 4).cuda()
labels = torch.randint(VOCAB, (2, TOKENS), generator=draw).cuda()


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
"""

LOSSES = """
def off(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


results = {}
for layout in ("same tokens", "own tokens"):
    shard = VocabShard.even(VOCAB, WORLD, WORLD if layout == "own tokens" else None)
    part = rank if layout == "own tokens" else 0
    rows = slice(shard.start, shard.stop)
    e, c = hidden[part].clone().requires_grad_(), weight[rows].clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for name, stream in {"": torch.cuda.current_stream(), ", another stream": side}.items():
        with torch.cuda.stream(stream):
            loss = linear_cross_entropy(e, c, labels[part], shard=shard, gradient="exact")
            grads = torch.autograd.grad(loss, (e, c))
        torch.cuda.current_stream().wait_stream(side)
        parts = (0, 1) if layout == "own tokens" else (0,)
        E, C = hidden[list(parts)].double().requires_grad_(), weight.double().requires_grad_()
        true = torch.nn.functional.cross_entropy((E @ C.T).flatten(0, 1), labels[list(parts)].flatten())
        dE, dC = torch.autograd.grad(true, (E, C))
        # The mean over both ranks' tokens; a rank's own gradient is that of the sum of the ranks' means.
        results[layout + name] = [
            abs(float(loss) - float(true)),
            off(grads[0], dE[rank if layout == "own tokens" else 0] * len(parts)),
            off(grads[1], dC[rows] * len(parts)),
        ]
shard = VocabShard.even(VOCAB, WORLD)
wrong = hidden[0, :, :64] if rank == 1 else hidden[0]
own = weight[shard.start : shard.stop]
results["a fault"] = error_of(lambda: linear_cross_entropy(wrong, own, labels[0], shard=shard))
print(json.dumps({"rank": rank, **results}), flush=True)
dist.destroy_process_group()
"""

GONE = """
shard = VocabShard.even(VOCAB, WORLD)
e, c = hidden[0].clone().requires_grad_(), weight[shard.start : shard.stop].clone().requires_grad_()
for step in range(1000):
    if (step, rank) == (3, 1):
        print("rank 1 goes", flush=True)
        HOW
    linear_cross_entropy(e, c, labels[0], shard=shard).backward()
    torch.cuda.synchronize()
"""


def _command(script: str, backend: str, folder: Path) -> Command:
    path = folder / "script.py"
    path.write_text(HEAD + script)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
    arguments = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *RENDEZVOUS, path, backend]
    return Command(arguments, folder / "log", CUDA_VISIBLE_DEVICES=visible)


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_losses_gradients_and_faults_with_groups_of(backend: str, tmp_path: Path) -> None:
    with _command(LOSSES, backend, tmp_path) as command:
        assert command.wait(180) == 0, command.said
        said: list[dict[str, Any]] = [json.loads(line) for line in command.said.splitlines() if line.startswith("{")]
    assert sorted(results.pop("rank") for results in said) == [0, 1]
    for results in said:
        fault = results.pop("a fault")
        assert "rank 1" in fault and "hidden" in fault
        assert len(results) == 4
        for name, (loss, hidden, weight) in results.items():
            assert loss < 1e-5 and hidden < 1e-5 and weight < 1e-5, f"{name}: {loss:.1e}, {hidden:.1e}, {weight:.1e}"


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", f"exitcode  : {-signal.SIGKILL}"),
        ("raise RuntimeError('out of data')", "out of data"),
        ("time.sleep(1000)", "rank 1"),
    ],
    ids=["killed", "raises", "hangs"],
)
def test_a_rank_that_is_gone_ends_the_others_and_is_named(how: str, text: str, backend: str, tmp_path: Path) -> None:
    """By torchrun where its process has ended; by the timeout, 20 s here, of the call that waits for it."""
    with _command(GONE.replace("HOW", how), backend, tmp_path) as command:
        assert command.wait(120) != 0
        assert "rank 1 goes" in command.said
        assert text in command.said.split("rank 1 goes")[1], command.said
        assert command.alive() == []
