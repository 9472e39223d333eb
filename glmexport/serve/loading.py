"""From a bundle on disk to an engine that answers: the arithmetic of memory first, then the graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmexport import names
from glmexport.bundle import Bundle, open_bundle
from glmexport.bundle_tokenizer import make_tokenizer, tokenizer_of_bundle
from glmexport.errors import GlmExportError
from glmexport.machine import read_memory
from glmexport.serve.defaults import read_generation_config
from glmexport.serve.engine import Engine, Watch
from glmexport.serve.rows import InPlaceRows, PortableRows, RowRunner
from glmexport.serve.settings import Settings
from glmexport.session import Session
from glmexport.sizes import size_in_words
from glmexport.tokenizer import MODEL_LIMIT, Tokenizer
from glmexport.untrusted import read_small_file

Notice = Callable[[str], None]


class NoRoomError(GlmExportError):
    """A bundle does not fit into the memory that there is."""


@dataclass(frozen=True)
class Rooms:
    """The arithmetic of memory, in bytes. slots: rows that fit. available: None where nobody knows."""

    graphs: int
    kv_per_slot: int
    length: int
    slots: int
    available: int | None

    def in_words(self) -> str:
        """One line of it."""
        total = self.graphs + self.slots * self.kv_per_slot
        of = "" if self.available is None else f" of {size_in_words(self.available)} that may be used"
        return (
            f"graphs {size_in_words(self.graphs)} + {self.slots} rows x {self.length} places x "
            f"{size_in_words(self.kv_per_slot / self.length)} = {size_in_words(total)}{of}"
        )


@dataclass(frozen=True)
class Served:
    """A bundle in memory. defaults: parameters of its generation_config.json. rooms: what it takes."""

    bundle: Bundle
    engine: Engine
    tokenizer: Tokenizer
    defaults: Mapping[str, Any]
    rooms: Rooms

    @property
    def context(self) -> int:
        """Places for prompt and answer of one row."""
        return self.engine.runner.max_length


def rooms_of(graphs: int, kv_per_slot: int, length: int, wanted: int, available: int | None) -> Rooms:
    """How many of the wanted rows fit. Raises NoRoomError where not even one does.

    available: bytes that graphs and KV caches may take, None for any number.
    """
    slots = wanted if available is None else min(wanted, (available - graphs) // max(kv_per_slot, 1))
    if slots < 1:
        raise NoRoomError(
            f"The model needs {size_in_words(graphs)} for its graphs and {size_in_words(kv_per_slot)} for one row of "
            f"{length} places, and {size_in_words(available or 0)} may be used; serve a smaller form, give "
            "--max-model-len, or raise --gpu-memory-utilization."
        )
    return Rooms(graphs, kv_per_slot, length, slots, available)


def load(directory: Path, settings: Settings, notice: Notice, watch: Watch | None = None, name: str = "") -> Served:
    """Open a bundle and start its engine. Raises GlmExportError: no bundle, no tokenizer, too little memory."""
    bundle = open_bundle(directory)
    tokenizer = _tokenizer(bundle, settings.tokenizer)
    defaults = generation_defaults(directory, settings)
    session = Session(bundle, threads=settings.threads, providers=settings.providers)
    try:
        length = _length(settings, session)
        rooms = rooms_of(
            sum(session.graph_sizes.values()),
            session.held_kv_bytes(1, length),
            length,
            settings.max_num_seqs,
            _available(settings),
        )
        runner = open_runner(session, rooms.slots, length, notice)
        session.load()
    except BaseException:
        session.close()
        raise
    if rooms.slots < settings.max_num_seqs:
        notice(f"{name or directory}: {rooms.slots} rows instead of {settings.max_num_seqs} fit into memory.")
    notice(f"{name or directory}: {rooms.in_words()}.")
    return Served(bundle, start_engine(runner, tokenizer, bundle, settings, watch, name), tokenizer, defaults, rooms)


def open_runner(session: Session, slots: int, length: int, notice: Notice) -> RowRunner:
    """What computes the rows of a bundle, which takes the session over."""
    if session.flavor == names.ORT:
        return InPlaceRows(session, slots, length)
    notice(f"{session.bundle.directory} is a portable bundle: its rows are computed one after the other.")
    return PortableRows(session, slots, length)


def start_engine(
    runner: RowRunner, tokenizer: Tokenizer, bundle: Bundle, settings: Settings, watch: Watch | None, name: str
) -> Engine:
    """The engine of a bundle's runner."""
    return Engine(
        runner,
        tokenizer,
        bundle.config.special_ids,
        max_queue=settings.max_queue,
        max_batched_tokens=settings.max_batched_tokens,
        watch=watch,
        name=name,
    )


def generation_defaults(directory: Path, settings: Settings) -> dict[str, Any]:
    """What the generation_config.json says: the one that is given, else the bundle's, else the one beside it."""
    if settings.generation_config is not None:
        return read_generation_config(settings.generation_config, demanded=True)
    return read_generation_config(directory) or read_generation_config(directory.absolute().parent)


def _length(settings: Settings, session: Session) -> int:
    positions = session.config.max_positions
    if settings.max_model_len is not None and settings.max_model_len > positions:
        raise GlmExportError(
            f"--max-model-len is {settings.max_model_len} and {session.bundle.directory} has {positions} positions; "
            "give at most those."
        )
    return settings.max_model_len or positions


def _tokenizer(bundle: Bundle, elsewhere: Path | None) -> Tokenizer:
    if elsewhere is None:
        if names.TOKENIZER_MODEL not in bundle.files:
            raise GlmExportError(
                f"{bundle.directory} has no {names.TOKENIZER_MODEL}; give a directory that has with --tokenizer, or "
                "split again from a checkpoint that has."
            )
        return tokenizer_of_bundle(bundle)
    path = elsewhere / names.TOKENIZER_MODEL if elsewhere.is_dir() else elsewhere
    model = read_small_file(path, MODEL_LIMIT)
    return make_tokenizer(model, bundle.config, bundle.form, origin=str(path))


def _available(settings: Settings) -> int | None:
    available = read_memory().available
    return None if available is None else int(available * settings.memory_utilization)
