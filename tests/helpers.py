"""What the end-to-end tests share: a tiny policy, tasks that it can learn, ways to run `jaxrft` and
to compare runs.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxrft.config import Config, MeshConfig, SelectConfig, TasksConfig
from jaxrft.lm import model, weights
from jaxrft.tasks import embeddings

CHARACTERS = "0123456789+= ?"
SHAPE = model.ModelConfig(
    16, 16, 32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, tie_word_embeddings=True
)
TIMES = ("timing/", "step_time", "select/seconds")
TIMEOUT = 240  # seconds after which a process that hangs fails its test


def write_tokenizer(folder, *, eos="<eos>"):
    """One token a character."""
    vocabulary = {"<|endoftext|>": 0, "<eos>": 1} | {
        character: i for i, character in enumerate(CHARACTERS, 2)
    }
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<|endoftext|>", eos_token=eos
    )
    fast.save_pretrained(folder)


def write_policy(folder, shape=SHAPE, *, eos="<eos>", spread=0.25, **keys):
    """A Hugging Face folder with a random Qwen2; `keys` go into its config.json."""
    random = np.random.default_rng(0)  # compiles nothing, unlike model.init
    params = {
        row.name: random.normal(row.constant, spread, row.shape).astype(np.float32)
        for row in model.table(shape)
    }
    weights.save(folder, params, shape, source=weights.hf_config(shape, **keys))
    write_tokenizer(folder, eos=eos)
    return str(folder)


def task_rows(number=16):
    """Tasks that a few of fourteen first characters solve, and two references that know how
    many.
    """
    rows = []
    for i in range(number):
        answer = CHARACTERS[: 1 + i % 13]
        rate = len(answer) / len(CHARACTERS)
        rows.append(
            {"prompt": f"{i}+{i}=", "answer": answer, "weak": rate / 2, "strong": (1 + rate) / 2}
        )
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learner_policy(apply, unembed):
    """A policy that is learned, and never decoded."""

    def decode(*_):
        raise NotImplementedError

    return model.Policy(apply, unembed, *[decode] * 5)


def make_config(policy, tasks_file, output_dir, **changes):
    """A run of a few seconds."""
    settings = {
        "model": policy,
        "output_dir": str(output_dir),
        "tasks": TasksConfig(source=tasks_file, pass_rate_columns=("weak", "strong")),
        "select": SelectConfig(name="bots"),
        "mesh": MeshConfig(data=2, fsdp=2, model=2),
        "steps": 6,
        "save_steps": 3,
        "batch_size": 8,
        "num_generations": 4,
        "max_prompt_length": 64,
        "max_completion_length": 4,
        "rewards": ("graders:starts",),
        "reward_workers": 1,
        "learning_rate": 1e-2,
        "log_completions_steps": 0,
    }
    return Config(**settings | changes)


def write_config(path, config, **changes):
    """A config file; `changes` may be mistakes."""
    text = (
        f"from dataclasses import replace\n\nfrom jaxrft.config import *\n\nconfig = {config!r}\n"
    )
    path.write_text(text + f"config = replace(config, **{changes!r})\n")
    return str(path)


def start(*arguments, devices=8, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **environment):
    """A Python process of this package that finds the graders."""
    # the last one counts
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    here = Path(__file__).parent
    path = {
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
    }
    environment = os.environ | path | {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=stdout, stderr=stderr, text=True
    )


def finish(*processes):
    """(exit code, stdout, stderr) of each; those that take too long are killed."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


def free_port():
    """A port for processes to meet at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def jaxrft(*arguments, **environment):
    """Exit code, stdout and stderr of the command line."""
    (result,) = finish(start("-m", "jaxrft", *arguments, **environment))
    return result


def metrics(folder):
    """The lines of metrics.jsonl without the numbers that are times."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(TIMES)}
        for line in lines
    ]


def checkpoints(folder):
    """The steps that have a checkpoint."""
    return sorted(int(path.name) for path in (Path(folder) / "checkpoints").iterdir())


def stopped_after(step, run, copy):
    """A copy of a finished run's folder, as it was when the checkpoint of `step` was its last."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "policy")
    for saved in checkpoints(copy):
        if saved > step:
            shutil.rmtree(copy / f"checkpoints/{saved}")
    assert checkpoints(copy)[-1:] == [step]
    return copy


def contents(folder):
    """Path -> bytes of every file below a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_same_bits(state, other):
    """Two pytrees of arrays are equal bit for bit."""
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), (
            jax.tree_util.keystr(path)
        )


def assert_close(state, other, atol=1e-4):
    """Two pytrees of arrays are equal to rounding."""
    chex.assert_trees_all_close(jax.device_get(state), jax.device_get(other), rtol=1e-7, atol=atol)


def write_embeddings(path, prompts, rows, source):
    """A file of embeddings, a row a prompt."""
    tensors = {embeddings.PROMPTS: embeddings.digests(prompts), embeddings.ROWS: rows}
    save_file(tensors, path, metadata={embeddings.SOURCE: json.dumps(source)})


def masked_rewards(values, *, garbage=0.0):
    """Rewards of any shape, in which None is none, and which are valid; `garbage` stands where they
    are not.
    """
    given = np.array(values, np.float32)  # None becomes NaN
    valid = ~np.isnan(given)
    return np.where(valid, given, np.float32(garbage)), valid


def bare_setup(config, *, num_tasks=40, mesh=None):
    """The setup of a run on one device that knows its config, its number of tasks and its end
    token, 0.
    """
    import jax

    from jaxrft import mesh as meshes
    from jaxrft.lm.policy import LanguageModel
    from jaxrft.train.setup import Setup

    return Setup(
        config=config,
        mesh=mesh or meshes.make(1, 1, 1, devices=jax.devices()[:1]),
        lm=LanguageModel(None, None, None, {}, None, (0,), None),
        selector=None,
        predictor=None,
        learner=None,
        replay=None,
        num_tasks=num_tasks,
        domains=(),
        prompt_length=8,
        generate=None,
    )
