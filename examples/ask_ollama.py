"""Ask a running server with Ollama's own client: the models, an answer as it comes, a chat that goes on.

glmexport serve int4/ &
python examples/ask_ollama.py http://127.0.0.1:11434 "我叫小明。" "我叫什么名字？"
"""

from __future__ import annotations

import sys

import ollama


def main(address: str, *questions: str) -> None:
    """Ask the questions in turn; each request holds the messages before it."""
    client = ollama.Client(address)
    name = client.list().models[0].model or ""
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = ""
        for part in client.chat(name, messages, stream=True, options={"temperature": 0}):
            answer += part.message.content or ""
            print(part.message.content, end="", flush=True)
        speed = (part.eval_count or 0) / max((part.eval_duration or 0) / 1e9, 1e-9)
        print(f"\n[{part.eval_count} tokens, {speed:.0f}/s]")
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(*sys.argv[1:])
