"""Show an answer as it comes, in a chat of two rounds, and what it took.

python examples/stream_tokens.py out/example-int4 "我叫小明。" "我叫什么名字？"
"""

from __future__ import annotations

import sys

import glmexport


def main(bundle: str, *questions: str) -> None:
    """Ask the questions in turn; each prompt holds the rounds before it."""
    history: list[tuple[str, str]] = []
    with glmexport.Session(bundle, memory_limit=2_000_000_000) as session:
        for question in questions:
            answer = glmexport.generate(session, question, history=history, greedy=True)
            for piece in answer:
                print(piece, end="", flush=True)
            print(f"\n[{len(answer.ids)} tokens, {answer.finish_reason}, KV cache {answer.stats.kv_bytes:,} bytes]")
            history.append((question, answer.text))


if __name__ == "__main__":
    main(*sys.argv[1:])
