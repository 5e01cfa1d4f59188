"""Imports point one way: jobs → launch, tracking → training → algorithms, tasks, models → types, config.

Imports inside functions count as well; those for type checking alone do not, as they never run.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = sorted(path for top in ("pipeline", "jobs") for path in (REPOSITORY / top).rglob("*.py"))

ROOTS = {
    "pipeline.types",
    "pipeline.attempts",
    "pipeline.config",
    "pipeline.credentials",
    "pipeline.errors",
    "pipeline.files",
    "pipeline.http_path",
    "pipeline.keys",
    "pipeline.ranged_file",
    "pipeline.storage",
}

# A room -> what of the project it may import, besides itself. Prefixes of dotted names; rooms not listed are free.
MAY_IMPORT: dict[str, set[str]] = {
    **{root: ROOTS for root in ROOTS},
    "pipeline.algorithms": ROOTS,
    "pipeline.kernels": ROOTS,
    "pipeline.models": ROOTS | {"pipeline.kernels"},
    "pipeline.tasks": ROOTS,
    "pipeline.tasks.class_images": ROOTS | {"pipeline.tasks", "pipeline.datasets.preprocessing"},
    "pipeline.tasks.shards": ROOTS | {"pipeline.tasks", "pipeline.datasets.source"},
    "pipeline.datasets": ROOTS | {"pipeline.tasks.shards"},
    "pipeline.experiment": ROOTS
    | {"pipeline.algorithms", "pipeline.kernels", "pipeline.models", "pipeline.tasks", "pipeline.training.outer"},
    "pipeline.training": ROOTS
    | {"pipeline.algorithms", "pipeline.models", "pipeline.tasks", "pipeline.experiment", "pipeline.runs"},
}

# A library -> the only modules and rooms that may import it.
LIBRARY_OF: dict[str, set[str]] = {
    "ray": {
        "pipeline.launch",
        "pipeline.tuning",
        "pipeline.submission",
        "pipeline.training.context",
        "pipeline.datasets.on_ray",
    },
    "mlflow": {"pipeline.tracking", "pipeline.serving", "pipeline.served_model"},
    "requests": {"pipeline.http_path"},
    "pyarrow": {"pipeline.tasks.shards", "pipeline.datasets.tables", "pipeline.storage", "pipeline.results"},
}

ONLY_INSIDE_FUNCTIONS = {(module, "ray") for module in LIBRARY_OF["ray"]}  # slow to import


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    return name.removesuffix(".__init__")


NAMES = {module_name(path) for path in MODULES}


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def imports(tree: ast.Module, package: str) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, inside a function) of each import that can run."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, inside)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, inside
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module or ""]))
            for alias in node.names:  # `from pipeline.tasks import shards` imports the module shards
                whole = f"{source}.{alias.name}"
                yield (whole if whole in NAMES else source), node.lineno, inside
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(tree, False)


def imports_of(path: Path) -> list[tuple[str, int, bool]]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), package))


def violations(module: str, found: list[tuple[str, int, bool]]) -> list[str]:
    problems = []
    rooms = [room for room in MAY_IMPORT if within(module, room)]
    room = max(rooms, key=len, default=None)
    for name, line, inside in found:
        top = name.split(".")[0]
        if top == "jobs" and not within(module, "jobs"):
            problems.append(f"line {line}: imports {name}, but only jobs imports jobs")
        if top == "pipeline" and room and not any(within(name, allowed) for allowed in MAY_IMPORT[room] | {room}):
            problems.append(f"line {line}: imports {name}, but {room} may import only {sorted(MAY_IMPORT[room])}")
        if top in LIBRARY_OF and not any(within(module, owner) for owner in LIBRARY_OF[top]):
            problems.append(f"line {line}: imports {top}, which only {sorted(LIBRARY_OF[top])} may")
        if (module, top) in ONLY_INSIDE_FUNCTIONS and not inside:
            problems.append(f"line {line}: imports {top} when it is imported; import it inside the function")
    return problems


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    assert violations(module_name(path), imports_of(path)) == []


def test_the_tables_name_modules_that_exist() -> None:
    """A renamed room must not slip out of its rule."""
    allowed = {name for names in MAY_IMPORT.values() for name in names}
    assert {name for name in MAY_IMPORT.keys() | allowed if name not in NAMES} == set()


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("pipeline.algorithms.maml", "import pipeline.models", True),
        ("pipeline.algorithms.maml", "from pipeline import models", True),
        ("pipeline.algorithms.maml", "from ..tasks import sampler", True),
        ("pipeline.algorithms.maml", "def f():\n    from pipeline.training.step import split_tasks", True),
        ("pipeline.algorithms.maml", "from pipeline.types import Params\nfrom pipeline import keys", False),
        ("pipeline.models.mlp", "from pipeline.models.normalization import Normalizer", False),
        ("pipeline.tasks.images", "from pipeline.datasets.source import RawClass", True),
        ("pipeline.tasks.shards", "from pipeline.datasets.source import RawClass", False),
        ("pipeline.tasks.shards", "from pipeline.datasets.omniglot import Omniglot", True),
        ("pipeline.keys", "from pipeline.training import outer", True),
        ("pipeline.training.loop", "def f():\n    import ray.train", True),
        ("pipeline.training.loop", "from mlflow import log_metric", True),
        ("pipeline.training.context", "def f():\n    import ray.train", False),
        ("pipeline.training.context", "import ray", True),
        ("pipeline.runs", "if True:\n    import pyarrow.parquet as pq", True),
        ("pipeline.launch", "from jobs import train", True),
        ("jobs.train", "from pipeline.launch import launch\nfrom jobs import console", False),
        ("jobs.train", "import ray", True),
        ("pipeline.tasks.images", "if TYPE_CHECKING:\n    from pipeline.serving import Learner", False),
    ],
)
def test_the_rule_catches_planted_imports(module: str, source: str, caught: bool) -> None:
    found = list(imports(ast.parse(source), module.rpartition(".")[0]))
    assert bool(violations(module, found)) == caught
