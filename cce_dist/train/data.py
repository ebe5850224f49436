"""Text to batches: which text, its tokenizer, its tokens on disk, and the order in which they are trained on.

The order is a function of the tokens, the seed and the number of windows consumed alone, so a checkpoint holds no more
than these, and a run goes on with another number of ranks where it was.

Shapes: B sequences of a micro-batch, L tokens of a sequence.
"""

import codecs
import hashlib
import json
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from cce_dist.train.lock import locked
from cce_dist.train.settings import DataSettings

IGNORED = -100


class Batch(NamedTuple):
    """``labels_BL`` are the inputs moved by one: position l of the logits is compared with position l of the labels."""

    inputs_BL: Tensor
    labels_BL: Tensor


class _Text(NamedTuple):
    """What is read of a file: its first ``bytes``."""

    path: Path
    bytes: int


class Corpus:
    """The tokens of the text in windows of L, the last ones held out.

    Raises:
        ValueError: the text is too short.
    """

    def __init__(self, folder: Path, settings: DataSettings, seed: int) -> None:
        manifest = _read_manifest(folder / "manifest.json")
        self.vocab_size: int = manifest["vocab_size"]
        self._end_id: int = manifest["end_id"]
        self._tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self._length = settings.sequence_length
        self._seed = seed
        windows = (len(self._tokens) - 1) // self._length
        self.eval_windows = max(int(windows * settings.eval_share), 1)
        self.train_windows = windows - self.eval_windows
        facts = [manifest["tokens"], self._length, self.train_windows]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        """Of what the order means: the tokens and how they are cut into windows. With the seed it fixes every batch."""
        if self.train_windows < 1:
            raise ValueError(
                f"the text has {len(self._tokens)} tokens: too few for one window of {self._length} to "
                "train on and one to evaluate on. Give more text, or shorten data.sequence_length."
            )

    def train_batch(self, first: int, size: int) -> Batch:
        """Windows number ``first`` to ``first + size - 1`` of the run; each pass over the text has its own order."""
        places = (divmod(index, self.train_windows) for index in range(first, first + size))
        return self._batch([int(self._order(epoch)[place]) for epoch, place in places])

    def eval_batch(self, first: int, size: int) -> Batch:
        """Held-out windows; beyond their end, windows whose labels are all ignored."""
        wanted = [self.train_windows + index for index in range(first, first + size)]
        batch = self._batch([min(window, self.train_windows + self.eval_windows - 1) for window in wanted])
        batch.labels_BL[torch.arange(first, first + size) >= self.eval_windows] = IGNORED
        return batch

    def _batch(self, windows: list[int]) -> Batch:
        starts = [window * self._length for window in windows]
        rows = np.stack([self._tokens[start : start + self._length + 1] for start in starts])
        tokens = torch.from_numpy(rows.astype(np.int64))
        inputs_BL, labels_BL = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return Batch(inputs_BL, labels_BL.masked_fill(inputs_BL == self._end_id, IGNORED))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return _permutation(self.train_windows, self._seed, epoch)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(size)


def prepare(folder: Path, settings: DataSettings) -> None:
    """Writes tokenizer.json, tokens.npy and manifest.json into ``folder``, unless they are there for the same text.

    For one process of a run, the others read afterwards; runs that share the folder wait for each other.

    Raises:
        ValueError: no text was found, the tokenizer lacks the end-of-text token, or the folder holds a manifest of
            something else.
    """
    files = list(_text_files(settings))
    if not files:
        raise ValueError(f"no file in {settings.text} ends in one of {settings.suffixes}; set data.suffixes.")
    fingerprint = _fingerprint(files, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", f"data.cache={folder}", wait=True):
        manifest = folder / "manifest.json"
        if not manifest.exists() or _read_manifest(manifest)["fingerprint"] != fingerprint:
            manifest.unlink(missing_ok=True)
            _write(folder, [_read(file) for file in files], fingerprint, settings)


def _write(folder: Path, documents: list[str], fingerprint: str, settings: DataSettings) -> None:
    tokenizer = _tokenizer(documents, settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    end_id = tokenizer.token_to_id(settings.end_of_text)
    if end_id is None:
        raise ValueError(
            f"the tokenizer has no token {settings.end_of_text!r}; name its end-of-text token in data.end_of_text."
        )
    ids = [[*encoding.ids, end_id] for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)]
    tokens = np.concatenate([np.asarray(document, dtype=np.uint32) for document in ids])
    np.save(folder / "tokens.new.npy", tokens)
    (folder / "tokens.new.npy").replace(folder / "tokens.npy")  # another run may have the old one open
    manifest = {
        "fingerprint": fingerprint,
        "tokens": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "vocab_size": tokenizer.get_vocab_size(),
        "end_id": end_id,
    }
    (folder / "manifest.tmp").write_text(json.dumps(manifest))
    (folder / "manifest.tmp").replace(folder / "manifest.json")  # last and at once: with it, the rest is complete


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        if isinstance(manifest, dict) and {"fingerprint", "tokens", "vocab_size", "end_id"} <= manifest.keys():
            return manifest
        fault = "it has other keys"
    except ValueError as error:
        fault = str(error)
    raise ValueError(f"{path} is none that the trainer wrote ({fault}): choose another data.cache, or remove it.")


def _text_files(settings: DataSettings) -> Iterator[_Text]:
    root = settings.text if settings.text is not None else Path(sysconfig.get_paths()["stdlib"])
    left = settings.max_bytes
    for path in [root] if root.is_file() else _walk(root, settings):
        try:
            status = path.stat()
        except OSError as error:  # a link that leads nowhere
            _skip(path, error.strerror)
            continue
        if not stat.S_ISREG(status.st_mode):  # to open a FIFO may take forever
            _skip(path, "it is no regular file")
            continue
        yield _Text(path, min(left, status.st_size))
        left -= status.st_size
        if left <= 0:
            return


def _walk(root: Path, settings: DataSettings) -> Iterator[Path]:
    skipped = {"site-packages", "test", "tests"} if settings.text is None else set()
    for folder, subfolders, names in os.walk(root, onerror=lambda error: _skip(error.filename, error.strerror)):
        subfolders[:] = sorted(set(subfolders) - skipped)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(settings.suffixes))


def _skip(path: Path | str, why: str | None) -> None:
    print(f"data.text: {path} is left out: {why}", file=sys.stderr, flush=True)


def _read(text: _Text) -> str:
    with text.path.open("rb") as file:
        contents = file.read(text.bytes)
    # A character that is cut off at the end is left out; line ends are those of text files.
    decoded = codecs.getincrementaldecoder("utf-8")("replace").decode(contents)
    return decoded.replace("\r\n", "\n").replace("\r", "\n")


def _fingerprint(files: list[_Text], settings: DataSettings) -> str:
    """Of everything that the tokens depend on; files by their name, size and time."""
    read = dict(files)
    if settings.tokenizer is not None:
        read[settings.tokenizer] = settings.tokenizer.stat().st_size
    facts = [
        "tokens",  # what the manifest holds beside the sizes
        settings.model_dump_json(include={"text", "tokenizer", "vocab_size", "end_of_text"}),
        *(f"{path} {bytes} {path.stat().st_size} {path.stat().st_mtime_ns}" for path, bytes in read.items()),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _tokenizer(documents: list[str], settings: DataSettings) -> Tokenizer:
    if settings.tokenizer is not None:
        try:
            return Tokenizer.from_file(str(settings.tokenizer))
        except Exception as error:  # the package has no class of its own
            raise ValueError(f"{settings.tokenizer} is no tokenizer.json: {error}.") from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[settings.end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer
