"""What is shipped is what lies in the folders."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

import glmexport

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_every_package_on_disk_is_shipped_and_no_other(project):
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("glmexport/**/__init__.py")} | {
        "glmexport.patches"
    }
    setuptools = project["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(folders)
    assert setuptools["package-dir"] == {"glmexport.patches": "patches"}
    for package in setuptools["packages"]:
        folder = ROOT.joinpath(*setuptools["package-dir"].get(package, package.replace(".", "/")).split("/"))
        assert (folder / "__init__.py").is_file()


def test_every_file_of_the_web_page_is_shipped(project):
    [(package, patterns)] = project["tool"]["setuptools"]["package-data"].items()
    folder = ROOT.joinpath(*package.split("."))
    shipped = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    assert folder / "page" / "index.html" in shipped
    assert shipped == {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}


def test_the_console_script_exists(project):
    module, _, function = project["project"]["scripts"]["glmexport"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_version_is_one(project):
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "glmexport.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", glmexport.__version__)


def test_patches_lie_where_the_project_says():
    patches = importlib.import_module("glmexport.patches")
    assert Path(patches.__file__).name == "__init__.py"
    assert {path.stem for path in Path(patches.__file__).parent.glob("*.py")} == {
        path.stem for path in (ROOT / "patches").glob("*.py")
    }


def test_what_the_code_imports_is_declared(project):
    optional = project["project"]["optional-dependencies"]
    extras = [*optional["plot"], *optional["mnn"], *optional["serve"]]
    declared = {
        re.match(r"[\w-]+", line).group().replace("-", "_") for line in [*project["project"]["dependencies"], *extras]
    }
    shipped_with_others = {"onnx_ir"}  # onnxscript's own dependency and the type that torch.onnx.export returns
    roots = set()
    for path in (*ROOT.glob("glmexport/**/*.py"), *ROOT.glob("patches/*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots.add(str(node.module).split(".")[0])
    third_party = {root for root in roots if root not in sys.stdlib_module_names and root != "glmexport"}
    assert third_party - shipped_with_others <= declared
