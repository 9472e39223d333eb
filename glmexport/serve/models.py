"""The models that a server has: which there are, which are in memory, which leaves when another must come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from glmexport.errors import GlmExportError
from glmexport.serve.engine import QueueFullError, StoppedError, Watch
from glmexport.serve.loading import NoRoomError, Served, load
from glmexport.serve.model_names import full_name
from glmexport.serve.settings import Settings
from glmexport.serve.store import Entry, Store

LOGGER = logging.getLogger("glmexport.serve")
STOPPING = "The server is stopping; ask again when it is back."
UNLOADED = "The model was unloaded; ask again."
CLOSE_SECONDS = 60.0
RETRY_SECONDS = 5

Loader = Callable[[Path, Settings, Callable[[str], None], Watch | None, str], Served]


class NoModelError(GlmExportError):
    """There is no model of that name."""


class BrokenModelError(GlmExportError):
    """A model that is served cannot be loaded, which is no fault of whoever asks it."""


@dataclass
class Loaded:
    """A bundle in memory and who uses it. expires: of `time.time`, None for never. leaving: at the next rest."""

    entry: Entry
    served: Served
    users: int = 0
    used: float = field(default_factory=time.monotonic)
    expires: float | None = None
    leaving: bool = False
    timer: asyncio.TimerHandle | None = None


@dataclass(frozen=True)
class Use:
    """A model while a request has it. load_seconds: what this request waited for it."""

    entry: Entry
    served: Served
    load_seconds: float


class Models:
    """Served bundles by name, and those of the store; at most `max_loaded_models` are in memory.

    fixed: name -> entry of the command line; several names may have one bundle, which is loaded once. `mario` and
    `mario:latest` are one name. Everything but the loading itself happens in the event loop.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        fixed: Mapping[str, Entry],
        *,
        watch: Callable[[str], Watch | None] = lambda name: None,
        loader: Loader = load,
    ) -> None:
        self.settings, self.store = settings, store
        self.fixed = {full_name(name): entry for name, entry in fixed.items()}
        self.loaded: dict[Path, Loaded] = {}
        self._watch, self._loader = watch, loader
        self._loading = asyncio.Lock()
        self._rested = asyncio.Event()  # set whenever a model loses its last user
        self._waiting = 0
        self._expiring: set[asyncio.Task[None]] = set()
        self.stopping = False

    def entries(self) -> list[Entry]:
        """Every model, those of the command line first."""
        return [*self.fixed.values(), *(entry for entry in self.store.list() if entry.name not in self.fixed)]

    def find(self, name: str) -> Entry:
        """A model by name. Raises NoModelError."""
        if full_name(name) in self.fixed:
            return self.fixed[full_name(name)]
        try:
            entry = self.store.get(name)
        except GlmExportError as error:
            raise NoModelError(f"model '{name:.200}' not found") from error
        if entry is None:
            raise NoModelError(f"model '{name:.200}' not found")
        return entry

    def status(self, entry: Entry) -> Loaded | None:
        """What of a model is in memory."""
        return self.loaded.get(_key(entry))

    @asynccontextmanager
    async def use(self, entry: Entry, keep_alive: float | None = None) -> AsyncIterator[Use]:
        """Have a model in memory for as long as this is entered.

        keep_alive: seconds to keep it after that, None for the server's own, infinite for ever. Raises QueueFullError,
        StoppedError, NoRoomError, BrokenModelError: what keeps it from being loaded.
        """
        begun = time.monotonic()
        loaded = await self._have(entry)
        if loaded.timer is not None:
            loaded.timer.cancel()
            loaded.timer = None
        loaded.users, loaded.entry, loaded.leaving = loaded.users + 1, entry, False
        try:
            yield Use(entry, loaded.served, time.monotonic() - begun)
        finally:
            loaded.users -= 1
            loaded.used = time.monotonic()
            self._rest(loaded, keep_alive)

    async def unload(self, entry: Entry) -> bool:
        """Take a model out of memory once its running answers have ended; whether it was there."""
        loaded = self.loaded.get(_key(entry))
        if loaded is not None and loaded.users:
            loaded.leaving = True
        elif loaded is not None:
            await self._close(loaded, UNLOADED)
        return loaded is not None

    async def preload(self, entries: Sequence[Entry]) -> None:
        """Load as many as may be in memory. Raises as `use` does."""
        for entry in entries[: self.settings.max_loaded_models]:
            async with self.use(entry):
                pass

    async def drain(self, grace: float) -> None:
        """Take no more questions; let the running answers end within `grace` seconds, and tell those that have not."""
        self.stopping = True
        engines = [loaded.served.engine for loaded in self.loaded.values()]
        for engine in engines:
            engine.stop(STOPPING)
        end = time.monotonic() + grace
        while any(engine.running for engine in engines) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for engine in engines:
            engine.stop(STOPPING, drain=False)

    async def close(self) -> None:
        """Unload everything."""
        self.stopping = True
        for loaded in [*self.loaded.values()]:
            await self._close(loaded, STOPPING)

    async def _have(self, entry: Entry) -> Loaded:
        if self.stopping:
            raise StoppedError(STOPPING)
        found = self._living(entry)
        if found is not None:
            return found
        if self._waiting >= self.settings.max_queue:
            raise QueueFullError(
                f"{self._waiting} requests wait for a model to be loaded; try again later.", RETRY_SECONDS
            )
        self._waiting += 1
        try:
            async with self._loading:
                return self._living(entry) or await self._load(entry)
        finally:
            self._waiting -= 1

    def _living(self, entry: Entry) -> Loaded | None:
        """A model in memory whose engine runs."""
        loaded = self.loaded.get(_key(entry))
        return loaded if loaded is not None and loaded.served.engine.alive else None

    async def _load(self, entry: Entry) -> Loaded:
        self.loaded.pop(_key(entry), None)  # one whose engine has ended
        while len(self.loaded) >= self.settings.max_loaded_models:
            await self._make_room()
        while True:
            try:
                served = await asyncio.to_thread(
                    self._loader, entry.bundle, self.settings, LOGGER.info, self._watch(entry.name), entry.name
                )
                break
            except NoRoomError:
                if not self.loaded:
                    raise
                await self._make_room()
            except GlmExportError as error:
                raise BrokenModelError(str(error)) from error
        if self.stopping:
            served.engine.stop(STOPPING, drain=False)
            raise StoppedError(STOPPING)
        loaded = Loaded(entry, served)
        self.loaded[_key(entry)] = loaded
        return loaded

    async def _make_room(self) -> None:
        """Unload the model that was used least recently, once there is one that nobody uses."""
        while True:
            idle = [loaded for loaded in self.loaded.values() if not loaded.users]
            if idle:
                oldest = min(idle, key=lambda loaded: loaded.used)
                LOGGER.info("%s is unloaded to make room.", oldest.entry.name)
                await self._close(oldest, UNLOADED)
                return
            self._rested.clear()
            await self._rested.wait()
            if self.stopping:
                raise StoppedError(STOPPING)

    def _rest(self, loaded: Loaded, keep_alive: float | None) -> None:
        """Nobody uses it now, perhaps: when it is to be unloaded."""
        seconds = self.settings.keep_alive if keep_alive is None else keep_alive
        seconds = 0.0 if loaded.leaving else seconds
        forever = seconds is None or seconds == float("inf")
        loaded.expires = None if forever or seconds is None else time.time() + seconds
        if loaded.users:
            return
        self._rested.set()
        if seconds is not None and not forever:
            loop = asyncio.get_running_loop()
            loaded.timer = loop.call_later(seconds, self._start_expiry, loaded)

    def _start_expiry(self, loaded: Loaded) -> None:
        task = asyncio.get_running_loop().create_task(self._expire(loaded))
        self._expiring.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._expiring.discard)

    async def _expire(self, loaded: Loaded) -> None:
        if not loaded.users and self.loaded.get(_key(loaded.entry)) is loaded:
            LOGGER.info("%s is unloaded: nobody asked it for as long as it was to be kept.", loaded.entry.name)
            await self._close(loaded, UNLOADED)

    async def _close(self, loaded: Loaded, sentence: str) -> None:
        if self.loaded.get(_key(loaded.entry)) is loaded:
            del self.loaded[_key(loaded.entry)]
        if loaded.timer is not None:
            loaded.timer.cancel()
        loaded.served.engine.stop(sentence, drain=False)
        await asyncio.to_thread(loaded.served.engine.join, CLOSE_SECONDS)


def _key(entry: Entry) -> Path:
    return entry.bundle.resolve()
