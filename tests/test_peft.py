"""PEFT: adapters in the body train as they do in the stock model; one on the output layer is honoured or refused."""

import copy
from collections.abc import Callable
from typing import Any

import architectures
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from cce_dist import CCEConfig
from cce_dist.heads.find import output_layer
from cce_dist.heads.lazy import LazyLogits, MaterializedLogitsWarning, is_lazy
from cce_dist.transformers import patch, unpatch

peft = pytest.importorskip("peft")
EXACT = CCEConfig(gradient="exact", materialize="raise")
BODY = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
SAVED = {**BODY, "modules_to_save": ["lm_head"]}
ON_HEAD = {**BODY, "target_modules": ["q_proj", "lm_head"]}


def _adapted(model: PreTrainedModel, settings: dict[str, Any]) -> Any:
    torch.manual_seed(2)
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


def _step(model: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    model.zero_grad()
    outputs = model(**architectures.batch())
    outputs.loss.backward()
    return (
        outputs.loss.detach(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        outputs,
    )


def _assert_equal_to_stock(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=0)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (got[1][name] - gradient).norm() <= 5e-5 * gradient.norm(), name


def _before(name: str, settings: dict[str, Any]) -> Any:
    return _adapted(patch(architectures.build(name), EXACT), settings)


def _after(name: str, settings: dict[str, Any]) -> Any:
    return patch(_adapted(architectures.build(name), settings), EXACT)


@pytest.mark.parametrize("order", [_before, _after])
@pytest.mark.parametrize("settings", [BODY, SAVED], ids=["body", "a copy of the output layer"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2"])
def test_adapters_train_as_in_the_stock_model(order: Callable[..., Any], settings: dict[str, Any], name: str) -> None:
    wanted = _step(_adapted(architectures.build(name), settings))
    got = _step(order(name, settings))
    assert isinstance(got[2].logits, LazyLogits)
    _assert_equal_to_stock(got, wanted)
    assert any("lora_A" in key for key in wanted[1])
    assert any("lm_head" in key for key in wanted[1]) == (settings is SAVED)


def test_an_adapter_put_on_a_patched_output_layer_is_honoured_and_reported() -> None:
    wanted = _step(_adapted(architectures.build("llama"), ON_HEAD))
    model = _adapted(patch(architectures.build("llama"), gradient="exact"), ON_HEAD)
    with pytest.warns(MaterializedLogitsWarning, match="peft"):
        got = _step(model)
    _assert_equal_to_stock(got, wanted)
    assert any("lm_head.lora_A" in key for key in got[1])
    with pytest.raises(RuntimeError, match="materialize='raise'"):
        _step(_before("llama", ON_HEAD))


def test_an_output_layer_that_has_an_adapter_is_refused() -> None:
    with pytest.raises(TypeError, match="Adapters on the output layer"):
        _after("llama", ON_HEAD)


def test_copies_of_the_output_layer_are_refused_while_none_is_active() -> None:
    model = _adapted(architectures.build("llama"), SAVED)
    model.add_adapter("other", peft.LoraConfig(**BODY))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="set_adapter"):
        patch(model)


def test_a_merged_adapter_and_an_unpatched_model_are_plain_models() -> None:
    model = _after("llama", BODY)
    wanted = copy.deepcopy(unpatch(model)).merge_and_unload()
    assert not is_lazy(output_layer(wanted))
    patch(model, EXACT)
    losses = [m(**architectures.batch()).loss.detach() for m in (model, wanted)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def _with_another_adapter(model: Any, **settings: Any) -> Any:
    model = _adapted(model, SAVED)
    torch.manual_seed(4)
    model.add_adapter("other", peft.LoraConfig(**{**BODY, **settings}))
    model.set_adapter("other")
    return model


FOLLOWED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "another adapter's copy": ("llama", lambda m: _with_another_adapter(m, modules_to_save=["lm_head"])),
    "an adapter without a copy": ("llama", lambda m: _with_another_adapter(m)),
    "a copy tied to that of the embedding": (
        "llama_tied", lambda m: _adapted(m, {**BODY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ),
    "LoRA on the parameter": ("llama", lambda m: _adapted(m, {**BODY, "target_parameters": ["lm_head.weight"]})),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change"), FOLLOWED.values(), ids=FOLLOWED)
def test_the_output_layer_that_peft_puts_in_place_after_patch_is_fused(name: str, change: Callable[..., Any]) -> None:
    wanted = _step(change(architectures.build(name)))
    got = _step(change(patch(architectures.build(name), EXACT)))
    assert isinstance(got[2].logits, LazyLogits)
    _assert_equal_to_stock(got, wanted)
    assert any("lora_A" in key for key in wanted[1])


def test_a_switch_of_adapters_after_patch_is_followed_and_unpatch_undoes_all() -> None:
    outcomes = []
    for patched in (True, False):
        model = _with_another_adapter(architectures.build("llama"), modules_to_save=["lm_head"])
        if patched:
            patch(model, EXACT)
        seen = []
        for adapter in ("other", "default", "other"):
            model.set_adapter(adapter)
            seen.append(_step(model))
            assert isinstance(seen[-1][2].logits, LazyLogits) == patched
        outcomes.append(seen)
        if patched:
            unpatch(model)
            assert not any(is_lazy(module) for module in model.modules())
            assert not any(module._forward_pre_hooks for module in model.get_base_model().modules())
    for got, wanted in zip(*outcomes, strict=True):
        _assert_equal_to_stock(got, wanted)


PAST: dict[str, tuple[str, Any]] = {
    "tokens of a tied embedding": ("llama_tied", [1, 2, 3]),
    "tokens of the output layer": ("llama", {"lm_head": [1, 2, 3]}),
}


@pytest.mark.parametrize(("name", "tokens"), PAST.values(), ids=PAST)
def test_a_wrapper_that_computes_logits_past_the_layer_is_reported(name: str, tokens: Any) -> None:
    settings = {**BODY, "trainable_token_indices": tokens}
    wanted = _step(_adapted(architectures.build(name), settings))
    model = _adapted(patch(architectures.build(name), gradient="exact"), settings)
    for _ in range(2):
        with pytest.warns(MaterializedLogitsWarning, match="TrainableTokensWrapper, which computes them past"):
            got = _step(model)
    _assert_equal_to_stock(got, wanted)
    with pytest.raises(RuntimeError, match="materialize='raise'.*TrainableTokensWrapper"):
        _step(_before(name, settings))


LR, STEPS = 1e-2, 3


def _batch_of(rank: int) -> dict[str, Tensor]:
    return {key: x[rank][None] for key, x in architectures.batch().items()}


def _plain_losses() -> list[list[float]]:
    """By step, each of two ranks' losses: one process that trains on the mean of both."""
    model = _adapted(architectures.build("llama"), SAVED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-6)
    losses = []
    for _ in range(STEPS):
        of_ranks = [model(**_batch_of(rank)).loss for rank in range(2)]
        torch.stack(of_ranks).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in of_ranks])
    return losses


def _under_fsdp2(entry: str) -> list[float]:
    from cce_dist.fsdp import adopt, shard_head

    model = _adapted(architectures.build("llama"), SAVED)
    mesh = init_device_mesh("cpu", (2,))
    if entry == "shard_head":
        shard_head(model, mesh, config=EXACT)
    fully_shard(model, mesh=mesh)
    if entry == "adopt":
        adopt(model, config=EXACT)
    if entry == "patch":
        patch(model, EXACT)
    assert is_lazy(output_layer(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-6)
    losses = []
    for _ in range(STEPS):
        loss = model(**_batch_of(dist.get_rank())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _under_deepspeed(stage: int, section: dict[str, Any]) -> list[float]:
    from deepspeed_runs import fresh_deepspeed

    import cce_dist.deepspeed as cce_deepspeed

    fresh_deepspeed()
    model = _adapted(architectures.build("llama"), SAVED)
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "eps": 1e-6, "weight_decay": 1e-2, "torch_adam": True}},
        "cce_dist": {"gradient": "exact", "materialize": "raise", **section},
    }  # fmt: skip
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine = cce_deepspeed.initialize(model=model, config=config, model_parameters=parameters)[0]
    assert is_lazy(output_layer(engine.module))
    losses = []
    for _ in range(STEPS):
        loss = engine(**_batch_of(dist.get_rank())).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("train", "arguments"),
    [
        *((_under_fsdp2, (entry,)) for entry in ("shard_head", "adopt", "patch")),
        *((_under_deepspeed, (stage, {})) for stage in (3, 1)),
        (_under_deepspeed, (1, {"vocab_parallel_size": 2})),
    ],
)
def test_a_copy_of_the_output_layer_trains_under_fsdp2_and_deepspeed(
    ranks: RankPool, train: Callable[..., list[float]], arguments: tuple[Any, ...]
) -> None:
    if train is _under_deepspeed:
        pytest.importorskip("deepspeed")
    plain = _plain_losses()
    assert plain[-1] != pytest.approx(plain[0], rel=1e-3)
    for rank, losses in enumerate(ranks.run(2, train, *arguments, timeout=120)):
        assert losses == pytest.approx([step[rank] for step in plain], rel=1e-5)


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.mm.out)


class _Shapes(TorchDispatchMode):
    """Notes the shape of every floating-point tensor that a product makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and function in PRODUCTS:
            self.seen.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_frozen_output_layer_gets_no_gradient_and_none_is_computed(backend: str) -> None:
    made = {}
    for settings in (BODY, SAVED):
        model = patch(_adapted(architectures.build("llama"), settings), gradient="exact", backend=backend)
        loss = model(**architectures.batch()).loss
        with _Shapes() as shapes:
            loss.backward()
        made[settings is SAVED] = (architectures.VOCAB, 32) in shapes.seen
        assert (output_layer(model).weight.grad is not None) == (settings is SAVED)
    assert made == {False: False, True: True}
