"""A path to package: a checkpoint or a bundle, opened as a source of weights and as the reference of the check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from glmexport.bundle import looks_like_bundle, open_bundle
from glmexport.checkpoint import Checkpoint, open_checkpoint
from glmexport.checkpoint_draft import draft_of_checkpoint
from glmexport.draft import Notice, draft_of_bundle
from glmexport.errors import BundleError, CheckpointError
from glmexport.interface import DEFAULT_OPSET
from glmexport.mnn_llm.following import CheckpointReference, Reference, SessionReference
from glmexport.mnn_llm.source import PackageSource, source_of_draft
from glmexport.session import Session
from glmexport.splitter import check_apart
from glmexport.vocabulary import VocabularyMap


@dataclass(frozen=True)
class Input:
    """source: of weights. reference: makes what the package is compared with.

    check: raises where the files changed since they were opened.
    """

    source: PackageSource
    reference: Callable[[], Reference]
    check: Callable[[], None]


@contextmanager
def open_input(path: str, revision: str | None, output: Path, notice: Notice) -> Iterator[Input]:
    """Open a bundle, or a checkpoint directory or hub id.

    Raises BundleError and CheckpointError for what is neither, damaged, or would hold the output.
    """
    directory = Path(path)
    if looks_like_bundle(directory):
        if revision is not None:
            raise BundleError(f"{path} is a bundle, which has no revision {revision}; leave the revision out.")
        with _bundle(directory) as found:
            yield found
        return
    with open_checkpoint(path, revision) as checkpoint:
        check_apart(checkpoint.directory, output)
        config = checkpoint.config

        def check() -> None:
            changed = checkpoint.weights.changed()
            if changed:
                raise CheckpointError(f"{changed[0]} changed while it was read; start again when nothing writes to it.")

        rows = VocabularyMap.identity(config.vocab_size)
        yield Input(_source(checkpoint, notice), lambda: CheckpointReference(checkpoint, config, rows), check)


def _source(checkpoint: Checkpoint, notice: Notice) -> PackageSource:
    return source_of_draft(draft_of_checkpoint(checkpoint, DEFAULT_OPSET, "none", tied=False, notice=notice))


@contextmanager
def _bundle(directory: Path) -> Iterator[Input]:
    bundle = open_bundle(directory)
    if bundle.argmax == "only":
        raise BundleError(
            f"{directory} gives token ids and no logits, which MNN's engine needs; split without --argmax only."
        )
    opened: list[Session] = []

    def reference() -> Reference:
        opened.append(Session(bundle))
        return SessionReference(opened[-1])

    try:
        yield Input(source_of_draft(draft_of_bundle(bundle)), reference, lambda: None)
    finally:
        for session in opened:
            session.close()
