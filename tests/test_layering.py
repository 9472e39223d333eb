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
        *("ahead", "builtins_lock", "chat", "direct_file", "errors", "export_ops", "machine", "mapped_pages"),
        *("mnn.process", "mnn_llm.engine_worker", "names", "sentencepiece_model", "serve.protocol", "serve.settings"),
        *("serve.web_page", "thread_pool", "tools", "verify.measures", "verify.report", "verify.tolerances"),
        *("vocabulary",),
    ),
    (
        *("affine", "compiled", "config", "hub", "mnn.converter", "mnn.module", "mnn_llm.engine"),
        *("mnn_llm.sentencepiece_facts", "onnx_files", "plotting", "sampling", "serve.client", "sizes", "untrusted"),
    ),
    (
        *("interface", "mnn.matrix", "mnn_llm.tokenizer_file", "models.chatglm_6b", "passes.wide_activations"),
        *("patch", "placement", "prompt", "quantize_kernels", "recipe", "serve.defaults", "serve.durations"),
        *("serve.model_names", "serve.modelfile", "slot_cache", "tensors", "tokenizer", "verify.matrices"),
        *("weight_files",),
    ),
    (
        *("form", "graph_lint", "graphs", "mnn.file", "mnn.rounding", "mnn_llm.chat_template", "mnn_llm.net"),
        *("patches", "quantized_rows", "serve.prompts", "trace", "verify.cases", "weights"),
    ),
    (
        *("bundle", "checkpoint", "equivalence", "mnn.vectors", "mnn_llm.engine_config", "mnn_llm.engine_graph"),
        *("quantized", "raw_rows", "stamping", "verify.runs"),
    ),
    (
        *("bundle_tokenizer", "inventory", "journal", "mnn.session", "mnn_llm.weight_writer", "quantize_report"),
        *("serve.store", "stored", "verify.forms", "verify.reference"),
    ),
    (
        *("bundle_writer", "convert.plain_graph", "doctor", "draft", "embedding_rows", "graph_pool"),
        *("verify.stored_weights",),
    ),
    (
        *("checkpoint_draft", "convert.mnn_embedding", "convert.mnn_sources", "draft_writer", "in_place"),
        *(
            "mnn_llm.source",
            "passes",
            "passes.half_cache",
            "passes.half_weights",
            "passes.raw_embedding",
            "passes.slim_vocab",
        ),
    ),
    (
        *("convert.mnn_graph", "convert.mnn_plan", "derive", "lifting", "session", "splitter", "verify.overflow"),
        *("verify.structure",),
    ),
    (
        *("convert.mnn_check", "generation", "mnn_llm.following", "passes.quantize_weights", "verify.mnn_weights"),
        *("verify.modes",),
    ),
    (
        *("api", "bench", "conversation", "evaluation", "mnn_llm.check", "mnn_llm.inputs", "mnn_llm.position_probe"),
        *("passes.choose_bits", "serve.rows", "verify.expected", "verify.twins"),
    ),
    (*("convert.mnn", "mnn_llm.package", "serve.row", "serve.throughput", "verify.check"),),
    (*("serve.engine", "serve.logprobs", "verify"),),
    (*("serve.loading", "serve.metrics"),),
    (*("serve.models",),),
    (*("serve.context", "serve.replies"),),
    (*("serve.asking", "serve.guard", "serve.ollama_models", "serve.openai_forms", "serve.server"),),
    (*("serve.ollama", "serve.openai", "serve.operations"),),
    (*("serve.app",),),
    ("cli.interrupt",),
    ("cli.output",),
    ("cli.model_options",),
    (
        *(
            "cli.derived",
            "cli.doctor",
            "cli.pass_options",
            "cli.run_options",
            "cli.inspect",
            "cli.package",
            "cli.patches",
        ),
        *("cli.cached_bundle", "cli.serve_options"),
    ),
    ("cli.talk",),
    (
        "cli.bench",
        "cli.chat",
        "cli.convert",
        "cli.embed",
        "cli.evaluate",
        "cli.generate",
        "cli.quantize",
        "cli.slim",
        "cli.tokenize",
        "cli.verify",
        *("cli.cp", "cli.create", "cli.list_models", "cli.ps", "cli.rm", "cli.run_model", "cli.serve", "cli.show"),
        "cli.stop",
    ),
    ("cli.split",),
    ("cli.main",),
    ("__main__",),
)
"""Bottom first. A command is a file by itself; `split` shows the reports of `verify` and `quantize`."""

FREE = (
    "",
    "models",
    "cli",
    "convert",
    "mnn",
    "mnn_llm",
    "serve",
)  # a docstring and the version at most; anybody may import them
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}
PATCHES_MAY = ("config", "errors", "export_ops", "interface", "names", "onnx_files", "patch", "models.chatglm_6b")
WITHOUT_TORCH = (
    *("errors", "names", "config", "interface", "prompt", "vocabulary", "tokenizer", "recipe", "form"),
    *("onnx_files", "graph_lint", "tensors", "bundle", "bundle_writer", "stored", "draft", "draft_writer", "derive"),
    *("affine", "compiled", "quantize_kernels", "quantized", "quantized_rows", "raw_rows", "embedding_rows", "session"),
    *(
        "passes",
        "passes.half_cache",
        "passes.half_weights",
        "passes.slim_vocab",
        "passes.raw_embedding",
        "passes.quantize_weights",
        "passes.choose_bits",
    ),
    *("bundle_tokenizer", "placement", "graph_pool", "sampling", "generation", "chat", "conversation", "evaluation"),
    "mapped_pages",
    *("convert.mnn", "convert.mnn_check", "convert.mnn_plan", "cli.convert"),
    *("mnn.converter", "mnn.file", "mnn.matrix", "mnn.module", "mnn.process", "mnn.rounding", "mnn.session"),
    "mnn.vectors",
    *(
        "serve.rows",
        "serve.row",
        "serve.engine",
        "serve.store",
        "serve.models",
        "serve.app",
        "serve.server",
        "cli.serve",
    ),
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
