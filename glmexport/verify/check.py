"""Verify: files against the manifest, graphs against the rules, graphs and chain against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from glmexport import names
from glmexport.bundle import Bundle, check_files
from glmexport.checkpoint import Checkpoint
from glmexport.errors import BundleError
from glmexport.graph_lint import lint_graph
from glmexport.interface import graph_spec
from glmexport.onnx_files import ExternalTensor, external_tensors, holds, load_graph, rows_of
from glmexport.session import Session
from glmexport.verify.cases import Case, make_cases
from glmexport.verify.reference import StreamedReference
from glmexport.verify.report import Report, Row
from glmexport.verify.structure import check_structure
from glmexport.verify.tolerances import TOLERANCES, Tolerance

DEFAULT_STEPS = 4
"""Decode steps after each prompt; few, because a model that does not stay in memory is read once a step."""

RESIDENT_BYTES = 1 << 30
"""Weights that onnxruntime may hold at once: small models stay open, of a large one only the graph that runs."""

Advance = Callable[[str], None]
Array = npt.NDArray[Any]


def ignore_advance(what: str) -> None:
    """Drop a progress report."""


def verify(
    bundle: Bundle, checkpoint: Checkpoint, *, steps: int = DEFAULT_STEPS, advance: Advance = ignore_advance
) -> Report:
    """Check `bundle` against `checkpoint` and report; never raises for a bundle that is merely wrong.

    advance: called with what was just done, `progress_total` times for a bundle without damage.
    Raises BundleError where bundle and checkpoint are of different models, CheckpointError for unreadable weights.
    """
    _check_same_model(bundle, checkpoint)
    report = Report(str(bundle.directory), "float32")
    for name, complaint in check_files(bundle):
        advance(f"hash {name}")
        if complaint:
            report.rows.append(Row(name, "files", False, detail=complaint))
    if report.failures:
        return report  # damaged files are not worth running
    report.rows.append(Row("all", "files", True, detail=f"{len(bundle.files)} files match size and SHA-256"))
    report.rows.extend(_lint(bundle, advance))
    if report.failures:
        return report
    report.rows.extend(check_structure(bundle, checkpoint, advance))
    with torch.inference_mode(), Session(bundle, resident_bytes=RESIDENT_BYTES) as session:
        try:
            _Comparison(bundle, checkpoint, session, report, steps, advance).run()
        except BundleError as error:
            report.rows.append(Row("all", "run", False, detail=str(error)))
    return report


def progress_total(bundle: Bundle, steps: int = DEFAULT_STEPS) -> int:
    """How often `verify` calls `advance`."""
    graphs = len(bundle.graphs)
    return len(bundle.files) + 2 * graphs + (steps + 1) * graphs + graphs


def _check_same_model(bundle: Bundle, checkpoint: Checkpoint) -> None:
    if bundle.manifest.get("architecture") != checkpoint.patch.name or bundle.config != checkpoint.config:
        ours, theirs = vars(bundle.config), vars(checkpoint.config)
        differ = ", ".join(f"{key} {ours[key]} against {theirs[key]}" for key in ours if ours[key] != theirs[key])
        raise BundleError(
            f"{bundle.directory} was not made from {checkpoint.directory}: {differ or 'another architecture'}; "
            f"give the checkpoint it was split from."
        )


def _lint(bundle: Bundle, advance: Advance) -> Iterator[Row]:
    failed = False
    for graph in bundle.graphs:
        try:
            spec = graph_spec(graph["name"], bundle.config, bundle.argmax)
            complaints = lint_graph(bundle.path(graph["file"]), spec, bundle.opset)
        except BundleError as error:
            complaints = [str(error)]
        advance(f"lint {graph['name']}")
        if complaints:
            failed = True
            yield Row(graph["name"], "lint", False, detail=" ".join(complaints))
    if not failed:
        yield Row("all", "lint", True, detail=f"{len(bundle.graphs)} graphs keep every rule")


@dataclass
class _Run:
    """One case as it goes through graphs and reference; lists have one entry a step, step 0 is the prefill.

    tokens: [batch] ids fed at each decode step, and the last ones generated. logits: what the chain of graphs gave.
    hidden: the reference's hidden states at the block being compared.
    """

    case: Case
    tokens: list[Array] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)

    def input_ids(self, step: int) -> Array:
        """int64 [batch, seq] fed at a step."""
        return self.case.prompt.input_ids if step == 0 else self.tokens[step - 1][:, None]


@dataclass
class _Worst:
    """Largest absolute error and largest relative error seen; NaN sticks."""

    absolute: float = 0.0
    relative: float = 0.0
    reference_is_finite: bool = True

    def add(self, found: Array, expected: Array) -> None:
        """Take in one pair of outputs; another shape counts as an infinite error."""
        if found.shape != expected.shape or found.dtype != expected.dtype:
            self.absolute = self.relative = float("inf")
            return
        self.reference_is_finite &= bool(np.isfinite(expected).all())
        error = float(np.abs(found - expected).max(initial=0.0))
        largest = float(np.abs(expected).max(initial=0.0))
        self.absolute = float(np.maximum(self.absolute, error))
        self.relative = float(np.maximum(self.relative, error / largest if largest else error))


class _Comparison:
    """The numeric part: the graphs generate first, then the reference is streamed once over prompts and answers."""

    def __init__(
        self, bundle: Bundle, checkpoint: Checkpoint, session: Session, report: Report, steps: int, advance: Advance
    ) -> None:
        self._bundle, self._checkpoint, self._session = bundle, checkpoint, session
        self._report, self._advance = report, advance
        self._steps = steps
        self._reference = StreamedReference(checkpoint)
        self._tolerance: Tolerance = TOLERANCES[report.form]
        self._runs = [_Run(case) for case in make_cases(bundle.config, steps)]

    def run(self) -> None:
        """Fill the report."""
        self._generate()
        self._compare_embedding()
        for block_id in range(self._bundle.config.num_blocks):
            self._compare_block(block_id)
        self._compare_head_and_chain()

    def _generate(self) -> None:
        """Chain the graphs, all cases side by side so that each graph is opened once a step."""
        pasts = {
            (run.case.name, block_id): self._session.empty_past(run.case.batch)
            for run in self._runs
            for block_id in range(self._bundle.config.num_blocks)
        }
        for step in range(self._steps + 1):
            hidden = {run.case.name: self._session.embed(run.input_ids(step)) for run in self._runs}
            self._advance(f"generate {names.EMBEDDING}")
            for block_id in range(self._bundle.config.num_blocks):
                for run in self._runs:
                    name = run.case.name
                    mask, positions = run.case.inputs(step)
                    hidden[name], pasts[name, block_id] = self._session.block(
                        block_id, hidden[name], mask, positions, pasts[name, block_id]
                    )
                self._advance(f"generate {names.block_name(block_id)}")
            for run in self._runs:
                outputs = self._session.head(hidden[run.case.name])
                if names.LOGITS in outputs:
                    run.logits.append(outputs[names.LOGITS])
                run.tokens.append(self._token(run, outputs))
            self._advance(f"generate {names.HEAD}")

    def _token(self, run: _Run, outputs: Mapping[str, Array]) -> Array:
        """The greedy ids int64 [batch]; raises BundleError for what cannot be one."""
        token = outputs.get(names.TOKEN_ID)
        if token is None:
            token = outputs[names.LOGITS].argmax(-1)
        vocab, batch = self._bundle.config.vocab_size, run.case.batch
        if token.shape != (batch,) or token.dtype != np.int64 or not ((token >= 0) & (token < vocab)).all():
            raise BundleError(
                f"{names.graph_file(names.HEAD)} gave the token {token.tolist()!r:.80}, expected {batch} ids from 0 to "
                f"{vocab - 1}."
            )
        return token

    def _compare_embedding(self) -> None:
        for run in self._runs:
            worst = _Worst()
            for step in range(self._steps + 1):
                expected = self._reference.embed(run.input_ids(step))
                run.hidden.append(expected)
                worst.add(self._session.embed(run.input_ids(step)), expected.numpy())
            self._add_row(names.EMBEDDING, run.case.name, worst)
        self._add_exact(names.EMBEDDING, self._wrong_table(names.EMBEDDING, self._checkpoint.embedding_name), 1)
        self._advance(f"compare {names.EMBEDDING}")

    def _compare_block(self, block_id: int) -> None:
        patch, graph = self._checkpoint.patch, names.block_name(block_id)
        path = patch.block.format(block_id=block_id)
        weights = self._reference.weights(path)
        block = self._reference.module(path, weights)
        for run in self._runs:
            worst, past = _Worst(), torch.from_numpy(self._session.empty_past(run.case.batch))
            for step in range(self._steps + 1):
                mask, positions = run.case.inputs(step)
                found = self._session.block(
                    block_id, run.hidden[step].contiguous().numpy(), mask, positions, past.numpy()
                )
                expected = patch.run_reference_block(
                    block, block_id, run.hidden[step], torch.from_numpy(mask), torch.from_numpy(positions), past
                )
                for ours, theirs in zip(found, expected, strict=True):
                    worst.add(ours, theirs.numpy())
                run.hidden[step], past = expected[0], expected[1].contiguous()
            self._add_row(graph, run.case.name, worst)
        self._add_exact(graph, self._wrong_weights(graph, weights), len(weights))
        self._advance(f"compare {graph}")

    def _compare_head_and_chain(self) -> None:
        patch = self._checkpoint.patch
        weights = self._reference.weights(patch.final_norm)
        final_norm = self._reference.module(patch.final_norm, weights)
        last = [run.hidden[step][-1] for run in self._runs for step in range(self._steps + 1)]
        logits = iter(torch.split(self._reference.logits(final_norm(torch.cat(last))), [len(rows) for rows in last]))
        equal = total = 0
        chain: list[tuple[str, _Worst, int, int]] = []
        for run in self._runs:
            head, whole, same = _Worst(), _Worst(), 0
            for step in range(self._steps + 1):
                expected = next(logits).numpy()
                outputs = self._session.head(run.hidden[step].contiguous().numpy())
                if names.LOGITS in outputs:
                    head.add(outputs[names.LOGITS], expected)
                    whole.add(run.logits[step], expected)
                if names.TOKEN_ID in outputs:
                    margin = self._margin(expected, self._token(run, outputs))
                    head.add(margin, np.zeros(run.case.batch, np.float32))
                same += int((self._margin(expected, run.tokens[step]) <= self._tolerance.absolute).sum())
            count = run.case.batch * (self._steps + 1)
            equal, total = equal + same, total + count
            self._add_row(names.HEAD, run.case.name, head)
            chain.append((run.case.name, whole, same, count))
        wrong = self._wrong_table(names.HEAD, self._checkpoint.head_name) + self._wrong_weights(names.HEAD, weights)
        self._add_exact(names.HEAD, wrong, len(weights) + 1)
        for case, whole, same, count in chain:
            self._add_row("chain", case, whole, f"{same}/{count} greedy tokens", same == count)
        self._report.greedy = (equal, total)
        self._advance(f"compare {names.HEAD}")

    @staticmethod
    def _margin(logits: Array, tokens: Array) -> Array:
        """How far each token's reference logit is below the best one: float32 [batch]; 0 for the greedy token."""
        margin: Array = logits.max(-1) - np.take_along_axis(logits, tokens[:, None], -1)[:, 0]
        return margin

    def _wrong_weights(self, graph: str, weights: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of the stored weights of a block (or the final norm) that are not the checkpoint's, bit for bit."""
        entry = next(entry for entry in self._bundle.graphs if entry["name"] == graph)
        transposed = set(entry["transposed"])
        stored = self._stored(graph)
        wrong = []
        for name, value in weights.items():
            expected = (value.t() if name in transposed else value).numpy()
            if name not in stored or not holds(self._bundle.directory, stored[name], expected.shape, rows_of(expected)):
                wrong.append(name)
        return wrong

    def _wrong_table(self, graph: str, name: str) -> list[str]:
        """`name` if that [vocab, hidden] matrix is not the checkpoint's, bit for bit; holds neither of them whole."""
        stored, shape = self._stored(graph), self._checkpoint.info(name).shape
        same = name in stored and holds(
            self._bundle.directory,
            stored[name],
            shape,
            lambda start, stop: self._checkpoint.read_rows(name, start, stop).float().numpy(),
        )
        return [] if same else [name]

    def _stored(self, graph: str) -> dict[str, ExternalTensor]:
        """The external tensors of a graph by name."""
        model = load_graph(self._bundle.path(names.graph_file(graph)))
        return {tensor.name: tensor for tensor in external_tensors(model, graph)}

    def _add_exact(self, graph: str, wrong: list[str], count: int) -> None:
        detail = f"differ from the checkpoint: {', '.join(wrong)}" if wrong else f"{count} tensors equal bit for bit"
        self._report.rows.append(Row(graph, "weights", not wrong, detail=detail))

    def _add_row(self, graph: str, case: str, worst: _Worst, detail: str = "", also: bool = True) -> None:
        if not worst.reference_is_finite:
            detail = f"{detail}, " * bool(detail) + "the reference's own numbers are not finite: look at its weights"
        passed = also and self._tolerance.allows(worst.absolute, worst.relative)
        self._report.rows.append(Row(graph, case, passed, worst.absolute, worst.relative, detail))
