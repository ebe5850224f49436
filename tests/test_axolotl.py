"""The plugin for axolotl: its settings are checked with axolotl's config, and its callback trains.

axolotl needs packages that only a GPU has, so that it is seldom installed. Where its plugin interface can be imported
(it was, of axolotl 0.19.0) the tests run against it. Elsewhere an empty class takes the place of ``BasePlugin``, whose
hooks do nothing either, and the hooks are called as the ``PluginManager`` of 0.19.0 calls them.
"""

import gc
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import architectures
import pytest
from pydantic import ValidationError

from cce_dist.heads.lazy import is_lazy

pytest.importorskip("transformers")
YAML = {"base_model": "tiny", "plugins": ["cce_dist.axolotl.CCEPlugin"], "micro_batch_size": 1}


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """cce_dist.axolotl, on axolotl's own interface or on an empty class."""
    try:
        importlib.import_module("axolotl.integrations.base")
    except ImportError:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["axolotl.integrations.base"].BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    yield importlib.import_module("cce_dist.axolotl")
    sys.modules.pop("cce_dist.axolotl")


def _plugin(axolotl: Any) -> Any:
    """As axolotl finds it: by the path in the YAML."""
    module, name = YAML["plugins"][0].rsplit(".", 1)  # type: ignore[index]
    assert sys.modules[module] is axolotl
    return getattr(axolotl, name)()


def _validated(axolotl: Any, **settings: Any) -> dict[str, Any]:
    """What is left of a YAML, by the model that the plugin names; axolotl dumps it without what is None."""
    module, name = _plugin(axolotl).get_input_args().rsplit(".", 1)
    schema = getattr(importlib.import_module(module), name)
    return dict(schema.model_validate({**YAML, **settings}).model_dump(exclude_none=True))


def test_settings_are_checked_by_name_with_axolotls_config(axolotl: Any) -> None:
    section = _validated(axolotl, cce_dist={"gradient": "exact"})["cce_dist"]
    assert section["gradient"] == "exact" and section["enabled"] is True
    assert _validated(axolotl) == {}
    with pytest.raises(ValidationError, match="(?s)axolotl config is not valid.*gradiant: unknown key"):
        _validated(axolotl, cce_dist={"gradiant": "exact"})
    with pytest.raises(ValidationError, match="must be a mapping of settings, got bool"):
        _validated(axolotl, cce_dist=True)


@pytest.mark.parametrize("other", ["liger_fused_linear_cross_entropy", "cut_cross_entropy", "chunked_cross_entropy"])
def test_another_option_that_replaces_the_loss_is_refused_unless_ours_is_off(axolotl: Any, other: str) -> None:
    with pytest.raises(ValidationError, match=f"{other} of the axolotl config"):
        _validated(axolotl, **{other: True})
    _validated(axolotl, **{other: True}, cce_dist={"enabled": False})


@pytest.mark.parametrize("enabled", [True, False])
def test_the_callback_of_the_plugin_trains_the_model_without_logits(
    axolotl: Any, tmp_path: Path, enabled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import Trainer, TrainingArguments

    config = _validated(axolotl, cce_dist={"gradient": "exact", "materialize": "raise", "enabled": enabled})
    losses, plugin, filters = [], _plugin(axolotl), list(logging.getLogger("cce_dist").filters)
    for callbacks in ([], plugin.add_callbacks_pre_trainer(config, None)):
        model = architectures.build("llama")
        rows = [{key: x[i].clone() for key, x in architectures.batch().items()} for i in range(2)]
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert is_lazy(model.lm_head) == (enabled and bool(callbacks))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plugin.post_train(config, model)
    assert logging.getLogger("cce_dist").filters == filters
    active = [record.name for record in caplog.records if "cce_dist is active" in record.getMessage()]
    assert active == ["axolotl.cce_dist"] * enabled  # axolotl's loggers alone may say what is no warning


def test_a_run_that_raises_leaves_logging_as_it_was(axolotl: Any) -> None:
    filters = list(logging.getLogger("cce_dist").filters)

    def run() -> None:
        callbacks = _plugin(axolotl).add_callbacks_pre_trainer({}, None)
        assert len(logging.getLogger("cce_dist").filters) == len(filters) + len(callbacks)
        raise MemoryError

    with pytest.raises(MemoryError) as caught:
        run()
    del caught
    gc.collect()
    assert logging.getLogger("cce_dist").filters == filters


def test_axolotl_itself_takes_the_plugin_and_refuses_an_unknown_key() -> None:
    """By its own manager and config; skipped where axolotl cannot be imported."""
    pytest.importorskip("axolotl.utils.config", exc_type=ImportError)
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    given = {
        **YAML, "learning_rate": 1e-3, "gradient_accumulation_steps": 1, "datasets": [{"path": "x", "type": "alpaca"}]
    }  # fmt: skip
    config = DictDefault({**given, "cce_dist": {"gradient": "exact"}})
    prepare_plugins(config)
    config = validate_config(config)
    assert config.cce_dist.gradient == "exact"
    (callback,) = PluginManager.get_instance().add_callbacks_pre_trainer(config, None)
    assert type(callback).__name__ == "CCECallback"
    with pytest.raises(ValidationError, match="gradiant: unknown key"):
        validate_config(DictDefault({**given, "cce_dist": {"gradiant": "exact"}}))
