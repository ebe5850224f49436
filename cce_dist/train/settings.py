"""What the trainer can be told: one YAML file, and ``key=value`` overrides with dotted keys.

Paths are relative to the working directory.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, DirectoryPath, Field, FilePath, ValidationError, model_validator

from cce_dist.config import CCEConfig


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(_Section):
    """Exactly one of the two."""

    config: dict[str, Any] | None = None
    """A Hugging Face config: ``model_type`` and what differs from its defaults. vocab_size is the tokenizer's."""
    path: DirectoryPath | None = None
    """A folder with config.json and weights, as ``save_pretrained`` writes it."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "ModelSettings":
        if (self.config is None) == (self.path is None):
            raise ValueError("give either model.config or model.path")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config must name a model_type, such as llama")
        return self


class DataSettings(_Section):
    text: FilePath | DirectoryPath | None = None
    """A file, or a folder searched for ``suffixes``; None: the source of Python's standard library."""
    suffixes: tuple[str, ...] = (".py", ".txt", ".md")
    max_bytes: int = Field(default=4_000_000, ge=1)
    """Files are taken folder by folder, in alphabetical order, until they hold this much; the last is cut off there.
    Only regular files are read."""
    tokenizer: FilePath | None = None
    """A tokenizer.json; None: the one in ``model.path``, else a byte-level BPE is trained on the text."""
    vocab_size: int = Field(default=8192, ge=257)
    """Of the tokenizer to be trained."""
    end_of_text: str = "<|endoftext|>"
    """The token put after each file. What follows it is not predicted from it."""
    sequence_length: int = Field(default=128, ge=2)
    eval_share: float = Field(default=0.02, gt=0, lt=1)
    """The last part of the text, held out from training."""
    cache: Path | None = None
    """Where the tokenizer and the tokens are kept, for other runs too; None: ``output``/data."""


class BatchSettings(_Section):
    micro: int = Field(default=4, ge=1)
    """Sequences per rank in one forward."""
    accumulation: int = Field(default=1, ge=1)
    """Forwards per optimizer step."""


class OptimizerSettings(_Section):
    """AdamW; the learning rate rises linearly, then falls along a cosine to a tenth."""

    learning_rate: float = Field(default=1e-3, gt=0)
    warmup_steps: int = Field(default=10, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)


class MeshSettings(_Section):
    """How FSDP2 lays the ranks out: replicas x shards x tensor_parallel of them."""

    replicas: int = Field(default=1, ge=1)
    """HSDP: copies of the model, each sharded over the ranks that are left."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that split every layer among them, and read the same text."""


class CheckpointSettings(_Section):
    every: int | None = Field(default=None, ge=1)
    """Steps between two; None: only at the end and on Ctrl-C."""
    keep: int = Field(default=2, ge=1)
    resume: bool = False
    """Go on from the newest checkpoint of ``output``, if there is one."""


class Settings(_Section):
    output: Path
    """Folder of metrics.jsonl and checkpoints."""
    model: ModelSettings
    data: DataSettings = DataSettings()
    engine: Literal["deepspeed", "fsdp2", "none"]
    """none: plain PyTorch in a single process."""
    head: Literal["cce", "plain"] = "cce"
    """plain: the stock head, with full logits."""
    cce: CCEConfig | None = None
    """Settings of the sharded head. What is not given here is as in the DeepSpeed JSON's section, or the default."""
    mesh: MeshSettings = MeshSettings()
    deepspeed: FilePath | None = None
    """DeepSpeed's JSON. Its batch sizes, clipping, optimizer and scheduler are replaced by the settings here; a
    precision other than ``dtype`` is refused."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What the model computes in; its parameters stay fp32."""
    seed: int = 0
    steps: int = Field(default=100, ge=1)
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    timeout: float = Field(default=1800, gt=0)
    """Seconds that a rank waits for the others before it ends with an error: more than preparing the text takes, which
    rank 0 does for all, and more than writing a checkpoint takes."""
    log_every: int = Field(default=1, ge=1)
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations; None: only at the end."""
    eval_batches: int = Field(default=8, ge=1)
    nonfinite_steps: int = Field(default=5, ge=1)
    """Steps in a row whose loss or gradient norm is NaN or infinite that end the run with an error. From the first of
    them on no checkpoint is written or removed."""
    measure_head_memory: bool = False
    """Measure the head's memory in the second step of the run; that step is slower."""
    tensorboard: bool = False
    """Write the metrics as TensorBoard events too, into ``output``/tensorboard; needs the extra of that name."""

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if (self.engine == "deepspeed") != (self.deepspeed is not None):
            if self.deepspeed is None:
                raise ValueError(
                    "engine: deepspeed needs a path in deepspeed, got null; add "
                    "deepspeed=configs/deepspeed/zero3.json or another file, or choose engine: fsdp2"
                )
            raise ValueError(
                f"engine: {self.engine} and deepspeed: {self.deepspeed} exclude each other; add deepspeed=null (in "
                "YAML deepspeed: null), or choose engine: deepspeed"
            )
        if self.engine != "fsdp2" and self.mesh != MeshSettings():
            raise ValueError(f"mesh is for engine: fsdp2; leave it out with engine: {self.engine}")
        if self.cce is not None and not self.cce.enabled:
            raise ValueError("cce.enabled is for DeepSpeed's JSON; here head: plain switches the sharded head off")
        for key, path in (("output", self.output), ("data.cache", self.data.cache)):
            if path is not None and (file := next((p for p in (path, *path.parents) if p.exists()), path)).is_file():
                raise ValueError(f"{key} = {path}: must be a folder, but {file} is a file; name another folder")
        if self.tensorboard and find_spec("tensorboard") is None:
            raise ValueError("tensorboard: true needs a package: pip install 'cce_dist[tensorboard]', or set it false")
        return self

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json to use; None: one is trained."""
        in_model = None if self.model.path is None else self.model.path / "tokenizer.json"
        return (
            in_model
            if self.data.tokenizer is None and in_model is not None and in_model.is_file()
            else self.data.tokenizer
        )


def load(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads and validates a YAML file.

    Args:
        path: the file.
        overrides: ``key=value`` each; dots lead into sections, the value is YAML: ``optimizer.learning_rate=3e-4``.

    Raises:
        ValueError: a file that is not there or no YAML mapping, an unknown key, a value that is not allowed; the text
            names all of them, what is allowed, and whether they come from the file or from the overrides.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(raw).__name__}.")
    changed = dict(raw)
    for override in overrides:
        _override(changed, override)
    valid, faults = _validate(changed)
    if valid is not None:
        return valid
    _, of_file = _validate(raw)
    told = {
        f"{path} is not valid": [fault for fault in faults if fault in of_file],
        f"the command line is not valid, on top of {path}": [fault for fault in faults if fault not in of_file],
    }
    raise ValueError("\n".join("\n  ".join([f"{where}:", *found]) for where, found in told.items() if found))


def _validate(raw: dict[str, Any]) -> tuple[Settings | None, list[str]]:
    """The settings, or what is wrong."""
    try:
        return Settings.model_validate(raw), []
    except ValidationError as error:
        return None, [_describe(fault) for fault in error.errors()]


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"an override must be key=value, got {override!r}.")
    *sections, last = key.split(".")
    for name in sections:
        section = raw.get(name)
        raw[name] = raw = dict(section) if isinstance(section, Mapping) else {}
    try:
        raw[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {override!r} is no YAML: {error}") from None


def _describe(fault: Any) -> str:
    keys = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        return f"{'.'.join(keys)}: unknown key; allowed here: {', '.join(_keys_beside(keys))}."
    if fault["type"] == "missing":
        return f"{'.'.join(keys)}: is missing."
    if fault["type"] == "value_error":
        return f"{fault['msg'].removeprefix('Value error, ')}."
    return f"{'.'.join(keys)} = {fault['input']!r}: {fault['msg']}."


def _keys_beside(keys: Sequence[str]) -> list[str]:
    """The keys of the section that the last of ``keys`` stands in."""
    section: type[BaseModel] = Settings
    for key in keys[:-1]:
        annotation: Any = section.model_fields[key].annotation
        section = next(
            t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)
        )
    return list(section.model_fields)
