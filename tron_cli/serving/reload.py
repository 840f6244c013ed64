"""The served model, and its replacement while the server runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tron_cli.errors import sentence_of
from tron_cli.files import best_checkpoint
from tron_cli.serving.recommender import Recommender

log = logging.getLogger("tron")


class ServedModel:
    """The recommender of a .pt file or a run folder, made by `load`, whose errors are passed on.

    A new model replaces the old one once it is loaded and has recommended successfully; a batch
    that is being computed is finished by the old one.
    """

    def __init__(self, path: Path, load: Callable[[Path], Recommender]) -> None:
        self._path, self._load = path, load
        self._seen = self._state()
        self.recommender = self._loaded()

    @property
    def name(self) -> str:
        return self.recommender.checkpoint.path.name

    @property
    def step(self) -> int:
        return self.recommender.checkpoint.step

    def changed(self) -> bool:
        """Return True if the file has changed since the last (re)load."""
        return self._state() != self._seen

    def reload(self) -> bool:
        """Load the current file; on any failure keep the old model, log why and return False."""
        # Taken before reading, so that a file that changes while it is read counts as changed.
        self._seen = self._state()
        try:
            self.recommender = self._loaded()
        except Exception as error:
            log.error("not reloaded, %s is still served: %s", self.name, sentence_of(error))
            return False
        log.info("reloaded: %s", self.described())
        return True

    def described(self) -> str:
        return f"{self.name}, step {self.step:,}, {self.recommender.num_items:,} items"

    def _loaded(self) -> Recommender:
        """Load and try the current file, in a thread that ends with it.

        A thread that has computed keeps OpenMP's workers. Once there are more of them in a process
        than cores, libgomp lets idle ones sleep at once instead of waiting for their next part,
        and the batches of the thread that computes answers take 1.5 times as long.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="load") as thread:
            return thread.submit(lambda: _tried(self._load(self._path))).result()

    def _state(self) -> object:
        """Return an identity of the file's current version; None where there is no file."""
        try:
            file = best_checkpoint(self._path) if self._path.is_dir() else self._path
            found = file.stat()
        except Exception:  # a folder between two checkpoints, for example
            return None
        return file, found.st_ino, found.st_mtime_ns, found.st_size


def _tried(recommender: Recommender) -> Recommender:
    """Recommend once: a model that fails must not be served, and first calls are slow."""
    recommender.recommend([recommender.item_ids[:1].tolist()], k=1)
    return recommender
