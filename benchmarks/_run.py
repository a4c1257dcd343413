"""The stages of `jaxrft.train.step` on a random policy, with completions of wanted lengths."""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import make_quickstart
from benchmarks._serve import Measured, Request, Subject
from benchmarks._shape import Shape
from jaxrft.config import Config, SelectConfig, TasksConfig
from jaxrft.lm import model, weights
from jaxrft.lm.model import ModelConfig, Policy
from jaxrft.report.visits import Visits
from jaxrft.rewards.grading import Rewards, open_rewards
from jaxrft.streams import STREAMS
from jaxrft.train.devices import computing_on, open_mesh
from jaxrft.train.setup import open_run
from jaxrft.train.state import TrainState
from jaxrft.train.step import RolledOut, Step
from jaxrft.types import Array, PyTree

try:
    from jaxrft.lm.segments import compile_rollout
except ImportError:  # a commit without the module
    from jaxrft.lm.policy import compile_rollout  # pyright: ignore

SELECT = STREAMS.index("select")
REWARD = "benchmarks._rewards:parity"
NEVER = -1e9  # a logit
STAGES = ("select", "rollout", "grade", "score", "learn")


def force_ends(
    policy: Policy, end: int, probability: float, *, endless: int = 0, tail: float = 0
) -> Policy:
    """Returns the policy with the end token's probability set at every position, 0 = never.

    The logit of the end is the others' log-sum-exp plus log(p / (1 - p)), so that the sampler
    itself draws lengths of a geometric distribution with mean 1 / p, whatever the other logits are.
    They derive from the seed as all samples do, and are the same on another commit but for rows in
    which rounding decides a token. The price is one more pass over the logits a token; none at
    probability 0, where the logit is a constant.

    With the probability `tail`, a completion begins with the token `endless`, repeats it and does
    not end; no other completion has it.
    """

    def force(logits: Array) -> Array:
        others = logits.at[..., end].set(NEVER)
        if tail:
            others = others.at[..., endless].set(NEVER)
        return _with_probability(others, end, probability)

    def repeat(logits: Array, is_endless: Array) -> Array:
        always = NEVER * (1 - jax.nn.one_hot(endless, logits.shape[-1]))
        return jnp.where(is_endless[..., None], always, logits)

    def unembed(params: PyTree, hidden: Array) -> Array:
        return _with_probability(force(policy.unembed(params, hidden)), endless, tail)

    decode = getattr(policy, "decode", None)  # which commits after 0dc3c58 sample from
    if decode is None:
        return (
            _force_hidden(policy, force, repeat, endless, tail)
            if tail
            else policy._replace(unembed=unembed)
        )

    def decode_forced(*arguments: PyTree) -> tuple[Array, PyTree]:
        logits, cache = decode(*arguments)
        logits = force(logits)
        return repeat(logits, arguments[-4] == endless) if tail else logits, cache

    return policy._replace(unembed=unembed, decode=decode_forced)


def _force_hidden(
    policy: Policy,
    force: Callable[[Array], Array],
    repeat: Callable[[Array, Array], Array],
    endless: int,
    tail: float,
) -> Policy:
    """Forces completions of a policy without `decode`, which samples from `unembed`.

    What `unembed` has to know of the token is one more number of its hidden state.
    """

    def apply(params: PyTree, tokens: Array, *others: PyTree) -> tuple[Array, PyTree]:
        hidden, cache = policy.apply(params, tokens, *others)
        is_prompt = tokens.shape[1] > 1
        kind = jnp.where(is_prompt, 2, tokens == endless).astype(hidden.dtype)
        return jnp.concatenate([hidden, kind[..., None]], axis=-1), cache

    def unembed(params: PyTree, hidden: Array) -> Array:
        kind = hidden[..., -1]
        logits = force(policy.unembed(params, hidden[..., :-1]))
        first = _with_probability(logits, endless, tail)
        return jnp.where((kind == 2)[..., None], first, repeat(logits, kind == 1))

    return policy._replace(apply=apply, unembed=unembed)


def _with_probability(logits: Array, token: int, probability: float) -> Array:
    """Sets the probability of a token, which the logits give none; 0 changes nothing."""
    if probability == 0:
        return logits
    total = jax.nn.logsumexp(logits, axis=-1)
    return logits.at[..., token].set(total + math.log(probability / (1 - probability)))


def model_config(shape: Shape) -> ModelConfig:
    """Returns the decoder of a shape, its logits tied to the embeddings."""
    return ModelConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
    )


def write_model(shape: Shape, folder: Path) -> None:
    """Writes a random policy, with a tokenizer of one token a character."""
    config = model_config(shape)
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(shape.seed), config)
    positions = shape.prompt_length + shape.new_tokens
    end = make_quickstart.CHARACTERS.index(make_quickstart.END)
    keys = weights.hf_config(
        config, eos_token_id=end, pad_token_id=end, max_position_embeddings=positions
    )
    weights.save(folder, params, config, source=keys)
    make_quickstart.tokenizer().save_pretrained(folder)


def write_tasks(shape: Shape, path: Path) -> None:
    """Writes four batches of random prompts, with pass rates of two reference policies."""
    rng = np.random.default_rng(shape.seed)
    letters = make_quickstart.CHARACTERS[2:]  # without the end and the space
    prompts = rng.choice(letters, (4 * shape.prompts, shape.prompt_length))
    weak = rng.uniform(0, 0.5, len(prompts))
    with path.open("w") as file:
        for prompt, rate in zip(prompts, weak, strict=True):
            row = {"prompt": "".join(prompt), "answer": "", "weak": rate, "strong": rate + 0.5}
            file.write(json.dumps(row) + "\n")


@contextmanager
def open_step(shape: Shape) -> Iterator[tuple[Step, TrainState]]:
    """Opens a run on a random policy, with its graders, whose rollouts have the lengths of the
    shape.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(shape, folder / "model")
        write_tasks(shape, folder / "tasks.jsonl")
        config = Config(
            model=str(folder / "model"),
            tasks=TasksConfig(
                source=str(folder / "tasks.jsonl"),
                prompt_column="prompt",
                answer_column="answer",
                pass_rate_columns=("weak", "strong"),
            ),
            select=SelectConfig(name="bots"),
            output_dir=str(folder / "run"),
            batch_size=shape.prompts,
            num_generations=shape.group_size,
            max_prompt_length=shape.prompt_length,
            max_completion_length=shape.new_tokens,
            micro_batch_size=shape.micro_batch_rows,
            dtype="bfloat16" if shape.dtype == "bfloat16" else "float32",
            seed=shape.seed,
            rewards=(REWARD,),
        )
        if shape.attention != "xla":  # a field that older commits do not have
            config = dataclasses.replace(config, attention=shape.attention)
        mesh = open_mesh(config)
        with open_rewards(config) as pool:
            setup, table, constants, state = open_run(config, mesh)
            probability = 1 / shape.mean_length if shape.lengths == "geometric" else 0
            policy = force_ends(
                setup.lm.policy,
                setup.lm.eos_ids[0],
                probability,
                endless=shape.vocabulary - 1,
                tail=shape.tail / shape.rows,
            )
            lm = setup.lm._replace(policy=policy)
            generate = compile_rollout(lm, config, mesh)
            if shape.max_rows:  # an argument that older commits do not have
                generate = compile_rollout(lm, config, mesh, max_rows=shape.max_rows)
            setup = dataclasses.replace(setup, generate=generate)
            step = Step(setup, table, constants, pool, Visits(table.domain, table.domains))
            with computing_on(mesh, config):
                yield step, state


def grade_rolled(step: Step, state: TrainState, rolled: RolledOut) -> Rewards:
    """Grades completions, on commits that grade while others are decoded and on others."""
    if "grading" in RolledOut._fields:
        return step.grade(rolled)
    return step.grade(state, rolled)  # pyright: ignore


class Stages:
    """A run whose stages are timed one by one, each until its results are there."""

    def __init__(self, step: Step, state: TrainState):
        """Starts from a state, which the stages consume."""
        self.step = step
        self.state = state
        self.ids = np.arange(step.setup.config.batch_size, dtype=np.int32)
        self.rolled: RolledOut | None = None

    def rollout(self) -> Measured:
        """Rolls out the same tasks as before, with other samples if a step was made meanwhile."""
        start = time.perf_counter()
        self.rolled = jax.block_until_ready(self.step.roll_out(self.state, self.ids))
        return {"seconds": time.perf_counter() - start}

    def learn(self) -> Measured:
        """Updates the policy by the latest rollout, which is graded and scored before the clock
        starts.
        """
        if self.rolled is None:
            self.rollout()
        assert self.rolled is not None
        rewards = grade_rolled(self.step, self.state, self.rolled)
        scored = jax.block_until_ready(self.step.score(self.state, self.rolled, rewards))
        start = time.perf_counter()
        self.state, metrics = self.step.learn(self.state, scored.groups, ())
        jax.block_until_ready(self.state)
        measured = {"seconds": time.perf_counter() - start}
        if "update/utilization" in metrics:  # which commits after 6701e75 say
            measured["computed"] = 1 / float(metrics["update/utilization"])
        return measured

    def full_step(self) -> Measured:
        """Runs a step, and measures its stages; the selector's update counts as `select`."""
        laps = [time.perf_counter()]

        def lap(tree: PyTree) -> None:
            jax.block_until_ready(tree)
            laps.append(time.perf_counter())

        no_tasks = np.zeros(0, np.int32)
        size = self.step.setup.config.batch_size
        choice, self.state = self.step.select(
            self.state, batch_size=size, exclude=no_tasks, stream=SELECT
        )
        self.ids = np.asarray(choice.ids)
        lap(self.state)
        self.rolled = self.step.roll_out(self.state, self.ids)
        lap(self.rolled)
        rewards = grade_rolled(self.step, self.state, self.rolled)
        lap(rewards.rewards)
        scored = self.step.score(self.state, self.rolled, rewards)
        lap(scored)
        feedback = (scored.feedback, scored.informative)
        self.state, _ = self.step.update_selector(self.state, choice, feedback)
        lap(self.state)
        self.state, _ = self.step.learn(self.state, scored.groups, ())
        lap(self.state)
        select, rollout, grade, score, update, learn = np.diff(laps).tolist()
        seconds = (select + update, rollout, grade, score, learn)
        return {"seconds": laps[-1] - laps[0], **dict(zip(STAGES, seconds, strict=True))}

    def lengths(self) -> list[int]:
        """Returns the lengths [R] of the latest rollout."""
        assert self.rolled is not None
        return np.asarray(self.rolled.rollout.lengths).tolist()


@contextmanager
def open_subject(request: Request) -> Iterator[Subject]:
    """Opens what a request asks for; its lengths are those that the sampler draws."""
    with open_step(request.shape) as (step, state):
        stages = Stages(step, state)
        runs = {"rollout": stages.rollout, "learn": stages.learn, "step": stages.full_step}
        yield Subject(runs[request.what], stages.lengths, device_memory)


def device_memory() -> int:
    """Returns the peak bytes on the first device; 0 where it does not count them."""
    memory = jax.local_devices()[0].memory_stats()
    return memory["peak_bytes_in_use"] if memory else 0
