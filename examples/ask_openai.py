"""Ask a running server with OpenAI's own client: an answer as it comes, and how likely a text is, token by token.

glmexport serve int4/ &
python examples/ask_openai.py http://127.0.0.1:11434 "12+34="
"""

from __future__ import annotations

import os
import sys

import openai


def main(address: str, question: str) -> None:
    """Ask once, then score the question with its answer."""
    key = os.environ.get("GLMEXPORT_API_KEY", "none")  # the client wants one, whether the server does or not
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=key)
    model = client.models.list().data[0].id
    answer = ""
    for chunk in client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, stream=True
    ):
        piece = chunk.choices[0].delta.content or ""
        answer += piece
        print(piece, end="", flush=True)
    print()
    scored = client.completions.create(model=model, prompt=question + answer, echo=True, logprobs=0, max_tokens=0)
    logprobs = scored.choices[0].logprobs
    if logprobs is not None:
        for token, logprob in zip(logprobs.tokens or (), logprobs.token_logprobs or (), strict=True):
            print(f"{token!r} {'' if logprob is None else f'{logprob:.3f}'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
