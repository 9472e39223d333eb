"""Verify: files against the manifest, graphs against the rules, graphs and chain against the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from glmexport import names
from glmexport.bundle import Bundle, check_files
from glmexport.checkpoint import Checkpoint
from glmexport.errors import BundleError, CheckpointError, GlmExportError
from glmexport.form import FLOAT16
from glmexport.graph_lint import lint_graph
from glmexport.interface import opset_of
from glmexport.inventory import form_in_words
from glmexport.verify.cases import make_cases
from glmexport.verify.expected import check_same_model, expected_draft
from glmexport.verify.forms import graph_forms
from glmexport.verify.measures import HalfErrors, NextTokens, Worst, half_errors, margin
from glmexport.verify.mnn_weights import MnnStoredWeights, check_mnn_structure
from glmexport.verify.modes import Mode, ModeRun, modes_of
from glmexport.verify.overflow import OverflowProbe, Peak, Stress, peak_row
from glmexport.verify.reference import StreamedReference
from glmexport.verify.report import Report, Row
from glmexport.verify.runs import BlockInputs, BlockOutputs, as_array, feeds
from glmexport.verify.stored_weights import StoredWeights
from glmexport.verify.structure import check_structure
from glmexport.verify.tolerances import FORMS, HALF_SLACK, INHERENT_SLACK, TOLERANCES
from glmexport.verify.twins import Twins
from glmexport.vocabulary import VocabularyMap

DEFAULT_STEPS = 4
"""Decode steps after each prompt; few, because a model that does not stay in memory is read once a step."""

Advance = Callable[[str], None]
Array = npt.NDArray[Any]
OneMore = Callable[[BlockInputs, tuple[Array, Array]], None]


def ignore_advance(what: str) -> None:
    """Drop a progress report."""


def verify(
    bundle: Bundle, checkpoint: Checkpoint, *, steps: int = DEFAULT_STEPS, advance: Advance = ignore_advance
) -> Report:
    """Check `bundle` against `checkpoint` and report; never raises for a bundle that is merely wrong.

    advance: called with what was just done, `progress_total` times for a bundle without damage.
    Raises BundleError where bundle and checkpoint are of different models, CheckpointError for unreadable weights.
    """
    files = check_files(bundle)
    manifest = next(files)
    if manifest[1] is None:  # what a damaged one says of the model is not worth comparing
        check_same_model(bundle, checkpoint)
    report = Report(str(bundle.directory), form_in_words(bundle))
    for name, complaint in (manifest, *files):
        advance(f"hash {name}")
        if complaint:
            report.rows.append(Row(name, "files", False, detail=complaint))
    if report.failures:
        return report  # damaged files are not worth running
    report.rows.append(Row("all", "files", True, detail=f"{len(bundle.files)} files match size and SHA-256"))
    if bundle.runtime == names.ONNX:
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
    structure = check_structure if bundle.runtime == names.ONNX else check_mnn_structure
    report.rows.extend(structure(bundle, expected, advance))
    with torch.inference_mode(), ExitStack() as stack:
        try:
            modes = []
            for mode in modes_of(bundle):
                stack.enter_context(mode.session)
                modes.append(mode)
            _Comparison(bundle, checkpoint, modes, report, steps, advance).run()
        except BundleError as error:
            report.rows.append(Row("all", "run", False, detail=str(error)))
    return report


def progress_total(bundle: Bundle, steps: int = DEFAULT_STEPS) -> int:
    """How often `verify` calls `advance`."""
    graphs, parts = len(bundle.graphs), bundle.config.num_blocks + 2  # an embedding may be a part and no graph
    looked_at = 2 * graphs if bundle.runtime == names.ONNX else 0
    return 1 + len(bundle.files) + looked_at + (steps + 2) * parts


def _lint(bundle: Bundle, advance: Advance) -> Iterator[Row]:
    failed = False
    for graph in bundle.graphs:
        try:
            complaints = [
                complaint
                for flavor, one in bundle.flavored(graph).items()
                for complaint in lint_graph(
                    bundle.whole_path(one["file"]),
                    bundle.form.spec_of(graph["name"], bundle.config, bundle.argmax, flavor),
                    opset_of(flavor, bundle.opset),
                )
            ]
        except BundleError as error:
            complaints = [str(error)]
        advance(f"lint {graph['name']}")
        if complaints:
            failed = True
            yield Row(graph["name"], "lint", False, detail=" ".join(complaints))
    if not failed:
        yield Row("all", "lint", True, detail=f"{len(bundle.graphs) * len(bundle.flavors)} graphs keep every rule")


class _Comparison:
    """The numeric part: the graphs generate first, then the reference is streamed once over prompts and answers."""

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: Checkpoint,
        modes: Sequence[Mode],
        report: Report,
        steps: int,
        advance: Advance,
    ) -> None:
        self._bundle, self._checkpoint, self._modes = bundle, checkpoint, modes
        self._report, self._advance = report, advance
        self._steps = steps
        self._dtype = bundle.form.dtype
        self._forms = graph_forms(bundle)
        self._chain_form = max(self._forms.values(), key=FORMS.index)
        slim = bundle.form.slim
        vocabulary = slim.vocabulary if slim else VocabularyMap.identity(checkpoint.config.vocab_size)
        self._reference = StreamedReference(checkpoint, vocabulary)
        stored = StoredWeights if bundle.runtime == names.ONNX else MnnStoredWeights
        self._weights: StoredWeights | MnnStoredWeights = stored(bundle, checkpoint, self._reference)
        cases = make_cases(bundle.config, steps)
        self._runs = [ModeRun(case, mode=mode) for mode in modes for case in cases]
        self._stress = Stress(checkpoint, self._reference, bundle.config) if self._dtype == FLOAT16 else None
        self._peak = Peak()

    def run(self) -> None:
        """Fill the report."""
        self._generate()
        self._compare_embedding()
        for block_id in range(self._bundle.config.num_blocks):
            self._compare_block(block_id)
        self._compare_head_and_chain()

    def _mode_after_mode(self) -> Iterator[ModeRun]:
        """Every run; what a mode has open and does not keep is closed before the next one opens the same graph.

        A block of the reference, which is read next, is as large.
        """
        for mode in self._modes:
            yield from (run for run in self._runs if run.mode is mode)
            mode.session.release()

    def _generate(self) -> None:
        """Chain the graphs, all cases side by side so that each graph is opened once a step."""
        pasts = {run.name: run.mode.session.empty_pasts(run.case.batch) for run in self._runs}
        for step in range(self._steps + 1):
            hidden = {run.name: run.mode.session.embed(run.input_ids(step)) for run in self._runs}
            self._advance(f"generate {names.EMBEDDING}")
            for block_id in range(self._bundle.config.num_blocks):
                for run in self._mode_after_mode():
                    name = run.name
                    mask, positions = run.case.inputs(step)
                    hidden[name] = run.mode.session.step(block_id, hidden[name], mask, positions, pasts[name])
                self._advance(f"generate {names.block_name(block_id)}")
            for run in self._mode_after_mode():
                outputs = run.mode.session.head(hidden[run.name])
                if names.LOGITS in outputs:
                    run.logits.append(outputs[names.LOGITS])
                run.tokens.append(self._token(run, outputs))
            self._advance(f"generate {names.HEAD}")

    def _token(self, run: ModeRun, outputs: Mapping[str, Array]) -> Array:
        """The greedy ids int64 [batch]; raises BundleError for what cannot be one."""
        token = outputs.get(names.TOKEN_ID)
        if token is None:
            token = outputs[names.LOGITS].argmax(-1)
        vocab, batch = self._bundle.config.vocab_size, run.case.batch
        if token.shape != (batch,) or token.dtype != np.int64 or not ((token >= 0) & (token < vocab)).all():
            file = names.graph_file(names.HEAD, self._bundle.runtime)
            raise BundleError(
                f"{file} gave the token {token.tolist()!r:.80}, expected {batch} ids from 0 to {vocab - 1}."
            )
        return token

    def _compare_embedding(self) -> None:
        for run in self._runs:
            worst = Worst()
            for step in range(self._steps + 1):
                expected = self._reference.embed(run.input_ids(step))
                found = run.mode.session.embed(run.input_ids(step))
                worst.add(found, expected.numpy(), self._dtype)
                run.hidden.append(expected)
                run.half.append(torch.from_numpy(found))
            if run.mode is self._modes[0] or run.mode.flavor != names.PORTABLE:  # MNN's modes look up the same rows
                self._add_row(names.EMBEDDING, run, worst)
        self._report.rows.extend(self._weights.embedding())
        self._advance(f"compare {names.EMBEDDING}")

    def _compare_block(self, block_id: int) -> None:
        graph = names.block_name(block_id)
        path = self._checkpoint.patch.block.format(block_id=block_id)
        weights = self._reference.weights(path)
        block = self._reference.module(path, weights)

        stored = list(self._weights.block(graph, weights))
        # only weights that are what they must be may excuse numbers that are not; float16 is the checkpoint's, rounded
        trusted = self._dtype == FLOAT16 or all(row.passed for row in stored)

        @cache
        def stored_block() -> torch.nn.Module:
            return self._reference.module(path, self._weights.as_stored(graph, weights))

        probe = OverflowProbe(self._bundle, graph) if self._stress else None
        as_stored = Worst() if self._forms[graph] != "float32" and any(mode.exact for mode in self._modes) else None
        flavors = len({mode.flavor for mode in self._modes})
        twins = Twins(graph, self._bundle.form.kv_cache) if self._forms[graph] != "float32" and flavors > 1 else None
        for run in self._mode_after_mode():
            also: OneMore | None = None
            if as_stored is not None and run.mode.exact:
                also = partial(self._hold, as_stored, stored_block, block_id)
            elif twins is not None:
                also = partial(twins.take, run)
            worst, seen = self._run_block(block_id, block, run, also)
            inherent = partial(self._inherent, block_id, stored_block, seen, self._computed_in(run.mode))
            self._add_row(graph, run, worst, inherent=inherent if trusted else None)
            if probe is not None:
                probe.run(feeds(seen[0][0], "float32"))
                probe.run(feeds(seen[-1][0], "float32"))
        self._add_as_stored(graph, as_stored)
        if twins is not None:
            self._report.rows.append(twins.row())
        self._report.rows.extend(stored)
        if self._stress is not None and probe is not None:
            probe.run(feeds(self._stress.through(block_id, block), "float32"))
            self._add_peak(graph, probe.peak)
            self._chain_half(block_id, stored_block())
        self._advance(f"compare {graph}")

    def _run_block(
        self, block_id: int, block: torch.nn.Module, run: ModeRun, also: OneMore | None = None
    ) -> tuple[Worst, list[tuple[BlockInputs, BlockOutputs]]]:
        """One block's graph and reference on one case: how far they are apart, and what the reference took and gave.

        The run's hidden states go on to the reference's outputs. also: called with what the graph took and gave.
        """
        worst, past = Worst(), torch.from_numpy(run.mode.session.empty_past(run.case.batch)).float()
        seen: list[tuple[BlockInputs, BlockOutputs]] = []
        for step in range(self._steps + 1):
            inputs = run.inputs(step, run.hidden[step], past)
            found = run.mode.session.block(block_id, *feeds(inputs, self._dtype).values())
            expected = self._checkpoint.patch.run_reference_block(block, block_id, *inputs)
            told = run.mode.comparable(inputs[1].numpy())
            worst.add(found[0][told], expected[0].numpy()[told], self._dtype)
            worst.add(found[1], expected[1].numpy(), self._dtype)
            if also is not None:
                also(inputs, found)
            seen.append((inputs, expected))
            run.hidden[step], past = expected[0], expected[1].contiguous()
        return worst, seen

    def _hold(
        self,
        worst: Worst,
        stored_block: Callable[[], torch.nn.Module],
        block_id: int,
        inputs: BlockInputs,
        found: tuple[Array, Array],
    ) -> None:
        """Hold what a graph gave to the reference with the weights that the graph has."""
        expected = self._checkpoint.patch.run_reference_block(stored_block(), block_id, *inputs)
        for ours, theirs in zip(found, expected, strict=True):
            worst.add(ours, theirs.numpy())

    def _add_as_stored(self, graph: str, worst: Worst | None) -> None:
        """A row for the graph against the reference with exactly its weights, whatever their form is."""
        if worst is not None:
            passed = TOLERANCES["float32"].allows(worst.absolute, worst.relative, worst.norm)
            detail = "against the reference with these very weights"
            self._report.rows.append(Row(graph, "as stored", passed, worst.absolute, worst.relative, detail))

    def _inherent(
        self,
        block_id: int,
        stored_block: Callable[[], torch.nn.Module],
        seen: list[tuple[BlockInputs, BlockOutputs]],
        dtype: str,
    ) -> float:
        """What the stored weights, and computing in a dtype, do to the reference's own outputs."""
        error, block, numbers = Worst(), stored_block(), getattr(torch, dtype)
        if dtype != self._dtype:
            block = copy.deepcopy(block)
            for parameter in block.parameters():
                parameter.data = parameter.data.to(numbers)
        for (hidden, mask, positions, past), expected in seen:
            inputs = (hidden.to(numbers), mask, positions, past.to(numbers))
            outputs = self._checkpoint.patch.run_reference_block(block, block_id, *inputs)
            for ours, theirs in zip(outputs, expected, strict=True):
                error.add(ours.numpy(), theirs.numpy(), dtype)
        return error.norm

    def _computed_in(self, mode: Mode) -> str:
        """The coarsest dtype that a mode's blocks hold numbers in."""
        return FLOAT16 if mode.block_form == FLOAT16 else self._dtype

    def _chain_half(self, block_id: int, block: torch.nn.Module) -> None:
        """Take every case's float16 states through one block of the reference in float16."""
        for run in self._runs:
            past = torch.from_numpy(run.mode.session.empty_past(run.case.batch))
            for step in range(self._steps + 1):
                inputs = run.inputs(step, run.half[step], past)
                run.half[step], past = self._checkpoint.patch.run_reference_block(block, block_id, *inputs)

    def _compare_head_and_chain(self) -> None:
        path = self._checkpoint.patch.final_norm
        weights = self._reference.weights(path)
        final_norm = self._reference.module(path, weights)
        logits = self._logits(final_norm, lambda run, step: run.hidden[step])
        in_half = self._half_errors(weights, logits) if self._dtype == FLOAT16 else None
        of_stored = self._stored_logits(final_norm)
        as_stored = Worst() if of_stored else None
        chains = []
        for run in self._mode_after_mode():
            head, chain = Worst(), NextTokens()
            for step, expected in enumerate(logits[run.name]):
                outputs = run.mode.session.head(as_array(run.hidden[step], self._dtype))
                if names.LOGITS in outputs:
                    head.add(outputs[names.LOGITS], expected, self._dtype)
                if as_stored is not None and run.name in of_stored:
                    theirs = of_stored[run.name][step]
                    if names.LOGITS in outputs:
                        as_stored.add(outputs[names.LOGITS], theirs)
                    else:
                        as_stored.add(margin(theirs, self._token(run, outputs)), np.zeros(run.case.batch, np.float32))
                if names.TOKEN_ID in outputs and self._forms[names.HEAD] == "float32":
                    missed = margin(expected, self._token(run, outputs))
                    head.add(missed, np.zeros(run.case.batch, np.float32))
                chain.add(expected, run.tokens[step], run.logits[step] if run.logits else None, self._dtype)
            alone = partial(float, in_half.head[run.name].norm) if in_half else None
            self._add_row(names.HEAD, run, head, inherent=alone)
            chains.append(chain)
        self._add_as_stored(names.HEAD, as_stored)
        self._report.rows.extend(self._weights.head(weights))
        if in_half:
            self._add_peak(names.HEAD, self._head_peak(final_norm, logits))
            self._report.rows.append(peak_row("all", self._peak))
        for mode in self._modes:
            of_all = zip(self._runs, chains, strict=True)
            self._add_chains(mode, [(run, chain) for run, chain in of_all if run.mode is mode], in_half)
        self._advance(f"compare {names.HEAD}")

    def _logits(
        self, final_norm: torch.nn.Module, states: Callable[[ModeRun, int], torch.Tensor]
    ) -> dict[str, list[Array]]:
        """Run -> float32 logits [batch, vocab] of each step, of states [seq, batch, hidden], for all at once."""
        return self._split_logits(self._runs, states, lambda last: self._reference.logits(final_norm(last)))

    def _stored_logits(self, final_norm: torch.nn.Module) -> dict[str, list[Array]]:
        """The same of a head as MNN has it stored, for the runs that are held to that."""
        runs, stored = [run for run in self._runs if run.mode.exact], self._weights
        if not runs or not isinstance(stored, MnnStoredWeights) or self._forms[names.HEAD] == "float32":
            return {}
        return self._split_logits(
            runs, lambda run, step: run.hidden[step], lambda last: stored.logits(final_norm(last))
        )

    def _split_logits(
        self,
        runs: Sequence[ModeRun],
        states: Callable[[ModeRun, int], torch.Tensor],
        logits: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, list[Array]]:
        last = [states(run, step)[-1] for run in runs for step in range(self._steps + 1)]
        rows = logits(torch.cat(last)).numpy()
        parts = iter(np.split(rows, np.cumsum([len(part) for part in last])[:-1]))
        return {run.name: [next(parts) for _ in range(self._steps + 1)] for run in runs}

    def _half_errors(self, weights: Mapping[str, torch.Tensor], logits: dict[str, list[Array]]) -> HalfErrors:
        """What float16 does to the reference's own logits."""
        norm = self._reference.module(self._checkpoint.patch.final_norm, self._weights.as_stored(names.HEAD, weights))
        alone = self._logits(norm, lambda run, step: run.hidden[step].half())
        return half_errors(logits, alone, self._logits(norm, lambda run, step: run.half[step]))

    def _add_chains(self, mode: Mode, chains: list[tuple[ModeRun, NextTokens]], in_half: HalfErrors | None) -> None:
        """A row for each case, and where tokens may differ one for all cases: few steps tell little of them."""
        form = max(self._chain_form, mode.block_form, key=FORMS.index)
        budget, whole = mode.budgets.get(form), NextTokens()
        for run, chain in chains:
            tokens, worst = f"{chain.same}/{chain.count} greedy tokens", chain.worst
            if in_half is not None:
                alone = partial(float, in_half.chain[run.name].worst.norm)
                self._add_row("chain", run, worst, tokens, inherent=alone)
            elif budget is None:
                self._add_row("chain", run, worst, tokens, chain.same == chain.count)
            else:
                passed = worst.norm <= budget.logits
                self._report.rows.append(Row("chain", run.name, passed, worst.absolute, worst.norm, tokens))
            whole.merge(chain)
        if budget is not None:
            if in_half is not None:
                budget = budget.or_near(in_half.whole.share, in_half.whole.divergence)
            passed = whole.share >= budget.greedy and whole.divergence <= budget.divergence
            detail = f"KL divergence {whole.divergence:.2e} nats, {whole.share:.0%} of greedy tokens"
            self._report.rows.append(Row("chain", f"next token{mode.label}", passed, detail=detail))
        same, count = self._report.greedy
        self._report.greedy = (same + whole.same, count + whole.count)

    def _head_peak(self, final_norm: torch.nn.Module, logits: dict[str, list[Array]]) -> Peak:
        """Of the final norm and of the logits, which is all that the head holds."""
        peak = Peak()
        for run in self._runs:
            for states, found in zip(run.hidden, logits[run.name], strict=True):
                peak = peak.then(Peak(float(final_norm(states[-1]).abs().max()), "the final norm"))
                peak = peak.then(Peak(float(np.abs(found).max()), "the logits"))
        return peak

    def _add_peak(self, graph: str, peak: Peak) -> None:
        self._report.rows.append(peak_row(graph, peak))
        self._peak = self._peak.then(Peak(peak.largest, f"{graph}: {peak.place}"))

    def _add_row(
        self,
        graph: str,
        run: ModeRun,
        worst: Worst,
        detail: str = "",
        also: bool = True,
        inherent: Callable[[], float] | None = None,
    ) -> None:
        if not worst.reference_is_finite:
            detail = f"{detail}, " * bool(detail) + "the reference's own numbers are not finite: look at its weights"
        form = run.mode.form_of(graph, self._forms[graph]) if graph in self._forms else self._dtype
        in_half = self._dtype == FLOAT16
        passed = also and run.mode.tolerances[form].allows(worst.absolute, worst.relative, worst.norm)
        if also and inherent is not None and form != "float32" and (in_half or not passed):
            alone = inherent()
            is_half = form == FLOAT16
            passed = passed or worst.norm <= alone * (HALF_SLACK if is_half else INHERENT_SLACK)
            what = "float16" if is_half else "the stored weights"
            detail = f"{detail}, " * bool(detail) + f"{what} alone gives {alone:.2e} in the reference"
        relative = worst.relative if form == "float32" else worst.norm
        self._report.rows.append(Row(graph, run.name, passed, worst.absolute, relative, detail))
