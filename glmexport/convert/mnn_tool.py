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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from glmexport.errors import ExportError, GlmExportError

TIMEOUT = 1800.0
"""Seconds after which a conversion is stopped; one block of ChatGLM-6B in float32 takes four."""

SUCCESS = ("Converted Success!", "has convert to JsonFile")
"""What the converter prints when it believes that it succeeded: for models, and for a dump to JSON."""

BAD_WORDS = ("can't open", "[error]", "failed", "not support", "don't use block-quant", "no space left")
"""What it prints, in any spelling, where it did not do what it was asked for, before it says that it succeeded."""

LOG_BYTES = 1 << 20
SOURCE = "source"
TARGET = "target"

_CALL = "import sys, _tools; sys.exit(0 if _tools.mnnconvert(['mnnconvert', *sys.argv[1:]]) else 3)"


def mnn_version() -> str:
    """Version of the installed MNN. Raises GlmExportError, which says how to get it, where there is none."""
    try:
        if importlib.util.find_spec("MNN") is not None:
            return version("MNN")
    except PackageNotFoundError:
        return "not installed as a package"
    raise GlmExportError("MNN is not installed, which this needs; install it with `pip install glmexport[mnn]`.")


def run_converter(
    options: Sequence[str],
    outputs: Mapping[str, Path],
    log: Path,
    *,
    timeout: float = TIMEOUT,
    command: Sequence[str] | None = None,
) -> None:
    """Run the converter once and put what it made into its places, or raise ExportError and put nothing anywhere.

    options: its arguments, in which `{name}` for a name in `outputs` stands for a file in the private directory; other
    paths must be absolute. outputs: name of a file that it must write there -> where that file is to go; what lies
    there is removed first. log: takes all that it printed, and stays. command: what to run instead of the converter.
    """
    for place in outputs.values():
        place.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    first = next(iter(outputs.values()))
    with tempfile.TemporaryDirectory(prefix=".mnnconvert-", dir=first.parent) as private:
        made = {name: Path(private).resolve() / name for name in outputs}
        arguments = [_filled(option, made) for option in options]
        status = _run([*(command or (sys.executable, "-c", _CALL)), *arguments], Path(private), log, timeout)
        complaint = _complaint_of_status(status, timeout) or _complaint_of_log(log, arguments)
        for name, path in made.items():
            if complaint is None and (path.is_symlink() or not path.is_file()):
                complaint = f"it wrote no {name}"
            elif complaint is None and path.stat().st_size == 0:
                complaint = f"its {name} is empty"
        if complaint is not None:
            raise ExportError(
                f"MNN's converter did not make {first.name}: {complaint}; what it printed is in {log}. Nothing of it "
                "was taken over."
            )
        for name, place in outputs.items():
            shutil.move(made[name], place)


def _filled(option: str, made: Mapping[str, Path]) -> str:
    """An option with the private path in the place of `{name}`."""
    return re.sub(r"\{([^{}]+)\}", lambda match: str(made[match[1]]) if match[1] in made else match[0], option)


def _run(command: Sequence[str], private: Path, log: Path, timeout: float) -> int | None:
    """Exit status, negative for a signal; None where it was stopped because it took too long."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=private, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:  # Ctrl-C comes here too
            if process.poll() is None:
                process.kill()
                process.wait()


def _complaint_of_status(status: int | None, timeout: float) -> str | None:
    if status is None:
        return f"it did not end within {timeout:g} seconds and was stopped"
    if status < 0:
        name = signal.Signals(-status).name if -status in {*signal.Signals} else str(-status)
        memory = ", which is what the system does where memory is short" * (name == "SIGKILL")
        return f"it was ended by {name}{memory}"
    return f"it ended with status {status}" if status else None


def _complaint_of_log(log: Path, arguments: Sequence[str]) -> str | None:
    """What it printed that it must not, or did not print that it must."""
    with log.open("rb") as file:
        text = file.read(LOG_BYTES).decode("utf-8", errors="replace")
    for argument in arguments:
        if os.sep in argument:  # a path may hold any word
            text = text.replace(argument, TARGET)
    for line in text.splitlines():
        if any(word in line.lower() for word in BAD_WORDS):
            return f"it printed {line.strip()!r:.160}"
    if not any(word in text for word in SUCCESS):
        return "it did not say that it succeeded"
    return None
