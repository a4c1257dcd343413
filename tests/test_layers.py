import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxrft"
# Lowest first. A package stands for all of its modules but those that are named themselves.
LAYERS = (
    {"errors"},
    {
        "host.files",
        "host.signals",
        "host.stderr",
        "host.launch",
        "host.installation",
        "host.yaml_files",
        "host.crash",
        "host.terminal",
        "host.lock",
        "host.compile_cache",
    },
    {"types", "shapes", "fields", "flags", "config", "mesh", "stats", "streams", "suites"},
    {"select", "learn", "lm"},
    {"tasks", "assets", "rewards", "host", "report"},
    {"train"},
    {"prepare", "simulate", "dry_run"},
    {"cli", "__main__", ""},
)
ARRAYS_ONLY = ("masked", "losses", "grpo", "reward_shaping", "replay")
LIBRARY = [*ROOT.rglob("select/**/*.py"), *(ROOT / f"learn/{name}.py" for name in ARRAYS_ONLY)]
LIBRARY = {path for path in LIBRARY if path.exists()}  # what other people's JAX code imports
LIBRARY -= {ROOT / "select/dots/predictor.py"}  # reads and writes a file, with safetensors
ALLOWED = {"jax", "optax", "flax", "chex", "numpy", *sys.stdlib_module_names}
PATHS = sorted(ROOT.rglob("*.py"))


def name_of(path):
    """Dotted name of a module within the package; that of the package itself is empty."""
    return (
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    )


def entry_of(name):
    """The entry of LAYERS that a module belongs to: its own, or that of the nearest package around
    it.
    """
    entries = set().union(*LAYERS)
    while name not in entries and "." in name:
        name = name.rpartition(".")[0]
    return name if name in entries else None


def level_of(name):
    """The level of the module's layer."""
    entry = entry_of(name)
    return next(level for level, names in enumerate(LAYERS) if entry in names)


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


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_is_in_one_layer(path):
    assert entry_of(name_of(path)) is not None, f"{path} is in no layer: put it into LAYERS"


def test_every_entry_is_in_one_layer_and_has_modules():
    entries = [entry for names in LAYERS for entry in names]
    assert len(entries) == len(set(entries))
    assert set(entries) - {"stats"} <= {entry_of(name_of(path)) for path in PATHS}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = name_of(path)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "jaxrft" and rest and entry_of(".".join(rest)) is not None:
            assert level_of(".".join(rest)) <= level_of(own), (
                f"{own} imports {name}, which stands above it"
            )
        if path in LIBRARY:
            folder = own.split(".")[0]
            inside = top == "jaxrft" and {*rest[:1]} <= {
                "errors",
                "types",
                "shapes",
                "mesh",
                folder,
            }
            inside = inside and rest[:2] != ["learn", "update"]
            assert top in ALLOWED or inside, f"{own} imports {name}"
