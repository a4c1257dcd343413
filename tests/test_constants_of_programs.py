"""The stages of a step take the tables of a run as arguments: a program holds no array as large as
one.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import mesh as meshes
from jaxrft.config import SelectConfig
from jaxrft.dry_run import programs, resolve
from jaxrft.tasks.table import TaskTable
from jaxrft.train.setup import describe_run

N = 1_000_000  # tasks
LARGE = 1 << 16  # bytes


def large_constants(lowered):
    """Sizes in bytes of the large constants in the text of a lowered program, which writes them in
    hexadecimal.
    """
    sizes = [
        len(digits) // 2 for digits in re.findall(r'dense<"0x([0-9A-F]+)">', lowered.as_text())
    ]
    return [size for size in sizes if size > LARGE]


def huge_table():
    """The table of a million tasks of one token, in two domains."""
    return TaskTable(
        tokens=np.zeros((N, 1), np.int32),
        lengths=np.ones(N, np.int32),
        prompts=[""] * N,
        columns={},
        reference_pass_rates=np.full((N, 2), 0.5, np.float32),
        embeddings=None,
        embedded_by=None,
        rows=np.arange(N, dtype=np.int32),
        domain=np.arange(N, dtype=np.int32) % 2,
        domains=("even", "odd"),
        dropped=(),
    )


def test_a_captured_table_is_found():
    table = jnp.asarray(np.random.default_rng(0).normal(size=N).astype(np.float32))
    assert large_constants(
        jax.jit(lambda x: x + table.sum() + table[x.astype(int)]).lower(jnp.float32(0))
    )


@pytest.mark.parametrize(
    "name",
    [
        "bots",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("uniform", "easy_to_hard", "mopps", "greso", "retire", "adaptive")
        ),
    ],
)
def test_stages_capture_no_task_table(name, configure, tmp_path, monkeypatch):
    config = configure(tmp_path / "run", select=SelectConfig(name), kl_coef=0.1)
    mesh = meshes.make(2, 2, 2)
    lm = resolve.resolve_inputs(config, mesh).lm
    lowered = []

    def lower(name, program, arguments, held, **static):
        lowered.append(name)
        lowered_program = program.lower(*arguments, **static)
        assert not large_constants(lowered_program), name
        # The update is one program for all selectors and pools.
        assert name != "learn" or f"tensor<{N}" not in lowered_program.as_text()
        # What prefill returns is what decode takes.
        return compile_(name, program, arguments, held) if name == "prefill" else name

    compile_ = programs._compile
    monkeypatch.setattr(programs, "_compile", lower)
    assert len(
        list(programs.compiled(describe_run(config, mesh, lm, huge_table(), None), 8))
    ) == len(lowered)
    assert lowered == ["select", "prefill", "decode", "update selector", "learn"]
