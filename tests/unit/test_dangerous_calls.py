"""No code of ours loads a pickle, evaluates text or hands a line to a shell: found by reading it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = sorted(path for top in ("pipeline", "jobs", "infra") for path in (REPOSITORY / top).rglob("*.py"))

PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle")
LOADING = ("load", "loads", "Unpickler", "open", "decode")  # `pickle.UnpicklingError` may be named
FORBIDDEN = {
    *(f"{module}.{name}" for module in PICKLES for name in LOADING),
    *(f"ray.{module}.{name}" for module in ("cloudpickle", "pickle") for name in LOADING),
    *(f"pandas.{name}" for name in ("read_pickle", "eval")),
    *(f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all")),
    *("builtins.eval", "builtins.exec", "builtins.compile"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.jit.load", "torch.package.PackageImporter", "torch.hub.load", "torch.serialization.add_safe_globals"),
}
# Where a forbidden name may stand all the same.
EXCEPT = {"pipeline/datasets/array_pickles.py": "pickle.Unpickler"}  # a subclass that admits arrays: test_raw_files.py


def found_in(source: str) -> Iterator[str]:
    """Each forbidden call or name in a module's text, with its line."""
    tree = ast.parse(source)
    names = {name: f"builtins.{name}" for name in ("eval", "exec", "compile")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def whole_name(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return names.get(node.id, "")
        if isinstance(node, ast.Attribute):
            inside = whole_name(node.value)
            return f"{inside}.{node.attr}" if inside else ""
        return ""

    for node in ast.walk(tree):
        used = isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load)
        name = whole_name(node) if used else ""
        if name in FORBIDDEN:  # also where it is only handed on, or imported under another name
            yield f"line {node.lineno}: {name}"
        if not isinstance(node, ast.Call):
            continue
        called = whole_name(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}

        def is_true(key: str, given: dict = given) -> bool:
            return isinstance(given.get(key), ast.Constant) and given[key].value is True

        if called == "torch.load" and not is_true("weights_only"):
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if called in ("numpy.load", "numpy.lib.format.read_array") and "allow_pickle" in given:
            yield f"line {node.lineno}: {called} with allow_pickle"
        if "shell" in given and not (isinstance(given["shell"], ast.Constant) and given["shell"].value is False):
            yield f"line {node.lineno}: shell="
        if None in given and called in ("torch.load", "numpy.load"):
            yield f"line {node.lineno}: {called} with arguments that cannot be read here"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_dangerous_is_called(path: Path) -> None:
    allowed = EXCEPT.get(str(path.relative_to(REPOSITORY)), "nothing")
    assert [found for found in found_in(path.read_text(encoding="utf-8")) if not found.endswith(f": {allowed}")] == []


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("import pickle\npickle.load(f)", True),
        ("import pickle as p\np.loads(b)", True),
        ("from pickle import loads as read\nread(b)", True),
        ("from pickle import Unpickler\nclass U(Unpickler): pass", True),
        ("import pickle\nmap(pickle.loads, found)", True),
        ("import pickle\ntry:\n  f()\nexcept pickle.UnpicklingError:\n  pass", False),
        ("def f():\n    from ray import cloudpickle\n    cloudpickle.loads(b)", True),
        ("import torch\ntorch.load(f)", True),
        ("import torch\ntorch.load(f, weights_only=False)", True),
        ("import torch\ntorch.load(f, weights_only=safe)", True),
        ("import torch\ntorch.load(f, **options)", True),
        ("import torch\ntorch.load(f, map_location=d, weights_only=True)", False),
        ("from torch import load\nload(f)", True),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", True),
        ("import numpy as np\nnp.load(f)", False),
        ("import yaml\nyaml.load(f, Loader=yaml.Loader)", True),
        ("import yaml\nyaml.unsafe_load(f)", True),
        ("import yaml\nyaml.safe_load(f)", False),
        ("eval(text)", True),
        ("model.eval()", False),
        ("exec(text)", True),
        ("class Config:\n    compile: bool = False", False),
        ("import re\nre.compile(p)", False),
        ("import subprocess\nsubprocess.run(c, shell=True)", True),
        ("import subprocess\nsubprocess.run(c, shell=flag)", True),
        ("import subprocess\nsubprocess.run(['git'], shell=False)", False),
        ("import os\nos.system(c)", True),
        ("import json\njson.load(f)", False),
    ],
)
def test_the_rule_catches_planted_calls(source: str, caught: bool) -> None:
    assert bool(list(found_in(source))) == caught
