"""Settings: defaults, validation, and errors that name the key, the value and what is allowed."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cce_dist import CCEConfig, linear_cross_entropy
from cce_dist.arguments import gradient_on

WHERE = 'the section "cce_dist" of ds.json'


def test_the_defaults_are_those_of_the_loss() -> None:
    config = CCEConfig()
    assert config.enabled
    assert config.loss_kwargs() == {
        "gradient": None,
        "tail": True,
        "filter_eps": "auto",
        "backend": "auto",
        "first_pass": "auto",
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
    assert gradient_on(CCEConfig(**settings), torch.device(device)) == chosen


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
