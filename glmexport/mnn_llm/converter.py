"""MNN's converter, called in a process of its own: JSON -> `.mnn`.

It prints whatever it likes to the C library's stdout, writes temporary files into its working directory, and returns
success whatever happens; so it is believed only when it says so and has made the file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from glmexport.errors import ExportError

_CALL = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
_SUCCESS = "has convert to MNNModel"  # what it says for JSON; "Converted Success!" is for the other formats
_COMPLAINTS = ("Can't open file", "[ERROR]", "Failed", "Not Support", "Not support option", "Error")
_SECONDS = 600


def mnn_of_json(document: bytes) -> bytes:
    """The binary form of a graph given as JSON. Raises ExportError where MNN's converter does not make it."""
    with tempfile.TemporaryDirectory(prefix="glmexport-mnn-") as directory:
        source, target = Path(directory, "graph.json"), Path(directory, "graph.mnn")
        source.write_bytes(document)
        words = ["-f", "JSON", "--modelFile", str(source), "--MNNModel", str(target)]
        done = subprocess.run(
            [sys.executable, "-c", _CALL, *words],
            cwd=directory,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
        said = done.stdout + done.stderr
        wrong = next((line for line in said.splitlines() if any(word in line for word in _COMPLAINTS)), None)
        if done.returncode or wrong or _SUCCESS not in said or not target.is_file() or not target.stat().st_size:
            reason = wrong or (said.strip().splitlines() or ["it said nothing"])[-1]
            raise ExportError(
                f"MNN's converter made no graph ({reason:.200}); report this with the versions installed."
            )
        return target.read_bytes()
