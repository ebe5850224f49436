"""Text to batches: which text, its tokenizer, its tokens on disk, and the order in which they are trained on.

The order is a function of the tokens, the seed and the number of windows consumed alone, so a checkpoint holds no more
than these, and a run goes on with another number of ranks where it was.

Shapes: B sequences of a micro-batch, L tokens of a sequence.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from cce_dist.train.settings import DataSettings

IGNORED = -100


class Batch(NamedTuple):
    """``labels_BL`` are the inputs moved by one: position l of the logits is compared with position l of the labels."""

    inputs_BL: Tensor
    labels_BL: Tensor


class Corpus:
    """The tokens of the text in windows of L, the last ones held out.

    Raises:
        ValueError: the text is too short.
    """

    def __init__(self, folder: Path, settings: DataSettings, seed: int) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
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

    For one process alone; the others read afterwards.

    Raises:
        ValueError: no text was found, or the tokenizer lacks the end-of-text token.
    """
    files = list(_text_files(settings))
    if not files:
        raise ValueError(f"no file in {settings.text} ends in one of {settings.suffixes}; set data.suffixes.")
    fingerprint = _fingerprint(files, settings)
    manifest = folder / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text())["fingerprint"] == fingerprint:
        return
    folder.mkdir(parents=True, exist_ok=True)
    manifest.unlink(missing_ok=True)
    documents = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    tokenizer = _tokenizer(documents, settings)
    tokenizer.save(str(folder / "tokenizer.json"))
    end_id = tokenizer.token_to_id(settings.end_of_text)
    if end_id is None:
        raise ValueError(
            f"the tokenizer has no token {settings.end_of_text!r}; name its end-of-text token in data.end_of_text."
        )
    ids = [[*encoding.ids, end_id] for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)]
    tokens = np.concatenate([np.asarray(document, dtype=np.uint32) for document in ids])
    np.save(folder / "tokens.npy", tokens)
    written = manifest.with_suffix(".tmp")
    written.write_text(
        json.dumps(
            {
                "fingerprint": fingerprint,
                "tokens": hashlib.sha256(tokens.tobytes()).hexdigest(),
                "vocab_size": tokenizer.get_vocab_size(),
                "end_id": end_id,
            }
        )
    )
    written.replace(manifest)  # last and at once: a manifest means that the rest is complete


def _text_files(settings: DataSettings) -> Iterator[Path]:
    root = settings.text if settings.text is not None else Path(sysconfig.get_paths()["stdlib"])
    left = settings.max_bytes
    for path in [root] if root.is_file() else _walk(root, settings):
        yield path
        left -= path.stat().st_size
        if left <= 0:
            return


def _walk(root: Path, settings: DataSettings) -> Iterator[Path]:
    skipped = {"site-packages", "test", "tests"} if settings.text is None else set()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - skipped)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(settings.suffixes))


def _fingerprint(files: list[Path], settings: DataSettings) -> str:
    """Of everything that the tokens depend on; files by their name, size and time."""
    tokenizer = [] if settings.tokenizer is None else [settings.tokenizer]
    facts = [
        "tokens",  # what the manifest holds beside the sizes
        settings.model_dump_json(include={"text", "tokenizer", "vocab_size", "end_of_text"}),
        *(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in [*files, *tokenizer]),
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
