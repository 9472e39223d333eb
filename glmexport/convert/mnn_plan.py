"""What a conversion for MNN makes: of how many bits and which blocks, decided and said before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.convert.mnn_sources import CHANNEL
from glmexport.draft import Notice
from glmexport.errors import GlmExportError
from glmexport.form import FLOAT16 as HALF
from glmexport.mnn.matrix import FLOAT16, FLOAT32
from glmexport.mnn.module import LOW, NORMAL
from glmexport.mnn.rounding import block_for

BITS = (8, 4, 16, FLOAT32)
DEFAULT_BLOCK = 128
HEAD_BITS = 8
"""Of the LM head where the blocks get fewer."""

MEMORY_BUDGET = 3_000_000_000
BASE_MEMORY = 400_000_000
"""Interpreter, onnxruntime and one process with MNN in it, before any weight."""


@dataclass(frozen=True)
class MnnOptions:
    """How to convert.

    bits: of the blocks' matrices, one of `BITS`; None: as the bundle stores them. lm_bits: of the LM head; None: 8
    where `bits` is 4, else `bits`. block: the most inputs that share a scale. memory: the mode that the bundle is run
    in, None: low where anything is quantized. argmax: what the head gives, None: as the bundle's. jobs: graphs at once.
    """

    bits: int | None = None
    lm_bits: int | None = None
    block: int = DEFAULT_BLOCK
    memory: str | None = None
    argmax: str | None = None
    jobs: int = 1


@dataclass(frozen=True)
class MnnPlan:
    """What is made.

    bits: graph -> of matrices that are float in the bundle. block: inputs of these that share a scale, or CHANNEL.
    most: what a block is to be at most.
    """

    bits: Mapping[str, int]
    block: int
    most: int
    memory: str
    argmax: str


def plan_mnn(bundle: Bundle, options: MnnOptions, notice: Notice) -> MnnPlan:
    """Decide and say what is decided. Raises GlmExportError where the options do not fit the bundle."""
    for asked in (options.bits, options.lm_bits):
        if asked is not None and asked not in BITS:
            raise GlmExportError(f"bits is {asked}, expected one of {', '.join(map(str, BITS))}.")
    if options.block < 1 or options.jobs < 1:
        raise GlmExportError(f"block is {options.block} and jobs {options.jobs}, expected 1 or more of each.")
    kept = FLOAT16 if bundle.form.weights == HALF else FLOAT32
    quantized = {entry["name"]: {record["bits"] for record in entry["matrices"].values()} for entry in bundle.graphs}
    bits = dict.fromkeys(quantized, kept)
    if bundle.form.quantization is None:
        blocks = options.bits or kept
        bits = dict.fromkeys(quantized, blocks)
        bits[names.HEAD] = options.lm_bits or max(blocks, HEAD_BITS)
    else:
        _demand_same_bits(bundle, options, quantized)
        notice("The bundle is quantized: its integers and scales go over as they are, nothing is rounded again.")
    block = _block(bundle, options.block, bits, notice)
    integers = any(quantized.values()) or any(count < FLOAT16 for count in bits.values())
    memory = options.memory or (LOW if integers else NORMAL)
    return MnnPlan(bits, block, options.block, memory, options.argmax or bundle.argmax)


def _demand_same_bits(bundle: Bundle, options: MnnOptions, found: Mapping[str, set[int]]) -> None:
    blocks = set().union(*(bits for name, bits in found.items() if name != names.HEAD))
    head = found[names.HEAD]
    for asked, has, option in ((options.bits, blocks, "--bits"), (options.lm_bits, head, "--lm-bits")):
        if asked is not None and has and has != {asked}:
            words = " and ".join(f"int{count}" for count in sorted(has))
            raise GlmExportError(
                f"The bundle is quantized to {words} already and {option} asks for {asked} bits; leave {option} out "
                "to keep its integers, or convert the float32 bundle: rounding twice only adds errors."
            )


def _block(bundle: Bundle, at_most: int, bits: Mapping[str, int], notice: Notice) -> int:
    """Inputs that share a scale, of matrices that are rounded here, with a notice where any are."""
    rounds = [entry for entry in bundle.graphs if bits[entry["name"]] < FLOAT16 and entry["name"] != names.EMBEDDING]
    if not rounds:
        return CHANNEL
    config = bundle.config
    inputs = {config.hidden_size, config.inner_size}
    block = block_for(inputs, at_most)
    if block is None:
        sizes = " and ".join(map(str, sorted(inputs)))
        notice(f"No multiple of 16 up to {at_most} divides {sizes} inputs: one scale for each output (per channel).")
        return CHANNEL
    notice(f"{block} inputs share a scale" + f" ({at_most} asked for)" * (block != at_most) + ".")
    return block


def jobs_at_once(bundle: Bundle, options: MnnOptions) -> int:
    """Graphs at once, so that their checks fit into the memory budget: each runs its weights as float32."""
    config = bundle.config
    block = 4 * config.hidden_size * (4 * config.hidden_size + 2 * config.inner_size)
    return max(min(options.jobs, (MEMORY_BUDGET - BASE_MEMORY) // (3 * block // 2 + BASE_MEMORY // 2)), 1)
