"""What can be damaged in a checkpoint, a bundle, a small file or a stopped run, and how; see `KINDS`."""

from __future__ import annotations

import hashlib
import json
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from conftest import record_again
from damage import (
    BUNDLES,
    CANARY,
    NASTY_NUMBERS,
    NASTY_TEXTS,
    Case,
    Chance,
    Command,
    Damage,
    any_value,
    bundle_commands,
    checkpoint_commands,
    damaged_bytes,
    damaged_document,
    damaged_json,
    deep_json,
)


def some(chance: Chance, commands: tuple[Command, ...], count: int = 2) -> tuple[Command, ...]:
    return tuple(chance.sample(commands, count))


def _rewrite(path: Path, chance: Chance, damage: Callable[[Chance, bytes], tuple[bytes, str]]) -> str:
    content, done = damage(chance, path.read_bytes())
    path.write_bytes(content)
    return f"{path.name}: {done}"


# Checkpoints


def checkpoint_config(chance: Chance, folder: Path) -> Case:
    """config.json."""
    name = chance.choice(["bin", "safetensors"])
    done = _rewrite(folder / name / "config.json", chance, damaged_json)
    return Case(done, some(chance, checkpoint_commands(name)))


def checkpoint_tokenizer(chance: Chance, folder: Path) -> Case:
    """tokenizer_config.json and ice_text.model."""
    if chance.randrange(3):
        done = _rewrite(folder / "bin" / "ice_text.model", chance, damaged_bytes)
    else:
        done = _rewrite(folder / "bin" / "tokenizer_config.json", chance, damaged_json)
    return Case(done, some(chance, checkpoint_commands("bin")))


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
    return Case(done, some(chance, checkpoint_commands(name)))


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
    return Case(done, some(chance, checkpoint_commands("safetensors")))


def rezip(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
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
            rezip(path, lambda name, old: bomb if name.endswith(which) else old, zipfile.ZIP_DEFLATED)
            done = f"{which} of {len(bytes(bomb))} zeros, compressed"
    return Case(done, some(chance, checkpoint_commands("bin")))


def calls(folder: Path) -> tuple[bytes, ...]:
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
    call, protocol = chance.choice(calls(folder)), bytes((0x80, chance.choice([2, 2, 3, 4, 5])))
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
        rezip(path, lambda name, old: changed if name.endswith("/data.pkl") else old)
    else:
        path.write_bytes(changed)
        done += ", bare"
    return Case(done, some(chance, checkpoint_commands("bin")))


# Bundles


def record_files_again(bundle: Path) -> None:
    """Make the manifest fit the files."""
    listed = json.loads((bundle / "manifest.json").read_bytes())["files"]
    record_again(bundle, *(name for name in listed if (bundle / name).is_file()))


def with_digest(manifest: Any) -> bytes:
    """The manifest's bytes with the digest that fits, if it can have one."""
    from glmexport.bundle import manifest_text

    try:
        return manifest_text(manifest).encode()
    except (AttributeError, ValueError):  # no object; half a character
        return json.dumps(manifest).encode()


def bundle_manifest(chance: Chance, folder: Path) -> Case:
    """manifest.json of a bundle of any form."""
    name = chance.choice(BUNDLES)
    path = folder / name / "manifest.json"
    content, done = damaged_json(chance, path.read_bytes())
    with suppress(ValueError, RecursionError):
        if chance.randrange(4):
            content = with_digest(json.loads(content))
    path.write_bytes(content)
    return Case(f"{name}: {done}", some(chance, bundle_commands(name), 3))


def bundle_entries(chance: Chance, folder: Path) -> Case:
    """Links, directories, pipes and other files in the place of a bundle's."""
    name = chance.choice(BUNDLES)
    path = chance.choice(sorted((folder / name).iterdir()))
    done = _replace(chance, path)
    return Case(f"{name}/{path.name}: {done}", some(chance, bundle_commands(name), 3))


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
    name = chance.choice(BUNDLES)
    small = [path for path in (folder / name).iterdir() if path.suffix in (".txt", ".toml", ".model", ".json")]
    path = chance.choice(sorted(path for path in small if path.name != "manifest.json"))
    done = _rewrite(path, chance, damaged_json if path.suffix == ".json" else damaged_bytes)
    record_files_again(folder / name)
    return Case(f"{name}/{done}", some(chance, bundle_commands(name), 3))


def onnx_bytes(chance: Chance, folder: Path) -> Case:
    """Bytes of graphs and of their data, with hashes that fit, mostly."""
    name = chance.choice(BUNDLES)
    path = chance.choice(sorted((folder / name).glob("*.onnx*")))
    done = _rewrite(path, chance, damaged_bytes)
    if chance.randrange(4):
        record_files_again(folder / name)
    return Case(f"{name}/{done}", some(chance, bundle_commands(name), 3))


def onnx_fields(chance: Chance, folder: Path) -> Case:
    """Fields of graphs: where external data lie, sizes, types, names, operators; with hashes that fit."""
    import onnx

    name = chance.choice(BUNDLES)
    path = chance.choice(sorted((folder / name).glob("*.onnx")))
    model = onnx.load(path, load_external_data=False)
    done = [_damage_model(chance, model, folder) for _ in range(chance.choice([1, 1, 2]))]
    path.write_bytes(model.SerializeToString())
    record_files_again(folder / name)
    return Case(f"{name}/{path.name}: {', '.join(done)}", some(chance, bundle_commands(name), 3))


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
        value, _, digest = lines[number].rstrip().rpartition(b" ")
        value, done = damaged_json(chance, value)
        if chance.randrange(4):
            digest = hashlib.sha256(value).hexdigest().encode()
        lines[number] = value + b" " + digest + chance.choice([b"\n", b"\n", b"\r\n", b""])
        path.write_bytes(b"".join(lines))
    else:
        path = chance.choice(sorted(partial.iterdir()))
        done = (
            _rewrite(path, chance, damaged_bytes) if chance.randrange(2) else f"{path.name}: {_replace(chance, path)}"
        )
    return Case(done, (Command(("split", "safetensors", "-o", "stopped", "--opset", "14", "--resume")),))


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
