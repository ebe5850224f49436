"""PEFT: adapters in the body train as they do in the stock model; one on the output layer is honoured or refused."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import architectures
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from cce_dist import CCEConfig
from cce_dist.heads.find import output_layer
from cce_dist.heads.lazy import LazyLogits, MaterializedLogitsWarning, is_lazy
from cce_dist.transformers import fused_evaluation, patch, unpatch

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


ALONE = {**ON_HEAD, "target_modules": ["lm_head"]}


@pytest.mark.parametrize(
    ("order", "settings", "name"),
    [
        (_before, ON_HEAD, "gemma2"),
        (_after, ALONE, "llama_tied"),
        pytest.param(_before, ALONE, "cohere", marks=pytest.mark.full),
        pytest.param(_after, ON_HEAD, "cohere", marks=pytest.mark.full),
    ],
)
def test_lora_on_the_output_layer_trains_as_in_the_stock_model(
    order: Callable[..., Any], settings: dict[str, Any], name: str
) -> None:
    wanted = _step(_adapted(architectures.build(name), settings))
    got = _step(order(name, settings))
    assert isinstance(got[2].logits, LazyLogits)
    _assert_equal_to_stock(got, wanted)
    assert {key.split(".")[-3] for key in got[1] if "lm_head" in key} == {"lora_A", "lora_B"}


def test_lora_on_the_output_layer_is_that_of_the_merged_model() -> None:
    model = _after("llama", ON_HEAD)
    got = model(**architectures.batch()).loss
    merged = copy.deepcopy(unpatch(model)).merge_and_unload().train()
    wanted = patch(merged, EXACT)(**architectures.batch()).loss
    torch.testing.assert_close(got.detach(), wanted.detach(), rtol=1e-5, atol=0)


def _two_adapters(model: Any) -> Any:
    model = _adapted(model, ON_HEAD)
    torch.manual_seed(4)
    model.add_adapter("other", peft.LoraConfig(**{**ON_HEAD, "r": 3, "lora_alpha": 5, "use_rslora": True}))
    return model


def _each_adapter(model: Any) -> Iterator[Any]:
    """A step of each way to choose among two adapters."""
    for adapter in ("other", "default"):
        model.set_adapter(adapter)
        yield _step(model)
    model.base_model.set_adapter(["default", "other"])
    yield _step(model)
    model.set_adapter("default")
    with model.disable_adapter():
        yield model(**architectures.batch()).loss.detach(), {}, None
    model.merge_adapter()
    yield model(**architectures.batch()).loss.detach(), {}, None
    model.unmerge_adapter()
    yield _step(model)


@pytest.mark.parametrize("first", ["patch", "adapters"])
def test_of_several_adapters_those_that_are_active_count_in_each_call(first: str) -> None:
    wanted = _each_adapter(_two_adapters(architectures.build("llama")))
    model = architectures.build("llama")
    model = _two_adapters(patch(model, EXACT)) if first == "patch" else patch(_two_adapters(model), EXACT)
    for got, expected in zip(_each_adapter(model), wanted, strict=True):
        _assert_equal_to_stock(got, expected)


def test_dropout_of_an_adapter_draws_as_in_the_stock_model() -> None:
    outcomes = []
    for change in (lambda model: model, lambda model: patch(model, EXACT)):
        model = change(_adapted(architectures.build("llama"), {**ALONE, "lora_dropout": 0.3}))
        torch.manual_seed(5)
        outcomes.append(_step(model))
    assert isinstance(outcomes[1][2].logits, LazyLogits)
    _assert_equal_to_stock(outcomes[1], outcomes[0])


def test_statistics_and_logprobs_of_lazy_logits_are_those_with_the_adapter() -> None:
    stock, model = _adapted(architectures.build("llama"), ON_HEAD), _after("llama", ON_HEAD)
    inputs = {key: x for key, x in architectures.batch().items() if key != "labels"}
    logits, lazy = (m(**inputs).logits[:, 1:] for m in (stock, model))
    assert isinstance(lazy, LazyLogits)
    assert torch.equal(lazy.argmax(-1), logits.argmax(-1))
    ids = logits.argmin(-1)
    log_p = logits.log_softmax(-1).gather(-1, ids[..., None])
    torch.testing.assert_close(lazy.log_softmax(-1).gather(-1, ids[..., None]), log_p, rtol=1e-5, atol=0)
    torch.testing.assert_close(lazy.logsumexp(-1), logits.logsumexp(-1), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="linear_selected_logits of an output layer with a LoRA adapter"):
        lazy.selected(ids[..., None])
    with pytest.raises(RuntimeError, match="materialize='raise'"):
        lazy.sort(-1)


def test_an_adapter_changed_before_its_logits_are_used_is_refused() -> None:
    model = _after("llama", ON_HEAD)
    logits = model(**{key: x for key, x in architectures.batch().items() if key != "labels"}).logits
    with torch.no_grad():
        model.get_output_embeddings().lora_B["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="lora_B of the output layer has been changed"):
        logits.logsumexp(-1)


def test_real_logits_of_a_lazy_layer_are_those_with_the_adapter() -> None:
    stock, model = _adapted(architectures.build("llama"), ON_HEAD), _adapted(architectures.build("llama"), ON_HEAD)
    patch(model, gradient="exact")
    inputs = {key: x for key, x in architectures.batch().items() if key != "labels"}
    with pytest.warns(MaterializedLogitsWarning, match="computed after all"):
        got = model(**inputs).logits.sort(-1).values
    torch.testing.assert_close(got, stock(**inputs).logits.sort(-1).values)
    torch.testing.assert_close(model.eval()(**inputs).logits, stock.eval()(**inputs).logits)
    with fused_evaluation(model):
        losses = [m(**architectures.batch()).loss.detach() for m in (model, stock)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_a_model_with_an_adapted_output_layer_is_copied_and_pickled() -> None:
    model = _after("llama", ON_HEAD)
    wanted = _step(model)
    twin = copy.deepcopy(model)
    got = _step(twin)
    assert isinstance(got[2].logits, LazyLogits)
    _assert_equal_to_stock(got, wanted)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded.get_output_embeddings()) is peft.tuners.lora.Linear
    _assert_equal_to_stock(_step(loaded), wanted)
    unpatch(model)
    assert type(model.get_output_embeddings()) is peft.tuners.lora.Linear


def test_a_bf16_model_with_an_adapter_in_fp32_trains_near_the_stock_one() -> None:
    wanted = _step(_adapted(architectures.build("llama"), ON_HEAD))
    model = patch(_adapted(architectures.build("llama").bfloat16(), ON_HEAD), EXACT)
    got = _step(model)
    assert isinstance(got[2].logits, LazyLogits)
    for name, gradient in wanted[1].items():
        assert got[1][name].dtype == torch.float32
        assert (got[1][name] - gradient).norm() <= 0.1 * gradient.norm(), name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({**ON_HEAD, "use_dora": True}, "'default' on the output layer has the variant DoraLinearVariant"),
    "lora_bias": ({**ON_HEAD, "lora_bias": True}, "bias of its own"),
}


@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_more_than_lora_on_the_output_layer_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _after("llama", settings)
    wanted = _step(_adapted(architectures.build("llama"), settings))
    model = _adapted(patch(architectures.build("llama"), gradient="exact"), settings)
    with pytest.warns(MaterializedLogitsWarning):
        _assert_equal_to_stock(_step(model), wanted)
    with pytest.raises(RuntimeError, match="materialize='raise'"):
        _step(_before("llama", settings))


@pytest.mark.parametrize("setting", [{"fp32_head": True}, {"workspace_mb": "logits", "gradient": "exact"}], ids=str)
def test_what_a_loss_with_an_adapter_refuses_is_refused_before_a_step(setting: dict[str, Any]) -> None:
    model = _adapted(architectures.build("llama"), ON_HEAD)
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* does not go with a LoRA adapter"):
        patch(model, **setting)
    assert not is_lazy(output_layer(model))


def test_a_head_in_fp8_is_refused_by_name() -> None:
    model = architectures.build("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().to(torch.float8_e4m3fn), False)
    with pytest.raises(TypeError, match="a weight of torch.float8_e4m3fn"):
        patch(model)


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


def _plain_losses(settings: dict[str, Any], name: str = "llama") -> list[list[float]]:
    """By step, each of two ranks' losses: one process that trains on the mean of both."""
    model = _adapted(architectures.build(name), settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-6)
    losses = []
    for _ in range(STEPS):
        of_ranks = [model(**_batch_of(rank)).loss for rank in range(2)]
        torch.stack(of_ranks).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in of_ranks])
    return losses


def _under_ddp(settings: dict[str, Any]) -> list[float]:
    model = DistributedDataParallel(patch(_adapted(architectures.build("llama"), settings), EXACT))
    return _steps(model)


def _steps(model: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-6)
    losses = []
    for _ in range(STEPS):
        loss = model(**_batch_of(dist.get_rank())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _under_fsdp2(settings: dict[str, Any], entry: str, name: str = "llama", own_group: bool = False) -> list[float]:
    from cce_dist.fsdp import adopt, shard_head

    model = _adapted(architectures.build(name), settings)
    mesh = init_device_mesh("cpu", (2,))
    if entry == "shard_head":
        shard_head(model, mesh, config=EXACT)
    if own_group:  # FSDP2 lets its parameters go when the layer's forward ends
        fully_shard(model.get_output_embeddings(), mesh=mesh)
    fully_shard(model, mesh=mesh)
    if entry == "adopt":
        adopt(model, config=EXACT)
    if entry == "patch":
        patch(model, EXACT)
    assert is_lazy(output_layer(model))
    return _steps(model)


def _under_deepspeed(settings: dict[str, Any], stage: int, section: dict[str, Any]) -> list[float]:
    from deepspeed_runs import fresh_deepspeed

    import cce_dist.deepspeed as cce_deepspeed

    fresh_deepspeed()
    model = _adapted(architectures.build("llama"), settings)
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


def _id(x: Any) -> str:
    if callable(x):
        return x.__name__
    names = {id(SAVED): "copy", id(ON_HEAD): "lora with the body", id(ALONE): "lora alone"}
    return ", ".join(names.get(id(part), str(part)) for part in x)


@pytest.mark.parametrize(
    ("train", "arguments"),
    [
        *((_under_fsdp2, (SAVED, entry)) for entry in ("shard_head", "adopt", "patch")),
        *((_under_deepspeed, (SAVED, stage, {})) for stage in (3, 1)),
        (_under_deepspeed, (SAVED, 1, {"vocab_parallel_size": 2})),
        (_under_fsdp2, (ON_HEAD, "shard_head", "llama", True)),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                (_under_ddp, (ALONE,)),
                (_under_fsdp2, (ON_HEAD, "adopt", "llama_tied")),
                (_under_fsdp2, (ON_HEAD, "patch")),
                (_under_fsdp2, (ALONE, "adopt", "llama", True)),
                (_under_deepspeed, (ON_HEAD, 1, {})),
                (_under_deepspeed, (ALONE, 3, {})),
            )
        ),
    ],
    ids=_id,
)
def test_what_peft_trains_of_the_output_layer_trains_on_ranks(
    ranks: RankPool, train: Callable[..., list[float]], arguments: tuple[Any, ...]
) -> None:
    """A copy of it, or LoRA on it: as in one process, by the losses of a few steps."""
    if train is _under_deepspeed:
        pytest.importorskip("deepspeed")
    name = {"name": arguments[2]} if train is _under_fsdp2 and len(arguments) > 2 else {}
    plain = _plain_losses(arguments[0], **name)
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


def _plain_gradients(name: str) -> dict[str, Tensor]:
    """Of the mean of two ranks' losses."""
    model = _adapted(architectures.build(name), ON_HEAD)
    torch.stack([model(**_batch_of(rank)).loss for rank in range(2)]).mean().backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def _gradients_under_fsdp2(name: str, vocab_parallel_size: int) -> dict[str, Tensor]:
    from cce_dist.fsdp import shard_head

    model = _adapted(architectures.build(name), ON_HEAD)
    mesh = init_device_mesh("cpu", (2,))
    shard_head(model, mesh, config=EXACT.model_copy(update={"vocab_parallel_size": vocab_parallel_size}))
    fully_shard(model, mesh=mesh)
    model(**_batch_of(dist.get_rank())).loss.backward()
    return {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None}


def _gradients_under_deepspeed(stage: int, section: dict[str, Any]) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad
    from deepspeed_runs import fresh_deepspeed

    import cce_dist.deepspeed as cce_deepspeed

    fresh_deepspeed()
    model = _adapted(architectures.build("llama"), ON_HEAD)
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": LR}}, "zero_allow_untested_optimizer": True,
        "cce_dist": {"gradient": "exact", "materialize": "raise", **section},
    }  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = cce_deepspeed.initialize(model=model, config=config, model_parameters=trained)[0]
    engine.backward(engine(**_batch_of(dist.get_rank())).loss)
    named = [(key, p) for key, p in engine.module.named_parameters() if p.requires_grad]
    return {key: safe_get_full_grad(p).clone() for key, p in named}


@pytest.mark.parametrize(
    ("train", "arguments"),
    [
        (_gradients_under_deepspeed, (3, {})),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                (_gradients_under_fsdp2, ("llama", 1)),
                (_gradients_under_fsdp2, ("gemma2", 2)),
                (_gradients_under_deepspeed, (3, {"vocab_parallel_size": 1})),
                (_gradients_under_deepspeed, (1, {"vocab_parallel_size": 2})),
            )
        ),
    ],
    ids=_id,
)
def test_the_gradients_of_lora_on_a_sharded_output_layer_are_those_of_one_process(
    ranks: RankPool, train: Callable[..., dict[str, Tensor]], arguments: tuple[Any, ...]
) -> None:
    """The losses of a few steps of Adam would not show a factor."""
    if train is _gradients_under_deepspeed:
        pytest.importorskip("deepspeed")
    wanted = _plain_gradients(arguments[0] if train is _gradients_under_fsdp2 else "llama")
    assert any("lm_head.lora_B" in key for key in wanted)
    for got in ranks.run(2, train, *arguments, timeout=120):
        assert got.keys() == wanted.keys()
        for key, gradient in wanted.items():
            assert (got[key] - gradient).norm() <= 5e-5 * gradient.norm(), key


def _generated_under_fsdp2() -> tuple[Tensor, Tensor]:
    from cce_dist.fsdp import shard_head

    model = _adapted(architectures.build("llama"), ON_HEAD)
    mesh = init_device_mesh("cpu", (2,))
    shard_head(model, mesh, config=EXACT)
    fully_shard(model, mesh=mesh)
    return _generated(model)


@torch.no_grad()
def _generated(model: Any) -> tuple[Tensor, Tensor]:
    model.eval()
    ids = architectures.batch()["input_ids"][:1, :5]
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model(input_ids=ids).logits, model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)


@pytest.mark.full
def test_a_sharded_output_layer_with_lora_generates_by_real_logits(ranks: RankPool) -> None:
    wanted = _generated(_adapted(architectures.build("llama"), ON_HEAD))
    for logits, ids in ranks.run(2, _generated_under_fsdp2, timeout=120):
        torch.testing.assert_close(logits, wanted[0], rtol=1e-4, atol=1e-6)
        assert torch.equal(ids, wanted[1])


def _over_tensor_parallelism() -> str:
    from cce_dist.fsdp import shard_head

    model = _adapted(architectures.build("llama"), ON_HEAD)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "tp"))
    with pytest.raises(TypeError, match="LoRA adapter on the output layer is not supported with tp") as caught:
        shard_head(model, mesh["fsdp"], tp=mesh["tp"], config=EXACT)
    return str(caught.value)


@pytest.mark.full
def test_tensor_parallelism_of_an_output_layer_with_lora_is_refused_by_name(ranks: RankPool) -> None:
    assert all(ranks.run(2, _over_tensor_parallelism, timeout=120))
