"""Patched Hugging Face models train as the stock ones do, and never compute logits on the way."""

import copy
import pickle
import random
import re
import warnings
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import RankPool
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from cce_dist import CCEConfig, VocabShard
from cce_dist.heads.find import output_layer
from cce_dist.heads.lazy import LazyLogits, MaterializedLogitsWarning, is_lazy, make_lazy
from cce_dist.transformers import fused_evaluation, patch, unpatch

EXACT = CCEConfig(gradient="exact", materialize="raise")
SLOW_FORMS = architectures.FULL + architectures.TIED_OR_NOT
ALL_FORMS = [*architectures.FAST, *(pytest.param(name, marks=pytest.mark.full) for name in SLOW_FORMS)]
DOCUMENT = architectures.DOCUMENT.read_text()
DOCUMENTED = f"transformers {transformers.__version__}." in DOCUMENT  # of the installed version


def _step(model: PreTrainedModel, **extra: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Loss, gradients and outputs of one training step, with the same dropout every time."""
    torch.manual_seed(1)
    model.zero_grad()
    outputs = model(**architectures.batch(), **extra)
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.loss.detach(), gradients, outputs


def _assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """By relative norm; a tensor that matters little to the whole gradient (key biases) is held to less."""
    assert got.keys() == wanted.keys()
    floor = 1e-4 * torch.stack([x.norm() for x in wanted.values()]).norm()
    errors = {name: ((got[name] - x).norm() / torch.maximum(x.norm(), floor)).item() for name, x in wanted.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < 5e-5, f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("name", ALL_FORMS)
def test_loss_and_all_gradients_equal_the_stock_model(name: str) -> None:
    try:
        model = architectures.build(name)
    except (ValueError, ImportError) as error:
        if "Unrecognized model" not in str(error):
            raise
        pytest.skip(f"the installed transformers has no {name}")
    for extra in ({}, {"num_items_in_batch": torch.tensor(40)}):
        stock_loss, stock_gradients, _ = _step(model, **extra)
        patch(model, EXACT)  # raises if logits are materialised
        loss, gradients, outputs = _step(model, **extra)
        unpatch(model)
        assert isinstance(outputs.logits, LazyLogits)
        torch.testing.assert_close(loss, stock_loss, rtol=1e-6, atol=0)
        _assert_close(gradients, stock_gradients)
    if DOCUMENTED:
        assert architectures.row(name, model, outputs.logits) in DOCUMENT.splitlines(), "python tests/architectures.py"


def test_the_document_lists_what_is_tested_and_that_of_support_says_how_many() -> None:
    rows = [line for line in DOCUMENT.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].strip() for row in rows] == sorted(architectures.FAST + SLOW_FORMS)
    if DOCUMENTED:
        assert architectures.document(rows, SHARDED) == DOCUMENT
    support = (Path(__file__).parent.parent / "docs/support.md").read_text()
    forms, types = re.findall(r"^(\d+) forms of (\d+) model types", DOCUMENT, re.M)[0]
    assert f"[{forms} forms of {types} model types](architectures.md)" in support.replace("\n", " ")


@pytest.mark.full
def test_every_causal_model_type_is_tested_or_listed_with_a_reason() -> None:
    left_out = sorted(architectures.types_left_out())
    if left_out:
        warnings.warn(f"neither in FAST, FULL nor NOT_TESTED of tests/architectures.py: {left_out}", stacklevel=1)


def test_evaluation_and_generation_are_untouched() -> None:
    model, prompt = architectures.build("llama").eval(), architectures.batch()["input_ids"]
    stock_logits = model(prompt).logits
    stock_tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
    patch(model, EXACT)
    assert type(model(prompt).logits) is Tensor
    assert torch.equal(model(prompt).logits, stock_logits)
    model.train()
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), stock_tokens)


def test_fused_evaluation_gives_the_stock_loss() -> None:
    model = architectures.build("gemma2").eval()
    with torch.no_grad():
        stock = model(**architectures.batch()).loss
        with fused_evaluation(patch(model, EXACT)):
            outputs = model(**architectures.batch())
    assert isinstance(outputs.logits, LazyLogits)
    torch.testing.assert_close(outputs.loss, stock, rtol=1e-6, atol=0)


def test_saving_and_copying_are_untouched(tmp_path: Path) -> None:
    model = architectures.build("llama_tied")
    names = list(model.state_dict())
    patch(model, EXACT)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    for copied in (AutoModelForCausalLM.from_pretrained(tmp_path), pickle.loads(pickle.dumps(model))):
        assert type(copied.lm_head) is nn.Linear
        assert copied.lm_head.weight is copied.model.embed_tokens.weight
        assert torch.equal(copied.lm_head.weight, model.lm_head.weight)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert isinstance(_step(twin)[2].logits, LazyLogits)
    assert model.lm_head.weight.grad is None


def test_patch_and_unpatch_take_no_random_numbers_and_leave_no_function_of_others_replaced() -> None:
    model = architectures.build("llama")
    places = [torch.nn.functional, torch.nn.Linear, torch.Tensor, torch.nn.Module, type(model), type(model.model)]
    before = torch.get_rng_state(), random.getstate(), [dict(vars(place)) for place in places]
    patch(model, gradient="exact")
    model(**architectures.batch()).loss.backward()
    unpatch(model)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert [dict(vars(place)) for place in places] == before[2]


def test_unpatch_restores_the_model() -> None:
    model = architectures.build("llama")
    stock = _step(model)
    assert patch(model, EXACT) is model
    assert unpatch(model) is model
    assert type(model.lm_head) is nn.Linear
    loss, gradients, outputs = _step(model)
    assert type(outputs.logits) is Tensor
    assert torch.equal(loss, stock[0])
    assert all(torch.equal(gradients[name], stock[1][name]) for name in gradients)


def _resized(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    torch.manual_seed(3)
    model.resize_token_embeddings(rows)
    return model


@pytest.mark.parametrize("rows", [400, 310])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_a_vocabulary_resized_after_patch_is_followed(name: str, rows: int) -> None:
    batch = {key: x.clamp(max=309) for key, x in architectures.batch().items()}
    outcomes = []
    for patched in (True, False):
        model = architectures.build(name)
        if patched:
            _step(patch(model, EXACT))
        _resized(model, rows)
        torch.manual_seed(1)
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        assert isinstance(outputs.logits, LazyLogits) == patched
        assert outputs.logits.shape[-1] == rows
        outcomes.append((outputs.loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-6, atol=0)
    _assert_close(outcomes[0][1], outcomes[1][1])


class _Twice(nn.Module):
    """A new output layer that is no nn.Linear."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T * 2


def test_a_new_output_layer_that_cannot_be_fused_is_reported_before_it_runs() -> None:
    model = patch(architectures.build("llama"), EXACT)
    model.set_output_embeddings(_Twice(model.lm_head.weight))
    with pytest.raises(RuntimeError, match=r"materialize='raise'.*LlamaForCausalLM.*_Twice"):
        _step(model)
    model = patch(architectures.build("llama"), gradient="exact")
    model.lm_head = _Adapted(32, architectures.VOCAB, bias=False)
    with pytest.warns(MaterializedLogitsWarning, match="_Adapted"):
        _step(model)
    model.lm_head = nn.Linear(32, architectures.VOCAB, bias=False)
    assert isinstance(_step(model)[2].logits, LazyLogits)
    patch(unpatch(model), EXACT)
    assert isinstance(_step(model)[2].logits, LazyLogits)


def test_what_patch_hangs_on_a_model_goes_with_it_and_is_nothing_in_a_pickle_or_a_copy_of_a_part() -> None:
    model = patch(architectures.build("llama"), EXACT)
    twin, part = copy.deepcopy(model), copy.deepcopy(model.model)
    for m in (model, twin):
        assert isinstance(_step(_resized(m, 400))[2].logits, LazyLogits)
    assert torch.isfinite(part(architectures.batch()["input_ids"])[0]).all()
    data = pickle.dumps(model)
    assert b"cce_dist" not in data
    assert type(_step(pickle.loads(data))[2].logits) is Tensor
    for m in (model, twin):
        assert type(_step(unpatch(m))[2].logits) is Tensor
        assert not any(module._forward_pre_hooks for module in m.modules())


def _fsdp2_with_a_new_head() -> str:
    model = architectures.build("llama")
    fully_shard(model)
    patch(model, EXACT)
    model.lm_head = nn.Linear(32, architectures.VOCAB, bias=False)
    try:
        _step(model)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_new_output_layer_beside_a_sharded_one_is_reported_on_every_rank(ranks: RankPool) -> None:
    for text in ranks.run(2, _fsdp2_with_a_new_head):
        assert "materialize='raise'" in text, text
        assert "is not the one that was patched" in text, text


def test_a_loss_that_reads_probabilities_gets_them_with_a_warning_that_names_its_line() -> None:
    model = patch(architectures.build("llama"), gradient="exact")
    logits = model(architectures.batch()["input_ids"]).logits
    with pytest.warns(
        MaterializedLogitsWarning, match=rf"{__file__}:\d+, in {_entropy.__name__}, uses them in softmax"
    ):
        loss = _entropy(logits)
    loss.backward()
    gradient = model.lm_head.weight.grad
    unpatch(model).zero_grad()
    _entropy(model(architectures.batch()["input_ids"]).logits).backward()
    assert torch.equal(gradient, model.lm_head.weight.grad)


def _entropy(logits: Tensor) -> Tensor:
    p = torch.softmax(logits.float(), dim=-1)
    return -(p * p.log()).sum(-1).mean()


class _Adapted(nn.Linear):
    """As an adapter that inherits from nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_models_that_cannot_be_patched_are_refused() -> None:
    llama = architectures.build("llama")
    with pytest.raises(ValueError, match="LlamaModel has none"):
        patch(AutoModel.from_config(llama.config))
    with pytest.raises(ValueError, match="Sequential has none"):
        patch(nn.Sequential())
    with pytest.raises(ValueError, match="not a class that make_lazy made"):
        unpatch(llama)
    patch(llama)
    with pytest.raises(ValueError, match="lazy already"):
        patch(llama)
    for head, error in (
        (_Adapted(32, architectures.VOCAB), "LoRA"),
        (nn.Sequential(), "a classifier such as nn.Linear"),
    ):
        llama.lm_head = head
        with pytest.raises(TypeError, match=error):
            patch(llama)


def test_a_sharded_output_layer_is_left_to_its_framework() -> None:
    zero3 = architectures.build("llama")
    zero3.lm_head.weight.data = torch.empty(0)  # as ZeRO-3 leaves it between uses
    with pytest.raises(ValueError, match="deepspeed"):
        patch(zero3)


def test_settings_come_as_a_config_or_by_keyword_and_are_checked() -> None:
    model = architectures.build("llama")
    with pytest.raises(ValueError, match="gradiant: unknown key"):
        patch(model, gradiant="exact")
    with pytest.raises(ValueError, match="not both"):
        patch(model, EXACT, gradient="exact")
    assert type(patch(model, enabled=False).lm_head) is nn.Linear
    with pytest.raises(RuntimeError, match="materialize='raise'"):
        patch(model, materialize="raise")(architectures.batch()["input_ids"]).logits.exp()


def test_bf16_autocast_is_as_close_to_fp32_as_the_stock_model_is() -> None:
    model = architectures.build("qwen3")
    truth, _, _ = _step(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock, stock_gradients, _ = _step(model)
        loss, gradients, _ = _step(patch(model, EXACT))
    assert (loss - truth).abs() <= 1.5 * (stock - truth).abs() + 2.0**-9 * truth
    assert loss.dtype == stock.dtype
    for name, gradient in stock_gradients.items():
        assert (gradients[name] - gradient).norm() <= 0.05 * gradient.norm(), name


@pytest.mark.full
def test_a_compiled_model_breaks_its_graph_at_the_loss_alone() -> None:
    model = patch(architectures.build("gemma2"), EXACT)
    wanted_loss, wanted, _ = _step(model)
    counter = CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, backend=counter)  # type: ignore[method-assign]
    loss, gradients, _ = _step(model)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    _assert_close(gradients, wanted)
    assert counter.frame_count == 2


class _Slice:
    """An owner whose rank takes its rows of a whole, replicated head."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        assert dist.group.WORLD is not None
        self.shard = VocabShard.even(head.out_features, dist.group.WORLD)

    def local_weight(self) -> Tensor:
        return self.head.weight[self.shard.start : self.shard.stop]

    def local_bias(self) -> Tensor | None:
        return None if self.head.bias is None else self.head.bias[self.shard.start : self.shard.stop]


def _sharded_errors(name: str) -> None:
    """Every gradient equals the stock one; of the head's, this rank's rows."""
    model = architectures.build(name)
    stock_loss, stock_gradients, _ = _step(model)
    head = model.get_output_embeddings()
    owner = _Slice(head)
    make_lazy(head, owner, EXACT)
    loss, gradients, _ = _step(model)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-6, atol=0)
    for key, parameter in model.named_parameters():
        if parameter is head.weight or parameter is head.bias:
            rows = slice(owner.shard.start, owner.shard.stop)
            gradients[key], stock_gradients[key] = gradients[key][rows], stock_gradients[key][rows]
    _assert_close(gradients, stock_gradients)


SHARDED = ("llama", "llama_tied", "gemma2", "cohere", "granite", "gpt2", "phi", "inkling_text", "t5", "bart_seq2seq",
           "bert_masked", "mamba", "qwen3_moe")  # fmt: skip


@pytest.mark.parametrize("name", [SHARDED[0], *(pytest.param(name, marks=pytest.mark.full) for name in SHARDED[1:])])
def test_a_vocabulary_sharded_over_two_ranks_trains_as_stock(ranks: RankPool, name: str) -> None:
    ranks.run(2, _sharded_errors, name)


def _fsdp2_losses(patched: bool) -> list[float]:
    """Losses of three steps; the optimizer is there before the patch, as where a framework shards."""
    model = architectures.build("llama_tied")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if patched:
        patch(model, EXACT)
        assert is_lazy(output_layer(model))
    batch = {key: x[dist.get_rank()][None] for key, x in architectures.batch().items()}
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_model_that_fsdp2_has_sharded_is_adopted(ranks: RankPool) -> None:
    for losses, stock in zip(ranks.run(2, _fsdp2_losses, True), ranks.run(2, _fsdp2_losses, False), strict=True):
        assert losses == pytest.approx(stock, rel=1e-5)


def _ddp_gradients(patched: str) -> dict[str, Tensor]:
    """Each rank trains on its own sequence."""
    model = architectures.build("llama_tied")
    if patched == "before":
        patch(model, EXACT)
    batch = {key: x[dist.get_rank()][None] for key, x in architectures.batch().items()}
    wrapped = DistributedDataParallel(model)
    if patched == "after":
        patch(wrapped, EXACT)
    wrapped(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _outside_of_forward(patched: bool, name: str, frozen: str) -> dict[str, Tensor]:
    """Two steps with a loss on the logits that the model returns, where DDP looks for parameters that went unused."""
    model = architectures.build(name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad = not (frozen and frozen in key)
    if patched:
        patch(model, EXACT)
    unused = nn.ModuleDict({"model": model, "unused": nn.Linear(3, 3)})
    unused.forward = lambda **inputs: model(**inputs)  # type: ignore[method-assign]
    wrapped = DistributedDataParallel(unused, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = {key: x[dist.get_rank()][None] for key, x in architectures.batch().items()}
    labels = batch.pop("labels")
    for _ in range(2):
        optimizer.zero_grad()
        logits = wrapped(**batch).logits
        assert isinstance(logits, LazyLogits) == patched
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "frozen"), [("llama", ""), ("llama", "model."), ("llama", "lm_head"), ("phi", "")])
def test_ddp_that_looks_for_unused_parameters_finds_the_output_layer(ranks: RankPool, name: str, frozen: str) -> None:
    by_rank = zip(*(ranks.run(2, _outside_of_forward, patched, name, frozen) for patched in (True, False)), strict=True)
    for got, stock in by_rank:
        _assert_close(got, stock)


@pytest.mark.parametrize("patched", ["before", "after"])
def test_under_ddp_gradients_equal_stock(ranks: RankPool, patched: str) -> None:
    for got, stock in zip(ranks.run(2, _ddp_gradients, patched), ranks.run(2, _ddp_gradients, "never"), strict=True):
        _assert_close(got, stock)
