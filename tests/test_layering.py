"""Who may import whom: each file imports strictly lower layers, and what must run without torch imports none."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    (
        *("errors", "names", "ahead", "builtins_lock", "chat", "direct_file", "machine"),
        *("mnn_llm.engine_worker", "mnn_llm.net"),
    ),
    (
        *("compiled", "config", "export_ops", "hub", "onnx_files", "tools", "untrusted", "vocabulary"),
        *(
            "affine",
            "convert.mnn_tool",
            "mnn_module",
            "sampling",
            "sentencepiece_model",
            "sizes",
            "verify.report",
            "verify.tolerances",
            "verify.measures",
            "mnn_llm.converter",
            "mnn_llm.engine",
        ),
    ),
    (
        *("interface", "patch", "prompt", "weight_files", "models.chatglm_6b", "passes.wide_activations"),
        *("placement", "quantize_kernels", "recipe", "tensors", "tokenizer", "convert.mnn_matrix", "verify.matrices"),
        *("mnn_llm.sentencepiece_facts", "mnn_llm.stored_weights"),
    ),
    (
        *("convert.mnn_file", "form", "graph_lint", "graphs", "trace", "weights", "quantized_rows", "verify.cases"),
        *("patches", "mnn_llm.engine_graph", "mnn_llm.tokenizer_file"),
    ),
    (
        *("bundle", "checkpoint", "equivalence", "quantized", "raw_rows", "stamping", "verify.runs"),
        "mnn_llm.chat_template",
    ),
    (
        "bundle_tokenizer",
        "inventory",
        "journal",
        "mnn_session",
        "quantize_report",
        "stored",
        "verify.forms",
        "verify.reference",
        *("mnn_llm.engine_config", "mnn_llm.weight_writer"),
    ),
    (
        *("bundle_writer", "convert.plain_graph", "doctor", "draft", "embedding_rows"),
        *("graph_pool", "verify.stored_weights"),
    ),
    (
        "checkpoint_draft",
        "convert.mnn_embedding",
        "convert.mnn_sources",
        "draft_writer",
        "passes",
        "session",
        "passes.half_weights",
        "passes.raw_embedding",
        "passes.slim_vocab",
        "mnn_llm.source",
    ),
    (
        *("convert.mnn_graph", "derive", "generation", "lifting", "splitter", "verify.modes", "verify.overflow"),
        *("verify.structure", "mnn_llm.following"),
    ),
    (
        *("conversation", "convert.mnn_check", "evaluation", "passes.quantize_weights", "verify.mnn_weights"),
        *("mnn_llm.check", "mnn_llm.inputs", "mnn_llm.position_probe"),
    ),
    ("api", "passes.choose_bits", "verify.expected", "mnn_llm.package"),
    ("convert.mnn", "verify.check"),
    ("verify",),
    ("cli.interrupt",),
    ("cli.output",),
    ("cli.derived", "cli.doctor", "cli.pass_options", "cli.run_options", "cli.inspect", "cli.package", "cli.patches"),
    (
        "cli.chat",
        "cli.convert",
        "cli.embed",
        "cli.evaluate",
        "cli.generate",
        "cli.quantize",
        "cli.slim",
        "cli.tokenize",
        "cli.verify",
    ),
    ("cli.split",),
    ("cli.main",),
    ("__main__",),
)
"""Bottom first. A command is a file by itself; `split` shows the reports of `verify` and `quantize`."""

FREE = ("", "models", "cli", "convert", "mnn_llm", "serve")
"""A docstring and the version at most; anybody may import them."""

LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}
PATCHES_MAY = ("config", "errors", "export_ops", "interface", "names", "onnx_files", "patch", "models.chatglm_6b")
WITHOUT_TORCH = (
    *("errors", "names", "config", "interface", "prompt", "vocabulary", "tokenizer", "recipe", "form"),
    *("onnx_files", "graph_lint", "tensors", "bundle", "bundle_writer", "stored", "draft", "draft_writer", "derive"),
    *("affine", "compiled", "quantize_kernels", "quantized", "quantized_rows", "raw_rows", "embedding_rows", "session"),
    *(
        "passes",
        "passes.half_weights",
        "passes.slim_vocab",
        "passes.raw_embedding",
        "passes.quantize_weights",
        "passes.choose_bits",
    ),
    *("bundle_tokenizer", "placement", "graph_pool", "sampling", "generation", "chat", "conversation", "evaluation"),
    *("convert.mnn", "convert.mnn_check", "convert.mnn_tool", "mnn_module", "mnn_session", "cli.convert"),
    *("api", "doctor", "machine", "cli.generate", "cli.chat", "cli.doctor", "cli.evaluate", "cli.tokenize"),
)
FILES = sorted([*ROOT.glob("glmexport/**/*.py"), *ROOT.glob("patches/*.py")])


def module_of(path: Path) -> str:
    """`glmexport/verify/check.py` -> `verify.check`; every file of patches/ -> `patches`."""
    if path.parent.name == "patches":
        return "patches"
    parts = path.relative_to(ROOT / "glmexport").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules of glmexport that a file imports anywhere, inside functions too, without the leading `glmexport.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else str(node.module) for name in names}
    return {name.removeprefix("glmexport").removeprefix(".") for name in found if name.split(".")[0] == "glmexport"}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() or name == "glmexport.patches"


def test_the_table_names_every_file_once():
    assert len(LAYER_OF) == sum(map(len, LAYERS))
    assert {module_of(path) for path in FILES} - {*FREE} == set(LAYER_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_lower_layers_only(path):
    own = module_of(path)
    used = imports(path) - {*FREE}
    if own in FREE:
        assert used <= {"api"} if own == "" else not used
        return
    wrong = {name: LAYER_OF.get(name) for name in used if LAYER_OF.get(name, len(LAYERS)) >= LAYER_OF[own]}
    assert not wrong, f"layer {LAYER_OF[own]} imports {wrong}"


@pytest.mark.parametrize("name", sorted(name for name in LAYER_OF if name != "patches"))
def test_no_file_stands_higher_than_it_must(name):
    """The table stays true: a file is in the first layer above all that it imports, or beside its peers."""
    path = ROOT / "glmexport" / Path(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    needed = 1 + max((LAYER_OF[used] for used in imports(path) - {*FREE}), default=-1)
    if not name.startswith(("cli", "__main__")):  # the command line stands above everything by decision
        assert LAYER_OF[name] <= max(needed, 1)


@pytest.mark.parametrize("path", sorted(ROOT.glob("patches/*.py")), ids=lambda path: path.name)
def test_patches_import_the_lower_core_and_siblings_relatively(path):
    assert imports(path) <= {*PATCHES_MAY, "models"}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, "siblings only"


def test_the_core_reaches_the_patches_in_one_line():
    mentions = [
        f"{path.name}: {line.strip()}"
        for path in ROOT.glob("glmexport/**/*.py")
        for line in path.read_text("utf-8").splitlines()
        if "import" in line and ("glmexport.patches" in line or "from .patches" in line)
    ]
    assert mentions == ['patch.py: patches = importlib.import_module("glmexport.patches").PATCHES']


def test_relative_imports_are_for_patches_only():
    for path in ROOT.glob("glmexport/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_only_trace_calls_the_exporter():
    callers = {
        path.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.onnx.export"
    }
    assert callers == {"trace.py"}


def test_what_runs_a_bundle_needs_no_torch():
    """In an interpreter that cannot import torch."""
    code = "import sys; sys.modules['torch'] = None\n" + "\n".join(f"import glmexport.{name}" for name in WITHOUT_TORCH)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_torch_in_the_text_either(name):
    path = ROOT / "glmexport" / Path(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text("utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module for module in modules if module.split(".")[0] == "torch"}
