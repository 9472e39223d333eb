"""A checkpoint from the Hugging Face Hub: its config, tokenizer and weights into the local cache, never its code."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from glmexport.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?/[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_MAX_ID_LENGTH = 96  # the hub's own limit


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form `owner/name` of a model on the hub; says nothing about whether there is one."""
    return (
        len(text) <= _MAX_ID_LENGTH
        and _HUB_ID.fullmatch(text) is not None
        and ".." not in text
        and "--" not in text
        and not text.endswith(".git")
    )


def fetch_checkpoint(
    repo_id: str,
    revision: str | None,
    *,
    optional_files: Sequence[str],
    weight_files: Sequence[str],
    read_index: Callable[[Path], Collection[str]],
    cache_dir: Path | None = None,
) -> Path:
    """Make sure that the checkpoint is in the hub's cache and return its directory there.

    Fetched are `config.json`, those of `optional_files` that the repository has, the first of `weight_files` that it
    has and, where that one is an index (`*.index.json`), the files that `read_index` finds in it. All are of the
    commit that `config.json` came from, even if the branch moves meanwhile. Everything comes from the cache alone when
    HF_HUB_OFFLINE is set.

    revision: branch, tag or commit; None is the main branch.
    weight_files: in order of preference; empty to leave the weights out.
    cache_dir: None is the hub library's default (HF_HUB_CACHE).

    Raises CheckpointError: no such repository, revision or weights, no permission, no network and not in the cache.
    """
    config = _fetch(repo_id, "config.json", revision, cache_dir)
    if config is None:
        raise CheckpointError(
            f"{_described(repo_id, revision)} has no config.json{_where()}; expected a model repository."
        )
    commit = config.parent.name
    for name in optional_files:
        _fetch(repo_id, name, commit, cache_dir)
    if weight_files:
        _fetch_weights(repo_id, commit, weight_files, read_index, cache_dir)
    return config.parent


def _fetch_weights(
    repo_id: str,
    commit: str,
    weight_files: Sequence[str],
    read_index: Callable[[Path], Collection[str]],
    cache_dir: Path | None,
) -> None:
    for name in weight_files:
        path = _fetch(repo_id, name, commit, cache_dir)
        if path is not None:
            break
    else:
        raise CheckpointError(
            f"{_described(repo_id, commit)} has no weight file{_where()}; expected one of {', '.join(weight_files)}."
        )
    if not name.endswith(".index.json"):
        return
    missing = [shard for shard in sorted(set(read_index(path))) if _fetch(repo_id, shard, commit, cache_dir) is None]
    if missing:
        raise CheckpointError(
            f"{_described(repo_id, commit)} lacks {len(missing)} weight file(s) that {name} names{_where()}: "
            f"{', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}."
        )


def _fetch(repo_id: str, name: str, revision: str | None, cache_dir: Path | None) -> Path | None:
    """The cached file, fetched if need be; None if the repository (offline: the cache) does not have it."""
    from huggingface_hub import errors, hf_hub_download  # here: it is slow to import and most runs never need it

    what = _described(repo_id, revision)
    try:
        return Path(hf_hub_download(repo_id, name, revision=revision, cache_dir=cache_dir))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{what} is gated: accept its terms on its hub page and log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no directory {repo_id} here and no readable model of that name on the hub; check the name, and "
            "log in with `hf auth login` if the model is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{what} does not exist: the model has no such branch, tag or commit.") from error
    except errors.LocalEntryNotFoundError as error:
        if _offline():
            return None
        raise CheckpointError(
            f"{name} of {what} is not in the local cache and the hub cannot be reached; check the network."
        ) from error
    except errors.EntryNotFoundError:
        return None
    # Broad, because the classes of network errors below the hub library have changed from release to release.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{name} of {what} could not be fetched ({reason}); try again.") from error


def _described(repo_id: str, revision: str | None) -> str:
    return f"The hub model {repo_id}" + (f" at revision {revision}" if revision else "")


def _where() -> str:
    return " in the local cache, and HF_HUB_OFFLINE is set" if _offline() else ""


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
