"""Nothing of ours reports anything to anybody."""

from __future__ import annotations

import os
import subprocess
import sys

RUN = """
import sys
import glmexport
import onnx, onnxruntime
from onnx import helper
value = lambda name: helper.make_tensor_value_info(name, 1, [1])
graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value("x")], [value("y")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
onnxruntime.InferenceSession(model.SerializeToString())
"""


def traces(tmp_path, **variables):
    """What onnxruntime leaves in the user's directories, which the telemetry of 1.29 and later needs."""
    home = tmp_path / "home"
    home.mkdir()
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR"), str(home))
    own = {key: value for key, value in os.environ.items() if key not in ("CI", "ORT_DISABLE_TELEMETRY")}
    subprocess.run([sys.executable, "-c", RUN], env={**own, **places, **variables}, check=True, timeout=120)
    return sorted(path.name for path in home.rglob("*") if path.is_file())


def test_onnxruntime_stores_and_sends_nothing(tmp_path):
    assert traces(tmp_path) == []


def test_what_the_user_decided_stays(tmp_path):
    command = [sys.executable, "-c", "import glmexport, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"]
    env = {**os.environ, "ORT_DISABLE_TELEMETRY": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "0"
