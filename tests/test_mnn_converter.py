"""The converter's caller: whatever a converter does wrong, nothing of it is taken over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from glmexport.errors import ExportError, GlmExportError
from glmexport.mnn import converter
from glmexport.mnn.converter import OF_JSON, mnn_of_json, run_converter

WRITES = "from pathlib import Path; import sys; target = Path(sys.argv[1]); target.write_bytes(b'model');"
SAYS = "print('Converted Success!');"


@pytest.fixture
def convert(tmp_path):
    """`convert(code)`: run Python code in the converter's place; returns the path of what it was to make."""

    def run(code: str, timeout: float = 20.0) -> Path:
        target = tmp_path / "out" / "block.mnn"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"of an earlier run")
        run_converter(
            ["{model}"],
            {"model": target},
            tmp_path / "logs" / "block.log",
            timeout=timeout,
            command=(sys.executable, "-c", code),
        )
        return target

    return run


def test_what_is_whole_is_taken_over(convert, tmp_path):
    assert convert(WRITES + SAYS).read_bytes() == b"model"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["block.mnn"]


BAD = {
    "says success, writes nothing": (SAYS, "wrote no model"),
    "writes, says nothing": (WRITES, "did not say that it succeeded"),
    "an empty file": (WRITES + "target.write_bytes(b'');" + SAYS, "its model is empty"),
    "an error before the success": (WRITES + "print('[ERROR] in node 7');" + SAYS, "[ERROR] in node 7"),
    "a file that could not be opened": (WRITES + 'print("Can\'t open file: x.data");' + SAYS, "Can't open file"),
    "an operator that there is not": (WRITES + "print('Not Support op: Frob');" + SAYS, "Not Support op"),
    "a layer that was not block-quantized": (WRITES + 'print("don\'t use block-quant for l");' + SAYS, "block-quant"),
    "failed": (WRITES + "print('Failed to write');" + SAYS, "Failed to write"),
    "status 3": (WRITES + SAYS + "sys.exit(3)", "ended with status 3"),
    "killed": (WRITES + SAYS + "import os; sys.stdout.flush(); os.kill(os.getpid(), 9)", "ended by SIGKILL"),
    "crashed": (WRITES + SAYS + "import os; sys.stdout.flush(); os.abort()", "ended by SIGABRT"),
    "a link": ("import os, sys; os.symlink('/etc/hostname', sys.argv[1]);" + SAYS, "wrote no model"),
    "no space left": (WRITES + "print('write: No space left on device', file=sys.stderr);" + SAYS, "No space left"),
}


@pytest.mark.parametrize("name", BAD)
def test_whatever_is_wrong_leaves_nothing(convert, tmp_path, name):
    code, words = BAD[name]
    with pytest.raises(ExportError, match=r"block\.mnn") as error:
        convert(code)
    assert words in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []  # the earlier file is gone too, and so is the private directory
    log = tmp_path / "logs" / "block.log"
    assert str(log) in str(error.value)
    assert log.is_file()


def test_one_that_hangs_is_stopped(convert, tmp_path):
    with pytest.raises(ExportError, match=r"did not end within 0\.5 seconds"):
        convert(WRITES + SAYS + "import time; sys.stdout.flush(); time.sleep(60)", timeout=0.5)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_path_may_hold_any_word(tmp_path):
    target = tmp_path / "failed [ERROR] {x}" / "x.mnn"
    target.parent.mkdir()
    run_converter(
        ["{x}", str(tmp_path / "Not Support {x}")],
        {"x": target},
        tmp_path / "log",
        command=(
            sys.executable,
            "-c",
            WRITES + "print('MNNModel', *sys.argv[1:]); assert sys.argv[2].endswith('{x}');" + SAYS,
        ),
    )
    assert target.read_bytes() == b"model"


def test_each_call_has_a_working_directory_of_its_own(convert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert("open('.__convert_external_data.bin', 'w').close();" + WRITES + SAYS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "out"]


def test_without_mnn_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(converter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GlmExportError, match=r"pip install 'glmexport\[mnn\]'"):
        converter.mnn_version()


def test_every_part_of_the_extra_is_needed(monkeypatch):
    monkeypatch.setattr(converter, "MODULES", ("MNN", "flatbuffers", "one_that_there_is_not"))
    pytest.importorskip("MNN")
    with pytest.raises(GlmExportError, match=r"not installed whole \(one_that_there_is_not cannot be found\)"):
        converter.mnn_version()


def test_the_real_one_says_success_to_a_missing_file(tmp_path):
    """The stand-ins above are no inventions: nothing but the log and the files tells."""
    pytest.importorskip("MNN")
    options = ["-f", "ONNX", "--modelFile", str(tmp_path / "none.onnx"), "--MNNModel", "{m}", "--bizCode", "glm"]
    with pytest.raises(ExportError, match=r"m\.mnn"):
        run_converter(options, {"m": tmp_path / "m.mnn"}, tmp_path / "log")
    assert not (tmp_path / "m.mnn").exists()


def test_each_direction_has_its_own_success(tmp_path):
    """A graph from JSON is not believed for what the converter says of models."""
    target = tmp_path / "x.mnn"
    with pytest.raises(ExportError, match="did not say that it succeeded"):
        run_converter(["{x}"], {"x": target}, success=OF_JSON, command=(sys.executable, "-c", WRITES + SAYS))
    run_converter(
        ["{x}"],
        {"x": target},
        success=OF_JSON,
        command=(sys.executable, "-c", WRITES + f"print('JsonFile', sys.argv[1], '{OF_JSON}', sys.argv[1])"),
    )
    assert target.read_bytes() == b"model"


@pytest.mark.parametrize("document", [b"no JSON at all", b'{"oplists": [], "oplist": []}'])
def test_json_that_mnn_does_not_know_is_refused(document):
    """A key that it does not know is dropped by the real one, which then says that it succeeded."""
    pytest.importorskip("MNN")
    with pytest.raises(ExportError, match=r"graph\.mnn: it printed .*[Ii]nvalid"):
        mnn_of_json(document)


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(ExportError, match=r"could not be run for x\.mnn: .*taken.*\.$"):
        run_converter(["{x}"], {"x": tmp_path / "x.mnn"}, tmp_path / "taken" / "log")
    with pytest.raises(ExportError, match=r"No such file or directory .*none"):
        run_converter(["{x}"], {"x": tmp_path / "none" / "x.mnn"}, tmp_path / "log")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
