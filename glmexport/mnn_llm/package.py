"""A checkpoint or bundle -> the folder that MNN's LLM engine runs, checked and put in its place, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glmexport import __version__, names
from glmexport.affine import METHODS
from glmexport.bundle_writer import BundleWriter, check_output, sentences
from glmexport.draft import Notice, ignore_notice
from glmexport.draft_writer import Advance, check_disk, ignore_advance
from glmexport.errors import ExportError, GlmExportError
from glmexport.mnn.converter import mnn_of_json, mnn_version
from glmexport.mnn.matrix import FLOAT16, FLOAT32, MnnMatrix
from glmexport.mnn.rounding import block_that_holds
from glmexport.mnn_llm.check import CheckResult, check_package
from glmexport.mnn_llm.engine_config import EMBEDDING_FILES, GRAPH_FILE, TOKENIZER_FILE, WEIGHT_FILE, config_files
from glmexport.mnn_llm.engine_graph import EngineGraph, engine_graph
from glmexport.mnn_llm.following import Reference
from glmexport.mnn_llm.position_probe import needs_correction
from glmexport.mnn_llm.sentencepiece_facts import BPE, KINDS, UNIGRAM, SentencePieceFacts, read_facts
from glmexport.mnn_llm.source import PackageSource
from glmexport.mnn_llm.tokenizer_file import tokenizer_file
from glmexport.mnn_llm.weight_writer import WEIGHT, place_bytes, sixteen_bits
from glmexport.tokenizer import Tokenizer
from glmexport.tools import tool_versions

BLOCKS = (32, 64, 128, "channel")
BITS = (4, 8, FLOAT16, FLOAT32)
SCHEMA = 1
KIND = "mnn-llm"
CHECKED_BYTES = 1 << 30
"""Packages whose weights take more than this in the engine are checked only when asked for: it holds them all."""

_SMALL_FILES = 8 << 20  # graph, tokenizer and configs; the real ones have some 5 MB
ALWAYS, AUTO, NEVER = "always", "auto", "never"


@dataclass(frozen=True)
class PackageOptions:
    """bits: of the blocks' matrices, 4 or 8, or 16 or 32 for floats. head_bits: of the LM head, None for 8 with 4.

    block: inputs that share a scale, 32, 64, 128 or "channel". method: as `glmexport quantize` has it.
    check: `always`, `never`, or `auto`, where the engine takes less than CHECKED_BYTES.
    Raises GlmExportError for values that there are not.
    """

    bits: int = 4
    head_bits: int | None = None
    block: int | str = 64
    method: str = "mse"
    check: str = AUTO

    def __post_init__(self) -> None:
        for name, value, known in (
            ("bits", self.bits, BITS),
            ("bits of the LM head", self.head_bits, (None, *BITS)),
            ("block", self.block, BLOCKS),
            ("method", self.method, METHODS),
            ("check", self.check, (ALWAYS, AUTO, NEVER)),
        ):
            if value not in known:
                choices = ", ".join(str(one) for one in known if one is not None)
                raise GlmExportError(f"A package has no {name} {value!r}: choose one of {choices}.")

    def stored(self, source: PackageSource, name: str, outputs: int, inputs: int) -> MnnMatrix:
        """How a matrix is stored; one that is quantized already keeps its integers.

        What is no multiple of the block gets one scale a row, as MNN knows no partial blocks.
        """
        affine = source.integers.get(name + WEIGHT)
        if affine is None:
            head = self.head_bits or (8 if self.bits == 4 else self.bits)
            bits = head if name + WEIGHT == source.head_name else self.bits
            whole = self.block == "channel" or inputs % int(self.block)
            return MnnMatrix(outputs, inputs, bits, (inputs if whole else int(self.block)) if bits < FLOAT16 else 0)
        block = block_that_holds(affine, inputs)
        if block is None:
            raise GlmExportError(
                f"{name}{WEIGHT} has {inputs} inputs in groups of {affine.block_size(inputs)}, which MNN's equal "
                "blocks cannot hold; give the checkpoint."
            )
        return MnnMatrix(outputs, inputs, affine.bits, block)


@dataclass(frozen=True)
class Package:
    """What was written. result: of the check, None where it was left out."""

    directory: Path
    files: dict[str, int]
    form: str
    corrected: bool
    mnn: str
    result: CheckResult | None

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "package": str(self.directory),
            "mnn": self.mnn,
            "form": self.form,
            "position_corrected": self.corrected,
            "files": self.files,
            "bytes": sum(self.files.values()),
            "check": None if self.result is None else self.result.as_json(),
        }


def write_package(
    source: PackageSource,
    reference: Callable[[], Reference],
    output: Path,
    options: PackageOptions,
    *,
    force: bool = False,
    check: Callable[[], None] = lambda: None,
    notice: Notice = ignore_notice,
    advance: Advance = ignore_advance,
) -> Package:
    """Write the package to `output`. Never more than a band of one matrix and the scales of one are in memory.

    reference: makes what the package is compared with. check: raises where the source changed while it was read.
    advance: takes (what, bytes written).
    Raises GlmExportError without MNN; BundleError where the output may not be written; ExportError where the engine's
    answers are not the reference's; and what reading raises. No error leaves anything behind.
    """
    mnn = mnn_version()
    check_output(output, force=force)
    tokenizer, facts = source.tokenizer(), _facts(source, notice)
    advance("ask the engine how it counts positions", 0)
    with sentences(output):
        corrected = needs_correction()
    graph = engine_graph(source.config, lambda *matrix: options.stored(source, *matrix), corrected=corrected)
    check_disk(output, package_bytes(source, graph) + _SMALL_FILES)
    with BundleWriter(output, force=force) as writer, sentences(output):
        advance(WEIGHT_FILE, 0)
        with writer.create(WEIGHT_FILE) as file:
            for place in graph.places:
                for part in place_bytes(place, source, options.method):
                    file.write(part.data)
                    advance(WEIGHT_FILE, len(part))
        exact = _write_embedding(writer, source, advance)
        advance(GRAPH_FILE, 0)
        digest = bytes.fromhex(writer.files[WEIGHT_FILE].sha256)
        writer.write_bytes(GRAPH_FILE, mnn_of_json(graph.net.as_json(digest)))
        writer.write_bytes(TOKENIZER_FILE, _tokenizer(source, tokenizer, facts))
        form = _form(graph, exact)
        configs = config_files(source.config, source.embedding_dtype, _bits(graph), TOKENIZER_FILE)
        for name, content in configs.items():
            writer.write_bytes(name, content)
        result = None
        if options.check == ALWAYS or (options.check == AUTO and engine_bytes(graph) <= CHECKED_BYTES):
            advance("compare the engine with the reference", 0)
            result = check_package(writer.path(""), reference(), tokenizer, form, mnn)
            if result.complaint:
                raise ExportError(result.complaint)
            if result.texts:
                notice(f"MNN's tokenizer writes {len(result.texts)} of the texts tried with other tokens.")
        else:
            notice("The package was not compared with the reference, as the engine holds it whole; --check does it.")
        check()
        writer.commit(_manifest(source, options, corrected, mnn, form, result))
        sizes = {name: record.bytes for name, record in writer.files.items()}
    return Package(output, sizes, form, corrected, mnn, result)


def package_bytes(source: PackageSource, graph: EngineGraph) -> int:
    """Bytes of the package, but for some of its small files."""
    config = source.config
    return graph.places[-1].end + 2 * config.vocab_size * config.hidden_size


def expected_bytes(source: PackageSource, options: PackageOptions) -> int:
    """About the bytes that will be written, before the engine was asked anything."""
    graph = engine_graph(source.config, lambda *matrix: options.stored(source, *matrix), corrected=True)
    return package_bytes(source, graph)


def engine_bytes(graph: EngineGraph) -> int:
    """About what the engine holds of a package: floats as float32."""
    return sum(
        place.stored.total_bytes * (2 if isinstance(place.stored, MnnMatrix) and place.stored.bits == FLOAT16 else 1)
        for place in graph.places
    )


def _facts(source: PackageSource, notice: Notice) -> SentencePieceFacts:
    facts = read_facts(source.tokenizer_model or b"", names.TOKENIZER_MODEL)
    if facts.kind not in (UNIGRAM, BPE):
        raise GlmExportError(
            f"{names.TOKENIZER_MODEL} is a {KINDS.get(facts.kind, 'different')} model of SentencePiece; MNN's engine "
            "knows Unigram and BPE."
        )
    if facts.charsmap or facts.trims:
        notice(f"{names.TOKENIZER_MODEL} normalizes texts, which MNN's engine will not: some get other tokens.")
    return facts


def _tokenizer(source: PackageSource, tokenizer: Tokenizer, facts: SentencePieceFacts) -> bytes:
    images = source.form.slim.num_image_tokens if source.form.slim else source.config.num_image_tokens
    rows = tokenizer.vocabulary.to_new(np.arange(images, images + len(facts.pieces))).tolist()
    ids = source.config.special_ids
    return tokenizer_file(facts, source.config, rows, (ids.gmask, ids.bos))


def _write_embedding(writer: BundleWriter, source: PackageSource, advance: Advance) -> bool:
    """Write the rows; returns whether they are the source's numbers."""
    dtype, exact = source.embedding_dtype, True
    name = EMBEDDING_FILES[dtype]
    advance(name, 0)
    with writer.create(name) as file:
        for band in source.embedding_bands():
            part, same = sixteen_bits(band, dtype)
            exact = exact and same
            file.write(part.data)
            advance(name, len(part))
    return exact


def _bits(graph: EngineGraph) -> set[int]:
    return {place.stored.bits for place in graph.places if isinstance(place.stored, MnnMatrix)}


def _form(graph: EngineGraph, exact_embedding: bool) -> str:
    """The coarsest form of weights in the package, as budgets have it."""
    bits = _bits(graph)
    if bits & {4, 8}:
        return f"int{min(bits)}"
    return "float32" if exact_embedding else "float16"


def _manifest(
    source: PackageSource, options: PackageOptions, corrected: bool, mnn: str, form: str, result: CheckResult | None
) -> dict[str, Any]:
    bits = "as the bundle" if source.integers else options.bits
    return {
        "schema": SCHEMA,
        "glmexport": __version__,
        "kind": KIND,
        "architecture": source.config.architecture,
        "weights": {"form": form, "bits": bits, "block": options.block, "method": options.method},
        "embedding": source.embedding_dtype,
        "mnn": {"version": mnn, "position_corrected": corrected},
        "check": None if result is None else result.as_json(),
        "tools": tool_versions(),
    }
