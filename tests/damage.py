"""Random damage to JSON, bytes and files, the things to damage, and the commands to run over them.

A case is a function of a random generator alone: hypothesis draws one in tests/test_fuzz.py, benchmarks/fuzz.py seeds
one.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from checkpoints import write_checkpoint
from derived_bundles import glmexport
from faults import stop_after_the_first_graph

CANARY = "canary"
"""A file of the case's directory that a command makes where it runs what lies in a checkpoint."""

BUNDLES = ("float", "half", "int4", "shared")
"""What `prepare` makes of a checkpoint, in every form."""


class Command(NamedTuple):
    """Arguments of `glmexport`, run where the case lies, and what stands on its stdin."""

    arguments: tuple[str, ...]
    stdin: bytes = b""


class Case(NamedTuple):
    """What was damaged, in words, and what to run over it."""

    damage: str
    commands: tuple[Command, ...]


Chance = random.Random
Damage = Callable[[Chance, Path], Case]
"""Damages the copies in a directory (see `lay_out`) and says how."""

# Random pieces

NASTY_TEXTS = (
    *("", ".", "..", "../x", "../../etc/passwd", "/etc/passwd", "sub/x", "a\\b", "C:x", "manifest.json", "lm.onnx"),
    *("x\0y", "x\ny", "\x1b[31mred", "\u2028", "\ud800", "x" * 300, "%s{0}", "[red]x[/]", "[/]", "NaN", "é", "🙂"),
)
NASTY_NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 8, 127, 128, 255, 256, 4096, 65535, 1 << 20, 1 << 24, 1 << 31, 1 << 32, 1 << 40, 1 << 53),
    *(1 << 62, 1 << 63, 1 << 64, 10**18, 10**40, -(1 << 63), 0.5, -0.0, 1e-320, 1e308, 1e400, -1e400, float("nan")),
)


def any_value(chance: Chance, depth: int = 2) -> Any:
    """A value of JSON, with numbers and texts that programs stumble over."""
    match chance.randrange(8 if depth else 6):
        case 0:
            return chance.choice([None, True, False])
        case 1 | 2:
            return chance.choice(NASTY_NUMBERS)
        case 3:
            return chance.randint(-(1 << 40), 1 << 40)
        case 4 | 5:
            return chance.choice(NASTY_TEXTS)
        case 6:
            return [any_value(chance, depth - 1) for _ in range(chance.randrange(4))]
        case _:
            return {chance.choice(NASTY_TEXTS): any_value(chance, depth - 1) for _ in range(chance.randrange(4))}


def damaged_bytes(chance: Chance, data: bytes) -> tuple[bytes, str]:
    """Some bytes changed, cut off, taken out, put in or repeated."""
    content = bytearray(data)
    start = chance.randrange(len(content) + 1)
    stop = min(start + chance.choice([1, 2, 8, 64, 4096]), len(content))
    match chance.randrange(6):
        case 0 | 1:
            places = [chance.randrange(len(content)) for _ in range(chance.randint(1, 4))] if content else []
            for place in places:
                content[place] = chance.choice(
                    [content[place] ^ 1 << chance.randrange(8), 0, 255, chance.randrange(256)]
                )
            return bytes(content), f"bytes {places} changed"
        case 2:
            return bytes(content[:start]), f"cut off at {start}"
        case 3:
            return bytes(content[:start] + content[stop:]), f"bytes {start} to {stop} taken out"
        case 4:
            put = bytes(chance.randrange(256) for _ in range(chance.randint(1, 8)))
            return bytes(content[:start] + put + content[start:]), f"{put!r} put in at {start}"
        case _:
            return bytes(content[:stop] + content[start:]), f"bytes {start} to {stop} repeated"


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value, but for the value itself."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inside for place in ((*path, key), *places_in(item, (*path, key)))]


def damaged_document(chance: Chance, document: Any) -> tuple[Any, str]:
    """A JSON value with up to three of the values in it replaced or left out."""
    document = json.loads(json.dumps(document))
    done = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        places = places_in(document)
        if not places:
            break
        path = chance.choice(places)
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        if chance.randrange(5):
            holder[path[-1]] = any_value(chance)
            done.append(f"{'.'.join(map(str, path))} = {holder[path[-1]]!r:.100}")
        else:
            del holder[path[-1]]
            done.append(f"no {'.'.join(map(str, path))}")
    return document, ", ".join(done)


def damaged_json(chance: Chance, data: bytes) -> tuple[bytes, str]:
    """Of a JSON document: a value replaced, mostly; a key given twice, deep nesting, damaged bytes."""
    match chance.randrange(10):
        case 0:
            return damaged_bytes(chance, data)
        case 1:
            return deep_json(chance)
        case 2:
            key = chance.choice([json.dumps(key) for key in json.loads(data)] or ['""']).encode()
            value = json.dumps(any_value(chance)).encode()
            return data.replace(b"{", b"{" + key + b": " + value + b",", 1), f"{key!r} twice, once as {value[:60]!r}"
        case _:
            document, done = damaged_document(chance, json.loads(data))
            return json.dumps(document).encode(), done


def deep_json(chance: Chance) -> tuple[bytes, str]:
    """A JSON document that is nested deeply, or holds a number of many digits."""
    depth = chance.choice([900, 5000, 200_000])
    content = chance.choice(
        [b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b'{"a": ' + b"9" * depth + b"}"]
    )
    return content, f"{content[:6]!r}… of depth {depth}"


# The files of a case


def prepare(directory: Path) -> None:
    """Make what cases are made from: checkpoints in every format, bundles in every form, a split that was stopped."""
    sizes = {"hidden_size": 16, "inner": 32, "heads": 1, "num_blocks": 1}
    write_checkpoint(directory / "bin", image_tokens=40, tied=True, **sizes)
    for fmt in ("bin-sharded", "safetensors", "safetensors-sharded"):
        write_checkpoint(directory / fmt, fmt=fmt, vocab_size=64, tokenizer=False, shards=2, **sizes)
    forms = {
        "float": (),
        "half": ("--weights", "float16"),
        "int4": ("--slim", "--embedding", "bf16", "--quantize", "int4"),
        "shared": ("--quantize", "int8", "--embedding", "shared"),
    }
    for name, options in forms.items():
        done = glmexport("split", directory / "bin", "-o", directory / name, "--opset", "17", "-q", *options)
        if done.status:
            raise RuntimeError(f"{name}: {done}")
    stop_after_the_first_graph(directory / "safetensors", directory / "stopped", pytest.MonkeyPatch())


def lay_out(stock: Path, folder: Path) -> None:
    """Copies of everything that `prepare` made, and files that commands are given."""
    shutil.copytree(stock, folder, symlinks=True, dirs_exist_ok=True)
    (folder / "examples.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')


def checkpoint_commands(name: str) -> tuple[Command, ...]:
    """Every command that opens a checkpoint."""
    split = ("split", name, "-o", "out", "--opset", "17")
    arguments = (
        ("inspect", name),
        ("inspect", name, "--json", "-q"),
        (*split, "--dry-run"),
        (*split, "-q"),
        (*split, "--slim", "--embedding", "bf16", "--quantize", "int8"),
        ("tokenize", name, "12+34= é"),
        ("verify", "float", name, "--steps", "1", "-q"),
    )
    return tuple(map(Command, arguments))


def bundle_commands(name: str) -> tuple[Command, ...]:
    """Every command that opens a bundle."""
    threads = ("--threads", "1", "-q")
    arguments = (
        ("inspect", name),
        ("inspect", name, "--json"),
        ("inspect", name, "--check", "-q"),
        ("tokenize", name, "12+34= é", "--pieces"),
        ("tokenize", name, "--decode", "5,9,60,1500"),
        ("generate", name, "12+34=", "--greedy", "--max-tokens", "2", *threads),
        ("generate", name, "12", "--memory-limit", "1", "--max-tokens", "2", *threads),
        ("generate", name, "12", "--dry-run"),
        ("slim", name, "-o", "out", "-q"),
        ("embed", name, "-o", "out", "-q"),
        ("quantize", name, "-o", "out", "--bits", "4", "-q"),
        ("verify", name, "bin", "--steps", "1", "-q"),
        ("eval", name, "examples.jsonl", *threads),
        ("doctor", name, "--no-bandwidth", "-q"),
    )
    return tuple(map(Command, arguments))
