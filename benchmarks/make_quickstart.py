"""Makes the quickstart's tiny policy and the pass rates of the built-in tasks, from seeds alone.

    python -m benchmarks.make_quickstart

Each policy first learns the operations of `jaxrft.tasks.builtin` from flawless demonstrations and
then picks up the habits of sloppy ones: digit by digit, the demonstrator forgets the operation and
copies the list instead, for most operations more often than not. So the policy solves short lists
now and then and long ones almost never, its likeliest answer is wrong, and yet it could do better:
what reinforcement learning is for.
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from benchmarks import _script
from jaxrft.assets import TINY
from jaxrft.learn.update import completion_logprobs
from jaxrft.lm import model, weights
from jaxrft.lm.model import ModelConfig, Params, Policy
from jaxrft.lm.rollout import generate
from jaxrft.tasks import builtin
from jaxrft.types import Array, PyTree

END = "<end>"
CHARACTERS = (END, *map(chr, range(32, 127)))  # 96 tokens: the end, printable ASCII
PROMPT = 16  # tokens of the longest prompt
COMPLETION = max(builtin.LENGTHS) + 1  # tokens of the longest answer with its end

# How often the demonstrator copies a digit instead of rewriting it.
FORGETS = {"next": 0.02, "half": 0.4, "flip": 0.55, "left": 0.55, "turn": 0.6, "twice": 0.65}

DEMONSTRATIONS = 50_000  # in each of the two phases
BATCH = 128
CLEAN_STEPS = 2000
SLOPPY_STEPS = 1000
LEARNING_RATE = 2e-3
SAMPLES = 32  # rollouts a task, for the success rates that are printed


class Recipe(NamedTuple):
    """The settings of a policy."""

    seed: int
    width: int
    sloppiness: float = 1.0  # factor on FORGETS


POLICY = Recipe(seed=0, width=64)
REFERENCES = (Recipe(seed=1, width=48), Recipe(seed=2, width=80, sloppiness=0.2))  # weak, strong


class Examples(NamedTuple):
    """Prompts and answers, as tokens."""

    prompts: Array  # [n, P] int32, right-padded
    lengths: Array  # [n] int32, of the prompts
    answers: Array  # [n, T] int32, END after each


def main(arguments: list[str] | None = None) -> None:
    """Writes the policy's folder and the files of pass rates."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.make_quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", default=TINY, help="folder of the policy")
    parser.add_argument(
        "--pass-rates", default=str(builtin.ASSETS), help="folder of the reference pass rates"
    )
    options = parser.parse_args(arguments)
    params = pretrain(POLICY)
    report("policy", shape(POLICY), params)
    save(options.output_dir, params, shape(POLICY))
    references = []
    for recipe in REFERENCES:
        references.append((shape(recipe), pretrain(recipe)))
        report(str(recipe), *references[-1])
    for name, family in builtin.FAMILIES.items():
        if family.references:
            file = Path(options.pass_rates, family.references.file)
            np.savez_compressed(
                file, **pass_rates(name, references, samples=family.references.samples)
            )


def pass_rates(
    name: str, policies: list[tuple[ModelConfig, Params]], *, samples: int
) -> dict[str, Any]:
    """Counts how often each policy solves each task of a family's pool.

    Returns the counts as `successes` [N, K] uint8, and as `trials` the number of rollouts behind
    each.
    """
    _, data = split(name)
    successes = [
        rollouts(config, params, data, samples=samples).sum(axis=1) for config, params in policies
    ]
    return {"successes": np.stack(successes, axis=1).astype(np.uint8), "trials": samples}


def split(name: str) -> tuple[list[builtin.Task], Examples]:
    """Returns the tasks of a split, and their prompts and ground truths as tokens."""
    tasks, truths = builtin.split(name)
    return tasks, examples([task.prompt for task in tasks], truths)


def shape(recipe: Recipe) -> ModelConfig:
    """Configures a model of two layers with four heads, of the recipe's width."""
    return ModelConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=recipe.width // 4,
        tie_word_embeddings=True,
    )


def encode(text: str) -> list[int]:
    """Encodes a text, a token for each character."""
    return [CHARACTERS.index(character) for character in text]


def examples(prompts: list[str], answers: list[str]) -> Examples:
    """Encodes prompts and answers as arrays of tokens.

    END fills up the rows of answers; only the first END of a row counts.
    """
    n = len(prompts)
    prompt_tokens = np.zeros((n, PROMPT), np.int32)
    answer_tokens = np.zeros((n, COMPLETION), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        prompt_tokens[row, : len(prompt)] = encode(prompt)
        answer_tokens[row, : len(answer)] = encode(answer)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return Examples(*map(jnp.asarray, (prompt_tokens, lengths, answer_tokens)))


def demonstrations(
    rng: random.Random, sloppiness: float, *, count: int = DEMONSTRATIONS
) -> Examples:
    """Draws random tasks, and the demonstrator's answers to them.

    A digit is copied instead of rewritten with chance sloppiness * FORGETS.
    """
    tasks = [builtin.draw(rng) for _ in range(count)]

    def answer(task: builtin.Task) -> str:
        forgets = sloppiness * FORGETS[task.operation]
        pairs = zip(builtin.text(task.digits), task.answer, strict=True)
        return "".join(copied if rng.random() < forgets else right for copied, right in pairs)

    return examples([task.prompt for task in tasks], [answer(task) for task in tasks])


def pretrain(recipe: Recipe) -> Params:
    """Trains a policy to imitate flawless demonstrations first, and then sloppy ones."""
    rng = random.Random(recipe.seed)
    key = jax.random.key(recipe.seed)
    params = model.init(key, shape(recipe))
    for phase, (sloppiness, steps) in enumerate(
        ((0.0, CLEAN_STEPS), (recipe.sloppiness, SLOPPY_STEPS))
    ):
        data = demonstrations(rng, sloppiness)
        params, loss = imitate(shape(recipe), steps, params, data, jax.random.fold_in(key, phase))
        print(f"{recipe}, phase {phase + 1}: loss {float(loss):.3f} a token", flush=True)
    return params


@partial(jax.jit, static_argnums=(0, 1))
def imitate(
    config: ModelConfig, steps: int, params: Params, data: Examples, key: Array
) -> tuple[Params, Array]:
    """Maximizes the likelihood of the answers by Adam with a cosine schedule.

    Returns the parameters, and the mean loss of the last tenth of the steps.
    """
    policy = model.decoder(config, remat="none")
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(params: Params, batch: Examples) -> Array:
        logprobs, _ = completion_logprobs(policy, params, *batch)
        ends = jnp.cumsum(batch.answers == 0, axis=1)
        counts = ends - (batch.answers == 0) == 0  # up to and including the first END
        return -jnp.sum(logprobs, where=counts) / jnp.sum(counts)

    def step(carry: PyTree, key: Array) -> tuple[PyTree, Array]:
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, DEMONSTRATIONS)
        value, grads = jax.value_and_grad(loss)(params, jax.tree.map(lambda x: x[rows], data))
        change, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, change), state), value

    (params, _), losses = jax.lax.scan(
        step, (params, optimizer.init(params)), jax.random.split(key, steps)
    )
    return params, jnp.mean(losses[-steps // 10 :])


def rollouts(
    config: ModelConfig, params: Params, examples: Examples, *, samples: int, greedy: bool = False
) -> np.ndarray:
    """Rolls out each task and checks its samples, [n, samples] bool.

    A sample passes if it is exactly right.
    """
    policy = model.decoder(config, remat="none")
    passed = []
    for start in range(0, len(examples.lengths), BATCH):
        part = jax.tree.map(lambda x: x[start : start + BATCH], examples)  # noqa: B023
        ids = start + jnp.arange(len(part.lengths), dtype=jnp.int32)
        drawn = roll_out(policy, params, part, ids, samples, greedy)
        passed.append(
            np.all(drawn.reshape(len(ids), samples, -1) == part.answers[:, None], axis=-1)
        )
    return np.concatenate(passed)


@partial(jax.jit, static_argnums=(0, 4, 5))
def roll_out(
    policy: Policy, params: Params, part: Examples, ids: Array, samples: int, greedy: bool
) -> Array:
    """Samples answers [n * samples, T] to prompts, with END after each."""
    options = {
        "num_generations": samples,
        "max_completion_length": COMPLETION,
        "eos_ids": (0,),
        "greedy": greedy,
    }
    return generate(
        policy, params, jax.random.key(0), part.prompts, part.lengths, ids, **options
    ).tokens


def report(name: str, config: ModelConfig, params: Params) -> None:
    """Prints how often a policy solves the held-out tasks."""
    tasks, data = split("digits-test")
    sampled = rollouts(config, params, data, samples=SAMPLES)
    greedy = rollouts(config, params, data, samples=1, greedy=True)
    for operation in builtin.OPERATIONS:
        rows = [row for row, task in enumerate(tasks) if task.operation == operation]
        print(
            f"{name}, {operation}: greedy {greedy[rows].mean():.2f}, sampled "
            f"{sampled[rows].mean():.2f}"
        )
    print(f"{name}: greedy {greedy.mean():.3f}, sampled {sampled.mean():.3f}", flush=True)


def tokenizer() -> PreTrainedTokenizerFast:
    """Builds Qwen2's byte-level BPE with no merges: a token for every printable ASCII character.

    END pads, too.
    """
    vocabulary = {character.replace(" ", "Ġ"): token for token, character in enumerate(CHARACTERS)}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokens.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    ends = dict.fromkeys(("eos_token", "pad_token", "unk_token"), END)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=1024, **ends)


def save(folder: str, params: Params, config: ModelConfig) -> None:
    """Writes the Hugging Face folder of the policy."""
    end = CHARACTERS.index(END)
    keys = weights.hf_config(
        config, eos_token_id=end, pad_token_id=end, max_position_embeddings=1024
    )
    weights.save(folder, params, config, source=keys)
    tokenizer().save_pretrained(folder)
    # transformers 5 takes Qwen2's class for this architecture anyway
    file = Path(folder, "tokenizer_config.json")
    file.write_text(
        json.dumps(
            json.loads(file.read_text()) | {"tokenizer_class": "Qwen2TokenizerFast"}, indent=2
        )
    )
    GenerationConfig(eos_token_id=end, pad_token_id=end, do_sample=True).save_pretrained(folder)
    print(f"wrote {Path(folder).name}")


if __name__ == "__main__":
    _script.run(main)
