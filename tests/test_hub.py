"""Hub ids, and fetching against a local cache with no network at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from checkpoints import HUB_COMMIT, HUB_REPO, fill_hub_cache, write_checkpoint
from huggingface_hub import constants, errors

from glmexport.errors import CheckpointError
from glmexport.hub import fetch_checkpoint, is_hub_id
from glmexport.weights import WEIGHT_FILES, Weights, read_index

OPTIONAL = ("tokenizer_config.json", "ice_text.model")


def fetch(revision: str | None = None, weight_files=WEIGHT_FILES) -> Path:
    return fetch_checkpoint(
        HUB_REPO,
        revision,
        optional_files=OPTIONAL,
        weight_files=weight_files,
        read_index=lambda path: read_index(path).values(),
    )


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; the network is off in the way of HF_HUB_OFFLINE."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The names of the files that were asked for, in order."""
    names = []
    download = huggingface_hub.hf_hub_download

    def record(repo_id, filename, **kwargs):
        names.append(filename)
        return download(repo_id, filename, **kwargs)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", record)
    return names


@pytest.mark.parametrize("text", ["zai-org/chatglm-6b", "THUDM/chatglm-6b", "a/b", "me_1/x.y-z"])
def test_hub_ids(text):
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "chatglm-6b",
        "/a/b",
        "./a",
        "../a",
        "a/",
        "a/b/c",
        "~/a",
        "a\\b",
        "a/b..c",
        "a/b--c",
        "a/.b",
        "a/b.git",
        "a b/c",
        "a/b\n",
        "a/" + "b" * 100,
        "https://huggingface.co/a/b",
        "a/模型",
    ],
)
def test_no_hub_ids(text):
    assert not is_hub_id(text)


@pytest.mark.parametrize("fmt", ["bin", "bin-sharded", "safetensors", "safetensors-sharded"])
def test_fetches_config_tokenizer_and_weights_and_never_code(tmp_path, cache, asked, fmt):
    snapshot = fill_hub_cache(cache, write_checkpoint(tmp_path / "source", fmt=fmt))
    assert fetch() == snapshot
    assert not [name for name in asked if name.endswith(".py")]
    weights = {path.name for path in snapshot.iterdir() if path.suffix in (".bin", ".safetensors")}
    assert weights | {"config.json", *OPTIONAL} <= set(asked)
    with Weights.open(snapshot) as opened:
        assert len(opened) > 0


def test_only_one_format_is_fetched(tmp_path, cache, asked):
    write_checkpoint(tmp_path / "source", fmt="bin-sharded")
    fill_hub_cache(cache, write_checkpoint(tmp_path / "source", fmt="safetensors-sharded"))
    fetch()
    assert not [name for name in asked if "pytorch_model" in name]
    asked.clear()
    fetch(weight_files=())
    assert asked == ["config.json", *OPTIONAL]


def test_revisions(tmp_path, cache):
    first, second = "a" * 40, "b" * 40
    old = fill_hub_cache(cache, write_checkpoint(tmp_path / "old", seed=1), first, "v1")
    new = fill_hub_cache(cache, write_checkpoint(tmp_path / "new", seed=2), second)
    assert [fetch(), fetch("main"), fetch("v1"), fetch(first), fetch(second)] == [new, new, old, old, new]
    with pytest.raises(CheckpointError, match=r"at revision v9 has no config\.json in the local cache"):
        fetch("v9")


def test_all_files_are_of_one_commit(tmp_path, cache, monkeypatch):
    fill_hub_cache(cache, write_checkpoint(tmp_path / "source"))
    download, revisions = huggingface_hub.hf_hub_download, []

    def record(repo_id, filename, *, revision, **kwargs):
        revisions.append(revision)
        return download(repo_id, filename, revision=revision, **kwargs)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", record)
    fetch()
    assert revisions[0] is None
    assert set(revisions[1:]) == {HUB_COMMIT}


def test_what_the_cache_lacks(tmp_path, cache):
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        fetch()
    snapshot = fill_hub_cache(cache, write_checkpoint(tmp_path / "source", fmt="bin-sharded"))
    (snapshot / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 weight file.*pytorch_model-00002-of-00003\.bin"):
        fetch()
    (snapshot / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no weight file in the local cache.*model\.safetensors"):
        fetch()
    (snapshot / "ice_text.model").unlink()  # optional
    assert fetch(weight_files=()) == snapshot


def test_an_index_on_the_hub_that_names_code(tmp_path, cache, asked):
    source = write_checkpoint(tmp_path / "source")
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "modeling_chatglm.py"}}))
    fill_hub_cache(cache, source)
    with pytest.raises(CheckpointError, match=r"plain name of a \.bin file"):
        fetch()
    assert "modeling_chatglm.py" not in asked


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # its arguments are a response of the http library, which differs between releases
    Exception.__init__(error, "404 Client Error.\nmore")
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (http_error(errors.RepositoryNotFoundError), "There is no directory zai-org/chatglm-6b here"),
        (http_error(errors.GatedRepoError), "gated"),
        (http_error(errors.RevisionNotFoundError), "no such branch"),
        (http_error(errors.RemoteEntryNotFoundError), "has no config.json; expected"),
        (errors.LocalEntryNotFoundError("not here"), "cannot be reached; check the network"),
        (http_error(errors.HfHubHTTPError), "could not be fetched"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError(), "could not be fetched (RuntimeError)"),
    ],
)
def test_every_failure_is_one_sentence(cache, monkeypatch, error, sentence):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError) as caught:
        fetch()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_by_environment_variables_alone(tmp_path):
    snapshot = fill_hub_cache(tmp_path / "cache", write_checkpoint(tmp_path / "source"))
    script = (
        "import sys; from glmexport import hub; assert 'huggingface_hub' not in sys.modules;"
        f"print(hub.fetch_checkpoint({HUB_REPO!r}, None, optional_files=(), weight_files=('pytorch_model.bin',), "
        "read_index=list)); assert 'torch' not in sys.modules"
    )
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == (str(snapshot), 0), done.stderr
