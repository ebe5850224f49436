"""Settings: defaults, validation, and errors that name the key, the value and what is allowed."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cce_dist import CCEConfig, VocabShard, linear_cross_entropy, linear_logprobs
from cce_dist.loss.settings import (
    CallSettings,
    LogprobSettings,
    LossSettings,
    TokenSettings,
    check_settings,
    contract,
    resolve,
)

WHERE = 'the section "cce_dist" of ds.json'


def test_the_defaults_are_those_of_the_loss() -> None:
    config = CCEConfig()
    assert config.enabled
    assert config.loss_kwargs() == {
        "gradient": None,
        "tail": True,
        "filter_eps": None,
        "backend": "auto",
        "first_pass": "auto",
        "fp32_head": False,
        "frequent_rows": None,
        "workspace_mb": None,
        "seed": None,
        "max_tokens": None,
        "agreement": "every_call",
    }


def test_settings_reach_the_loss() -> None:
    config = CCEConfig(gradient="filtered", filter_eps=0.25, tail=False, workspace_mb=3, backend="torch", seed=4)
    hidden, weight = torch.randn(3, 8), torch.randn(700, 8, requires_grad=True)
    labels = torch.tensor([1, 2, 3])
    gradients = []
    for settings in (config.loss_kwargs(), {"gradient": "filtered", "filter_eps": 0.25, "tail": False}, {}):
        (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, **settings), weight)
        gradients.append(gradient)
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize(
    ("settings", "device", "chosen"),
    [
        ({}, "cpu", "exact"),
        ({}, "cuda", "unbiased"),
        ({"backend": "torch"}, "cuda", "exact"),
        ({"backend": "triton"}, "cpu", "unbiased"),
        ({"filter_eps": 0.01}, "cpu", "unbiased"),
        ({"gradient": "filtered"}, "cpu", "filtered"),
        ({"gradient": "exact"}, "cuda", "exact"),
    ],
)
def test_the_default_gradient_is_the_fast_one_of_the_device(settings: dict[str, Any], device: str, chosen: str) -> None:
    assert CCEConfig(**settings).gradient_on(torch.device(device)) == chosen


def test_the_loss_takes_the_default_gradient_of_its_backend() -> None:
    """On the torch backend exact: the gradient is that of the exact mode, bit by bit."""
    hidden, weight, labels = torch.randn(5, 8), torch.randn(700, 8, requires_grad=True), torch.tensor([1, 2, 3, 4, 5])
    default, exact, unbiased = (
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, **settings), weight)[0]
        for settings in ({}, {"gradient": "exact"}, {"gradient": "unbiased", "filter_eps": 0.3})
    )
    assert torch.equal(default, exact)
    assert not torch.equal(default, unbiased)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CCEConfig().gradient = "exact"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("mapping", "parts"),
    [
        ({"gradiant": "exact"}, ["gradiant", "exact", "unknown", "gradient"]),
        ({"gradient": "approximate"}, ["gradient", "approximate", "unbiased", "exact", "filtered"]),
        ({"backend": "cuda"}, ["backend", "cuda", "auto", "triton", "torch"]),
        ({"filter_eps": -1}, ["filter_eps", "-1", "greater than or equal to 0"]),
        ({"filter_eps": 1.0}, ["filter_eps", "1.0", "less than 1"]),
        ({"filter_eps": "much"}, ["filter_eps", "much", "number"]),
        ({"filter_eps": "auto"}, ["filter_eps", "auto", "number"]),
        ({"filter_eps": float("nan")}, ["filter_eps", "nan"]),
        ({"workspace_mb": 0}, ["workspace_mb", "0", "greater than or equal to 1"]),
        ({"workspace_mb": 1.5}, ["workspace_mb", "1.5", "integer"]),
        ({"max_tokens": 0}, ["max_tokens", "0"]),
        ({"vocab_parallel_size": 0}, ["vocab_parallel_size", "0"]),
        ({"materialize": "never"}, ["materialize", "never", "warn", "raise"]),
        ({"enabled": "perhaps"}, ["enabled", "perhaps", "boolean"]),
        ({"tail": None}, ["tail", "None", "boolean"]),
        ({"seed": "x"}, ["seed", "x", "integer"]),
        ({"seed": 2**63}, ["seed", str(2**63), "less than"]),
        ({"agreement": "never"}, ["agreement", "never", "every_call", "first_call"]),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_what_is_allowed(mapping: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match="is not valid") as caught:
        CCEConfig.from_mapping(mapping, WHERE)
    text = str(caught.value)
    assert not isinstance(caught.value, ValidationError)
    for part in [WHERE, *parts]:
        assert part in text, text


def test_all_faults_come_in_one_text() -> None:
    with pytest.raises(ValueError, match="is not valid") as caught:
        CCEConfig.from_mapping({"gradient": 3, "colour": "red", "workspace_mb": -2}, WHERE)
    for part in ("gradient = 3", "colour", "workspace_mb = -2"):
        assert part in str(caught.value)


@pytest.mark.parametrize("mapping", [None, [], "exact", 3])
def test_a_section_must_be_a_mapping(mapping: Any) -> None:
    with pytest.raises(ValueError, match="must be a mapping"):
        CCEConfig.from_mapping(mapping, WHERE)


def test_a_valid_section_is_taken_as_it_is() -> None:
    mapping = {"gradient": "exact", "workspace_mb": 128, "materialize": "raise", "vocab_parallel_size": 2}
    config = CCEConfig.from_mapping(mapping, WHERE)
    assert {key: getattr(config, key) for key in mapping} == mapping
    assert CCEConfig.from_mapping({}, WHERE) == CCEConfig()


# One setting, one field: what else names the settings follows from it


functions = pytest.mark.parametrize(
    ("function", "kind"),
    [(linear_cross_entropy, CallSettings), (linear_logprobs, LogprobSettings)],
    ids=["loss", "log-probabilities"],
)


@functions
def test_the_signature_is_the_settings_fields(function: Callable[..., Any], kind: type[TokenSettings]) -> None:
    parameters = inspect.signature(function).parameters
    own = ["hidden", "weight", "labels", "bias", "shard", "adapter", *(["return_lse"] if kind is CallSettings else [])]
    assert list(parameters) == [*own, *kind.model_fields]
    defaults = {name: p.default for name, p in parameters.items() if name not in own}
    assert defaults == {name: field.default for name, field in kind.model_fields.items()}


@functions
def test_the_docstring_describes_every_setting(function: Callable[..., Any], kind: type[TokenSettings]) -> None:
    text = inspect.getdoc(function)
    assert text is not None
    arguments = text[text.index("Args:") : text.index("Returns:")]
    described = {
        name for names in re.findall(r"^    (\w[\w,\s]*):", arguments, re.M) for name in re.split(r",\s+", names)
    }
    assert set(inspect.signature(function).parameters) == described


@functions
def test_every_setting_of_a_config_reaches_the_loss_and_the_ranks_agree_on_it(
    function: Callable[..., Any], kind: type[TokenSettings]
) -> None:
    config = CCEConfig()
    assert set(config.loss_kwargs()) == set(LossSettings.model_fields) < set(kind.model_fields)
    hidden, weight, labels = torch.zeros(3, 8), torch.zeros(40, 8), torch.zeros(3).long()
    settings = check_settings(config.loss_kwargs(), kind)
    shard = VocabShard.whole(40)
    alike = contract(hidden, weight, None, shard, settings, resolve(settings, hidden, labels, shard, True))
    may_differ = {name for name, field in kind.model_fields.items() if field.json_schema_extra}
    assert (
        set(kind.model_fields) - set(alike)
        == may_differ
        == {"seed", "num_valid_tokens", "class_weights", "token_weights", "grad_accumulator"} & set(kind.model_fields)
    )


def test_the_table_of_settings_has_every_key_with_its_default() -> None:
    text = (Path(__file__).parent.parent / "docs/reference.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text[text.index("## Settings") :], re.M))
    assert table == {name: json.dumps(field.default) for name, field in CCEConfig.model_fields.items()}
