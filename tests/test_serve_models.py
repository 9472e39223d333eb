"""Modelfiles, the store, defaults, durations, and which models are in memory."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import FakeRunner, entry_of, serving

from glmexport.errors import GlmExportError
from glmexport.sampling import Sampling
from glmexport.serve.defaults import options_of, read_generation_config
from glmexport.serve.durations import FOREVER, parse_duration
from glmexport.serve.engine import Engine, QueueFullError, StoppedError
from glmexport.serve.loading import NoRoomError, Rooms, Served, rooms_of
from glmexport.serve.model_names import full_name, name_of_directory, split_name
from glmexport.serve.modelfile import Modelfile, modelfile_from_json, parse_modelfile
from glmexport.serve.models import Models, NoModelError
from glmexport.serve.prompts import Message, begun_chat, chat_of
from glmexport.serve.settings import Settings
from glmexport.serve.store import Entry, Store

FULL = '''# a comment
FROM ./int4
PARAMETER temperature 0.5
parameter stop "<eop>"
PARAMETER stop 问：
PARAMETER	num_gpu	 99
REQUIRES 0.14.0

SYSTEM """You are Mario,
and say so."""
MESSAGE user Who are you?
MESSAGE assistant """It's me,
Mario."""
LICENSE """
MIT"""
'''


# Modelfiles


def test_a_modelfile_is_read_as_it_is():
    parsed = parse_modelfile(FULL)
    assert parsed == Modelfile(
        "./int4",
        {"temperature": 0.5, "stop": ("<eop>", "问：")},
        "You are Mario,\nand say so.",
        (("user", "Who are you?"), ("assistant", "It's me,\nMario.")),
        ("\nMIT",),
        ("num_gpu", "REQUIRES"),
    )


def test_what_is_written_is_read_again():
    parsed = parse_modelfile(FULL)
    again = parse_modelfile(parsed.text())
    assert again.to_json() == parsed.to_json()


@given(
    texts=st.lists(st.text(max_size=20), min_size=3, max_size=3),
    stops=st.lists(st.text(min_size=1, max_size=5), max_size=3),
    number=st.floats(0, 10),
)
def test_the_store_keeps_every_text(texts, stops, number):
    whole = Modelfile(
        "x", {"top_p": number} | ({"stop": tuple(stops)} if stops else {}), texts[0], (("user", texts[1]),), (texts[2],)
    )
    assert modelfile_from_json(json.loads(json.dumps(whole.to_json())), "It") == whole


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no FROM"),
        ("SYSTEM x", "no FROM"),
        ("FROM a\nFROM b", "second FROM"),
        ("FROM a\nTEMPLATE {{ .Prompt }}", "Jinja"),
        ("FROM a\nADAPTER x", "merge"),
        ("FROM a\nBREW coffee", "'BREW'"),
        ("FROM a\nPARAMETER heat 1", "'heat'"),
        ("FROM a\nPARAMETER temperature hot", "a number"),
        ("FROM a\nPARAMETER top_k 1.5", "a whole number"),
        ("FROM a\nMESSAGE robot x", "'robot'"),
        ('FROM a\nSYSTEM """x', "nothing closes"),
        ("FROM a\n!!", "expected an instruction"),
    ],
)
def test_a_modelfile_that_is_none_names_its_line(text, words):
    with pytest.raises(GlmExportError, match=words):
        parse_modelfile(text)


@given(st.text(max_size=80))
def test_any_text_is_a_modelfile_or_a_sentence(text):
    with suppress(GlmExportError):
        assert parse_modelfile(text).source


# Names and the store


@pytest.mark.parametrize("name", ["a", "A1", "mario:v2", "a.b_c-d", "1"])
def test_names(name):
    first, tag = split_name(name)
    assert full_name(name) == f"{first}:{tag}"


@given(st.text(max_size=12) | st.text("./:\\ab\x00", max_size=8))
def test_a_name_never_leaves_the_store(name):
    try:
        parts = split_name(name)
    except GlmExportError:
        return
    home = Path("/home/x")
    assert home.joinpath(*parts).resolve().parent.parent == home
    assert name_of_directory(name)


def test_names_of_directories():
    assert name_of_directory("int4") == "int4"
    assert split_name(name_of_directory("my model (1)"))
    assert name_of_directory("..") == "model"


def test_a_model_is_created_changed_copied_and_removed(tmp_path, small_bundle):
    store = Store(tmp_path)
    store.create("a", Modelfile(str(small_bundle), {"top_k": 3}, "sys"), {}, within=None)
    made = store.create("b:x", Modelfile("a", {"top_p": 0.5}), {}, within=store.bundles)
    assert made.bundle == small_bundle
    assert made.modelfile.parameters == {"top_k": 3, "top_p": 0.5}
    assert made.modelfile.system == "sys"
    assert [entry.name for entry in store.list()] == ["a:latest", "b:x"]
    assert made.digest != store.get("a").digest
    store.copy(made, "c")
    assert store.get("c").modelfile == made.modelfile
    assert store.remove("a")
    assert not store.remove("a")
    assert store.get("a") is None
    assert small_bundle.is_dir()
    assert not list((tmp_path / "models").rglob(".*")), "no drafts are left"


def test_a_store_is_not_taken_in_by_damage(tmp_path, small_bundle):
    store = Store(tmp_path)
    store.create("a", Modelfile(str(small_bundle)), {}, within=None)
    for content in (b"", b"[]", b'{"parameters": {"stop": 1}}', b"\xff", b'{"messages": [["robot", "x"]]}'):
        (tmp_path / "models" / "a" / "latest").write_bytes(content)
        assert store.list() == []
        with pytest.raises(GlmExportError):
            store.get("a")


def test_from_that_is_no_bundle(tmp_path):
    with pytest.raises(GlmExportError, match="neither a model"):
        Store(tmp_path).create("a", Modelfile(str(tmp_path)), {}, within=None)


@pytest.mark.parametrize("parameters", [{"temperature": math.nan}, {"top_p": 7.0}, {"repeat_penalty": 0.0}])
def test_parameters_that_are_none_are_refused_at_once(tmp_path, small_bundle, parameters):
    with pytest.raises(GlmExportError, match="found"):
        Store(tmp_path).create("a", Modelfile(str(small_bundle), parameters), {}, within=None)


# Defaults


def test_layers_of_defaults(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.3, "top_k": 7, "max_new_tokens": 9, "x": 1}')
    config = read_generation_config(tmp_path)
    options = options_of(config, {"top_k": 8, "stop": ("a",)}, {"temperature": 0.1, "top_p": None})
    assert options.sampling == Sampling(temperature=0.1, top_k=8)
    assert (options.max_tokens, options.stop) == (9, ("a",))
    assert options_of().sampling == Sampling()


@pytest.mark.parametrize(
    ("text", "greedy"),
    [
        ('{"temperature": 0, "do_sample": true}', True),
        ('{"do_sample": false, "temperature": 0.9}', True),
        ('{"do_sample": true}', False),
        ("{}", False),
    ],
)
def test_what_is_greedy(tmp_path, text, greedy):
    (tmp_path / "generation_config.json").write_text(text)
    assert options_of(read_generation_config(tmp_path)).sampling.is_greedy == greedy


@pytest.mark.parametrize("text", ['{"temperature": "x"}', '{"top_p": 7}', "[]", "{", '{"top_k": true}'])
def test_a_generation_config_that_is_none_is_a_sentence(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(GlmExportError):
        read_generation_config(tmp_path)


def test_a_generation_config_is_found_beside_the_bundle_or_where_it_is_said_to_be(tmp_path, quick_bundle):
    bundle = tmp_path / "place" / "bundle"
    bundle.parent.mkdir()
    bundle.symlink_to(quick_bundle)
    (tmp_path / "place" / "generation_config.json").write_text('{"temperature": 0.25}')
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.75}')
    with serving(tmp_path / "home", entry_of(bundle), preload=False) as server:
        assert server.json("POST", "/api/show", {"model": "tiny"})["defaults"]["temperature"] == 0.25
    with serving(tmp_path / "home", entry_of(bundle), preload=False, generation_config=tmp_path) as server:
        assert server.json("POST", "/api/show", {"model": "tiny"})["defaults"]["temperature"] == 0.75
    with pytest.raises(GlmExportError, match="has no generation_config"):
        read_generation_config(tmp_path / "home", demanded=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("1h30m", 5400), ("300ms", 0.3), (10, 10), ("10", 10), (0, 0), (2.5, 2.5), ("1.5h", 5400), ("0", 0)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", [-1, "-1", "-5m", 1e300, math.inf])
def test_what_is_for_ever(text):
    assert parse_duration(text) == FOREVER


@pytest.mark.parametrize("text", ["", "soon", "5 m", "5mm", "m", math.nan, True, "1e5"])
def test_what_is_no_duration(text):
    with pytest.raises(GlmExportError):
        parse_duration(text)


# Chats


def test_rounds_of_messages():
    def of(*pairs):
        return chat_of([Message(role, text) for role, text in pairs])

    chat = of(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    assert (chat.system, chat.history, chat.query, chat.unfinished) == ("s", (("a", "b"),), "c", "")
    assert of(("user", "a"), ("user", "b")).query == "a\nb"
    assert of(("user", "a"), ("assistant", "b")).unfinished == "b"
    assert of(("assistant", "hi"), ("user", "a")).history == (("", "hi"),)
    with pytest.raises(GlmExportError, match="nothing to answer"):
        of(("system", "s"))
    assert begun_chat("s", ()) == ("s", ())
    assert begun_chat("s", (("user", "a"), ("assistant", "b"))) == ("s", (("a", "b"),))


# Memory


def test_the_rows_that_fit():
    assert rooms_of(100, 10, 5, 8, None).slots == 8
    assert rooms_of(100, 10, 5, 8, 145).slots == 4
    with pytest.raises(NoRoomError, match="105 B may be used"):
        rooms_of(100, 10, 5, 8, 105)
    assert "4 rows x 5 places" in rooms_of(100, 10, 5, 8, 145).in_words()


class Shelf:
    """Loads models that are none, and remembers it. rooms: models that fit at once."""

    def __init__(self, rooms: int = 99) -> None:
        self.loads, self.rooms, self.open = list[str](), rooms, set[str]()

    def __call__(self, bundle, settings, notice, watch, name):
        if len([one for one in self.open if not self.runners[one].closed]) >= self.rooms:
            raise NoRoomError("Too much.")
        self.loads.append(name)
        self.open.add(name)
        runner = FakeRunner()
        self.runners = {**getattr(self, "runners", {}), name: runner}
        special = SimpleNamespace(eos=3, forced=5)
        return Served(None, Engine(runner, None, special), None, {}, Rooms(1, 1, 1, 1, None))


def shelf_of(tmp_path, *names, shelf=None, **options):
    shelf = shelf or Shelf()
    fixed = {name: Entry(name, tmp_path / name, Modelfile(name), 0.0) for name in names}
    return Models(Settings(**options), Store(tmp_path), fixed, loader=shelf), shelf


async def touch(models, name, **options):
    async with models.use(models.find(name), **options) as use:
        return use


def test_the_least_recently_used_model_leaves(tmp_path):
    async def run():
        models, shelf = shelf_of(tmp_path, "a", "b", "c", max_loaded_models=2)
        for name in ("a", "b", "a", "c", "a"):
            await touch(models, name)
        assert shelf.loads == ["a", "b", "c"]
        assert {loaded.entry.name for loaded in models.loaded.values()} == {"a", "c"}
        assert shelf.runners["b"].closed
        await touch(models, "b")
        assert not shelf.runners["a"].closed
        await models.close()
        assert all(runner.closed for runner in shelf.runners.values())

    asyncio.run(run())


def test_a_model_in_use_is_waited_for(tmp_path):
    async def run():
        models, shelf = shelf_of(tmp_path, "a", "b")
        async with models.use(models.find("a")):
            other = asyncio.create_task(touch(models, "b"))
            await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            assert shelf.loads == ["a"]
        await other
        assert shelf.loads == ["a", "b"]
        await models.close()

    asyncio.run(run())


def test_too_little_memory_makes_room_first(tmp_path):
    async def run():
        models, _ = shelf_of(tmp_path, "a", "b", shelf=Shelf(rooms=1), max_loaded_models=3)
        await touch(models, "a")
        await touch(models, "b")
        assert [loaded.entry.name for loaded in models.loaded.values()] == ["b"]
        await models.close()
        models, _ = shelf_of(tmp_path, "a", shelf=Shelf(rooms=0), max_loaded_models=3)
        with pytest.raises(NoRoomError):
            await touch(models, "a")

    asyncio.run(run())


def test_many_ask_and_one_loads(tmp_path):
    async def run():
        models, shelf = shelf_of(tmp_path, "a")
        uses = await asyncio.gather(*(touch(models, "a") for _ in range(20)))
        assert shelf.loads == ["a"]
        assert len({id(use.served) for use in uses}) == 1
        await models.close()

    asyncio.run(run())


def test_names_with_one_bundle_are_loaded_once(tmp_path):
    async def run():
        models, shelf = shelf_of(tmp_path, "a")
        models.fixed["b:latest"] = Entry("b", tmp_path / "a", Modelfile("a"), 0.0)
        await touch(models, "a")
        await touch(models, "b:latest")
        assert shelf.loads == ["a"]
        await models.close()

    asyncio.run(run())


def test_more_may_not_wait_for_a_model_than_in_a_queue(tmp_path):
    gate = threading.Event()

    class Slow(Shelf):
        def __call__(self, *arguments):
            assert gate.wait(20)
            return super().__call__(*arguments)

    async def run():
        models, _ = shelf_of(tmp_path, "a", shelf=Slow(), max_queue=2)
        waiting = [asyncio.create_task(touch(models, "a")) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError):
            await touch(models, "a")
        gate.set()
        await asyncio.gather(*waiting)
        await models.close()
        with pytest.raises(StoppedError):
            await touch(models, "a")

    asyncio.run(run())


def test_what_there_is_not(tmp_path):
    models, _ = shelf_of(tmp_path, "a")
    assert models.find("a") is models.find("a:latest")
    for name in ("b", "", "../a", "a:b"):
        with pytest.raises(NoModelError):
            models.find(name)


def test_two_models_are_served_side_by_side(tmp_path, quick_bundle, small_bundle):
    with serving(tmp_path, entry_of(quick_bundle), entry_of(quick_bundle, "same"), preload=False) as server:
        body = {"prompt": "x", "options": {"num_predict": 2, "temperature": 0}, "stream": False}
        answers = [server.json("POST", "/api/generate", {**body, "model": name}) for name in ("tiny", "same")]
        assert answers[0]["response"] == answers[1]["response"]
        assert len(server.json("GET", "/api/ps")["models"]) == 1
        status, _, text = server.ask("POST", "/tokenize", {"prompt": "x"})
        assert status == 400
        assert "2 models" in json.loads(text)["error"]


def test_a_bundle_without_a_tokenizer_wants_one_from_elsewhere(tmp_path, small_bundle):
    with serving(tmp_path, entry_of(small_bundle), preload=False) as server:
        status, _, text = server.ask("POST", "/api/generate", {"model": "tiny", "prompt": "x"})
        assert status == 500, "it is the server's fault"
        assert "ice_text.model" in json.loads(text)["error"]


def test_a_model_is_unloaded_after_its_running_answers(tmp_path):
    async def run():
        models, shelf = shelf_of(tmp_path, "a")
        async with models.use(models.find("a")):
            assert await models.unload(models.find("a"))
            assert not shelf.runners["a"].closed
        while models.loaded:
            await asyncio.sleep(0)
        assert not await models.unload(models.find("a"))
        await models.close()

    asyncio.run(run())


def test_an_engine_that_ended_is_loaded_again(tmp_path):
    async def run():
        models, shelf = shelf_of(tmp_path, "a")
        use = await touch(models, "a")
        use.served.engine.stop("gone")
        use.served.engine.join(20)
        await touch(models, "a")
        assert shelf.loads == ["a", "a"]
        await models.close()

    asyncio.run(run())


def test_a_model_whose_bundle_is_gone_does_not_hide_the_others(tmp_path, quick_bundle):
    moved = shutil.copytree(quick_bundle, tmp_path / "moved")
    Store(tmp_path).create("lost", Modelfile(str(moved)), {}, within=None)
    shutil.rmtree(moved)
    with serving(tmp_path, entry_of(quick_bundle), preload=False) as server:
        assert [model["name"] for model in server.json("GET", "/api/tags")["models"]] == ["tiny:latest"]
        assert server.ask("POST", "/api/generate", {"model": "lost", "prompt": "x"})[0] == 500
        assert server.ask("DELETE", "/api/delete", {"model": "lost"})[0] == 200
