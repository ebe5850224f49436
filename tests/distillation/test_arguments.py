"""What every function of distillation has: a signature of its settings, and a docstring with each of them."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import cce_dist
from cce_dist.distillation import settings
from cce_dist.loss.settings import FunctionSettings

KINDS = {
    kind.function: kind
    for kind in vars(settings).values()
    if isinstance(kind, type) and issubclass(kind, FunctionSettings) and "function" in vars(kind)
}
functions = pytest.mark.parametrize(
    ("function", "kind"), [(getattr(cce_dist, name), kind) for name, kind in KINDS.items()], ids=KINDS
)


@functions
def test_the_signature_is_the_settings_fields(function: Callable[..., Any], kind: type[FunctionSettings]) -> None:
    parameters = inspect.signature(function).parameters
    assert list(parameters)[-len(kind.model_fields) :] == list(kind.model_fields)
    for name, field in kind.model_fields.items():
        assert parameters[name].default == field.default


@functions
def test_the_docstring_describes_every_argument_and_error(
    function: Callable[..., Any], kind: type[FunctionSettings]
) -> None:
    text = inspect.getdoc(function)
    assert text is not None and "Raises:" in text
    arguments = text[text.index("Args:") : text.index("Returns:")]
    described = {
        name for names in re.findall(r"^    (\w[\w,\s]*):", arguments, re.M) for name in re.split(r",\s+", names)
    }
    assert set(inspect.signature(function).parameters) == described


def test_all_are_exported() -> None:
    assert set(KINDS) == {name for name in cce_dist.distillation.__all__ if name[0].islower()}
    assert set(cce_dist.distillation.__all__) <= set(cce_dist.__all__)
