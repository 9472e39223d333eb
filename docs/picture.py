"""Draw the README's pictures of the example: what `glmexport verify` prints, as SVG, and quantize's plot, as PNG.

    python docs/picture.py docs

The runs are real; nothing is drawn that the commands did not print or plot.
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


def main(folder_of_pictures: Path) -> None:
    """Run split, verify and quantize and write the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(Path(folder) / "bundle")
        run("split", str(CHECKPOINT), "-o", bundle, "-q")
        lines = run("verify", bundle, str(CHECKPOINT), "-q")
        plot = str(folder_of_pictures / "quantize.png")
        run("quantize", bundle, "-o", f"{folder}/int4", "--bits", "4", "--plot", plot, "-q")
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
    (folder_of_pictures / "verify.svg").write_text(
        "\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
