"""Bundles as the passes make them, and readers of their bytes that share no code with glmexport.

`odd_bundle` is what most of these tests start from: odd numbers of rows, image tokens in front, a tied head, a width
that no group divides. Its graphs have opset 17, which is traced twenty times faster than 18.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from checkpoints import write_checkpoint
from conftest import listing, split_directory
from onnx import TensorProto

from glmexport.affine import Affine
from glmexport.bundle import check_files, open_bundle
from glmexport.config import SpecialIds
from glmexport.derive import derive
from glmexport.form import QuantizationForm
from glmexport.passes import Pass
from glmexport.passes.quantize_weights import QuantizePass
from glmexport.prompt import prepare_prompt
from glmexport.recipe import Recipe, uniform_recipe

IMAGES = 40
ODD = {"vocab_size": 1897, "image_tokens": IMAGES, "hidden_size": 40, "inner": 300, "tied": True, "seed": 11}
OPSET = 17
Shared = Callable[[str, Callable[[Path], object]], Path]

# Making


def odd_checkpoint(shared: Shared) -> Path:
    """40 image rows, 1508 pieces and padding; head equal to the embedding; the padding id 3 is an image row."""
    return shared("odd-checkpoint", lambda path: write_checkpoint(path, **ODD))


def odd_bundle(shared: Shared) -> Path:
    """The odd checkpoint, split; never change it."""
    checkpoint = odd_checkpoint(shared)
    return shared("odd-bundle", lambda path: split_directory(checkpoint, path, opset=OPSET))


def plain_checkpoint(shared: Shared) -> Path:
    """No image tokens, no tokenizer, a head of its own."""
    sizes = {"vocab_size": 131, "hidden_size": 40, "inner": 300, "seed": 12}
    return shared("plain-checkpoint", lambda path: write_checkpoint(path, tokenizer=False, **sizes))


def plain_bundle(shared: Shared) -> Path:
    """The plain checkpoint, split; never change it."""
    checkpoint = plain_checkpoint(shared)
    return shared("plain-bundle", lambda path: split_directory(checkpoint, path, opset=OPSET))


def derived(source: Path, output: Path, *passes: Pass, **options: bool) -> list[str]:
    """Apply passes, each to the bundle that the one before wrote (beside `output`); returns the notices."""
    notices: list[str] = []
    for number, step in enumerate(passes, 1):
        target = output if number == len(passes) else output.with_name(f"{output.name}-step-{number}")
        derive(open_bundle(source), lambda _, step=step: step, target, notice=notices.append, **options)
        source = target
    return notices


def quantize_pass(
    bits: int = 4,
    group_size: int | str = 32,
    layout: str = "matmulnbits",
    *,
    symmetric: bool = True,
    method: str = "mse",
    head: int | None = 8,
    activations: str | None = None,
    num_blocks: int = 2,
) -> QuantizePass:
    """One way for every matrix, as `--bits` asks for it."""
    affine = Affine(bits, group_size, symmetric, method)
    lm = None if head is None else Affine(head, group_size, symmetric, method)
    return QuantizePass(uniform_recipe(affine, lm, num_blocks), form_of(layout, activations))


def recipe_pass(recipe: Recipe, layout: str = "matmulnbits") -> QuantizePass:
    return QuantizePass(recipe, form_of(layout))


def form_of(layout: str, activations: str | None = None) -> QuantizationForm:
    return QuantizationForm(layout) if activations is None else QuantizationForm(layout, activations, activations)


class Result(NamedTuple):
    status: int
    stdout: str
    stderr: str


def glmexport(*arguments: object) -> Result:
    """Run the command line in this process, exit status and all."""
    from glmexport.cli.main import run

    before, sys.argv = sys.argv, ["glmexport", *map(str, arguments)]
    status = 0
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                run()
            except SystemExit as done:
                status = int(done.code or 0)
    finally:
        sys.argv = before
    return Result(status, out.getvalue(), errors.getvalue())


def assert_one_sentence(result: Result, *words: str) -> None:
    """Status 2 and one line on stderr that holds these words; nothing else."""
    assert result.status == 2, result
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if not line.startswith(("Note: ", "["))]  # not progress
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("Error: ")
    assert errors[0].endswith(".")
    for word in words:
        assert word in errors[0]


@contextlib.contextmanager
def untouched(*directories: Path) -> Iterator[None]:
    """Nothing below these directories changes, not even a modification time."""
    before = [listing(directory) for directory in directories]
    yield
    for directory, was in zip(directories, before, strict=True):
        now = listing(directory)
        assert {name for name in {*was, *now} if was.get(name) != now.get(name)} == set()


# Reading


def manifest_of(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "manifest.json").read_text("utf-8"))


def steps_of(bundle: Path) -> list[str]:
    return [entry["step"] for entry in manifest_of(bundle)["history"]]


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(bundle.iterdir())}


def assert_intact(bundle: Path) -> None:
    assert [complaint for _, complaint in check_files(open_bundle(bundle)) if complaint] == []


def inode(bundle: Path, name: str) -> int:
    return (bundle / name).stat().st_ino


class Place(NamedTuple):
    """Where one initializer lies."""

    file: Path
    offset: int
    length: int
    data_type: int
    shape: tuple[int, ...]

    def read(self) -> bytes:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


def load(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def place_of(bundle: Path, graph: str, name: str) -> Place:
    """Where the initializer whose name ends so lies."""
    model = load(bundle / f"{graph}.onnx")
    (proto,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith(name))
    facts = {entry.key: entry.value for entry in proto.external_data}
    file = bundle / facts["location"]
    return Place(file, int(facts["offset"]), int(facts["length"]), proto.data_type, tuple(proto.dims))


def rewrite(place: Place, data: bytes) -> None:
    """Put other bytes there, in a file of its own: the old one may be shared by hard links."""
    assert len(data) == place.length
    whole = bytearray(place.file.read_bytes())
    whole[place.offset : place.offset + place.length] = data
    place.file.unlink()
    place.file.write_bytes(whole)


def floats(bundle: Path, graph: str, name: str) -> np.ndarray:
    place = place_of(bundle, graph, name)
    return np.frombuffer(place.read(), "<f4").reshape(place.shape)


def nibbles(data: bytes) -> np.ndarray:
    """Two 4-bit numbers a byte, the lower half first."""
    packed = np.frombuffer(data, np.uint8)
    return np.stack([packed % 16, packed // 16], axis=-1).reshape(-1)


def numbers(data: bytes, bits: int) -> np.ndarray:
    return (nibbles(data) if bits == 4 else np.frombuffer(data, np.uint8)).astype(np.int64)


def decoded(bundle: Path, graph: str, matrix: str) -> np.ndarray:
    """A quantized matrix [out, in] as float32, from the bytes of the file and the schema of the operator alone."""
    model = load(bundle / f"{graph}.onnx")
    (node,) = (node for node in model.graph.node if any(name.endswith(f"{matrix}.codes") for name in node.input))
    facts = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "MatMulNBits":
        parts = [place_of(bundle, graph, name) for name in node.input[1:]]
        return _decode_nbits(parts, **{key: facts[key] for key in ("K", "N", "bits", "block_size")})
    assert node.op_type == "DequantizeLinear"
    parts = [place_of(bundle, graph, name) for name in node.input]
    return _decode_linear(parts, facts["axis"], facts.get("block_size", 0)).T


def _decode_nbits(parts: list[Place], **facts: int) -> np.ndarray:
    rows, width, bits, block = facts["N"], facts["K"], facts["bits"], facts["block_size"]
    groups = math.ceil(width / block)
    assert parts[0].shape == (rows, groups, block * bits // 8)
    codes = numbers(parts[0].read(), bits).reshape(rows, groups, block)
    scales = np.frombuffer(parts[1].read(), "<f4").reshape(rows, groups, 1)
    points: Any = 2 ** (bits - 1)
    if len(parts) == 3:
        points = numbers(parts[2].read(), bits).reshape(rows, -1)[:, :groups, None]
    whole = (codes - points).astype(np.float32) * scales
    return whole.reshape(rows, groups * block)[:, :width]


def _decode_linear(parts: list[Place], axis: int, block: int) -> np.ndarray:
    """[in, out]."""

    def elements(place: Place, shape: tuple[int, ...]) -> np.ndarray:
        bits = 4 if place.data_type in (TensorProto.INT4, TensorProto.UINT4) else 8
        found = numbers(place.read(), bits)[: math.prod(shape)].reshape(shape)
        signed = place.data_type in (TensorProto.INT4, TensorProto.INT8)
        return np.where(found >= 2 ** (bits - 1), found - 2**bits, found) if signed else found

    shape = parts[0].shape
    codes = elements(parts[0], shape)
    scales = np.frombuffer(parts[1].read(), "<f4").reshape(parts[1].shape)
    points = elements(parts[2], parts[2].shape) if len(parts) == 3 else np.zeros(parts[1].shape, np.int64)
    if scales.ndim == 1:
        assert axis == 1
        return (codes - points[None, :]).astype(np.float32) * scales[None, :]
    assert axis == 0
    of_row = np.arange(shape[0]) // block
    return (codes - points[of_row]).astype(np.float32) * scales[of_row]


def quantized_matrices(bundle: Path, graph: str) -> dict[str, dict[str, Any]]:
    (entry,) = (entry for entry in manifest_of(bundle)["graphs"] if entry["name"] == graph)
    return entry["matrices"]


def weights_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every tensor of a .bin checkpoint in float32."""
    import torch

    return {name: value.float().numpy() for name, value in torch.load(checkpoint / "pytorch_model.bin").items()}


# Running, by plain onnxruntime


def session(model: Path | bytes, *, exact: bool = False, folder: Path | None = None) -> onnxruntime.InferenceSession:
    """exact: every node as it stands, nothing fused. folder: of the external data of a model given as bytes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if exact:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def exact_session(bundle: Path, graph: str) -> onnxruntime.InferenceSession:
    """A quantized graph whose products round no activations: what it computes with the numbers that are stored."""
    model = load(bundle / f"{graph}.onnx")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    return session(model.SerializeToString(), exact=True, folder=bundle)


def float_twin(floating: Path, quantized: Path, graph: str) -> onnxruntime.InferenceSession:
    """The float32 graph with the quantized bundle's matrices, decoded here, in the place of its own."""
    model = load(floating / f"{graph}.onnx")
    (entry,) = (entry for entry in manifest_of(floating)["graphs"] if entry["name"] == graph)
    replaced = quantized_matrices(quantized, graph)
    for proto in model.graph.initializer:
        if proto.data_location != TensorProto.EXTERNAL:
            continue
        if proto.name in replaced:
            value = decoded(quantized, graph, proto.name)
            value = value.T if proto.name in entry["transposed"] else value
        else:
            value = floats(floating, graph, proto.name)
        proto.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(value), proto.name))
    return session(model.SerializeToString())


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found - expected‖ / ‖expected‖."""
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def inputs_of(bundle: Path, graph: str, *, batch: int = 2, seq: int = 5, past: int = 3) -> dict[str, np.ndarray]:
    """Seeded inputs of a graph."""
    model = manifest_of(bundle)["model"]
    random = np.random.default_rng(5)
    hidden = random.standard_normal((seq, batch, model["hidden_size"])).astype(np.float32)
    if graph == "lm":
        return {"hidden_states": hidden}
    heads, total = model["num_heads"], past + seq
    cache = random.standard_normal((2, past, batch, heads, model["hidden_size"] // heads)).astype(np.float32)
    mask = np.zeros((batch, 1, seq, total), np.bool_)
    mask[:, 0] = np.arange(total)[None, :] > np.arange(seq)[:, None] + past
    positions = random.integers(0, 20, (batch, 2, seq))
    return {"inputs_embeds": hidden, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}


PROMPTS = ([7, 11, 2, 5], [9, 8])
ANSWERS = ([4, 10], [6, 3])


def chain(
    bundle: Path, number_of: Callable[[int], int] = lambda piece: piece, rows: np.ndarray | None = None
) -> list[np.ndarray]:
    """Logits [batch, vocab] after a prompt of two rows and after each of two answers.

    number_of: id in this bundle of a piece of the SentencePiece model. rows: the embedding, where no graph has it.
    """
    model = manifest_of(bundle)["model"]
    ids = SpecialIds(**model["special_ids"])
    prompt = prepare_prompt([[*map(number_of, words), ids.gmask, ids.bos] for words in PROMPTS], ids)
    given = [prompt.input_ids, *(np.array([[number_of(row[i])] for row in ANSWERS]) for i in range(len(ANSWERS)))]
    blocks = [session(bundle / f"glm_block_{i}.onnx") for i in range(model["num_blocks"])]
    head = session(bundle / "lm.onnx")
    heads = model["num_heads"]
    pasts = [np.zeros((2, 0, 2, heads, model["hidden_size"] // heads), np.float32) for _ in blocks]
    logits = []
    for step, input_ids in enumerate(given):
        mask, positions = (prompt.attention_mask, prompt.position_ids) if step == 0 else prompt.decode_step(step - 1)
        hidden = embedded(bundle, input_ids, rows)
        for i, block in enumerate(blocks):
            feeds = {"attention_mask": mask, "position_ids": positions, "past_key_values": pasts[i]}
            hidden, pasts[i] = block.run(["hidden_states", "presents"], {"inputs_embeds": hidden, **feeds})
        logits.append(head.run(["logits"], {"hidden_states": hidden})[0])
    return logits


def embedded(bundle: Path, input_ids: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    if rows is None:
        return session(bundle / "embedding.onnx").run(None, {"input_ids": input_ids})[0]
    return np.ascontiguousarray(rows[input_ids].transpose(1, 0, 2))


def seek_rows(path: Path, ids: Sequence[int], width: int, itemsize: int) -> list[bytes]:
    """Rows of a raw file, each read by seek."""
    found = []
    with path.open("rb") as file:
        for row in ids:
            file.seek(row * width * itemsize)
            found.append(file.read(width * itemsize))
    return found
