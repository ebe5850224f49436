"""The documents: every example runs, every figure is a result file's, and every path, link and setting exists."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from readme import PAGES, README, missing, shown
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from cce_dist import CCEConfig, VocabShard, linear_cross_entropy, linear_logprobs
from cce_dist.cli import main
from cce_dist.loss.settings import CallSettings, LossSettings

ROOT = Path(__file__).parent.parent
REFERENCE, LOGPROBS, OPTIONS, DISTILLATION, CLIENTS = (
    PAGES[f"docs/{name}.md"] for name in ("reference", "reinforcement-learning", "options", "distillation", "clients")
)
EXAMPLES, OF_REFERENCE, OF_LOGPROBS, OF_OPTIONS, OF_DISTILLATION, OF_CLIENTS = (
    dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", text, re.S))
    for text in (README, REFERENCE, LOGPROBS, OPTIONS, DISTILLATION, CLIENTS)
)
VOCAB, HIDDEN = 96, 16


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )


def _ids() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(VOCAB, (4, 8))


def _run_example(name: str, **given: Any) -> dict[str, Any]:
    names = {"torch": torch, "dist": dist, "fully_shard": fully_shard, **given}
    pages = EXAMPLES, OF_REFERENCE, OF_LOGPROBS, OF_OPTIONS, OF_DISTILLATION, OF_CLIENTS
    exec(compile(next(page[name] for page in pages if name in page), f"example {name}", "exec"), names)
    return names


def _plain() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(3, 7, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.randint(VOCAB, (3, 7))
    ours, reference = (hidden.clone().requires_grad_() for _ in range(2))
    after = _run_example("plain", hidden=ours, weight=weight, labels=labels, vocab_size=VOCAB)
    loss = F.cross_entropy((reference @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(after["loss"], loss)
    assert ours.grad is not None
    assert (ours.grad - reference.grad).norm() < 0.1 * reference.grad.norm()  # the default mode samples
    assert after["rows"].grad.shape == after["rows"].shape == (VOCAB // dist.get_world_size(), HIDDEN)


def _fsdp2() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    loss = _run_example("fsdp2", model=_llama(), ids=_ids(), mesh=mesh)["loss"]
    torch.testing.assert_close(loss.detach(), _llama()(input_ids=_ids(), labels=_ids()).loss.detach())


def test_every_python_example_is_tested() -> None:
    assert set(EXAMPLES) == {"start", "plain", "deepspeed", "fsdp2"}
    assert README.count("```python") == len(EXAMPLES)
    assert set(OF_REFERENCE) == {"transformers", "callback"}
    assert REFERENCE.count("```python") == len(OF_REFERENCE)
    assert set(OF_LOGPROBS) == {
        "logprobs",
        "exact_sums",
        "ppo",
        "reference",
        "sequences",
        "next_token",
        "grpo",
    }  # that of GRPO in test_trl.py
    assert LOGPROBS.count("```python") == len(OF_LOGPROBS)
    assert set(OF_OPTIONS) == {
        "accumulator",
        "adapter",
        "budget",
        "class_weights",
        "token_weights",
        "several",
        "statistics",
        "fp32_head",
    }
    assert OPTIONS.count("```python") == len(OF_OPTIONS)
    assert set(OF_DISTILLATION) == {"online", "write", "read", "kept", "select", "gkd"}  # the last in test_trl.py
    assert DISTILLATION.count("```python") == len(OF_DISTILLATION)
    of_lightning = {"fabric", "lightning", "lightning_deepspeed"}  # in test_lightning.py
    assert set(OF_CLIENTS) == {"llamafactory", "swift", "verl", "megatron", *of_lightning}
    assert CLIENTS.count("```python") == len(OF_CLIENTS)


def _megatron() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(7, 3, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.randint(VOCAB, (3, 7))
    output_layer, rank = torch.nn.Linear(HIDDEN, VOCAB // 2, bias=False), dist.get_rank()
    output_layer.weight.data = weight.chunk(2)[rank]
    given = {"hidden": hidden, "output_layer": output_layer, "labels": labels, "vocab_size": VOCAB}
    loss = _run_example("megatron", tensor_parallel_group=dist.group.WORLD, **given)["loss"]
    logits = (hidden.transpose(0, 1) @ weight.T).flatten(0, 1)
    torch.testing.assert_close(loss.flatten(), F.cross_entropy(logits, labels.flatten(), reduction="none"))


def test_the_example_of_megatron_is_the_loss_of_each_token(ranks: RankPool) -> None:
    ranks.run(2, _megatron)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("llamafactory", "llamafactory.train.tuner"),
        ("swift", "swift.callbacks"),
        ("verl", "verl.utils.kernel.linear_cross_entropy"),
    ],
)
def test_the_examples_of_clients_fit_the_client_that_is_installed(name: str, package: str) -> None:
    pytest.importorskip(package, exc_type=ImportError)
    from cce_dist.compat import verl
    from cce_dist.trainer_callback import CCECallback

    names = _run_example(name, __name__="imported")
    if name == "swift":
        assert isinstance(names["callbacks_map"]["cce_dist"](None, None), CCECallback)
    if name == "verl":
        assert sys.modules[package].linear_cross_entropy is verl.linear_cross_entropy  # type: ignore[attr-defined]


def _options() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(3, 7, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.randint(VOCAB, (3, 7))
    shard, class_weights = VocabShard.even(VOCAB, dist.group.WORLD), torch.rand(VOCAB)
    rows, logits = weight[shard.start : shard.stop], (hidden @ weight.T).flatten(0, 1)
    given = {"hidden": hidden, "rows": rows, "labels": labels, "shard": shard}
    given["linear_cross_entropy"] = linear_cross_entropy
    weighted = _run_example("class_weights", class_weights=class_weights, **given)["loss"]
    loss = _run_example("budget", **given)["loss"]
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels.flatten()))
    torch.testing.assert_close(weighted, F.cross_entropy(logits, labels.flatten(), weight=class_weights))
    nll = F.cross_entropy(logits, labels.flatten(), reduction="none")
    torch.testing.assert_close(_run_example("token_weights", **given)["loss"], (torch.exp(-nll) * nll).mean())
    told = _run_example("statistics", **given)
    assert torch.equal(told["predicted"].flatten(), logits.argmax(-1))
    assert told["accuracy"] == (logits.argmax(-1) == labels.flatten()).float().mean()
    adapter = {"lora_a": torch.randn(4, HIDDEN), "lora_b": torch.randn(VOCAB, 4), "scaling": 0.5}
    lora_b_rows = adapter["lora_b"][shard.start : shard.stop]
    merged = weight + 0.5 * adapter["lora_b"] @ adapter["lora_a"]
    with_adapter = _run_example("adapter", **given, **adapter, dropout=lambda x: x, lora_b_rows=lora_b_rows)["loss"]
    torch.testing.assert_close(with_adapter, F.cross_entropy((hidden @ merged.T).flatten(0, 1), labels.flatten()))
    ahead = [
        F.cross_entropy((hidden @ weight.T)[:, :-shift].flatten(0, 1), labels[:, shift:].flatten())
        for shift in (1, 2, 3)
    ]
    torch.testing.assert_close(_run_example("several", **given)["loss"], ahead[0] + 0.3 * (ahead[1] + ahead[2]))
    in_fp32 = F.cross_entropy((hidden.bfloat16().float() @ weight.T).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(_run_example("fp32_head", **given)["loss"], in_fp32)
    rows = given["rows"].detach().requires_grad_()
    steps = [(hidden, labels), (hidden[:1] / 2, labels[:1])]
    got = _run_example("accumulator", **{**given, "rows": rows}, micro_steps=steps)["main_grad"]
    whole = weight.clone().requires_grad_()
    for step_hidden, step_labels in steps:
        F.cross_entropy((step_hidden @ whole.T).flatten(0, 1), step_labels.flatten(), reduction="sum").backward()
    assert rows.grad is None and whole.grad is not None
    torch.testing.assert_close(got, whole.grad[shard.start : shard.stop])


@pytest.mark.parametrize("world", [1, 2])
def test_the_examples_of_options_are_those_of_all_logits(ranks: RankPool, world: int) -> None:
    ranks.run(world, _options)


def _distillation() -> None:
    torch.manual_seed(0)
    student_hidden, teacher_hidden = torch.randn(3, 7, HIDDEN), torch.randn(3, 7, 2 * HIDDEN)
    student_weight, teacher_weight = torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, 2 * HIDDEN)
    labels = torch.randint(VOCAB, (3, 7)).masked_fill(torch.rand(3, 7) < 0.3, -100)
    given: dict[str, Any] = {"student_hidden": student_hidden.requires_grad_(), "teacher_hidden": teacher_hidden}
    given |= {"student_weight": student_weight, "teacher_weight": teacher_weight, "labels": labels}
    after = _run_example("online", vocab_size=VOCAB, **given)
    log_s, log_t = (
        ((given[f"{name}_hidden"] @ given[f"{name}_weight"].T) / 2).log_softmax(-1) for name in ("student", "teacher")
    )
    log_m = (0.1 * log_t.exp() + 0.9 * log_s.exp()).log()
    losses = (0.1 * log_t.exp() * (log_t - log_m) + 0.9 * log_s.exp() * (log_s - log_m)).sum(-1)
    torch.testing.assert_close(after["loss"], losses[:, :-1][labels[:, 1:] != -100].mean())
    shard, rows = after["shard"], after["student_rows"]
    given |= {"shard": shard, "student_rows": rows}
    stored = _run_example("write", teacher_rows=teacher_weight[shard.start : shard.stop], **given)["stored"]
    p_t, p_s = (log_p.exp().gather(-1, stored["ids"].long()) for log_p in (log_t, log_s))
    p_t, p_s = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (p_t, p_s))
    losses = (p_t * (p_t / p_s).log()).sum(-1)
    after = _run_example("read", stored=stored, **given)
    torch.testing.assert_close(after["loss"], losses[labels != -100].mean(), rtol=1e-3, atol=0)  # stored in 16 bits
    kept = torch.tensor([5, 6, 9, 11, 70])
    given = {"hidden": student_hidden[0, :2].detach(), "rows": rows.detach(), "shard": shard}
    after = _run_example("kept", kept_ids=kept, offsets=torch.tensor([0, 2, 5]), sampled=torch.tensor([6, 9]), **given)
    z = given["hidden"] @ student_weight.T / 0.7
    expected = z[0, kept[:2]].log_softmax(-1)[1], z[1, kept[2:]].log_softmax(-1)[0]
    torch.testing.assert_close(after["of_sampled"], torch.tensor([0, expected[0], expected[1], 0, 0]))
    given |= {"hidden": torch.randn(20, 7, HIDDEN), "lengths": torch.full((20,), 7)}
    batch = _run_example("select", **given)["batch"]
    norms = torch.linalg.svdvals((given["hidden"] @ student_weight.T).double()).sum(-1)
    assert torch.equal(batch, norms.topk(8).indices)


@pytest.mark.parametrize("world", [1, 2])
def test_the_examples_of_distillation_are_those_of_all_logits(ranks: RankPool, world: int) -> None:
    ranks.run(world, _distillation)


def test_the_page_of_options_has_every_one_and_what_it_refuses_is_refused() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", OPTIONS, re.M))
    assert set(table) == set(CallSettings.model_fields) - set(LossSettings.model_fields) - {"reduction", "statistics"}
    given: dict[str, Any] = {"num_valid_tokens": 4, "reduction": "sum"}
    refused = {
        frozenset((name, other)) for name, row in table.items() for other in re.findall(r"`(\w+)`", row.split("|")[-1])
    }
    assert refused
    for pair in refused:
        with pytest.raises(ValueError, match=" goes with"):
            linear_cross_entropy(
                torch.zeros(3, 8), torch.zeros(VOCAB, 8), torch.zeros(3).long(), **{name: given[name] for name in pair}
            )


def _logprobs() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(3, 7, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.randint(VOCAB, (3, 7))
    ours, reference = (hidden.clone().requires_grad_() for _ in range(2))
    after = _run_example("logprobs", hidden=ours, weight=weight, labels=labels, vocab_size=VOCAB)
    log_p = (reference @ weight.T / 0.7).log_softmax(-1)
    chosen, entropy = log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    (-(chosen + 0.01 * entropy).sum()).backward()
    torch.testing.assert_close(after["found"].logprob, chosen)
    torch.testing.assert_close(after["found"].entropy, entropy)
    assert torch.equal(after["found"].top1, log_p.argmax(-1))
    assert ours.grad is not None
    assert (ours.grad - reference.grad).norm() < 1e-5 * reference.grad.norm()
    given = {"hidden": hidden, "rows": after["rows"], "shard": after["shard"]}
    exact = _run_example("exact_sums", labels=labels, linear_logprobs=linear_logprobs, **given)["found"]
    torch.testing.assert_close(exact.logprob, (hidden @ weight.T).log_softmax(-1).gather(-1, labels[..., None])[..., 0])
    sampled = _run_example("next_token", step=3, **given)
    assert sampled["next_id"].shape == (3,) and sampled["next_id"].max() < VOCAB


@pytest.mark.parametrize("world", [1, 2])
def test_the_example_of_log_probabilities_is_that_of_the_whole_vocabulary(ranks: RankPool, world: int) -> None:
    ranks.run(world, _logprobs)


def test_the_examples_of_a_policy_step_have_the_losses_and_gradients_of_stock() -> None:
    ids, mask = _ids(), torch.ones(4, 8, dtype=torch.int64)
    mask[0, :4] = 0
    given = {"ids": ids, "mask": mask, "temperature": 0.8, "advantage": torch.randn(4, 1)}
    stock, model = _llama(), _llama()
    log_p = (stock(input_ids=ids).logits[:, :-1] / 0.8).log_softmax(-1)
    chosen = log_p.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    old = chosen.detach() + 0.1 * torch.randn(4, 7) * mask[:, 1:]
    after = _run_example("ppo", model=model, old_logprob=old, **given)
    ratio = (chosen - old).exp()
    clipped, entropy = ratio.clamp(0.8, 1.2), -(log_p.exp() * log_p).sum(-1)
    objective = torch.minimum(ratio * given["advantage"], clipped * given["advantage"]) + 0.01 * entropy
    loss = -(objective * mask[:, 1:]).sum() / mask[:, 1:].sum()
    loss.backward()
    torch.testing.assert_close(after["loss"], loss)
    wanted = dict(stock.named_parameters())
    for name, p in model.named_parameters():
        assert (p.grad - wanted[name].grad).norm() <= 1e-5 * wanted[name].grad.norm(), name
    evaluated = _run_example("reference", model=model.eval(), labels=after["labels"], **given)
    assert torch.equal(evaluated["old_logprob"], after["found"].logprob)
    summed = _run_example("sequences", found=after["found"], labels=after["labels"])
    torch.testing.assert_close(summed["of_sequence"], chosen.sum(-1))


@pytest.mark.parametrize("world", [1, 2])
def test_the_plain_example_gives_the_loss_of_the_whole_vocabulary(ranks: RankPool, world: int) -> None:
    ranks.run(world, _plain)


def test_the_fsdp2_example_gives_the_stock_loss(ranks: RankPool) -> None:
    ranks.run(2, _fsdp2)


@pytest.mark.full
@pytest.mark.parametrize("examples", [["plain", "fsdp2"], ["deepspeed"]], ids=str)
def test_an_example_after_the_lines_before_it_is_a_script_that_gives_the_stock_loss(
    examples: list[str], tmp_path: Path
) -> None:
    if "deepspeed" in examples:
        pytest.importorskip("deepspeed")
    lines = [
        "import deepspeed",
        "deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False",
    ]  # a minute to compile
    lines = [EXAMPLES["start"], *(lines if "deepspeed" in examples else [])]
    for name in examples:
        lines += ["stock = model(input_ids=ids, labels=ids).loss.item()", EXAMPLES[name]]
        lines += [f"print('{name}:', loss.item(), stock, flush=True)"]
    (tmp_path / "example.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "example.py")], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    losses = re.findall(r"^(\w+): ([\d.]+) ([\d.]+)$", done.stdout, re.M)
    assert sorted(name for name, *_ in losses) == sorted(2 * examples), done.stderr[-3000:]
    for name, ours, stock in losses:
        expected = math.log(32_000) if name == "plain" else float(stock)  # plain has hidden states of its own
        assert float(ours) == pytest.approx(expected, rel=1e-2 if name == "plain" else 1e-5), name


def test_the_transformers_example_gives_the_stock_loss() -> None:
    loss = _run_example("transformers", model=_llama(), ids=_ids())["loss"]
    torch.testing.assert_close(loss, _llama()(input_ids=_ids(), labels=_ids()).loss)


def test_the_callback_example_trains_with_the_patched_model(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from cce_dist.heads.lazy import is_lazy

    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
    data = [{"input_ids": row, "labels": row} for row in _ids()]
    trainer = _run_example("callback", model=_llama(), arguments=arguments, data=data, Trainer=Trainer)["trainer"]
    assert trainer.state.global_step == 1
    assert is_lazy(trainer.model.lm_head)


def test_the_settings_table_has_every_key_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", REFERENCE, re.M))
    assert {key: json.loads(value) for key, value in rows.items()} == CCEConfig().model_dump()


def test_the_json_sections_are_valid() -> None:
    (section,) = re.findall(r'`("cce_dist": {.*?})`', README)
    CCEConfig.from_mapping(json.loads("{" + section + "}")["cce_dist"], "README")


def test_the_output_of_the_planner_is_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = re.findall(r"<!-- output: cce-dist plan (.*?) -->", PAGES["docs/plan.md"])
    assert f"cce-dist plan {words}`" in README
    assert main(["plan", *words.split()]) == 0
    assert missing(shown("cce-dist plan"), capsys.readouterr().out) == []


DOCUMENTS = ["CONTRIBUTING.md", "launch/README.md", *PAGES]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_paths_that_a_document_names_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"\b(?:(?:launch|configs|cce_dist|tests)/[\w./-]+\w|benchmarks/\w+\.py)", text)
    assert [path for path in sorted(set(named)) if not (ROOT / path).exists()] == []


def anchors(text: str) -> set[str]:
    """Those that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_links_of_a_document_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / document).parent / path) if path else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    assert wrong == []


def test_the_benchmark_commands_of_the_documents_have_options_that_exist() -> None:
    texts = [(ROOT / document).read_text().replace("\\\n", " ") for document in DOCUMENTS]
    commands = [found for text in texts for found in re.findall(r"benchmarks/(\w+)\.py (--[^#`\n]*)", text)]
    assert len(commands) > 10
    for script, words in commands:
        source = (ROOT / f"benchmarks/{script}.py").read_text()
        assert [option for option in re.findall(r"--[\w-]+", words) if f'"{option}"' not in source] == [], script


def test_every_page_is_linked_from_readme() -> None:
    assert {page for page in PAGES if page.startswith("docs/")} == set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README))


TABLES = (
    ("ranks", ["ranks_table"]),
    ("train", ["train_table", "train_summary"]),
    ("convergence", ["convergence_table"]),
    ("hostile", ["hostile_table"]),
)
"""Of the result files' names and of report.py's functions."""


def test_the_measured_figures_are_those_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    report = pytest.importorskip("matplotlib") and _benchmark_report(monkeypatch)
    results = ROOT / "benchmarks/results"
    stored = report.table(report.load(sorted(results.glob("loss-*.json")))).splitlines()
    for kind, tables in TABLES:
        for path in results.glob(f"{kind}-*.json"):
            for table in tables:
                stored += getattr(report, table)(json.loads(path.read_text())).splitlines()
    for page, part, least in (
        ("docs/measured.md", PAGES["docs/measured.md"], 10),
        ("docs/accuracy.md", PAGES["docs/accuracy.md"].split("## A training run")[1], -1),  # none before they are made
        ("README.md", README.split("## What it gives")[1].split("## ")[0], 6),
    ):
        quoted = [line for line in part.splitlines() if line.startswith("|")]
        assert len(quoted) > least, page
        assert set(quoted) <= set(stored), page


def _benchmark_report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report

    return sys.modules.pop(report.__name__)
