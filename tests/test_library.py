"""What other people's JAX loops import, where only jax, optax, flax and chex are installed."""

import importlib.metadata
import re
import subprocess
import sys

INSTALLED = ("jax", "optax", "flax", "chex")
PROGRAM = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import jax, jax.numpy as jnp
from jaxrft.learn import grpo, replay
from jaxrft.select import Session, selectors

session = Session(selectors.adaptive(4), 6)
ids = session.next(2)
session.record(ids, [4, 1], [4, 4])
print(len(ids), grpo.advantages(jnp.array([[1.0, 0.0]])).shape, hasattr(replay, "Replay"))
"""


def needs(names):
    """The distributions that installing `names` installs, extras aside."""
    found, left = set(), set(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform or Python
            continue
        found.add(name)
        left |= {re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line}
    return found


def test_selection_and_learning_need_jax_and_its_kin_only():
    there = needs(INSTALLED)
    packages = importlib.metadata.packages_distributions()
    missing = {
        package
        for package, owners in packages.items()
        if package != "jaxrft"
        and not there & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    }
    assert {"transformers", "pyarrow", "tyro"} <= missing and not {
        "jax",
        "optax",
        "flax",
        "numpy",
    } & missing
    program = f"MISSING = {missing!r}" + PROGRAM
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.split("\n")[0] == "2 (1, 2) True", found.stderr
