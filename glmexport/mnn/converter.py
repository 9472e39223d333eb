"""MNN's converter, run so that it can do no harm, and believed only after it is checked.

It is a native module that says it succeeded whatever happened, writes temporary files of fixed names into the working
directory and prints to the C library's stdout. So each call is a process of its own in a directory of its own, what it
prints goes to a log, and what it made leaves that directory only if every sign says that it is whole. Whether its
numbers are right is for the caller to see: nothing here can tell.

MNN's console script is never called, nor `MNN.tools`: both install packages while they run.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from glmexport.errors import ExportError, GlmExportError
from glmexport.mnn.process import last_line, run_apart

TIMEOUT = 1800.0
"""Seconds after which a conversion is stopped; one block of ChatGLM-6B in float32 takes four."""

OF_MODEL, OF_JSON, TO_JSON = "Converted Success!", "has convert to MNNModel", "has convert to JsonFile"
"""What the converter prints when it believes that it succeeded: with a model, a graph from JSON, and a dump to JSON."""

BAD_WORDS = (
    *("can't open", "[error]", "failed", "not support", "don't use block-quant", "no space left"),
    *("invalid", "does not exist"),
)
"""What it prints, in any spelling, where it did not do what it was asked for, before it says that it succeeded."""

MODULES = ("MNN", "_tools", "_mnncengine", "flatbuffers")
"""What the extra installs: of MNN's, its Python package, the converter, and the engine with its LLM part."""

LOG_BYTES = 1 << 20
TARGET = "target"

_CALL = "import sys, _tools; sys.exit(0 if _tools.mnnconvert(['mnnconvert', *sys.argv[1:]]) else 3)"


def mnn_version() -> str:
    """Version of the installed MNN. Raises GlmExportError, which says how to get it, where there is none."""
    try:
        found = version("MNN")
    except PackageNotFoundError:
        found = ""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if not found or missing:
        lacks = f" whole ({', '.join(missing)} cannot be found)" * bool(found)
        raise GlmExportError(
            f"MNN is not installed{lacks}, whose converter and engine this needs; install it with "
            "`pip install 'glmexport[mnn]'`."
        )
    return found


def mnn_of_json(document: bytes) -> bytes:
    """The binary form of a graph given as MNN's JSON. Raises ExportError where the converter does not make it."""
    with tempfile.TemporaryDirectory(prefix="glmexport-mnn-") as directory:
        source, target = Path(directory, "graph.json"), Path(directory, "graph.mnn")
        source.write_bytes(document)
        options = ["-f", "JSON", "--modelFile", str(source), "--MNNModel", "{graph.mnn}"]
        run_converter(options, {"graph.mnn": target}, success=OF_JSON)
        return target.read_bytes()


def run_converter(
    options: Sequence[str],
    outputs: Mapping[str, Path],
    log: Path | None = None,
    *,
    success: str = OF_MODEL,
    timeout: float = TIMEOUT,
    command: Sequence[str] | None = None,
) -> None:
    """Run the converter once and put what it made into its places, or raise ExportError and put nothing anywhere.

    options: its arguments, of which `{name}` for a name in `outputs` stands for a file in the private directory; other
    paths must be absolute. outputs: name of a file that it must write there -> where that file is to go; what lies
    there is removed first. log: takes all that it printed, and stays; None where the last line of it is enough.
    success: what it must print. command: what to run instead of the converter.
    """
    first = next(iter(outputs.values()))
    with _told(first), tempfile.TemporaryDirectory(prefix=".mnnconvert-", dir=first.parent) as private:
        for place in outputs.values():
            place.unlink(missing_ok=True)
        made = {name: Path(private).resolve() / name for name in outputs}
        private_paths = {f"{{{name}}}": str(path) for name, path in made.items()}
        arguments = [private_paths.get(option, option) for option in options]
        said = log or Path(private, "log")
        said.parent.mkdir(parents=True, exist_ok=True)
        complaint = run_apart(
            arguments, Path(private), said, timeout=timeout, command=command or (sys.executable, "-c", _CALL)
        ) or _complaint_of_log(said, arguments, success)
        for name, path in made.items():
            if complaint is None and (path.is_symlink() or not path.is_file()):
                complaint = f"it wrote no {name}"
            elif complaint is None and path.stat().st_size == 0:
                complaint = f"its {name} is empty"
        if complaint is not None:
            printed = f"what it printed is in {log}" if log else f"the last that it printed is {last_line(said)!r}"
            raise ExportError(
                f"MNN's converter did not make {first.name}: {complaint}; {printed}. Nothing of it was taken over."
            )
        for name, place in outputs.items():
            shutil.move(made[name], place)


@contextmanager
def _told(output: Path) -> Iterator[None]:
    """Files that the converter's caller cannot make or move, as a sentence."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ExportError(
            f"MNN's converter could not be run for {output.name}: {error.strerror or error}{where}; free some space or "
            "give another output."
        ) from error


def _complaint_of_log(log: Path, arguments: Sequence[str], success: str) -> str | None:
    """What it printed that it must not, or did not print that it must."""
    with log.open("rb") as file:
        text = file.read(LOG_BYTES).decode("utf-8", errors="replace")
    for argument in arguments:
        if os.sep in argument:  # a path may hold any word
            text = text.replace(argument, TARGET)
    for line in text.splitlines():
        if any(word in line.lower() for word in BAD_WORDS):
            return f"it printed {line.strip()!r:.160}"
    return None if success in text else "it did not say that it succeeded"
