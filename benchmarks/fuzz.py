"""Damage checkpoints, bundles and small files at random and run the command line over them.

    python benchmarks/fuzz.py --minutes 30 --seed 1
    python benchmarks/fuzz.py --seed 1 --kind manifest --number 812 --keep DIR    # one case again, kept to look at

Whatever is damaged, a command ends in success, in a failed check, or in one sentence. It never shows a traceback,
crashes, hangs, takes memory beyond a bound, changes what it reads, or runs what lies in a file. Commands run in a
process of their own whose address space is limited; it is started again after a crash or a hang.

tests/test_fuzz.py runs the same kinds of damage for some seconds, drawn by hypothesis. A case here is a function of
seed, kind and number alone.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickletools
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MEMORY_BYTES = 3 << 30
"""Address space that a command may take beyond what the process has when its libraries are loaded."""
HELD_BYTES = 600 << 20
"""Memory that a command may come to hold beyond that: the models are tiny, the largest file read whole has 64 MiB."""
SECONDS = 20.0
"""Longer is a hang; the longest command takes a fraction of a second."""
CANARY = "canary"
"""A file of the case's directory that a command makes where it runs what lies in a checkpoint."""


class Command(NamedTuple):
    """Arguments of `glmexport`, run where the case lies, and what stands on its stdin."""

    arguments: tuple[str, ...]
    stdin: bytes = b""


class Case(NamedTuple):
    """What was damaged, in words, and what to run over it."""

    damage: str
    commands: tuple[Command, ...]


class Outcome(NamedTuple):
    """How a command ended. problem: a traceback, crash or hang. held: bytes that it came to hold."""

    status: int
    stdout: str
    stderr: str
    problem: str = ""
    held: int = 0


Chance = random.Random
Damage = Callable[[Chance, Path], Case]
"""Damages the copies in a directory (see `prepare`) and says how."""

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
    """Make what cases are made from: checkpoints in every format, bundles in three forms, a split that was stopped."""
    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import write_checkpoint

    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 16, "inner": 32, "heads": 1, "num_blocks": 1}
    write_checkpoint(directory / "bin", image_tokens=40, tied=True, **sizes)
    for fmt in ("bin-sharded", "safetensors", "safetensors-sharded"):
        write_checkpoint(directory / fmt, fmt=fmt, vocab_size=64, tokenizer=False, shards=2, **sizes)
    for arguments in (
        ("split", "bin", "-o", "float", "--opset", "17"),
        ("split", "bin", "-o", "int4", "--opset", "17", "--slim", "--embedding", "bf16", "--quantize", "int4"),
        ("split", "bin", "-o", "shared", "--opset", "17", "--quantize", "int8", "--embedding", "shared"),
    ):
        outcome = run_here(Command(arguments), directory)
        if outcome.status or outcome.problem:
            raise RuntimeError(f"{arguments} ended with {outcome}")
    _stop_a_split(directory)


def _stop_a_split(directory: Path) -> None:
    """Leave `.stopped.partial`, as Ctrl-C does."""
    from glmexport.journal import Journal

    add, added = Journal.add, []

    def adding(self: Journal, *arguments: Any) -> None:
        add(self, *arguments)
        added.append(arguments)

    def stopping(*_: object) -> list[str]:
        while len(added) < 1:
            time.sleep(0.01)
        raise KeyboardInterrupt

    from glmexport import draft_writer

    lint, calls = draft_writer.lint_graph, []

    def second(*arguments: Any) -> list[str]:
        calls.append(arguments)
        return stopping() if len(calls) == 2 else lint(*arguments)

    Journal.add, draft_writer.lint_graph = adding, second  # type: ignore[method-assign]
    try:
        run_here(Command(("split", "safetensors", "-o", "stopped", "--opset", "17", "-q")), directory)
    finally:
        Journal.add, draft_writer.lint_graph = add, lint  # type: ignore[method-assign]
    if not (directory / ".stopped.partial").is_dir():
        raise RuntimeError("the split was not stopped")


def _pick(chance: Chance, count: int, *commands: Command) -> tuple[Command, ...]:
    return tuple(chance.sample(commands, count))


def _checkpoint_commands(chance: Chance, name: str, count: int = 2) -> tuple[Command, ...]:
    return _pick(
        chance,
        count,
        Command(("inspect", name)),
        Command(("inspect", name, "--json", "-q")),
        Command(("split", name, "-o", "out", "--dry-run", "--opset", "17")),
        Command(("split", name, "-o", "out", "--opset", "17", "-q")),
        Command(("split", name, "-o", "out", "--opset", "17", "--slim", "--embedding", "bf16", "--quantize", "int8")),
        Command(("tokenize", name, "12+34= é")),
        Command(("verify", "float", name, "--steps", "1", "-q")),
    )


def _bundle_commands(chance: Chance, name: str, count: int = 3) -> tuple[Command, ...]:
    return _pick(
        chance,
        count,
        Command(("inspect", name)),
        Command(("inspect", name, "--json")),
        Command(("inspect", name, "--check", "-q")),
        Command(("tokenize", name, "12+34= é", "--pieces")),
        Command(("tokenize", name, "--decode", "5,9,60,1500")),
        Command(("generate", name, "12+34=", "--greedy", "--max-tokens", "2", "--threads", "1", "-q")),
        Command(
            ("generate", name, "--input-ids", "5,9,7", "--max-tokens", "2", "--output-ids", "--threads", "1", "-q")
        ),
        Command(("generate", name, "12", "--memory-limit", "1", "--max-tokens", "2", "--threads", "1", "-q")),
        Command(("generate", name, "12", "--dry-run")),
        Command(("slim", name, "-o", "out", "-q")),
        Command(("embed", name, "-o", "out", "-q")),
        Command(("quantize", name, "-o", "out", "--bits", "4", "-q")),
        Command(("verify", name, "bin", "--steps", "1", "-q")),
        Command(("eval", name, "examples.jsonl", "--threads", "1", "-q")),
        Command(("doctor", name, "--no-bandwidth", "-q")),
    )


def _rewrite(path: Path, chance: Chance, damage: Callable[[Chance, bytes], tuple[bytes, str]]) -> str:
    content, done = damage(chance, path.read_bytes())
    path.write_bytes(content)
    return f"{path.name}: {done}"


# Checkpoints


def checkpoint_config(chance: Chance, folder: Path) -> Case:
    """config.json."""
    name = chance.choice(["bin", "safetensors"])
    done = _rewrite(folder / name / "config.json", chance, damaged_json)
    return Case(done, _checkpoint_commands(chance, name))


def checkpoint_tokenizer(chance: Chance, folder: Path) -> Case:
    """tokenizer_config.json and ice_text.model."""
    if chance.randrange(3):
        done = _rewrite(folder / "bin" / "ice_text.model", chance, damaged_bytes)
    else:
        done = _rewrite(folder / "bin" / "tokenizer_config.json", chance, damaged_json)
    return Case(done, _checkpoint_commands(chance, "bin"))


def checkpoint_index(chance: Chance, folder: Path) -> Case:
    """The index of a sharded checkpoint, and shards that are other than it says."""
    name = chance.choice(["bin-sharded", "safetensors-sharded"])
    (index,) = (folder / name).glob("*.index.json")
    if chance.randrange(3):
        document = json.loads(index.read_bytes())
        for tensor in chance.sample(sorted(document["weight_map"]), chance.randint(1, 3)):
            document["weight_map"][tensor] = chance.choice([any_value(chance), index.name, "config.json", tensor])
        index.write_text(json.dumps(document))
        done = f"{index.name}: other files"
    elif chance.randrange(2):
        done = _rewrite(index, chance, damaged_json)
    else:
        shard = chance.choice(sorted((folder / name).glob("*-of-*")))
        done = f"{shard.name}: {_replace(chance, shard)}"
    return Case(done, _checkpoint_commands(chance, name))


def safetensors_file(chance: Chance, folder: Path) -> Case:
    """The header of a safetensors file: its length, offsets, shapes, dtypes, names; its bytes."""
    path = folder / "safetensors" / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    match chance.randrange(5):
        case 0:
            done = _rewrite(path, chance, damaged_bytes)
        case 1:
            announced = chance.choice([0, 1, length - 1, length + 1, 1 << 24, (1 << 63) - 1, (1 << 64) - 1])
            path.write_bytes(struct.pack("<Q", announced) + content[8:])
            done = f"a header of {announced} bytes"
        case 2:
            document = json.loads(header)
            tensor = chance.choice(sorted(document))
            numbers = [0, -1, 1, 2, 16, 1 << 31, 1 << 61, (1 << 62) - 1, 1 << 64, 0.5]
            entry = document[tensor] = {
                "dtype": chance.choice(["F16", "F32", "U8", "F8_E4M3", "BOOL", "F4", 3]),
                "shape": [chance.choice(numbers) for _ in range(chance.randrange(5))],
                "data_offsets": [chance.choice([*numbers, len(data)]) for _ in range(chance.choice([2, 2, 2, 1, 3]))],
            }
            text = json.dumps(document).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + data)
            done = f"{tensor}: {entry}"
        case _:
            text, done = damaged_json(chance, header)
            path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return Case(done, _checkpoint_commands(chance, "safetensors"))


def _rezip(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def bin_file(chance: Chance, folder: Path) -> Case:
    """The zip archive of a torch file: bytes, lengths that it announces, compressed records."""
    path = folder / "bin" / "pytorch_model.bin"
    content = path.read_bytes()
    match chance.randrange(4):
        case 0:
            done = _rewrite(path, chance, damaged_bytes)
        case 1:  # the directory at its end
            start = (
                content.rindex(b"PK\x01\x02", 0, max(content.rindex(b"PK\x01\x02"), 5)) if chance.randrange(2) else -300
            )
            tail, done = damaged_bytes(chance, content[start:])
            path.write_bytes(content[:start] + tail)
        case 2:
            records = [place for place in range(len(content) - 4) if content[place : place + 4] == b"PK\x01\x02"]
            place = chance.choice(records) + chance.choice([20, 24, 42])  # lengths, compressed and not, and the offset
            number = chance.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, len(content)])
            path.write_bytes(content[:place] + struct.pack("<I", number) + content[place + 4 :])
            done = f"{number} in the archive's directory at {place}"
        case _:
            bomb = bytes(chance.choice([1 << 10, 50 << 20]))
            which = chance.choice(["data.pkl", "data/0", "byteorder", "version"])
            _rezip(path, lambda name, old: bomb if name.endswith(which) else old, zipfile.ZIP_DEFLATED)
            done = f"{which} of {len(bytes(bomb))} zeros, compressed"
    return Case(done, _checkpoint_commands(chance, "bin"))


def _calls(folder: Path) -> tuple[bytes, ...]:
    """Pickled calls, without protocol and end, that would make the canary if they were run."""
    canary = folder / CANARY
    text, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"

    def unicode(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    return (
        b"cposix\nsystem\n" + unicode(text) + b"\x85R",
        b"cos\nsystem\n" + unicode(text) + b"\x85R",
        b"cbuiltins\neval\n" + unicode(code) + b"\x85R",
        b"cbuiltins\nexec\n" + unicode(code) + b"\x85R",
        b"c__builtin__\neval\n" + unicode(code) + b"\x85R",
        b"csubprocess\nPopen\n]" + unicode("touch") + b"a" + unicode(str(canary)) + b"a\x85R",
        b"(" + unicode(text) + b"iposix\nsystem\n",
        b"(cposix\nsystem\n" + unicode(text) + b"o",
        unicode("posix") + unicode("system") + b"\x93" + unicode(text) + b"\x85R",
        b"cbuiltins\ngetattr\ncposix\nsystem\n" + unicode("__call__") + b"\x86R" + unicode(text) + b"\x85R",
        b"ctorch._utils\n_rebuild_tensor_v2\n(cposix\nsystem\n" + unicode(text) + b"\x85RtR",
        b"ccollections\nOrderedDict\n)R}" + unicode("__reduce__") + b"cposix\nsystem\n" + unicode(text) + b"\x85Rsb",
        b"(" + unicode("storage") + b"cposix\nsystem\n" + unicode(text) + b"\x85R" + unicode("0") + b"tQ",
        b"(((" + unicode("storage") + b"tQtQtQcposix\nsystem\n" + unicode(text) + b"\x85R",
        b"\x82\x01" + unicode(text) + b"\x85R",
        b"cpathlib\nPosixPath\n" + unicode(str(canary)) + b"\x85Rcpathlib\nPath.touch\n)\x81",
    )


def bin_pickle(chance: Chance, folder: Path) -> Case:
    """The pickle in a torch file: opcodes exchanged, calls put in, code in place of all of it."""
    path = folder / "bin" / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    call, protocol = chance.choice(_calls(folder)), bytes((0x80, chance.choice([2, 2, 3, 4, 5])))
    match chance.randrange(6):
        case 0:
            content = bytearray(pickled)
            codes = [ord(opcode.code) for opcode in pickletools.opcodes]
            for _ in range(chance.randint(1, 6)):
                content[chance.randrange(len(content))] = chance.choice(codes)
            changed, done = bytes(content), "opcodes exchanged"
        case 1:
            changed, done = damaged_bytes(chance, pickled)
        case 2:
            changed, done = protocol + call + b".", f"{call!r:.120}"
        case 3:
            changed, done = protocol + b"}X\x01\x00\x00\x00a" + call + b"s.", f"a dict of {call!r:.120}"
        case 4:
            changed, done = pickled[:2] + call + b"0" + pickled[2:], f"before the tensors {call!r:.120}"
        case _:
            start = chance.choice([place for _, _, place in pickletools.genops(pickled) if place])
            changed, done = pickled[:start] + call + pickled[start:], f"at {start} {call!r:.120}"
    if chance.randrange(8):
        _rezip(path, lambda name, old: changed if name.endswith("/data.pkl") else old)
    else:
        path.write_bytes(changed)
        done += ", bare"
    return Case(done, _checkpoint_commands(chance, "bin"))


# Bundles


def _record_again(bundle: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Make the manifest fit the files; with whatever a bundle has to vouch for its manifest."""
    from glmexport.bundle import sha256_of

    path = bundle / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name in manifest["files"]:
        file = bundle / name
        if file.is_file():
            manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    change(manifest)
    path.write_bytes(json.dumps(vouched_for(manifest)).encode())


def vouched_for(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the digest over the rest of it that fits, where manifests have one."""
    from glmexport import bundle

    digest = getattr(bundle, "manifest_digest", None)
    if digest is None or "digest" not in manifest:
        return manifest
    with suppress(Exception):  # of what is no manifest there is none
        return {**manifest, "digest": digest({key: value for key, value in manifest.items() if key != "digest"})}
    return manifest


def bundle_manifest(chance: Chance, folder: Path) -> Case:
    """manifest.json of a bundle of any form."""
    name = chance.choice(["float", "int4", "shared"])
    path = folder / name / "manifest.json"
    content, done = damaged_json(chance, path.read_bytes())
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        if chance.randrange(4):
            content = json.dumps(vouched_for(json.loads(content))).encode()
    path.write_bytes(content)
    return Case(f"{name}: {done}", _bundle_commands(chance, name))


def bundle_entries(chance: Chance, folder: Path) -> Case:
    """Links, directories, pipes and other files in the place of a bundle's."""
    name = chance.choice(["float", "int4", "shared"])
    path = chance.choice(sorted((folder / name).iterdir()))
    done = _replace(chance, path)
    return Case(f"{name}/{path.name}: {done}", _bundle_commands(chance, name))


def _replace(chance: Chance, path: Path) -> str:
    """Put something else in the place of a file."""
    content, elsewhere = path.read_bytes(), path.parent.parent / "elsewhere"
    path.unlink()
    match chance.randrange(9):
        case 0:
            return "missing"
        case 1:
            path.mkdir()
            return "a directory"
        case 2:
            os.mkfifo(path)
            return "a pipe"
        case 3:
            elsewhere.write_bytes(content)
            path.symlink_to(elsewhere)
            return "a link to the same bytes elsewhere"
        case 4:
            path.symlink_to(
                chance.choice(["/dev/zero", "/dev/null", "/proc/self/mem", "/etc/hostname", ".", path.name])
            )
            return f"a link to {path.readlink()}"
        case 5:
            path.write_bytes(b"")
            return "empty"
        case 6:
            path.write_bytes(content)
            os.truncate(path, chance.choice([1, 1 << 30, 1 << 40]))  # sparse
            return f"{path.stat().st_size} bytes"
        case 7:
            path.write_bytes(chance.choice(sorted(path.parent.glob("*.*"))).read_bytes())
            return "another file's bytes"
        case _:
            path.write_bytes(content)
            path.chmod(0)
            return "not readable"


def bundle_small_files(chance: Chance, folder: Path) -> Case:
    """Tokenizer, vocabulary and recipe of a bundle, with hashes that fit."""
    name = chance.choice(["float", "int4", "shared"])
    small = [path for path in (folder / name).iterdir() if path.suffix in (".txt", ".toml", ".model", ".json")]
    path = chance.choice(sorted(path for path in small if path.name != "manifest.json"))
    done = _rewrite(path, chance, damaged_json if path.suffix == ".json" else damaged_bytes)
    _record_again(folder / name)
    return Case(f"{name}/{done}", _bundle_commands(chance, name))


def onnx_bytes(chance: Chance, folder: Path) -> Case:
    """Bytes of graphs and of their data, with hashes that fit, mostly."""
    name = chance.choice(["float", "int4", "shared"])
    path = chance.choice(sorted((folder / name).glob("*.onnx*")))
    done = _rewrite(path, chance, damaged_bytes)
    if chance.randrange(4):
        _record_again(folder / name)
    return Case(f"{name}/{done}", _bundle_commands(chance, name))


def onnx_fields(chance: Chance, folder: Path) -> Case:
    """Fields of graphs: where external data lie, sizes, types, names, operators; with hashes that fit."""
    import onnx

    name = chance.choice(["float", "int4", "shared"])
    path = chance.choice(sorted((folder / name).glob("*.onnx")))
    model = onnx.load(path, load_external_data=False)
    done = [_damage_model(chance, model, folder) for _ in range(chance.choice([1, 1, 2]))]
    path.write_bytes(model.SerializeToString())
    _record_again(folder / name)
    return Case(f"{name}/{path.name}: {', '.join(done)}", _bundle_commands(chance, name))


def _damage_model(chance: Chance, model: Any, folder: Path) -> str:
    numbers = [number for number in NASTY_NUMBERS if isinstance(number, int) and -(1 << 63) <= number < 1 << 63]
    graph = model.graph
    external = [tensor for tensor in graph.initializer if tensor.external_data]
    tensor = chance.choice(external or list(graph.initializer))
    node = chance.choice(list(graph.node))
    match chance.randrange(9):
        case 0:
            secret = folder / "elsewhere"
            secret.write_bytes(bytes(1 << 20))
            places = [str(secret), "../elsewhere", "./../elsewhere", "/dev/zero", *NASTY_TEXTS]
            place = chance.choice(places).encode("utf-8", "replace").decode()
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place
            return f"{tensor.name} at {place!r:.80}"
        case 1:
            entry = chance.choice(list(tensor.external_data) or [tensor.external_data.add()])
            number = chance.choice(NASTY_NUMBERS)
            entry.value = chance.choice([str(number), "", "٣", "1_0", " 4096", "0x10", "4096"])
            return f"{entry.key} {entry.value!r:.60} of {tensor.name}"
        case 2:
            tensor.dims[:] = [chance.choice(numbers) for _ in range(chance.randrange(5))]
            return f"{tensor.name} of {list(tensor.dims)}"
        case 3:
            tensor.data_type = chance.choice([*range(25), -1, 99])
            return f"{tensor.name} of type {tensor.data_type}"
        case 4:
            value = chance.choice([*graph.input, *graph.output])
            dim = chance.choice(list(value.type.tensor_type.shape.dim) or [value.type.tensor_type.shape.dim.add()])
            dim.dim_value = chance.choice(numbers)
            return f"{value.name} with {dim.dim_value} on an axis"
        case 5:
            node.op_type = chance.choice(
                ["If", "Loop", "MatMul", "Expand", "ConstantOfShape", "Tile", "Range", "", "X"]
            )
            return f"{node.name} is {node.op_type}"
        case 6:
            attribute = chance.choice(list(node.attribute) or [node.attribute.add(name="axis", type=2)])
            attribute.i = chance.choice(numbers)
            attribute.ints[:] = [chance.choice(numbers)] * bool(attribute.ints)
            return f"{node.name} with {attribute.name} {attribute.i}"
        case 7:
            inline = chance.choice([one for one in graph.initializer if not one.external_data] or [tensor])
            inline.raw_data = struct.pack("<q", chance.choice(numbers)) * chance.choice([1, 2, 4])
            return f"{inline.name} is {inline.raw_data!r:.60}"
        case _:
            names = [*node.input, *node.output, chance.choice(NASTY_TEXTS).encode("utf-8", "replace").decode()]
            if node.input and chance.randrange(2):
                node.input[chance.randrange(len(node.input))] = chance.choice(names)
            else:
                graph.initializer.add().CopyFrom(tensor)
            return f"other names at {node.name}"


# Small files that people give, and what a stopped run leaves


def texts(chance: Chance, folder: Path) -> Case:
    """Recipes, lists of ids, corpora, examples, saved chats, lines of stdin."""
    recipe = b'[[rule]]\npattern = "*.mlp.*"\nblocks = "0-3, 27"\nbits = 4\ngroup_size = 32\n[[rule]]\nbits = "none"\n'
    example = b'{"prompt": "1+1=", "answer": "2", "history": [["a", "b"]]}\n'
    chat = b'[{"query": "1+1=", "answer": "2"}]'
    threads = ("--threads", "1", "-q")
    kinds: tuple[tuple[bytes, tuple[str, ...]], ...] = (
        (recipe, ("quantize", "float", "-o", "out", "--recipe", "file", "-q")),
        (recipe, ("split", "bin", "-o", "out", "--opset", "17", "--recipe", "file", "--dry-run")),
        (b"5\n9\n1500\n", ("slim", "float", "-o", "out", "--keep", "file", "-q")),
        ("12+34= é\n".encode(), ("slim", "float", "-o", "out", "--corpus", "file", "-q")),
        (example, ("eval", "float", "file", *threads)),
        (chat, ("chat", "float", "--history", "file", "--max-tokens", "1", *threads)),
        (b'"12+34="\n', ("tokenize", "float", "--jsonl")),
        (b"[5, 9]\n", ("tokenize", "float", "--jsonl", "--decode")),
        ("12+34= é".encode(), ("generate", "float", "-", "--max-tokens", "1", *threads)),
    )
    content, arguments = chance.choice(kinds)
    with suppress(ValueError):
        if chance.randrange(2):
            document = json.loads(content)
            changed = any_value(chance) if isinstance(document, str) else damaged_document(chance, document)[0]
            content = json.dumps(changed).encode() + b"\n"
    if chance.randrange(3):
        content, _ = damaged_bytes(chance, content)
    if not chance.randrange(12):
        content, _ = deep_json(chance)
    if "file" in arguments:
        (folder / "file").write_bytes(content)
        return Case(f"{arguments[0]} of {content!r:.200}", (Command(arguments, b"12+34="),))
    return Case(f"{arguments[0]} of {content!r:.200}", (Command(arguments, content),))


def journal(chance: Chance, folder: Path) -> Case:
    """What a stopped split left: its journal line by line, and the files beside it."""
    partial = folder / ".stopped.partial"
    path = partial / ".journal.jsonl"
    if chance.randrange(4):
        lines = path.read_bytes().splitlines(keepends=True)
        number = chance.randrange(len(lines))
        lines[number], done = damaged_json(chance, lines[number].rstrip())
        lines[number] += chance.choice([b"\n", b"\n", b"\r\n", b""])
        path.write_bytes(b"".join(lines))
    else:
        path = chance.choice(sorted(partial.iterdir()))
        done = (
            _rewrite(path, chance, damaged_bytes) if chance.randrange(2) else f"{path.name}: {_replace(chance, path)}"
        )
    return Case(done, (Command(("split", "safetensors", "-o", "stopped", "--opset", "17", "--resume")),))


KINDS: dict[str, Damage] = {
    "config": checkpoint_config,
    "tokenizer": checkpoint_tokenizer,
    "index": checkpoint_index,
    "safetensors": safetensors_file,
    "bin": bin_file,
    "pickle": bin_pickle,
    "manifest": bundle_manifest,
    "entries": bundle_entries,
    "small-files": bundle_small_files,
    "onnx-bytes": onnx_bytes,
    "onnx-fields": onnx_fields,
    "texts": texts,
    "journal": journal,
}
"""What is damaged -> how."""

# Running


class Worker:
    """A process that runs commands, within limits of time and memory; started when it is needed."""

    def __init__(self, *, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._errors.close()

    def run(self, command: Command, folder: Path) -> Outcome:
        """Run one command in a directory."""
        connection = self._connection or self._start()
        connection.send((tuple(command), str(folder)))
        try:
            if connection.poll(self._seconds):
                return Outcome(*connection.recv())
            problem = f"still running after {self._seconds:.0f} s"
        except (EOFError, ConnectionResetError):
            problem = ""
        status = self.close()
        self._errors.seek(0)
        tail = self._errors.read()[-2000:].decode("utf-8", "replace")
        return Outcome(status, "", tail, problem or f"crashed with status {status}")

    def close(self) -> int:
        """End the process."""
        if self._process is None or self._connection is None:
            return 0
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        self._process.kill()
        status = self._process.wait()
        self._process = self._connection = None
        return status

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        self._errors.truncate(0)
        limits = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # arenas are address space
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            env={**os.environ, **limits, "HF_HUB_OFFLINE": "1"},
        )
        theirs.close()
        self._connection = ours
        return ours


def serve(handle: int) -> None:
    """What the worker does until the other side is gone."""
    import numba  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch

    import glmexport.api
    import glmexport.passes.choose_bits
    import glmexport.splitter
    import glmexport.verify  # noqa: F401

    torch.set_num_threads(1)
    connection = Connection(handle)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            command, folder = connection.recv()
        except EOFError:
            return
        connection.send(tuple(run_here(Command(*command), Path(folder))))


def run_here(command: Command, folder: Path) -> Outcome:
    """Run a command in this process, in a directory; what libraries write past Python's stderr counts as stderr."""
    from glmexport.cli.main import run

    arguments, before, where = sys.argv, sys.stdin, Path.cwd()
    held = _reset_peak()
    status, problem = 0, ""
    with tempfile.TemporaryFile() as noise:
        with _stderr_into(noise), redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
            try:
                os.chdir(folder)
                sys.argv = ["glmexport", *command.arguments]
                sys.stdin = io.TextIOWrapper(io.BytesIO(command.stdin), "utf-8")
                run()
            except SystemExit as done:
                status = int(done.code or 0)
            except BaseException:
                problem = traceback.format_exc()
            finally:
                sys.argv, sys.stdin = arguments, before
                os.chdir(where)
        noise.seek(0)
        written = errors.getvalue() + noise.read(1 << 16).decode("utf-8", "replace")
    return Outcome(status, out.getvalue(), written, problem, _peak() - held)


@contextmanager
def _stderr_into(file: IO[bytes]) -> Iterator[None]:
    """Have what is written to the descriptor of stderr in a file."""
    keep = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(keep, 2)
        os.close(keep)


def _reset_peak() -> int:
    """Bytes that the process holds; from here on `_peak` counts anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)


# Judging


def complaint(command: Command, outcome: Outcome) -> str | None:
    """What is wrong with how a command ended, None where nothing is."""
    name = command.arguments[0]
    lines = [line for line in outcome.stderr.split("\n") if line and not line.startswith(("Note: ", "[ ", "[1"))]
    if outcome.problem:
        return outcome.problem + outcome.stderr[-1000:]
    if outcome.held > HELD_BYTES:
        return f"held {outcome.held >> 20} MiB"
    if "memory" in outcome.stderr.lower() or "bad_alloc" in outcome.stderr or "allocate" in outcome.stderr:
        return f"asked for more memory than it may: {outcome.stderr[:300]}"
    if "\x1b" in outcome.stderr or (name in ("inspect", "verify", "doctor") and "\x1b" in outcome.stdout):
        return f"sends what a file holds to the terminal: {(outcome.stderr + outcome.stdout)[:300]!r}"
    checks = name == "verify" or "--check" in command.arguments
    if outcome.status == 0 or (outcome.status == 1 and checks):
        return f"noise on stderr: {lines}" if lines else None
    if outcome.status != 2:
        return f"status {outcome.status}"
    if not lines or not lines[0].startswith("Error: ") or not lines[0].endswith("."):
        return f"no sentence: {lines}"
    if not all(line.isprintable() for line in lines) or len(lines[0]) > 2000:
        return f"not a line that a terminal shows: {lines[0][:300]!r}"
    if not all(line.startswith("  ") for line in lines[1:]):  # what is wrong with tensors is a list
        return f"more than one sentence: {lines}"
    return None


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Kind and content of everything below a directory."""
    found = {}
    for path in sorted(directory.rglob("*")):
        kind = path.lstat().st_mode
        content = b""
        if path.is_symlink():
            content = os.fsencode(path.readlink())
        elif path.is_file():
            with path.open("rb") as file:
                content = file.read(1 << 20)
        found[str(path.relative_to(directory))] = (kind, content)
    return found


def lay_out(stock: Path, folder: Path) -> None:
    """Copies of everything that `prepare` made, and files that commands are given."""
    shutil.copytree(stock, folder, symlinks=True, dirs_exist_ok=True)
    (folder / "examples.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')


def run_case(worker: Worker, folder: Path, damage: Damage, chance: Chance) -> tuple[Case, list[str]]:
    """Damage what lies in `folder` (see `lay_out`) and run the commands; the case and what is wrong with it."""
    case = damage(chance, folder)
    wrong = []
    resumed = folder / ".stopped.partial"
    for command in case.commands:
        before = snapshot(folder)
        outcome = worker.run(command, folder)
        found = complaint(command, outcome)
        if found is not None:
            wrong.append(f"glmexport {' '.join(command.arguments)}\n{found}")
        for made in (folder / "out", folder / "stopped"):
            if made.is_dir():
                shutil.rmtree(made)
        after = snapshot(folder)
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        changed = [name for name in changed if not name.startswith(resumed.name)]
        if changed:
            wrong.append(f"glmexport {' '.join(command.arguments)}\nchanged {', '.join(changed)}")
        if (folder / CANARY).exists():
            wrong.append(f"glmexport {' '.join(command.arguments)}\nran what lies in the file")
            break
    return case, wrong


def main() -> None:
    """Run cases until the time is over, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="of damage; all of them in turn without it")
    parser.add_argument("--number", type=int, help="run this case only")
    parser.add_argument("--failures", type=int, default=20, metavar="N", help="stop after so many (default: 20)")
    parser.add_argument("--keep", type=Path, help="a directory to be made, for the files of the last failure")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    with tempfile.TemporaryDirectory(prefix="glmexport-fuzz-") as place, Worker() as worker:
        failed = _run(options, Path(place), worker)
    sys.exit(1 if failed else 0)


def _run(options: argparse.Namespace, place: Path, worker: Worker) -> int:
    prepare(place / "stock")
    kinds = [options.kind] if options.kind else list(KINDS)
    end = time.monotonic() + 60 * options.minutes
    counts = dict.fromkeys(kinds, 0)
    failed = 0
    number = options.number or 0
    while options.number is None or number == options.number:
        for kind in kinds:
            if time.monotonic() > end or failed >= options.failures:
                break
            folder = place / "case"
            lay_out(place / "stock", folder)
            case, wrong = run_case(worker, folder, KINDS[kind], random.Random(f"{options.seed} {kind} {number}"))
            counts[kind] += 1
            if wrong:
                failed += 1
                again = f"--seed {options.seed} --kind {kind} --number {number}"
                print(f"FAILED {again}\n{case.damage}\n" + "\n".join(wrong) + "\n", flush=True)
                if options.keep is not None:
                    shutil.rmtree(options.keep, ignore_errors=True)
                    shutil.copytree(folder, options.keep, symlinks=True, ignore=_pipes)
            shutil.rmtree(folder)
        else:
            number += 1
            continue
        break
    print(", ".join(f"{kind} {count}" for kind, count in counts.items()))
    print(f"{sum(counts.values())} cases, {failed} failed")
    return failed


def _pipes(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(directory) / name).is_fifo()]


if __name__ == "__main__":
    main()
