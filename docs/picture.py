"""Draw the README's pictures: a chat with the example and what `verify` prints, as SVG, and quantize's plot, as PNG.

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

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CHECKPOINT = EXAMPLES / "chatglm-6b-tiny"
WIDTH = 112
CHAT_WIDTH = 96
QUESTIONS = ("你好", "12+34=", "Reverse: apple", "我叫小明。", "我叫什么名字？")
SHOWN = ("graph ", "all ", "glm_block_1 ", "lm ", "chain ", "PASS")
"""First words of the lines that are shown: one block stands for the others."""


def run(*arguments: str, asked: str | None = None) -> list[str]:
    """The lines that a glmexport command prints to stdout. asked: its stdin."""
    command = [sys.executable, "-m", "glmexport", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, input=asked)
    return done.stdout.splitlines()


def main(folder_of_pictures: Path) -> None:
    """Run split, verify, quantize and chat and write the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        bundle, int4 = f"{folder}/bundle", f"{folder}/int4"
        run("split", str(CHECKPOINT), "-o", bundle, "-q")
        verified = run("verify", bundle, str(CHECKPOINT), "-q")
        plot = str(folder_of_pictures / "quantize.png")
        run("quantize", bundle, "-o", int4, "--bits", "4", "--plot", plot, "-q")
        answering = f"{folder}/answering"
        small = ("--slim", "--embedding", "bf16", "--quantize", "int4")
        run("split", str(EXAMPLES / "tiny-chatglm"), "-o", answering, *small, "-q")
        chat = run("chat", answering, "--greedy", "-q", asked="\n".join(QUESTIONS))
    commands = ["$ glmexport split chatglm-6b-tiny/ -o bundle/", "$ glmexport verify bundle/ chatglm-6b-tiny/"]
    shown = [line for line in verified if line.startswith(SHOWN)]
    draw(folder_of_pictures / "verify.svg", WIDTH, commands, shown)
    commands = ["$ glmexport split tiny-chatglm/ -o int4/ --slim --embedding bf16 --quantize int4"]
    draw(folder_of_pictures / "chat.svg", CHAT_WIDTH, [*commands, "$ glmexport chat int4/ --greedy"], chat)


def draw(path: Path, width: int, commands: list[str], lines: list[str]) -> None:
    """Write a terminal with commands and their output as SVG."""
    console = Console(record=True, width=width, file=sys.stderr, force_terminal=True)
    for command in commands:
        console.print(Text(command, style="dim"))
    for line in lines:
        text = Text(line.rstrip())
        text.highlight_regex(r"\bok\b *|^PASS *", "green")
        text.highlight_regex(r"^graph .*|^> .*", "bold")
        console.print(text)
    svg = console.export_svg(title="glmexport")
    # the default style fetches a web font; the reader's own monospace font does as well
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "ui-monospace, Menlo, Consolas")
    # rich gives a Chinese character the width of a Latin one; without a width it takes its own
    svg = re.sub(r' textLength="[\d.]+"(?=[^>]*>[^<]*[\u3000-\uffff])', "", svg)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
