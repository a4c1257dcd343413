import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxrft"
LAYERS = (
    {"errors", "signals"},
    {"files", "launch", "crash", "terminal", "lock", "fields"},
    {"types", "shapes", "stats", "config", "mesh", "witness"},
    {"select", "learn", "lm"},
    {"tasks", "rewards", "changes", "checkpoint", "lifesigns", "report"},
    {"runtime", "steps", "train", "evaluate", "simulate", "prepare"},
    {"plan"},
    {"cli", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ARRAYS_ONLY = ("masked", "objectives", "grpo", "shaping", "replay")
LIBRARY = [*ROOT.rglob("select/**/*.py"), *(ROOT / f"learn/{name}.py" for name in ARRAYS_ONLY)]
LIBRARY = {path for path in LIBRARY if path.exists()}  # what other people's JAX code imports
LIBRARY -= {ROOT / "select/dots/predictor.py"}  # reads and writes a file, with safetensors
ALLOWED = {"jax", "optax", "flax", "numpy", *sys.stdlib_module_names}


def imports(path):
    """Dotted names of all that the file imports, anywhere in it."""
    package = ("jaxrft", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join(filter(None, (*folder, node.module)))
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "jaxrft" and rest and own in LEVEL:
            assert LEVEL.get(rest[0], 0) <= LEVEL[own], f"{own} imports {name}, which stands above it"
        if path in LIBRARY:
            inside = top == "jaxrft" and {*rest[:1]} <= {"errors", "types", "shapes", "mesh", own}
            inside = inside and rest[:2] != ["learn", "update"]
            assert top in ALLOWED or inside, f"{own} imports {name}"
