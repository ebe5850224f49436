"""torchtitan's Llama, sharded by torchtitan's own function, trains with `adopt` as without.

Skipped where torchtitan is not installed; docs/torchtitan.md says with which version it was run.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch.distributed.fsdp import FSDPModule

from cce_dist.config import CCEConfig
from cce_dist.heads.lazy import is_lazy

PAGE = (Path(__file__).parent.parent / "docs/torchtitan.md").read_text()
(EXAMPLE,) = re.findall(r"<!-- test: torchtitan -->\n```python\n(.*?)```", PAGE, re.S)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP": (2, {}),
    "FSDP, loss in chunks": (2, {"chunked": True}),
    "FSDP, tied": (2, {"tied": True}),
    "HSDP": (2, {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}),
    "FSDP x TP": (4, {"tensor_parallel_degree": 2}),
    "FSDP x TP, whole sequences": (4, {"tensor_parallel_degree": 2, "enable_sequence_parallel": False}),
}


def _spec(parallelism: Any, ours: bool, tied: bool) -> Any:
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.param_init import skip_param_init
    from torchtitan.models.llama3 import model_registry, parallelize_llama
    from torchtitan.models.llama3.sharding import set_llama3_sharding_config

    spec = model_registry("debugmodel")
    for layer in spec.model.layers:  # FlexAttention would be compiled
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    spec.model.layers = spec.model.layers[:2]
    if tied:
        spec.model.enable_weight_tying = True
        spec.model.tok_embeddings.param_init = {"weight": skip_param_init}
    set_llama3_sharding_config(spec.model, enable_sp=parallelism.enable_sequence_parallel)
    if not ours:
        return spec
    config = CCEConfig(gradient="exact", materialize="warn" if tied else "raise")
    code = EXAMPLE.replace("adopt(model)", "adopt(model, config=config)")
    names = {"parallelize_llama": parallelize_llama, "dataclasses": dataclasses, "spec": spec, "config": config}
    exec(compile(code, "example torchtitan", "exec"), names)
    return names["spec"]


def _log(ours: bool, chunked: bool = False, tied: bool = False, **degrees: Any) -> list[tuple[float, float]]:
    """(loss over all tokens, gradient norm) of each step, as the Trainer of torchtitan makes one."""
    import torchtitan.distributed.parallel_dims
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims, utils

    torchtitan.distributed.parallel_dims.device_type = "cpu"
    utils.set_spmd_backend("partial_dtensor")
    torch.manual_seed(0)
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor", **degrees)
    dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    spec = _spec(parallelism, ours, tied)
    with torch.device("meta"):
        model = spec.model.build()
    model = spec.parallelize_fn(
        model, parallel_dims=dims, training=TrainingConfig(mixed_precision_param="float32"), parallelism=parallelism,
        compile_config=CompileConfig(), ac_config=None, dump_folder="",
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_states()
    assert is_lazy(model.lm_head) == ours
    compute_loss = CrossEntropyLoss.Config().build()
    if chunked:
        compute_loss = ChunkedLossWrapper.Config(num_chunks=2, loss_fn=CrossEntropyLoss.Config()).build()
        compute_loss.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    copies, log = dims.tp, []
    for step in range(3):
        numbers = torch.Generator().manual_seed(10 * step + dist.get_rank() // copies)
        ids = torch.randint(2048, (2, 17), generator=numbers)
        logits = model(ids[:, :-1], positions=torch.arange(16).expand(2, 16))
        count = torch.tensor(32 * dist.get_world_size() // copies)
        loss, _ = compute_loss(logits, ids[:, 1:], count)
        loss.backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / copies
        dist.all_reduce(total)
        log.append((total.item(), norm.full_tensor().item()))
    log.append((torch.rand(()).item(), 0.0))  # the number that comes next shows that none were taken
    return log


def _logs(settings: dict[str, Any]) -> list[list[tuple[float, float]]]:
    return [_log(ours, **settings) for ours in (False, True)]


@pytest.mark.filterwarnings("ignore::cce_dist.heads.lazy.MaterializedLogitsWarning")
@pytest.mark.parametrize("name", CASES)
def test_three_steps_have_the_losses_and_gradient_norms_of_stock(ranks: RankPool, name: str) -> None:
    pytest.importorskip("torchtitan.models.llama3", exc_type=ImportError)
    world, settings = CASES[name]
    try:
        by_rank = ranks.run(world, _logs, settings, timeout=120)
    finally:
        ranks.close()  # torchtitan keeps state in the process
    for stock, ours in by_rank:
        for x, y in zip(ours, stock, strict=True):
            assert x == pytest.approx(y, rel=1e-5)
