"""
Work in small pieces that an interruption doesn't undo.

A stage of hours makes very many small results: an image, a caption, a score, each known by a key. Every finished batch
of them becomes one parquet file that appears complete or not at all. Started again, the stage asks which keys are
there and makes the others; with how large batches or how many processes the first ones were made doesn't matter.
"""

import errno
import hashlib
import logging
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features


logger = logging.getLogger(__name__)

Key = tuple[int | str, ...]

# Batches that are encoded while a model draws on. One thread would hold up a model of more than 12 images of 1024 px a
# second.
WRITERS = 4


class Parts:
    """
    A folder of results by key.

    Args:
        folder (`Path`): made when it isn't there.
        key (`tuple[str, ...]`): the columns, of numbers or strings, that together tell results apart.
        features ([`~datasets.Features`]): of all columns, those of the key among them. An image is written as
            `{"bytes": ..., "path": None}`.
    """

    def __init__(self, folder: Path, key: tuple[str, ...], features: Features):
        self.folder = folder
        self.key = key
        self.schema = features.arrow_schema
        self._places: dict[Key, tuple[Path, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def scan(self) -> set[Key]:
        """
        The keys of all results on disk. A file that can't be read, as a power cut may leave one, is removed: its
        results are made again.

        With several processes all must have looked before the first writes (`wait_for_everyone`), or they would divide
        different rests among them.
        """
        self._places = {}
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                columns = pq.read_table(path, columns=list(self.key)).to_pydict()
            except (pa.ArrowInvalid, OSError) as error:
                # A file that is damaged has no error number: one that another process has just removed has, and one
                # of a network drive that is away, which must not cost the results
                if getattr(error, "errno", None) not in (None, errno.ENOENT):
                    raise
                logger.warning(f"{path} can't be read ({error}); what it held is made again.")
                path.unlink(missing_ok=True)
                continue
            for index, key in enumerate(zip(*(columns[name] for name in self.key), strict=True)):
                self._places.setdefault(key, (path, index))
        return set(self._places)

    def write(self, columns: dict[str, list[Any]]) -> None:
        """Add results, at least one, as one file. Returns when they are on disk."""
        table = pa.table(columns, schema=self.schema)
        keys = repr(list(zip(*(columns[name] for name in self.key), strict=True)))
        path = self.folder / f"{hashlib.blake2b(keys.encode(), digest_size=12).hexdigest()}.parquet"
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with open(unfinished, "wb") as file:
            pq.write_table(table, file, use_dictionary=False, write_statistics=False)  # of images they cost time only
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    def read(self, keys: Sequence[Key], columns: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """
        The results of `keys`, which the last [`scan`] has found, in their order. Each file is opened once, so ask for
        keys that were made together in one call, and for no more of them than memory holds.
        """
        missing = [key for key in keys if key not in self._places]
        if missing:
            raise KeyError(
                f"{len(missing)} of {len(keys)} results are not in {self.folder}, the first being {missing[0]}: did "
                "another run or another machine's cache interfere? The same command makes them again."
            )
        wanted: dict[Path, list[tuple[int, int]]] = defaultdict(list)
        for place, key in enumerate(keys):
            path, index = self._places[key]
            wanted[path].append((index, place))
        results: list[dict[str, Any]] = [{}] * len(keys)
        for path, places in wanted.items():
            names = None if columns is None else list(columns)
            rows = pq.read_table(path, columns=names).take([index for index, _ in places]).to_pylist()
            for (_, place), row in zip(places, rows, strict=True):
                results[place] = row
        return results


class Writer:
    """
    Encodes and writes batches while a model makes the next ones, at most `WRITERS` of them at a time.

    What was put is on disk when the context ends, also when it ends in an error. An error of its own is raised by the
    next `put`, or at the end.

    Args:
        parts ([`Parts`]): what is written to.
        encode (`Callable`): from the columns that are put to those that are written.
    """

    def __init__(self, parts: Parts, encode: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]):
        self.parts, self.encode = parts, encode
        self.pool = ThreadPoolExecutor(WRITERS)
        self.waiting: deque[Future[None]] = deque()

    def put(self, columns: dict[str, list[Any]]) -> None:
        if len(self.waiting) == WRITERS:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(lambda: self.parts.write(self.encode(columns))))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.pool.shutdown()
        if kind is None:
            for future in self.waiting:
                future.result()


def missing_batches(keys: Iterable[Key], done: Set[Key], batch_size: int) -> list[list[int]]:
    """
    Places of the keys that are not `done`, in batches.

    Their bounds don't depend on what is done, nor on how many processes share the batches: kernels round differently
    at another batch size, and so an interrupted run, or one of several processes, gives the same numbers.
    """
    numbered = enumerate(keys)
    batches = iter(lambda: list(islice(numbered, batch_size)), [])
    rest = ([place for place, key in batch if key not in done] for batch in batches)
    return [batch for batch in rest if batch]
