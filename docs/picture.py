"""Draw the README's picture: what `glmexport verify` prints for the example, as SVG.

    python docs/picture.py docs/verify.svg

The run is real; nothing is drawn that the command did not print.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

CHECKPOINT = Path(__file__).resolve().parent.parent / "examples" / "chatglm-6b-tiny"
WIDTH = 112
SHOWN = ("graph ", "all ", "glm_block_1 ", "lm ", "chain ", "PASS")
"""First words of the lines that are shown: one block stands for the others."""


def run(*arguments: str) -> list[str]:
    """The lines that a glmexport command prints to stdout."""
    command = [sys.executable, "-m", "glmexport", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def main(target: Path) -> None:
    """Run split and verify and write the picture."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(Path(folder) / "bundle")
        run("split", str(CHECKPOINT), "-o", bundle, "-q")
        lines = run("verify", bundle, str(CHECKPOINT), "-q")
    console = Console(record=True, width=WIDTH, file=sys.stderr, force_terminal=True)
    console.print(Text("$ glmexport split chatglm-6b-tiny/ -o bundle/", style="dim"))
    console.print(Text("$ glmexport verify bundle/ chatglm-6b-tiny/", style="dim"))
    for line in lines:
        if line.startswith(SHOWN):
            text = Text(line.rstrip())
            text.highlight_regex(r"\bok\b *|^PASS *", "green")
            text.highlight_regex(r"^graph .*", "bold")
            console.print(text)
    svg = console.export_svg(title="glmexport")
    # the default style fetches a web font; the reader's own monospace font does as well
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "ui-monospace, Menlo, Consolas")
    target.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
