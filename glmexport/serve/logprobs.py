"""Tokens with their probabilities, in the forms of the surfaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glmexport.serve.row import Token
from glmexport.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token writes; of part of a character, `bytes:` and its bytes, as OpenAI has them."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """The `content` of a chat's `logprobs`."""
    return [
        {
            **_named(tokenizer, token.id, token.logprob),
            "top_logprobs": [_named(tokenizer, other, logprob) for other, logprob in token.top],
        }
        for token in tokens
    ]


def ollama_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """The same for Ollama's clients, without `top_logprobs` where none were asked for."""
    return [
        entry if entry["top_logprobs"] else {key: value for key, value in entry.items() if key != "top_logprobs"}
        for entry in chat_logprobs(tokenizer, tokens)
    ]


class CompletionLogprobs:
    """The `logprobs` of a completion, piece by piece. offset: characters before the first token."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._tokenizer, self._offset = tokenizer, offset

    def take(self, tokens: Sequence[Token], *, first_is_given: bool = False) -> dict[str, Any]:
        """Lists with one element a token. first_is_given: the first one follows nothing, which has no probability."""
        names = [token_text(self._tokenizer, token.id) for token in tokens]
        offsets = []
        for name in names:
            offsets.append(self._offset)
            self._offset += len(name)
        logprobs: list[float | None] = [token.logprob for token in tokens]
        top: list[dict[str, float] | None] = [self._top(token) for token in tokens]
        if first_is_given and tokens:
            logprobs[0] = top[0] = None
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _top(self, token: Token) -> dict[str, float]:
        """The likeliest, and the chosen one where it is not among them; of two with one text the likelier counts."""
        top: dict[str, float] = {}
        for other, logprob in (*token.top, (token.id, token.logprob)):
            top.setdefault(token_text(self._tokenizer, other), logprob)
        return top


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(data)}
