"""What this computer has, and what that means for a model: which forms of it fit into memory, how fast each can be.

Decoding one token at a time reads every weight of the blocks and of the LM head once a token, so memory bandwidth over
those bytes is the most tokens a second that any runtime can give. At short history onnxruntime comes within a few
percent of it: 3.8 ms for a 126 MB block at 34 GB/s (full size, 4 bits, groups of 32, two cores with AVX512-VNNI).
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from glmexport import __version__, names
from glmexport.affine import LARGEST_BLOCK, Affine, Sizes
from glmexport.bundle import Bundle
from glmexport.config import ModelConfig, SpecialIds
from glmexport.inventory import form_in_words
from glmexport.machine import INTEGER_PRODUCTS, Cpu, Memory, read_bandwidth, read_cpu, read_memory
from glmexport.placement import FLOAT_BYTES, held_on_cpu, kv_cache_bytes
from glmexport.recipe import affine_of_record
from glmexport.sizes import size_in_words

PACKAGES = ("onnxruntime", "onnx", "numpy", "torch", "transformers", "sentencepiece", "numba")

CHATGLM_6B = ModelConfig(
    architecture="chatglm-6b",
    vocab_size=130528,
    hidden_size=4096,
    num_blocks=28,
    num_heads=32,
    inner_size=16384,
    max_positions=2048,
    layernorm_epsilon=1e-5,
    num_image_tokens=0,
    special_ids=SpecialIds(mask=130000, gmask=130001, bos=130004, eos=130005, pad=3, forced=5),
)
"""The model that forms are reckoned for where no bundle is given; the reference's defaults, which need torch to ask."""

PROCESS_BYTES = 500_000_000
"""Kept free for Python, onnxruntime and activations: a round number, as placement.PROVIDER_BYTES is."""

LIMIT_SHARE = 0.8
"""Of the memory available, the part that is recommended as --memory-limit, which counts each scale once."""

FITS, STREAMS, TOO_LARGE, UNKNOWN = "fits", "streams", "too large", "unknown"


@dataclass(frozen=True)
class FormNeeds:
    """What one form of a model needs, in bytes.

    disk: of all weights. memory: of the graphs that a session holds, and the KV cache at the model's last position.
    largest: the same with the largest graph alone, which is what streaming needs. per_token: weights read for a token.

    Scales count twice in memory: onnxruntime packs them with the codes and keeps them beside that. Of int4 matrices in
    groups of 32, 4.13 GB of graphs, it held 4.80 GB (version 1.31, full size).
    """

    name: str
    disk: int
    memory: int
    largest: int
    per_token: int


@dataclass(frozen=True)
class FormReport:
    """A form on this computer.

    verdict: `fits`, `streams` (with a memory limit), `too large`, `unknown`. tokens_per_second: at most, None unknown
    or where weights come from disk.
    """

    needs: FormNeeds
    verdict: str
    tokens_per_second: float | None


@dataclass(frozen=True)
class Report:
    """All of it. versions: package -> version, None not installed. bandwidth: bytes a second, None not measured.

    kv_cache: bytes at the last position of `model`. memory_limit: bytes to give --memory-limit, None where memory is
    unknown. advice: sentences.
    """

    system: str
    versions: Mapping[str, str | None]
    cpu: Cpu
    memory: Memory
    disk_place: str
    disk_free: int
    providers: tuple[str, ...]
    mnn: bool
    bandwidth: float | None
    model: ModelConfig
    kv_cache: int
    forms: tuple[FormReport, ...]
    memory_limit: int | None
    advice: tuple[str, ...]


def examine(bundle: Bundle | None = None, *, bandwidth: bool = True) -> Report:
    """Examine this computer, for a bundle or for ChatGLM-6B. bandwidth: measure it, which takes about a second."""
    cpu, memory = read_cpu(), read_memory()
    place = Path.cwd()
    config = CHATGLM_6B if bundle is None else bundle.config
    speed = read_bandwidth(cpu.cores, memory.available) if bandwidth else None
    needs = (*(() if bundle is None else (bundle_needs(bundle),)), *form_needs(config))
    forms = tuple(judge(form, memory.available, speed) for form in needs)
    versions = {"glmexport": __version__, "Python": platform.python_version()}
    installed = {**versions, **{name: _version(name) for name in PACKAGES}}
    free = shutil.disk_usage(place).free
    limit = memory_limit(memory.available)
    providers = _providers() if installed["onnxruntime"] else ()
    return Report(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=installed,
        cpu=cpu,
        memory=memory,
        disk_place=str(place),
        disk_free=free,
        providers=providers,
        mnn=importlib.util.find_spec("MNN") is not None,  # found, never imported: that prints
        bandwidth=speed,
        model=config,
        kv_cache=config.num_blocks * kv_cache_bytes(config, 1, config.max_positions),
        forms=forms,
        memory_limit=limit,
        advice=tuple(advise(cpu, memory, free, forms, installed, providers)),
    )


# What a model needs


def form_needs(config: ModelConfig) -> tuple[FormNeeds, ...]:
    """Every form of the table for a model of these sizes, from the shapes of its matrices, run on the CPU.

    float16 is what `split --dtype float16` makes, for GPUs: a CPU holds and reads its matrices in float32. Integer
    forms have the LM head in 8 bits and a bfloat16 embedding, which is mapped and not held.
    """
    return (
        _needs(config, "float32", 4, 4, embedding_width=4),
        _needs(config, "float16, for GPUs", 2, 2, embedding_width=2, copies=2),
        _needs(config, "int8 group 128", Affine(8, 128), Affine(8, 128)),
        _needs(config, "int4 group 32", Affine(4, 32), Affine(8, 32)),
        _needs(config, "int4 group 128", Affine(4, 128), Affine(8, 128)),
    )


def bundle_needs(bundle: Bundle) -> FormNeeds:
    """What a bundle needs as it is, by the sizes of its files."""
    config = bundle.config
    files = bundle.graph_sizes
    graphs = held_on_cpu(files, bundle.form.float_bytes)
    read = sum(size for name, size in graphs.items() if name != names.EMBEDDING)
    scales = sum(_scales_of_record(record) for entry in bundle.graphs for record in entry["matrices"].values())
    table = bundle.form.embedding_file
    width = bundle.form.cache_float_bytes(bundle.flavors[-1])  # of the graphs that run here
    kv_cache = config.num_blocks * kv_cache_bytes(config, 1, config.max_positions, width)
    held = sum(graphs.values())
    if bundle.runtime == names.MNN and bundle.manifest["mnn"]["memory"] == "normal":
        read = held = 4 * sum(int(entry["parameters"]) for entry in bundle.graphs)
    disk = sum(files.values()) + (bundle.files[table].bytes if table is not None else 0)
    name = f"this bundle, {form_in_words(bundle)}"
    return FormNeeds(name, disk, held + scales + kv_cache, max(graphs.values()) + kv_cache, read)


def judge(needs: FormNeeds, available: int | None, bandwidth: float | None) -> FormReport:
    """Whether a form fits into `available` bytes, and its most tokens a second at `bandwidth` bytes a second."""
    if available is None:
        verdict = UNKNOWN
    elif needs.memory + PROCESS_BYTES <= available:
        verdict = FITS
    else:
        verdict = STREAMS if needs.largest + PROCESS_BYTES <= available else TOO_LARGE
    held = verdict in (FITS, UNKNOWN)
    return FormReport(needs, verdict, bandwidth / needs.per_token if bandwidth and held else None)


def memory_limit(available: int | None) -> int | None:
    """Bytes to give --memory-limit where so many are available: a part of them, in whole tenths of a GB."""
    return None if available is None else int(available * LIMIT_SHARE) // 10**8 * 10**8


def advise(
    cpu: Cpu,
    memory: Memory,
    disk_free: int,
    forms: tuple[FormReport, ...],
    versions: Mapping[str, str | None],
    providers: tuple[str, ...],
) -> Iterator[str]:
    """What follows from all that, a sentence each."""
    if cpu.integer_products is False:
        lacking = " nor ".join(name for name in INTEGER_PRODUCTS if name in cpu.features)
        either = "neither" if " nor " in lacking else "no"
        yield f"The processor has {either} {lacking}: int8 products take several steps each and stay below the bound."
    if cpu.features.get("AVX2") is False:
        yield "The processor has no AVX2: every product is much slower than the bound."
    if memory.limit is not None:
        yield f"A cgroup allows {size_in_words(memory.limit)} of memory, less than the machine has."
    yield from _advice_on_memory(memory, forms)
    largest, smallest = (pick(form.needs.disk for form in forms) for pick in (max, min))
    if smallest > disk_free:
        yield f"No form fits on the disk here ({size_in_words(disk_free)} free): write bundles to another place."
    elif largest > disk_free:
        yield (
            f"The largest form, {size_in_words(largest)}, does not fit on the disk here: `glmexport split --quantize` "
            "writes the integers straight from the checkpoint."
        )
    if versions.get("torch") is None:
        yield "torch is not installed: bundles run without it, split and verify need it."
    if any(name.startswith(("CUDA", "Tensorrt", "ROCM", "MIGraphX", "Dml")) for name in providers):
        yield "onnxruntime has a GPU provider: `--gpu-memory SIZE` puts as many blocks there as fit."


def _advice_on_memory(memory: Memory, forms: tuple[FormReport, ...]) -> Iterator[str]:
    if memory.available is None:
        yield "How much memory is available is unknown here: compare it with the table."
        return
    streamed = [form for form in forms if form.verdict == STREAMS]
    limit = f"--memory-limit {(memory_limit(memory.available) or 0) / 1e9:.1f}GB"
    if all(form.verdict == TOO_LARGE for form in forms):
        yield "Memory is too small even for the largest graph and the whole KV cache of any form: use fewer positions."
    elif not any(form.verdict == FITS for form in forms):
        yield f"Memory is too small to hold any form: run with {limit}, which reads the rest from disk for every token."
    elif streamed:
        yield f"What does not fit runs with {limit}, which reads the rest from disk for every token."


def _needs(
    config: ModelConfig,
    name: str,
    blocks: Affine | int,
    head: Affine | int,
    *,
    embedding_width: int | None = None,
    copies: int = 1,
) -> FormNeeds:
    """blocks, head: how their matrices are stored, or bytes of an element.

    embedding_width: bytes of an element of an embedding graph, None for a raw bfloat16 file. copies: bytes held and
    read of weights, for each byte of them that is stored.
    """
    hidden, inner, vocab = config.hidden_size, config.inner_size, config.vocab_size
    shapes = ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner))
    matrices = [_sizes(blocks, *shape) for shape in shapes]
    head_matrix = _sizes(head, vocab, hidden)
    # biases, one an output, and weight and bias of two norms
    block = sum(size.total for size in matrices) + (sum(out for out, _ in shapes) + 4 * hidden) * _small_width(blocks)
    last = head_matrix.total + 2 * hidden * _small_width(head)
    read = config.num_blocks * block + last
    scales = config.num_blocks * sum(size.scales for size in matrices) + head_matrix.scales
    table = vocab * hidden * (embedding_width or 2)
    mapped = 0 if embedding_width else table
    held = copies * read
    largest = max(copies * block, copies * last, table - mapped)
    kv_cache = config.num_blocks * kv_cache_bytes(config, 1, config.max_positions, _small_width(blocks))
    return FormNeeds(name, read + table, held + table - mapped + scales + kv_cache, largest + kv_cache, held)


def _sizes(form: Affine | int, out: int, width: int) -> Sizes:
    return form.sizes(out, width) if isinstance(form, Affine) else Sizes(out * width * form, 0, 0)


def _scales_of_record(record: Mapping[str, Any]) -> int:
    """Bytes of scales among those that a manifest says of a matrix: 4 for each group of codes."""
    if "block" in record:  # of a bundle for MNN, which holds what is stored
        return 0
    affine = affine_of_record(record)
    group = LARGEST_BLOCK if affine.per_channel else int(affine.group_size)
    return int(record["bytes"]) * 4 // (group * affine.bits // 8 + 4)


def _small_width(form: Affine | int) -> int:
    return FLOAT_BYTES if isinstance(form, Affine) else form


def _providers() -> tuple[str, ...]:
    import onnxruntime  # type: ignore[import-untyped]

    return tuple(onnxruntime.get_available_providers())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
