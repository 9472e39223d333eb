"""What `glmexport serve` is told, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 11434
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Options of the server; see the command's help.

    Sizes are bytes, times seconds. keep_alive: of a model that nobody asks, None for ever. max_model_len: None is what
    the model has. max_num_seqs: rows at most; fewer where memory has no room. memory_utilization: the share of memory
    that graphs and KV caches may take. origins and hosts: besides the server's own.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    api_key: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_queue: int = 64
    max_batched_tokens: int | None = None
    max_loaded_models: int = 1
    keep_alive: float | None = None
    threads: int | None = None
    providers: tuple[str, ...] = ()
    memory_utilization: float = 0.9
    tokenizer: Path | None = None
    generation_config: Path | None = None
    chat_template: Path | None = None
    request_timeout: float = 1800.0
    shutdown_timeout: float = 30.0
    max_body: int = 8 << 20
    body_timeout: float = 30.0
    send_timeout: float = 60.0
    hosts: tuple[str, ...] = ()
    log_prompts: bool = False

    @property
    def is_local(self) -> bool:
        """Whether nobody outside this computer reaches it."""
        return self.host in LOOPBACK
