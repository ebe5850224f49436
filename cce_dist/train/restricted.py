"""Checkpoints of strangers: files that hold pickles, read as data. What is no data in them is refused, and not run.

torch's DCP unpickles its file `.metadata` and every entry that is no tensor, and DeepSpeed its files, with whatever
they name. The checksums of a checkpoint protect from damage, not from the one who wrote them.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_METADATA = "torch.distributed.checkpoint.metadata"
# All that DCP writes into `.metadata`, torch's dtypes apart.
_CLASSES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        (_METADATA, name)
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


class Reader(FileSystemReader):
    """DCP's reader of a folder, for which `.metadata` is data.

    Raises:
        pickle.UnpicklingError: it names something else than what DCP writes.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path, ".metadata")
        with path.open("rb") as file:
            metadata = _Unpickler(file, str(path)).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError(f"{path} holds no metadata of a checkpoint.")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, name: str) -> None:
        super().__init__(file)
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(_refusal(self._name, f"{module}.{name}"))


def _member(kind: Any, name: Any) -> Enum:
    """In place of getattr, by which Python up to 3.11.3 pickles a member of an enumeration: of that alone."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"getattr of {kind}, which is no enumeration with a member {name!r}")
    member: Enum = kind[name]
    return member


def _refusal(file: object, what: str) -> str:
    return (
        f"{file} names {what}, which is no part of a checkpoint: to read it may run code, so it is not read. If you "
        "trust its author, copy the weights with the tools that it was written with."
    )


def check_deepspeed(files: Iterable[Path]) -> None:
    """Reads files that DeepSpeed would unpickle, as data and without their tensors.

    Raises:
        pickle.UnpicklingError: one names something else than what DeepSpeed writes.
    """
    with data_only(deepspeed_classes()):
        for file in files:
            try:
                torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file))
            except pickle.UnpicklingError as error:  # which recommends to read it all the same
                named = re.search(r"GLOBAL (\S+)", str(error))
                raise pickle.UnpicklingError(_refusal(file, named[1] if named else "what is no data")) from None


def deepspeed_classes() -> list[Any]:
    """What DeepSpeed's files hold beside tensors, numbers and texts."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, (_member, "builtins.getattr")]


@contextmanager
def data_only(classes: Sequence[Any] = ()) -> Iterator[None]:
    """Within, `torch.load` refuses what is no data nor of ``classes``, also where its caller asks it not to."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(list(classes)):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
