"""What is finished of a bundle that is not: a file beside its parts, from which a later run goes on.

The first line says what is being made, from what; each further line is one finished graph: its files, on disk and
synced before the line was, and its entry in the manifest. Each ends with its SHA-256: one that was cut off or changed
counts as none, nor do those behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmexport import names
from glmexport.bundle import FileRecord
from glmexport.errors import BundleError
from glmexport.untrusted import load_json

JOURNAL = ".journal.jsonl"
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Finished:
    """One finished graph. files: name -> size and hash. entry: what the manifest says of it."""

    files: Mapping[str, FileRecord]
    entry: dict[str, Any]


class Journal:
    """The journal of one run. identity: all that the bytes of the bundle follow from, as plain JSON values.

    finished: graph -> what there is of it.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.finished: dict[str, Finished] = {}
        self._path = directory / JOURNAL
        self._identity = json.loads(json.dumps(identity))

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
                graph, records = str(line["graph"]), line["files"]
                files = {name: FileRecord(int(size), str(sha256)) for name, (size, sha256) in records.items()}
                entry = dict(line["entry"])
            except (TypeError, ValueError, KeyError, AttributeError):
                break
            if "/" in graph or {*files} not in _possible_files(graph):
                break  # what does not fit is removed: it must be a file of ours
            self.finished[graph] = Finished(files, entry)
        return True

    def add(self, graph: str, finished: Finished) -> None:
        """Note that a graph is finished. Raises OSError."""
        with self._path.open("a", encoding="utf-8") as file:
            _write(file, _line(_of_graph(graph, finished)))
        self.finished[graph] = finished

    def rewrite(self) -> None:
        """Write the file anew with what is finished; until that is on the disk, the old one stays. Raises OSError."""
        lines = [{"identity": self._identity}, *(_of_graph(*item) for item in self.finished.items())]
        new = self._path.with_name(f"{JOURNAL}.new")
        with new.open("w", encoding="utf-8") as file:
            _write(file, "".join(map(_line, lines)))
        new.replace(self._path)

    def remove(self) -> None:
        """Remove the file. Raises OSError."""
        self._path.unlink(missing_ok=True)

    def _lines(self) -> Iterator[Any]:
        """JSON values up to the first line that is none."""
        try:
            status = self._path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                return
            text = self._path.read_text("utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            return
        for line in text.split("\n"):
            value, _, digest = line.rpartition(" ")
            if digest != _digest(value):
                return
            try:
                yield load_json(value)
            except (ValueError, RecursionError):
                return


def _possible_files(graph: str) -> Iterator[set[str]]:
    """The files of a finished graph, for each runtime and all flavors that there may be."""
    mnn, onnx = ({names.graph_file(graph, kind), names.data_file(graph, kind)} for kind in (names.MNN, names.ONNX))
    fast = {names.in_flavor(file, names.ORT) for file in onnx}
    yield from (mnn, onnx, fast, onnx | fast)


def _of_graph(graph: str, finished: Finished) -> dict[str, Any]:
    files = {name: [record.bytes, record.sha256] for name, record in finished.files.items()}
    return {"graph": graph, "files": files, "entry": finished.entry}


def _line(value: Any) -> str:
    text = json.dumps(value)
    return f"{text} {_digest(text)}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(file: Any, text: str) -> None:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _differences(before: Any, now: Any, where: str) -> Iterator[str]:
    """`options.opset: 17, now 18` for everything that is not the same."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {*before, *now}:
            yield from _differences(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    elif before != now:
        yield f"{where}: {before!r:.60}, now {now!r:.60}"
