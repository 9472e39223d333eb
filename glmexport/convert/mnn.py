"""Bundle -> bundle for MNN: `glm_block_<i>.mnn`, `lm.mnn`, the raw embedding, the tokenizer, and a manifest of its own.

Each graph is converted by MNN's converter with stand-ins for its matrices, which are then written by us, one band of
rows at a time: memory is that of a band, every form of bundle goes over as it is, and the bytes are reproducible. A
graph is only kept after it is read back and run (`mnn_check`).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glmexport import __version__, names
from glmexport.bundle import SCHEMA, Bundle, LinkedFile, demand_portable
from glmexport.bundle_writer import BundleWriter, check_output, sentences
from glmexport.convert.mnn_check import check_numbers, check_vectors, check_weights
from glmexport.convert.mnn_embedding import raw_embedding
from glmexport.convert.mnn_graph import Laid, convert_stand_ins, model_bytes, write_weights
from glmexport.convert.mnn_plan import MnnOptions, MnnPlan, jobs_at_once, plan_mnn
from glmexport.convert.mnn_sources import CHANNEL, FloatSource, Source, float_form, float_source, quantized_source
from glmexport.convert.plain_graph import PlainGraph, plain_graph
from glmexport.derive import demand_apart, demand_intact
from glmexport.draft import BundleDraft, Notice, as_matrix, draft_of_bundle, ignore_notice, is_matrix
from glmexport.draft_writer import Advance, check_disk, ignore_advance
from glmexport.errors import BundleError, ExportError
from glmexport.form import FLOAT32 as FLOAT32_DTYPE
from glmexport.form import GRAPH, RAW
from glmexport.interface import GraphSpec, TensorSpec, graph_spec
from glmexport.mnn.converter import mnn_version
from glmexport.mnn.matrix import FLOAT16, FLOAT32
from glmexport.mnn.rounding import block_for
from glmexport.mnn.session import TAKES
from glmexport.passes.slim_vocab import with_vocabulary_file
from glmexport.recipe import affine_of_record, policy_record
from glmexport.tensors import Matrix

if TYPE_CHECKING:
    from glmexport.checkpoint import Checkpoint


def convert_mnn(
    bundle: Bundle,
    output: Path,
    options: MnnOptions | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    copy: bool = False,
    checkpoint: Checkpoint | None = None,
    notice: Notice = ignore_notice,
    advance: Advance = ignore_advance,
) -> MnnPlan:
    """Write the bundle for MNN to `output` and return what was decided.

    resume: go on where a run that was killed has left off. checkpoint: where to round weights from that MNN cannot hold
    as the bundle has them; without one they are an error. notice: takes sentences for the user. advance: takes (what,
    bytes hashed or written). Raises GlmExportError: MNN is missing, options do not fit; BundleError: the output may not
    be written, the bundle is damaged or computes in float16; ExportError: a graph did not become what it must be.
    What is left behind, `BundleWriter` says; beside it, the log of a conversion that failed, which its sentence names.
    """
    version = mnn_version()
    demand_portable(bundle)
    _demand_float32(bundle)
    check_output(output, force=force)
    demand_apart(bundle, output)
    spare = {} if checkpoint is None else _matrices_of(bundle, checkpoint)
    plan = plan_mnn(bundle, options or MnnOptions(), notice)
    draft = _files(draft_of_bundle(bundle), bundle, notice)
    graphs = [entry["name"] for entry in bundle.graphs if entry["name"] != names.EMBEDDING]
    if not resume:
        check_disk(output, _estimate(bundle, plan))
    demand_intact(bundle, advance)
    identity = {
        "bundle": bundle.manifest["digest"],
        "mnn": version,
        "plan": dataclasses.asdict(plan),
        "checkpoint": None if checkpoint is None else checkpoint.weights.state_when_opened,
        "glmexport": __version__,
    }
    with (
        BundleWriter(output, force=force, copy=copy, identity=identity, resume=resume) as writer,
        sentences(output),  # of files that are made beside the bundle on the way
    ):
        if resume and not writer.resumed:
            notice(f"There is no unfinished run of {output} to go on with; it is begun anew.")
        with _scratch(output) as scratch:
            work = partial(_graph, writer, bundle, plan, spare, scratch=scratch, notice=notice, advance=advance)
            entries = dict(_at_once(jobs_at_once(bundle, options or MnnOptions()), graphs, work))
        _write_files(writer, draft, advance)
        writer.commit(_manifest(bundle, draft, plan, version, [entries[graph] for graph in graphs]))
    return plan


def _write_files(writer: BundleWriter, draft: BundleDraft, advance: Advance) -> None:
    """What lies beside the graphs."""
    for name, content in draft.files.items():
        if isinstance(content, bytes):
            writer.write_bytes(name, content)
        elif isinstance(content, LinkedFile):
            writer.link(name, content)
        else:
            with writer.create(name) as sink:
                for rows in content.slices():
                    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
                    sink.write(data.data)
                    advance(name, data.nbytes)


def _demand_float32(bundle: Bundle) -> None:
    if bundle.form.dtype != FLOAT32_DTYPE:
        raise BundleError(
            "The graphs compute in float16, and MNN is given float32 ones: convert a bundle that was split without "
            "--dtype float16; `--bits 16` stores its matrices as float16."
        )


def convert_total(bundle: Bundle) -> int:
    """About how many bytes `convert_mnn` reports."""
    return 2 * bundle.total_bytes


def _files(draft: BundleDraft, bundle: Bundle, notice: Notice) -> BundleDraft:
    """What lies beside the graphs: a raw embedding whatever it was, the pieces, the tokenizer."""
    if bundle.form.embedding.kind != RAW:
        table, form = raw_embedding(bundle, draft)
        draft = dataclasses.replace(draft, form=dataclasses.replace(draft.form, embedding=form))
        name = draft.form.embedding_file or ""
        draft = dataclasses.replace(draft, files={**draft.files, name: table})
        smaller = "; `glmexport embed` before it makes it half as large" * (form.dtype == "float32")
        notice(f"The embedding becomes {name}, the same numbers{smaller}.")
    if draft.form.vocabulary_file not in draft.files:
        draft = with_vocabulary_file(draft, notice)
    return draft


def _graph(
    writer: BundleWriter,
    bundle: Bundle,
    plan: MnnPlan,
    spare: Mapping[str, Matrix],
    graph: str,
    *,
    scratch: Path,
    notice: Notice,
    advance: Advance,
) -> dict[str, Any]:
    """Convert, check and note one graph; returns its entry in the manifest."""
    done = writer.finished(graph)
    if done is not None:
        return done
    advance(f"convert {graph}", 0)
    spec = graph_spec(graph, bundle.config, plan.argmax)
    plain = plain_graph(bundle, graph, plan.argmax)
    sources = _sources(bundle, graph, plain, plan, spare, notice)
    with _log_of(writer, graph) as log:
        converted = convert_stand_ins(plain, scratch, log)
        model, beside = names.graph_file(graph, names.MNN), names.data_file(graph, names.MNN)
        with writer.create(beside) as sink:
            laid = write_weights(converted, plain, sources, sink, lambda count: advance(f"write {graph}", count))
        writer.write_bytes(model, model_bytes(converted, laid, writer.files[beside].sha256))
        advance(f"check {graph}", 0)
        files = writer.path(model), writer.path(beside)
        try:
            check_vectors(*files, plain)
            weights = check_weights(files[1], laid, plain, sources, keep=spec.kind == names.KIND_BLOCK)
            errors = check_numbers(*files, laid, plain, weights, spec, bundle.config.max_positions, plan.memory)
        except ExportError as error:
            raise ExportError(f"{error} What the converter printed is in {log}.") from error
    entry = _entry(bundle, graph, spec, laid, sources, errors)
    writer.finish(graph, (beside, model), entry)
    return entry


@contextmanager
def _log_of(writer: BundleWriter, graph: str) -> Iterator[Path]:
    """Where the converter's words go; it stays where an error speaks of it."""
    log = writer.output.with_name(f"{writer.output.name}.{graph}.log")
    try:
        yield log
    except BaseException as error:
        if str(log) not in str(error):
            log.unlink(missing_ok=True)
        raise
    log.unlink()


def _sources(
    bundle: Bundle, graph: str, plain: PlainGraph, plan: MnnPlan, spare: Mapping[str, Matrix], notice: Notice
) -> dict[str, Source]:
    """Where each matrix comes from. spare: the checkpoint's, for those that MNN cannot hold as they are."""
    quantized, sources = bundle.graph(graph)["matrices"], dict[str, Source]()
    for product in plain.products:
        name = product.matrix
        if name not in quantized:
            sources[name] = float_source(bundle, graph, plain, product, plan.bits[graph], plan.block)
            continue
        try:
            sources[name] = quantized_source(bundle, graph, plain, product)
        except ExportError:
            if name not in spare:
                raise
            block = block_for({product.inputs}, plan.most) or CHANNEL
            notice(f"{name} is rounded anew from the checkpoint: MNN cannot hold the bundle's groups.")
            sources[name] = FloatSource(spare[name], float_form(product, quantized[name]["bits"], block))
    return sources


def _matrices_of(bundle: Bundle, checkpoint: Checkpoint) -> dict[str, Matrix]:
    """The checkpoint's matrices by name, with the bundle's rows. Raises BundleError for another model's checkpoint."""
    from glmexport.checkpoint_draft import draft_of_checkpoint  # here: these need torch, which nothing else here does
    from glmexport.passes.slim_vocab import slim_to
    from glmexport.verify.expected import check_same_model

    check_same_model(bundle, checkpoint)
    draft = draft_of_checkpoint(checkpoint, bundle.opset, bundle.argmax, bool(bundle.manifest["tied"]))
    if bundle.form.slim is not None:
        draft = slim_to(draft, bundle.form.slim.vocabulary)
    return {tensor.name: as_matrix(tensor) for graph in draft.graphs for tensor in graph.tensors if is_matrix(tensor)}


def _entry(
    bundle: Bundle,
    graph: str,
    spec: GraphSpec,
    laid: tuple[Laid, ...],
    sources: Mapping[str, Source],
    errors: Mapping[str, float],
) -> dict[str, Any]:
    """What the manifest says of a graph."""
    source = bundle.graph(graph)
    matrices = {
        one.product.matrix: {
            "bits": one.stored.bits,
            "block": one.stored.block,
            "symmetric": one.stored.symmetric,
            "rounded": one.stored.is_integers and isinstance(sources[one.product.matrix], FloatSource),
            "bytes": one.stored.total_bytes - one.stored.bias_bytes,
            "offset": one.offset,
            "source": None if one.product.matrix not in source["matrices"] else _policy(source, one.product.matrix),
        }
        for one in laid
    }
    bits = sorted({one.stored.bits for one in laid})
    words = [f"int{count}" if count < FLOAT16 else f"float{count}" for count in bits]
    return {
        **{key: source[key] for key in ("name", "kind", "block_id") if key in source},
        "file": names.graph_file(graph, names.MNN),
        "data": names.data_file(graph, names.MNN),
        "inputs": [_tensor(tensor) for tensor in spec.inputs],
        "outputs": [_tensor(tensor) for tensor in spec.outputs],
        "weights": ", ".join(dict.fromkeys([*words, "float32"])),
        "parameters": source["parameters"],
        "transposed": [],
        "matrices": matrices,
        "checked": {memory: float(f"{error:.1e}") for memory, error in errors.items()},
    }


def _policy(source: Mapping[str, Any], matrix: str) -> dict[str, Any]:
    """How the bundle had quantized a matrix."""
    return policy_record(affine_of_record(source["matrices"][matrix]))


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": TAKES.get(tensor.dtype, tensor.dtype), "shape": list(tensor.shape)}


def _manifest(
    bundle: Bundle, draft: BundleDraft, plan: MnnPlan, version: str, entries: list[dict[str, Any]]
) -> dict[str, Any]:
    form = dataclasses.replace(
        draft.form, quantization=None, weights=FLOAT32_DTYPE, flavors=(names.PORTABLE,), kv_cache=FLOAT32_DTYPE
    )
    facts = {key: value for key, value in draft.facts.items() if key not in ("architecture", "argmax")}
    step = {"step": "convert mnn", "bits": dict(plan.bits), "block": plan.block or "channel", "memory": plan.memory}
    head = bundle.graph(names.HEAD)["matrices"].values()
    source = {
        "digest": bundle.manifest["digest"],
        "embedding": bundle.form.embedding.kind,
        "head_bits": min((record["bits"] for record in head), default=FLOAT32),
    }
    return {
        "schema": SCHEMA,
        "runtime": names.MNN,
        "glmexport": __version__,
        "architecture": draft.facts["architecture"],
        "model": dataclasses.asdict(draft.config),
        **form.as_json(),
        **{**facts, "argmax": plan.argmax, "history": [*facts["history"], step]},
        "mnn": {"version": version, "memory": plan.memory, "source": source},
        "graphs": entries,
    }


def _estimate(bundle: Bundle, plan: MnnPlan) -> int:
    """More bytes than will be written."""
    total = bundle.total_bytes
    if bundle.form.embedding.kind != GRAPH:
        total += 0 if bundle.form.embedding.kind == RAW else 4 * bundle.config.vocab_size * bundle.config.hidden_size
    return total + total // 4


def _at_once(
    jobs: int, graphs: list[str], work: Callable[[str], dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(graph, entry) of each, some at a time; the first error stops what has not begun."""
    if jobs == 1:
        for graph in graphs:
            yield graph, work(graph)
        return
    with ThreadPoolExecutor(jobs, thread_name_prefix="convert") as pool:
        futures: dict[Future[dict[str, Any]], str] = {pool.submit(work, graph): graph for graph in graphs}
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            for future, graph in futures.items():
                yield graph, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A directory beside the output for files of no use afterwards."""
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.mnn-", dir=output.absolute().parent) as place:
        yield Path(place)
