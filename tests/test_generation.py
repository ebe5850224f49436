"""generate() of a transformers model whose head the ranks share: the tokens of the plain model, without logits.

A rank's sequences end before those of others, and it goes on with them. Shapes: V rows of the whole classifier.
"""

import copy
from collections.abc import Iterator
from typing import Any

import fsdp_runs
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

VOCAB = fsdp_runs.Case.vocab
FSDP2 = {
    "FSDP2": fsdp_runs.Case(model="llama"),
    "HSDP, tied": fsdp_runs.Case(model="llama", tied=True, mesh=(2, 2), entry="adopt, tied group"),
    "FSDP2, rows held by pairs": fsdp_runs.Case(model="llama", entry="adopt", vocab_parallel=2),
}


class _Products(TorchDispatchMode):
    """Counts products with all rows of a classifier."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += isinstance(result, Tensor) and "mm" in str(function) and result.shape[-1] == VOCAB
        return result


def _prompt(rank: int) -> Tensor:
    return torch.randint(3, VOCAB, (2, 3 + rank), generator=torch.Generator().manual_seed(rank))


def _scaled(model: Any) -> Any:
    """So that another token is next at each step, and the softmax is no uniform one."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5 if model.config.tie_word_embeddings else 20)
    return model


def _generate(model: Any, ids: Tensor, **settings: Any) -> tuple[Tensor, int]:
    """What is generated, and how often all logits were computed for it."""
    with _Products() as products:
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "synced_gpus": dist.is_initialized()}
        tokens = model.generate(ids, **{"max_new_tokens": 5, "do_sample": False, **given, **settings})
    return tokens[:, ids.shape[1] :], products.count


def _greedy(model: Any, plain: Any) -> None:
    rank = dist.get_rank()
    unlimited = _generate(plain, _prompt(0), synced_gpus=False)[0]
    # The first rank is at its end after two steps, wherever its sequences then agree; the others go on.
    ends = {"eos_token_id": sorted(set(unlimited[:, 1].tolist()))}
    wanted, _ = _generate(plain, _prompt(rank), synced_gpus=False, **ends)
    got, products = _generate(model, _prompt(rank), **ends)
    assert torch.equal(got, wanted) and products == 0
    lengths: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lengths, got.shape[1])
    assert lengths[0] <= 2 < max(lengths)


def _sampled(model: Any, plain: Any) -> None:
    """Draws of one step, each rank from a prompt of its own; and those among the most likely, which need logits."""
    draws, ids = 3000, _prompt(dist.get_rank())[:1]
    settings = {"max_new_tokens": 1, "do_sample": True, "temperature": 0.7}
    got, products = _generate(model, ids.expand(draws, -1), top_k=0, **settings)
    with torch.no_grad():
        p = (plain(ids).logits[0, -1].double() / 0.7).softmax(-1)
    expected, counts = p * draws, torch.bincount(got[:, 0], minlength=VOCAB).double()
    seen = expected > 5
    chi_square = ((counts - expected).square() / expected)[seen].sum()
    assert products == 0
    assert seen.sum() > 5, f"too sure: {p.topk(5)}"
    assert chi_square < 2 * seen.sum() + 30
    assert counts[p < 1e-7].sum() == 0
    among, products = _generate(model, ids.expand(8, -1), top_k=2, **settings)
    assert products > 0 and set(among.flatten().tolist()) <= set(p.topk(2).indices.tolist())
    scores = _generate_scores(model, ids)
    assert products > 0 and torch.allclose(scores, _generate_scores(plain, ids), atol=1e-4)


def _generate_scores(model: Any, ids: Tensor) -> Tensor:
    settings: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, **settings)
    return got.logits[0]  # type: ignore[no-any-return]


def _under_fsdp2(case: fsdp_runs.Case) -> None:
    model = _scaled(fsdp_runs.build(case))
    plain = copy.deepcopy(model).eval()
    fsdp_runs.shard_model(model, case, fsdp_runs.mesh_of(case))
    model.eval()
    _greedy(model, plain)
    _sampled(model, plain)


@pytest.mark.parametrize("name", ["FSDP2", *(pytest.param(name, marks=pytest.mark.full) for name in list(FSDP2)[1:])])
def test_under_fsdp2_no_rank_computes_logits(ranks: RankPool, name: str) -> None:
    ranks.run(2 if name == "FSDP2" else 4, _under_fsdp2, FSDP2[name], timeout=fsdp_runs.SLOW_START)


def _under_deepspeed(stage: int) -> None:
    import deepspeed_runs

    section = {**deepspeed_runs.EXACT, **({} if stage == 3 else {"vocab_parallel_size": 2})}
    case = deepspeed_runs.Case(vocab_size=VOCAB, stage=stage, section=section)
    plain = _scaled(deepspeed_runs.make_model(case).lm).eval()
    model = deepspeed_runs.make_engine(case, prepare=lambda model: _scaled(model.lm)).module.lm
    model.eval()
    _greedy(model, plain)
    _sampled(model, plain)


@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=pytest.mark.full)])
def test_under_deepspeed_no_rank_computes_logits(ranks: RankPool, stage: int) -> None:
    pytest.importorskip("deepspeed")
    ranks.run(2, _under_deepspeed, stage, timeout=200)


@pytest.fixture(scope="module", autouse=True)
def _leave_no_deepspeed_behind(ranks: RankPool) -> Iterator[None]:
    """ZeRO-3 patches torch in its process."""
    yield
    ranks.close()
