"""Verify: files against the manifest, graphs against the rules, graphs and chain against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from glmexport import names
from glmexport.bundle import Bundle, check_files
from glmexport.checkpoint import Checkpoint
from glmexport.errors import BundleError, CheckpointError, GlmExportError
from glmexport.graph_lint import lint_graph
from glmexport.interface import graph_spec
from glmexport.inventory import form_in_words
from glmexport.session import Session
from glmexport.verify.cases import Case, make_cases
from glmexport.verify.expected import check_same_model, expected_draft
from glmexport.verify.forms import graph_forms
from glmexport.verify.measures import NextTokens, Worst, margin
from glmexport.verify.reference import StreamedReference
from glmexport.verify.report import Report, Row
from glmexport.verify.stored_weights import StoredWeights
from glmexport.verify.structure import check_structure
from glmexport.verify.tolerances import CHAIN_BUDGETS, FORMS, INHERENT_SLACK, TOLERANCES
from glmexport.vocabulary import VocabularyMap

DEFAULT_STEPS = 4
"""Decode steps after each prompt; few, because a model that does not stay in memory is read once a step."""

MEMORY_LIMIT = 1 << 28
"""Bytes of graphs to keep open: small models stay, of a large one only the graph that runs, because the reference's own
block is in memory beside it."""

Advance = Callable[[str], None]
_BlockInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_BlockOutputs = tuple[torch.Tensor, torch.Tensor]
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
    check_same_model(bundle, checkpoint)
    report = Report(str(bundle.directory), form_in_words(bundle))
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
    try:
        expected = expected_draft(bundle, checkpoint)
    except CheckpointError:
        raise
    except GlmExportError as error:
        report.rows.append(Row("all", "manifest", False, detail=str(error)))
        return report
    report.rows.extend(check_structure(bundle, expected, advance))
    with torch.inference_mode(), Session(bundle, memory_limit=MEMORY_LIMIT, read_ahead=0) as session:
        try:
            _Comparison(bundle, checkpoint, session, report, steps, advance).run()
        except BundleError as error:
            report.rows.append(Row("all", "run", False, detail=str(error)))
    return report


def progress_total(bundle: Bundle, steps: int = DEFAULT_STEPS) -> int:
    """How often `verify` calls `advance`."""
    graphs, parts = len(bundle.graphs), bundle.config.num_blocks + 2  # an embedding may be a part and no graph
    return 1 + len(bundle.files) + 2 * graphs + (steps + 2) * parts


def _lint(bundle: Bundle, advance: Advance) -> Iterator[Row]:
    failed = False
    for graph in bundle.graphs:
        try:
            spec = graph_spec(graph["name"], bundle.config, bundle.argmax, bundle.form.dtype)
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


class _Comparison:
    """The numeric part: the graphs generate first, then the reference is streamed once over prompts and answers."""

    def __init__(
        self, bundle: Bundle, checkpoint: Checkpoint, session: Session, report: Report, steps: int, advance: Advance
    ) -> None:
        self._bundle, self._checkpoint, self._session = bundle, checkpoint, session
        self._report, self._advance = report, advance
        self._steps = steps
        self._forms = graph_forms(bundle)
        self._chain_form = max(self._forms.values(), key=FORMS.index)
        slim = bundle.form.slim
        vocabulary = slim.vocabulary if slim else VocabularyMap.identity(checkpoint.config.vocab_size)
        self._reference = StreamedReference(checkpoint, vocabulary)
        self._weights = StoredWeights(bundle, checkpoint, self._reference)
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
            worst = Worst()
            for step in range(self._steps + 1):
                expected = self._reference.embed(run.input_ids(step))
                run.hidden.append(expected)
                worst.add(self._session.embed(run.input_ids(step)), expected.numpy())
            self._add_row(names.EMBEDDING, run.case.name, worst)
        self._report.rows.extend(self._weights.embedding())
        self._advance(f"compare {names.EMBEDDING}")

    def _compare_block(self, block_id: int) -> None:
        patch, graph = self._checkpoint.patch, names.block_name(block_id)
        path = patch.block.format(block_id=block_id)
        weights = self._reference.weights(path)
        block = self._reference.module(path, weights)

        stored = list(self._weights.block(graph, weights))
        # only weights that are what they must be may excuse numbers that are not
        trusted = all(row.passed for row in stored)

        @cache
        def stored_block() -> torch.nn.Module:
            return self._reference.module(path, self._weights.as_stored(graph, weights))

        for run in self._runs:
            worst, past = Worst(), torch.from_numpy(self._session.empty_past(run.case.batch))
            seen: list[tuple[_BlockInputs, _BlockOutputs]] = []
            for step in range(self._steps + 1):
                mask, positions = run.case.inputs(step)
                found = self._session.block(
                    block_id, run.hidden[step].contiguous().numpy(), mask, positions, past.numpy()
                )
                inputs = (run.hidden[step], torch.from_numpy(mask), torch.from_numpy(positions), past)
                expected = patch.run_reference_block(block, block_id, *inputs)
                for ours, theirs in zip(found, expected, strict=True):
                    worst.add(ours, theirs.numpy())
                seen.append((inputs, expected))
                run.hidden[step], past = expected[0], expected[1].contiguous()

            def inherent(seen: list[tuple[_BlockInputs, _BlockOutputs]] = seen) -> float:
                """What the stored weights do to the reference's own outputs."""
                error = Worst()
                for inputs, expected in seen:
                    for ours, theirs in zip(
                        patch.run_reference_block(stored_block(), block_id, *inputs), expected, strict=True
                    ):
                        error.add(ours.numpy(), theirs.numpy())
                return error.norm

            self._add_row(graph, run.case.name, worst, inherent=inherent if trusted else None)
        self._report.rows.extend(stored)
        self._advance(f"compare {graph}")

    def _compare_head_and_chain(self) -> None:
        patch = self._checkpoint.patch
        weights = self._reference.weights(patch.final_norm)
        final_norm = self._reference.module(patch.final_norm, weights)
        last = [run.hidden[step][-1] for run in self._runs for step in range(self._steps + 1)]
        logits = iter(torch.split(self._reference.logits(final_norm(torch.cat(last))), [len(rows) for rows in last]))
        chains = []
        for run in self._runs:
            head, chain = Worst(), NextTokens()
            for step in range(self._steps + 1):
                expected = next(logits).numpy()
                outputs = self._session.head(run.hidden[step].contiguous().numpy())
                if names.LOGITS in outputs:
                    head.add(outputs[names.LOGITS], expected)
                if names.TOKEN_ID in outputs and self._forms[names.HEAD] == "float32":
                    missed = margin(expected, self._token(run, outputs))
                    head.add(missed, np.zeros(run.case.batch, np.float32))
                chain.add(expected, run.tokens[step], run.logits[step] if run.logits else None)
            self._add_row(names.HEAD, run.case.name, head)
            chains.append(chain)
        self._report.rows.extend(self._weights.head(weights))
        self._add_chains(chains)
        self._advance(f"compare {names.HEAD}")

    def _add_chains(self, chains: list[NextTokens]) -> None:
        """A row for each case, and where tokens may differ one for all cases: few steps tell little of them."""
        budget, whole = CHAIN_BUDGETS.get(self._chain_form), NextTokens()
        for run, chain in zip(self._runs, chains, strict=True):
            tokens, worst = f"{chain.same}/{chain.count} greedy tokens", chain.worst
            if budget is None:
                self._add_row("chain", run.case.name, worst, tokens, chain.same == chain.count)
            else:
                passed = worst.norm <= budget.logits
                self._report.rows.append(Row("chain", run.case.name, passed, worst.absolute, worst.norm, tokens))
            whole.merge(chain)
        if budget is not None:
            share = whole.same / whole.count
            passed = share >= budget.greedy and whole.divergence <= budget.divergence
            detail = f"KL divergence {whole.divergence:.2e} nats, {share:.0%} of greedy tokens"
            self._report.rows.append(Row("chain", "next token", passed, detail=detail))
        self._report.greedy = (whole.same, whole.count)

    def _add_row(
        self,
        graph: str,
        case: str,
        worst: Worst,
        detail: str = "",
        also: bool = True,
        inherent: Callable[[], float] | None = None,
    ) -> None:
        if not worst.reference_is_finite:
            detail = f"{detail}, " * bool(detail) + "the reference's own numbers are not finite: look at its weights"
        form = self._forms.get(graph, "float32")
        passed = also and TOLERANCES[form].allows(worst.absolute, worst.relative, worst.norm)
        if not passed and also and inherent is not None and form != "float32":
            alone = inherent()
            passed = worst.norm <= INHERENT_SLACK * alone
            detail = f"the stored weights alone give {alone:.2e} in the reference"
        relative = worst.relative if form == "float32" else worst.norm
        self._report.rows.append(Row(graph, case, passed, worst.absolute, relative, detail))
