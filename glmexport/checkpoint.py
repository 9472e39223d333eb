"""One checkpoint, opened and checked: its config, its patch, its weights by name, its tokenizer files.

A checkpoint directory is only ever read, and no code that lies in one is ever run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmexport import names
from glmexport.ahead import read_ahead
from glmexport.config import MAX_SIZE, ModelConfig, TokenizerFacts, implausible_sizes
from glmexport.errors import CheckpointError
from glmexport.hub import fetch_checkpoint, is_hub_id
from glmexport.patch import ModelPatch, all_patches
from glmexport.tokenizer import MODEL_LIMIT, SPECIAL_PIECES, load_processor
from glmexport.untrusted import quoted, read_json, read_small_file
from glmexport.weight_files import TensorInfo
from glmexport.weights import WEIGHT_FILES, Weights, read_index

_NAMED_PIECES = ("<unk>", "<s>", "</s>", "<pad>", *SPECIAL_PIECES)
_FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")

_LISTED = 1000  # tensors named in one list of an error: more than a 6B model has
_SLICE_BYTES = 16 << 20

# The models that say `model_type: "chatglm"` and are not ChatGLM-6B, by (padded_vocab_size, seq_length); None is any.
_LATER_CHATGLM: tuple[tuple[int, int | None, str], ...] = (
    (65024, 8192, "ChatGLM3"),
    (65024, 131072, "ChatGLM3 with 128K positions"),
    (65024, None, "ChatGLM2 or ChatGLM3"),
    (151552, None, "GLM-4-9B with remote code"),
)
_GLM_TYPES = {
    "glm": "GLM-4-9B or GLM-Edge",
    "glm4": "GLM-4-0414 or GLM-Z1",
    "glm4v": "GLM-4.1V",
    "glm4v_moe": "GLM-4.5V",
    "glm4_moe": "GLM-4.5",
}
# Kinds of ChatGLM-6B checkpoint that hold other weights than the model's own: what it is, how its config says so, how
# its tensors say so (config keys get lost in re-saved checkpoints), what to use.
_OTHER_WEIGHTS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool], str, str], ...] = (
    (
        "a quantized checkpoint (int4 or int8 weights)",
        lambda raw: bool(raw.get("quantization_bit")),
        r".*\.weight_scale",
        "use the float16 checkpoint it was made from and quantize the export instead",
    ),
    (
        "a P-Tuning checkpoint",
        lambda raw: raw.get("pre_seq_len") is not None,
        r"transformer\.prefix_encoder\..*",
        "use the checkpoint it was tuned from, or one that was fine-tuned as a whole",
    ),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One opened checkpoint; a context manager that closes its weight files.

    weights: by the names in the files; empty when it was opened with `require_weights=False`.
    warnings: sentences for the user.
    tokenizer_files: those that exist of `tokenizer_config.json` and `ice_text.model`, all that tokenizing needs.
    """

    directory: Path
    config: ModelConfig
    patch: ModelPatch
    weights: Weights
    warnings: tuple[str, ...]
    tokenizer_files: tuple[Path, ...]

    @property
    def head_name(self) -> str:
        """Name of the output head's tensor [vocab, hidden]."""
        return self.patch.head_name

    @property
    def embedding_name(self) -> str:
        """Name of the embedding's tensor [vocab, hidden]."""
        return self.patch.embedding_name

    @property
    def has_own_head(self) -> bool:
        """Whether the files hold a head; without one it is tied, which is to say that it is the embedding."""
        return self.head_name in self.weights

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies; a tied head is the embedding. CheckpointError if there is no such tensor."""
        return self.weights.info(self._stored(name))

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in its stored dtype; a tied head is the embedding. CheckpointError if it cannot be read."""
        return self.weights.read(self._stored(name))

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of a tensor in its stored dtype; a tied head is the embedding."""
        return self.weights.read_rows(self._stored(name), start, stop)

    def read_bands(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        """The whole tensor in bands of so many rows, in its stored dtype; a tied head is the embedding."""
        return self.weights.read_bands(self._stored(name), rows)

    def close(self) -> None:
        """Close the weight files."""
        self.weights.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _stored(self, name: str) -> str:
        return self.embedding_name if name == self.head_name and not self.has_own_head else name


def open_checkpoint(
    path_or_hub_id: str | Path,
    revision: str | None = None,
    *,
    require_weights: bool = True,
    patches: Sequence[ModelPatch] | None = None,
) -> Checkpoint:
    """Open and check a checkpoint directory, or a model on the Hugging Face Hub, which is fetched first.

    An existing path is never taken for a hub id. Every tensor that the model needs is checked for its presence, shape
    and dtype before anything is read.

    revision: of a hub model: branch, tag or commit.
    require_weights: False leaves the weights alone, for what needs config and tokenizer only.
    patches: the architectures to know; None is all.

    Raises CheckpointError: everything that can be wrong with a checkpoint, tensors all at once.
    """
    directory, from_hub = _locate(path_or_hub_id, revision)
    origin = directory / "config.json"
    if not os.path.lexists(origin):
        raise CheckpointError(f"{directory} is not a checkpoint directory: it has no config.json.")
    raw = read_json(origin)
    patch = _find_patch(origin, raw, all_patches() if patches is None else patches)
    facts, tokenizer_files, warnings = _read_tokenizer(directory)
    config = patch.read_config(raw, facts)
    if from_hub and require_weights:  # only now: a model that is not supported is not worth its download
        directory = _fetch(str(path_or_hub_id), directory.name, WEIGHT_FILES)
    _demand_plausible(origin, config)
    weights = Weights.open(directory) if require_weights else Weights.none()
    if require_weights:
        _check_tensors(directory, weights, patch, config)
    return Checkpoint(directory, config, patch, weights, warnings, tokenizer_files)


def heads_equal(checkpoint: Checkpoint) -> bool:
    """Whether head and embedding hold equal numbers; compared in slices of some megabytes, equal at once where tied."""
    if not checkpoint.has_own_head:
        return True
    head, embedding = checkpoint.info(checkpoint.head_name), checkpoint.info(checkpoint.embedding_name)
    if head.shape != embedding.shape:
        return False
    step = max(1, _SLICE_BYTES * head.shape[0] // max(1, head.nbytes, embedding.nbytes))
    table = checkpoint.read_bands(checkpoint.embedding_name, step)
    with closing(read_ahead(checkpoint.read_bands(checkpoint.head_name, step))) as rows:
        for ours, theirs in zip(rows, table, strict=True):
            if head.dtype != embedding.dtype:
                ours, theirs = ours.double(), theirs.double()
            if not torch.equal(ours, theirs):
                return False
    return True


def _locate(path_or_hub_id: str | Path, revision: str | None) -> tuple[Path, bool]:
    """The checkpoint directory, as yet without weights if it is the hub's, and whether it is."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{path} is a local directory, which has no revision {revision}; leave the revision out."
            )
        return path, False
    if os.path.lexists(path):
        raise CheckpointError(f"{path} is not a directory; give the checkpoint directory that holds config.json.")
    if not is_hub_id(str(path_or_hub_id)):
        raise CheckpointError(
            f"{path} does not exist; expected a checkpoint directory or a hub id such as zai-org/chatglm-6b."
        )
    return _fetch(str(path_or_hub_id), revision, ()), True


def _fetch(repo_id: str, revision: str | None, weight_files: Sequence[str]) -> Path:
    return fetch_checkpoint(
        repo_id,
        revision,
        optional_files=(names.TOKENIZER_CONFIG, names.TOKENIZER_MODEL),
        weight_files=weight_files,
        read_index=lambda index: read_index(index).values(),
    )


def _find_patch(origin: Path, raw: Mapping[str, Any], patches: Sequence[ModelPatch]) -> ModelPatch:
    for patch in patches:
        if patch.recognise(raw):
            for kind, in_config, _, advice in _OTHER_WEIGHTS:
                if in_config(raw):
                    raise CheckpointError(f"{origin} describes {kind} of {patch.title}; {advice}.")
            return patch
    supported = ", ".join(patch.title for patch in patches) or "no model at all"
    raise CheckpointError(f"{origin} describes {_name_of(raw)}; supported: {supported}.")


def _name_of(raw: Mapping[str, Any]) -> str:
    """What kind of model an unsupported config is of."""
    model_type = raw.get("model_type")
    if model_type is None:
        return "no model that can be told (no `model_type`)"
    if model_type == "chatglm":
        for vocab_size, seq_length, name in _LATER_CHATGLM:
            if raw.get("padded_vocab_size") == vocab_size and seq_length in (None, raw.get("seq_length")):
                return f"{name}, a later generation (`model_type` chatglm)"
        return "an unknown generation of `model_type` chatglm"
    if isinstance(model_type, str) and model_type in _GLM_TYPES:
        return f"{_GLM_TYPES[model_type]}, a later generation (`model_type` {model_type})"
    return f"a model of another kind (`model_type` {quoted(model_type)})"


def _read_tokenizer(directory: Path) -> tuple[TokenizerFacts, tuple[Path, ...], tuple[str, ...]]:
    """(facts, files that exist, warnings about those that do not)."""
    config, model = directory / names.TOKENIZER_CONFIG, directory / names.TOKENIZER_MODEL
    files = tuple(path for path in (config, model) if os.path.lexists(path))
    count = read_json(config).get("num_image_tokens") if config in files else None
    if count is not None and (type(count) is not int or not 0 <= count <= MAX_SIZE):
        raise CheckpointError(f"{config} must give `num_image_tokens` as a number of tokens, found {count!r:.80}.")
    pieces = _special_pieces(model) if model in files else {}
    missing = [path.name for path in (config, model) if path not in files]
    warnings: tuple[str, ...] = ()
    if missing:
        warnings = (f"{directory} has no {' and no '.join(missing)}: without both of them text cannot be tokenized.",)
    return TokenizerFacts(count, pieces), files, warnings


def _special_pieces(path: Path) -> dict[str, int]:
    processor = load_processor(read_small_file(path, MODEL_LIMIT), str(path))
    size = len(processor)
    pieces = [processor.IdToPiece(piece_id) for piece_id in range(size)]
    special = [processor.IsControl(piece_id) or processor.IsUnknown(piece_id) for piece_id in range(size)]
    if not size:
        raise CheckpointError(f"{path} is empty; download it again.")
    return {
        piece: piece_id
        for piece_id, piece in enumerate(pieces)
        if special[piece_id] or piece in _NAMED_PIECES  # a name counts whatever its kind in the model
    }


def _demand_plausible(origin: Path, config: ModelConfig) -> None:
    """Refuse sizes that no model has, before anything is built of them."""
    wrong = implausible_sizes(config)
    if wrong:
        raise CheckpointError(f"{origin} gives sizes that no supported model has: {', '.join(wrong)}; fetch it again.")


def _check_tensors(directory: Path, weights: Weights, patch: ModelPatch, config: ModelConfig) -> None:
    """Compare the files' tensors with the reference's, which is built without memory, and report every difference."""
    for kind, _, pattern, advice in _OTHER_WEIGHTS:
        if any(re.fullmatch(pattern, name) for name in weights.names()):
            raise CheckpointError(f"{directory} holds {kind} of {patch.title}; {advice}.")
    if config.num_blocks > len(weights):
        raise CheckpointError(
            f"{directory} holds {len(weights)} tensors, which is too few for the {config.num_blocks} blocks in its "
            "config.json; fetch both again."
        )
    with torch.device("meta"):
        reference = patch.build_reference(config)
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    optional = f"{patch.head}.weight"

    def ignored(name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in patch.ignored_tensors)

    used = {name: shape for name, shape in expected.items() if not ignored(name)}
    missing = [f"{name} {list(shape)}" for name, shape in used.items() if name not in weights and name != optional]
    found = {name: weights.info(name) for name in used if name in weights}
    misshapen = [
        f"{name}: found {list(info.shape)}, expected {list(used[name])}"
        for name, info in found.items()
        if info.shape != used[name]
    ]
    mistyped = [
        f"{name}: found {info.dtype}, expected one of {', '.join(_FLOAT_DTYPES)}"
        for name, info in found.items()
        if info.dtype not in _FLOAT_DTYPES
    ]
    unknown = [
        f"{quoted(name)[1:-1]} {list(weights.info(name).shape)}"
        for name in weights.names()
        if name not in used and not ignored(name)
    ]
    problems = {"missing": missing, "misshapen": misshapen, "of a wrong dtype": mistyped, "unknown": unknown}
    if any(problems.values()):
        counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in problems.items() if lines)
        raise CheckpointError(
            f"{directory} does not hold the tensors that its config.json describes ({patch.title}, "
            f"{config.num_blocks} blocks): {counts}; check that config and weights are of one complete download."
            + "".join(_listing(kind, lines) for kind, lines in problems.items())
        )


def _listing(kind: str, lines: Sequence[str]) -> str:
    more = f"\n  {kind}: and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return "".join(f"\n  {kind}: {line}" for line in lines[:_LISTED]) + more
