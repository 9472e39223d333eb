"""What is finished of a bundle that is not: a file beside its parts, from which a later run goes on.

The first line says what is being made, from what; each further line is one finished graph: its files, on disk and
synced before the line was, and its entry in the manifest. A line that was cut off counts as none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmexport.bundle import FileRecord
from glmexport.errors import BundleError

JOURNAL = ".journal.jsonl"
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Finished:
    """One finished graph. files: name -> size and hash. entry: what the manifest says of it."""

    files: Mapping[str, FileRecord]
    entry: dict[str, Any]


class Journal:
    """The journal of one run. identity: all that the bytes of the bundle follow from, as plain JSON values."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.finished: dict[str, Finished] = {}
        self._path = directory / JOURNAL
        self._identity = json.loads(json.dumps(identity))

    def begin(self) -> None:
        """Start it anew. Raises OSError."""
        self.finished.clear()
        with self._path.open("w", encoding="utf-8") as file:
            _add_line(file, {"identity": self._identity})

    def resume(self) -> bool:
        """Take in what an earlier run finished; false where there is no journal to go by.

        Raises BundleError, which names what differs, where that run was to make something else. Raises OSError.
        """
        lines = self._lines()
        header = next(lines, None)
        if not isinstance(header, dict) or "identity" not in header:
            return False
        different = sorted(_differences(header["identity"], self._identity, ""))
        if different:
            raise BundleError(
                f"{self._path.parent} was begun with something else: {'; '.join(different[:5])}; give what it was "
                "begun with, or leave --resume out to start anew."
            )
        for line in lines:
            try:
                files = {name: FileRecord(int(size), str(sha256)) for name, (size, sha256) in line["files"].items()}
                self.finished[str(line["graph"])] = Finished(files, dict(line["entry"]))
            except (TypeError, ValueError, KeyError, AttributeError):
                break
        return True

    def add(self, graph: str, finished: Finished) -> None:
        """Note that a graph is finished. Raises OSError."""
        self.finished[graph] = finished
        files = {name: [record.bytes, record.sha256] for name, record in finished.files.items()}
        with self._path.open("a", encoding="utf-8") as file:
            _add_line(file, {"graph": graph, "files": files, "entry": finished.entry})

    def rewrite(self) -> None:
        """Write the file anew with what is finished, without a cut-off line at its end. Raises OSError."""
        finished = dict(self.finished)
        self.begin()
        for graph, what in finished.items():
            self.add(graph, what)

    def remove(self) -> None:
        """Remove the file. Raises OSError."""
        self._path.unlink(missing_ok=True)

    def _lines(self) -> Iterator[Any]:
        """JSON values up to the first line that is none."""
        try:
            if self._path.is_symlink() or self._path.stat().st_size > MAX_BYTES:
                return
            text = self._path.read_text("utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return
        for line in text.split("\n"):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                return


def _add_line(file: Any, value: Any) -> None:
    file.write(json.dumps(value) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _differences(before: Any, now: Any, where: str) -> Iterator[str]:
    """`options.opset: 17, now 18` for everything that is not the same."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {*before, *now}:
            yield from _differences(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    elif before != now:
        yield f"{where}: {before!r:.60}, now {now!r:.60}"
