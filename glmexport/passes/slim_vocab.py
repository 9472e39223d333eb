"""Slim: drop rows that chat never uses from the embedding and the LM head, and renumber everything that names a row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from glmexport import names
from glmexport.bundle_tokenizer import make_tokenizer
from glmexport.config import ModelConfig
from glmexport.draft import BundleDraft, GraphDraft, Notice, Record
from glmexport.errors import BundleError, RecipeError
from glmexport.form import Slim, kept_special_ids, slimmed_config
from glmexport.onnx_files import Array
from glmexport.tensors import SelectedRows
from glmexport.tokenizer import Tokenizer
from glmexport.untrusted import parse_json
from glmexport.vocabulary import VocabularyMap

MAX_TEXT_BYTES = 256 << 20


@dataclass(frozen=True)
class SlimPass:
    """keep: a file of ids of the checkpoint, one a line. corpus: text files whose pieces are kept.

    Neither: everything but the image-token rows is kept.
    """

    keep: Path | None = None
    corpus: tuple[Path, ...] = ()

    def apply(self, draft: BundleDraft, notice: Notice) -> BundleDraft:
        """The slimmed draft. Raises BundleError where it is slimmed already, RecipeError for ids that are none."""
        if draft.form.slim is not None:
            raise BundleError(
                f"The bundle is slimmed already, from {draft.form.slim.vocabulary.full_size} rows to "
                f"{draft.config.vocab_size}; slim the bundle it was made from instead."
            )
        if any(isinstance(step, dict) and step.get("step") == "slim" for step in draft.facts["history"]):
            raise BundleError(
                "The bundle is slimmed already, though nothing was dropped; slim the bundle it was made from instead."
            )
        vocabulary = self._vocabulary(draft, notice)
        if vocabulary.is_identity:
            notice(f"Nothing to slim: {self._why(draft.config)}; every file is linked as it is.")
            return with_vocabulary_file(draft, notice).with_step("slim", kept=vocabulary.size)
        return with_vocabulary_file(slim_to(draft, vocabulary), notice).with_step("slim", kept=vocabulary.size)

    def _vocabulary(self, draft: BundleDraft, notice: Notice) -> VocabularyMap:
        config = draft.config
        rows, images = config.vocab_size, config.num_image_tokens
        if self.keep is None and not self.corpus:
            return VocabularyMap(rows, ((images, rows),))
        wanted: list[Array] = []
        if self.keep is not None:
            wanted.append(_read_ids(self.keep, rows))
        if self.corpus:
            tokenizer = tokenizer_of_draft(draft)
            if tokenizer is None:
                raise BundleError(
                    f"The bundle has no tokenizer, so what {self.corpus[0]} uses cannot be told; give ids with --keep."
                )
            wanted += [tokenizer.always_kept(), tokenizer.ids_used_by(_read_texts(self.corpus))]
        ids = np.concatenate(wanted)
        special = kept_special_ids(config, drops_images=config.special_ids.pad not in ids)
        added = sorted(set(special.values()) - set(ids.tolist()))
        if added:
            notice(f"Kept besides: {', '.join(map(str, added))}, which have a meaning of their own.")
        return VocabularyMap.from_ids(np.concatenate([ids, np.array(sorted(special.values()))]), rows)

    def _why(self, config: ModelConfig) -> str:
        if self.keep or self.corpus:
            return "the ids to keep are all there are"
        return f"the vocabulary of {config.vocab_size} rows has no image tokens at its front"


def slim_to(draft: BundleDraft, vocabulary: VocabularyMap) -> BundleDraft:
    """The draft with the rows of `vocabulary` alone. Raises BundleError where a graph's rows cannot be selected."""
    if draft.form.quantization is not None and draft.form.quantization.format == "qdq":
        raise BundleError(
            "The LM head is quantized in the qdq form, whose rows lie across bytes; slim first, then quantize."
        )
    config = slimmed_config(draft.config, vocabulary)
    form = dataclasses.replace(draft.form, slim=Slim(vocabulary, draft.config.num_image_tokens))
    files = {name: content for name, content in draft.files.items() if name != draft.form.vocabulary_file}
    old_table, new_table = draft.form.embedding_file, form.embedding_file
    if old_table is not None and new_table is not None:
        del files[old_table]
        files[new_table] = SelectedRows(draft.table(), vocabulary)
    if names.TOKENIZER_CONFIG in files:
        files[names.TOKENIZER_CONFIG] = _renumbered(draft.read_file(names.TOKENIZER_CONFIG), config)
    slimmed = dataclasses.replace(draft, config=config, form=form, files=files)
    for name in (names.EMBEDDING, names.HEAD):
        graph = draft.graph(name)
        if graph is not None:
            slimmed = slimmed.with_graph(_slim_graph(slimmed, graph, vocabulary))
    return slimmed


def with_vocabulary_file(draft: BundleDraft, notice: Notice) -> BundleDraft:
    """The draft with one piece a line in a file, or a notice where there is no tokenizer to tell them."""
    tokenizer = tokenizer_of_draft(draft)
    if tokenizer is None:
        notice(f"No {draft.form.vocabulary_file}: the checkpoint has no {names.TOKENIZER_MODEL} to tell the pieces.")
        return draft
    lines = "".join(f"{line}\n" for line in tokenizer.vocabulary_lines())
    return dataclasses.replace(draft, files={**draft.files, draft.form.vocabulary_file: lines.encode()})


def tokenizer_of_draft(draft: BundleDraft, *, checkpoint_ids: bool = False) -> Tokenizer | None:
    """The tokenizer with the draft's ids, or with those before it was slimmed; None where there is none."""
    if names.TOKENIZER_MODEL not in draft.files:
        return None
    model = draft.read_file(names.TOKENIZER_MODEL)
    return make_tokenizer(model, draft.config, draft.form, checkpoint_ids=checkpoint_ids)


def _slim_graph(draft: BundleDraft, graph: GraphDraft, vocabulary: VocabularyMap) -> GraphDraft:
    """The embedding or head, with the kept rows: what has two axes or more has the vocabulary on the first."""
    tensors = tuple(SelectedRows(tensor, vocabulary) if len(tensor.shape) > 1 else tensor for tensor in graph.tensors)
    dropped = (vocabulary.full_size - vocabulary.size) * draft.config.hidden_size

    def change(model: onnx.ModelProto) -> onnx.ModelProto:
        for value in model.graph.output:
            if value.name == names.LOGITS:
                value.type.tensor_type.shape.dim[-1].dim_value = vocabulary.size
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                for attribute in node.attribute:
                    if attribute.name == "N":
                        attribute.i = vocabulary.size
        return model

    # errors were measured over all rows, so those of the rows that are left are not known
    matrices = {name: _unmeasured(record(), vocabulary) for name, record in graph.matrices.items()}
    return graph.changed(change, tensors=tensors, parameters=graph.parameters - dropped, matrices=matrices)


def _unmeasured(record: Mapping[str, Any], vocabulary: VocabularyMap) -> Record:
    size = record["bytes"] * vocabulary.size // vocabulary.full_size
    slimmed = {**record, "bytes": size, "relative_error": None, "cosine": None}
    return lambda: slimmed


def _renumbered(tokenizer_config: bytes, config: ModelConfig) -> bytes:
    """`tokenizer_config.json` with the number of image rows that are left; without the key tokenizers take 20000."""
    document = parse_json(tokenizer_config, names.TOKENIZER_CONFIG)
    document["num_image_tokens"] = config.num_image_tokens
    return (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()


def _read_ids(path: Path, rows: int) -> Array:
    """Old ids int64, from a file with one a line. Raises RecipeError."""
    lines = _read_text(path).splitlines()
    ids = []
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word:
            continue
        if not (word.isascii() and word.isdecimal() and len(word) < 10 and int(word) < rows):
            raise RecipeError(
                f"{path}, line {number} is {word!r:.80}, expected an id from 0 to {rows - 1} in each line; correct it."
            )
        ids.append(int(word))
    if not ids:
        raise RecipeError(f"{path} holds no ids; expected one a line.")
    return np.array(ids, np.int64)


def _read_texts(paths: tuple[Path, ...]) -> Iterator[str]:
    for path in paths:
        yield _read_text(path)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise RecipeError(f"{path} has more than {MAX_TEXT_BYTES} bytes; give it in parts.")
        return path.read_text("utf-8")
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}); give a text file.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text; convert it.") from error
