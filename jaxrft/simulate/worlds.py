"""Worlds: a policy and its tasks without a language model, as pure functions of arrays."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft.select.checks import COUNTED, LARGEST, are_numbers, check_choice
from jaxrft.tasks.memory import Budget
from jaxrft.types import Array, Feedback, InputError, PyTree, Tasks


class World(NamedTuple):
    """Pure functions; `step` counts from 0, and a world's state is a pytree."""

    num_tasks: int
    init: Callable[[Array], tuple[Tasks, PyTree]]  # key -> tasks as selectors see them, state
    # (state, step) -> [N], the policy's own; NaN where there is none
    pass_rates: Callable[[PyTree, Array], Array]
    roll_out: Callable[[Array, PyTree, Array, Array], Feedback]  # (key, state, step, ids [B])
    learn: Callable[[Array, PyTree, Feedback], PyTree]  # (key, state, feedback) -> state


Reference = Literal["good", "anti", "constant", "zero", "none"]
Reward = Literal["true", "noise"]


@dataclass(frozen=True)
class StudentConfig:
    """Synthetic students: p = sigmoid(ability in the task's skill - difficulty); training raises
    ability.
    """

    tasks: int = 1000
    """Tasks of the pool."""
    skills: int = 4
    """Abilities of a student; each task needs one of them."""
    difficulty: float = 2.0
    """Mean difficulty, in logits above the student's first ability."""
    spread: float = 2.0
    """Standard deviation of the difficulties, in logits."""
    unsolvable: float = 0.2
    """Share of tasks with pass rate 0 at any ability."""
    rate: float = 0.04
    """Ability, in logits, gained in a step whose groups all have a pass rate of 0.5."""
    transfer: float = 0.3
    """Share of the gained ability that counts for every skill."""
    forgetting: float = 0.0
    """Ability, in logits, lost in each step, whatever is trained on."""
    rewards: Reward = "true"
    """true, or noise: a fair coin for every rollout, independent of the task."""
    references: Reference = "good"
    """Pass rates of two reference policies: of a student 1 below and one 4 above the first ability
    (good), those of the reversed difficulties (anti), 0.5 everywhere (constant), 0 everywhere
    (zero), or none."""
    signal: float = 0.5
    """Share of the embeddings' variance that difficulty and skill explain; the rest is noise."""
    width: int = 32
    """Width of the embeddings; 0 = none."""


MOST_LOGITS = 1e6
MOST_FEATURES = 2**16
LIMITS = (  # fields, the least and the most that they may be
    (("unsolvable", "transfer", "signal"), 0, 1, "in [0, 1]"),
    (("spread", "rate", "forgetting"), 0, MOST_LOGITS, "0 or more, at most 1e6"),
    (("difficulty",), -MOST_LOGITS, MOST_LOGITS, "a number from -1e6 to 1e6"),
    (("width",), 0, MOST_FEATURES, f"0 or more, at most {MOST_FEATURES}"),
    (("tasks",), 1, COUNTED, f"at least 1, at most {COUNTED}"),
    (("skills",), 1, MOST_FEATURES, f"at least 1, at most {MOST_FEATURES}"),
)


class Student(NamedTuple):
    """The abilities of a student, and the tasks' difficulties and skills."""

    ability: Array  # [skills]
    difficulty: Array  # [N], infinite = unsolvable
    skill: Array  # [N] int32


def students(config: StudentConfig, *, num_generations: int) -> World:
    """Makes a world that has a new student, pool of tasks and embeddings for every key.

    A batch moves the ability of skill k by rate * sum_b m_k(b) 4 v_b / B, where v_b = s/n (1 - s/n)
    of the group and m_k(b) = transfer + (1 - transfer) * skills * [b needs k]; the expected squared
    gradient of a group-relative objective is proportional to v. Rewards of pure noise move it by a
    normal number of that size instead. Raises InputError for values out of range.
    """
    _check_students(config)

    def init(key: Array) -> tuple[Tasks, Student]:
        keys = jax.random.split(key, 4)
        difficulty = config.difficulty + config.spread * jax.random.normal(keys[0], (config.tasks,))
        unsolvable = jax.random.uniform(keys[1], difficulty.shape) < config.unsolvable
        difficulty = jnp.where(unsolvable, jnp.inf, difficulty)
        skill = jax.random.randint(keys[2], difficulty.shape, 0, config.skills)
        state = Student(jnp.zeros(config.skills), difficulty, skill)
        embeddings = _embeddings(keys[3], config, state) if config.width else None
        return Tasks(_references(config, difficulty), embeddings, skill), state

    def pass_rates(state: Student, step: Array) -> Array:
        return jax.nn.sigmoid(state.ability[state.skill] - state.difficulty)

    def roll_out(key: Array, state: Student, step: Array, ids: Array) -> Feedback:
        chance = (
            pass_rates(state, step)[ids] if config.rewards == "true" else jnp.full(ids.shape, 0.5)
        )
        draws = jax.random.uniform(key, (*ids.shape, num_generations)) < chance[:, None]
        return _feedback(ids, draws.sum(axis=1), jnp.full(ids.shape, num_generations))

    def learn(key: Array, state: Student, feedback: Feedback) -> Student:
        rate = feedback.successes / feedback.trials
        needed = jax.nn.one_hot(state.skill[feedback.ids], config.skills)  # [B, skills]
        share = config.transfer + (1 - config.transfer) * config.skills * needed
        gain = config.rate * jnp.mean(share * (4 * rate * (1 - rate))[:, None], axis=0)
        if config.rewards == "noise":
            gain = gain * jax.random.normal(key, gain.shape)
        return state._replace(ability=state.ability + gain - config.forgetting)

    return World(config.tasks, init, pass_rates, roll_out, learn)


def _embeddings(key: Array, config: StudentConfig, state: Student) -> Array:
    """Mixes difficulty and skills at random into embeddings [N, E], and adds noise."""
    key_mix, key_noise = jax.random.split(key)
    difficulty = jnp.minimum(state.difficulty, config.difficulty + 3 * config.spread)
    skills = jax.nn.one_hot(state.skill, config.skills)
    features = jnp.concatenate([difficulty[:, None], skills], axis=1)
    mixed = _standard(features) @ jax.random.normal(key_mix, (config.skills + 1, config.width))
    noise = jax.random.normal(key_noise, mixed.shape)
    return jnp.sqrt(config.signal) * _standard(mixed) + jnp.sqrt(1 - config.signal) * noise


def _standard(x: Array) -> Array:
    """Standardizes the columns of x [N, E] to mean 0 and variance 1; constant ones become 0."""
    return (x - x.mean(axis=0, keepdims=True)) / jnp.maximum(x.std(axis=0, keepdims=True), 1e-6)


def _references(config: StudentConfig, difficulty: Array) -> Array | None:
    """Computes the pass rates [N, 2] of the two reference policies; None without references."""
    if config.references == "none":
        return None
    if config.references in ("constant", "zero"):
        return jnp.full((config.tasks, 2), 0.5 if config.references == "constant" else 0.0)
    if config.references == "anti":
        difficulty = 2 * config.difficulty - difficulty
    return jax.nn.sigmoid(jnp.array([[-1.0, 4.0]]) - difficulty[:, None])


def _check_students(c: StudentConfig) -> None:
    """Raises InputError for the first value out of range."""
    for names, least, most, wanted in LIMITS:
        for name in names:
            if not least <= getattr(c, name) <= most:
                raise InputError(f"students.{name} is {getattr(c, name)!r}: it must be {wanted}")
    for name, kind in (("rewards", Reward), ("references", Reference)):
        if getattr(c, name) not in get_args(kind):
            raise InputError(
                f"students.{name} is {getattr(c, name)!r}: it must be one of "
                f"{', '.join(get_args(kind))}"
            )


class Responses(NamedTuple):
    """Answers of many policies to the same tasks."""

    # [P, N] int8, 1 right, 0 wrong, -1 missing; rows sorted by ability, weakest first
    responses: np.ndarray
    embeddings: np.ndarray | None = None  # [N, E]
    domain: np.ndarray | None = None  # [N]


RANKS = {"embeddings": 2, "domain": 1}
# progress of the run in [0, 1] -> progress of the quantile in [0, 1]
SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "up": lambda u: u,
    "still": lambda u: jnp.full_like(u, 0.5),
    "down": lambda u: 1 - u,
    "jump": lambda u: (u >= 0.5).astype(u.dtype),
}
HALF_WINDOW = 0.02  # of the rows
REFERENCE_QUANTILES = (0.10, 0.95)
REFERENCE_ROWS = 64


def load(path: str) -> Responses:
    """Reads a response matrix from an .npz file: `responses` [P, N], optionally `embeddings` [N, E]
    and `domain` [N].

    Raises InputError for a file that is not there, is no .npz, unpacks to more than half of the
    memory that is available, or holds something else. Nothing is unpickled.
    """
    if not Path(path).is_file():
        raise InputError(
            f"no file {path}: give --responses an .npz file with an array `responses` "
            "of policies x tasks"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            Budget(path, "give fewer tasks or policies").hold(
                sum(part.file_size for part in archive.infolist())
            )
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in Responses._fields if name in file}
    except InputError:
        raise
    # of a damaged file numpy raises errors of many types, and a .npy file loads as a bare array
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as an .npz file: write it with numpy.savez"
        ) from error
    if "responses" not in arrays:
        raise InputError(
            f"{path} has no array `responses`: it must hold policies x tasks, 1 right, 0 "
            "wrong, -1 missing"
        )
    table = arrays["responses"]
    if (
        table.ndim != 2
        or not are_numbers(table)
        or not np.isin(table, (-1, 0, 1)).all()
        or (table < 0).all()
    ):
        raise InputError(
            f"`responses` of {path} must be a matrix of policies x tasks, 1 "
            "right, 0 wrong, -1 missing"
        )
    for name, array in arrays.items():
        if name == "responses":
            continue
        if array.ndim != RANKS[name] or len(array) != table.shape[1]:
            raise InputError(
                f"`{name}` of {path} has shape {array.shape}: it needs one row for each of "
                f"{table.shape[1]} tasks"
            )
        if name == "embeddings" and not are_numbers(array):
            raise InputError(f"`{name}` of {path} are {array.dtype}: give numbers")
        with np.errstate(over="ignore"):
            finite = name != "embeddings" or (np.abs(array.astype(np.float32)) <= LARGEST).all()
        if not finite:
            raise InputError(
                f"`{name}` of {path} are not all finite, up to {LARGEST:g}: leave out the "
                "tasks without any"
            )
    return Responses(**arrays)


def replay(
    data: Responses,
    *,
    steps: int,
    num_generations: int,
    schedule: tuple[str, ...] = ("up",),
    begin: float = 0.15,
    end: float = 0.85,
) -> World:
    """Replays a response matrix as a changing policy.

    The policy is a window of rows, those within 2 % around a quantile that moves from `begin` to
    `end` in `steps`. A task's rollouts are `num_generations` rows of the window, drawn without
    replacement. Its pass rate is that of the window. Missing answers are left out. `schedule` is
    one for all tasks, or one a domain, in the order of the domains' values. If the data have no
    domains, task i follows schedule i modulo their number. Reference pass rates are those of 64
    rows around the 10 % and the 95 % quantile. Raises InputError for schedules that do not fit and
    a window with fewer rows than `num_generations`.
    """
    table = np.asarray(data.responses, np.int8)
    policies, num_tasks = table.shape
    width = round(2 * HALF_WINDOW * policies)
    if width < num_generations:
        raise InputError(
            f"num_generations is {num_generations} but a window holds {width} of the {policies} "
            "policies: lower it, or give more rows"
        )
    schedule_index = _schedules(data, schedule)  # [N]
    right = _cumulative(table == 1)  # [P + 1, N]
    answered = _cumulative(table >= 0)  # [P + 1, N]
    tasks = _tasks(data, table)
    answers = jnp.asarray(table)

    def first_rows(step: Array) -> Array:  # [N], where each task's window begins
        progress = jnp.asarray(step, jnp.float32) / max(steps - 1, 1)
        quantile = begin + (end - begin) * jnp.stack(
            [SCHEDULES[name](progress) for name in schedule]
        )
        start = jnp.round((quantile - HALF_WINDOW) * policies).astype(jnp.int32)
        return jnp.clip(start, 0, policies - width)[schedule_index]

    def pass_rates(state: tuple[()], step: Array) -> Array:
        start = first_rows(step)
        task = jnp.arange(num_tasks)
        solved, count = (x[start + width, task] - x[start, task] for x in (right, answered))
        return jnp.where(count > 0, solved / jnp.maximum(count, 1), jnp.nan)

    def roll_out(key: Array, state: tuple[()], step: Array, ids: Array) -> Feedback:
        rows = first_rows(step)[ids][:, None] + jnp.arange(width)[None]  # [B, width]
        window = answers[rows, ids[:, None]]
        # missing answers last
        order = jnp.where(window < 0, 1.0, jax.random.uniform(key, window.shape))
        drawn = jnp.take_along_axis(window, jnp.argsort(order, axis=1)[:, :num_generations], axis=1)
        return _feedback(ids, (drawn == 1).sum(axis=1), (drawn >= 0).sum(axis=1))

    return World(
        num_tasks, lambda key: (tasks, ()), pass_rates, roll_out, lambda key, state, feedback: state
    )


def _tasks(data: Responses, table: np.ndarray) -> Tasks:
    """Describes the tasks of a response matrix, `table`, as selectors see them."""
    tasks = Tasks(jnp.stack([_around(table, quantile) for quantile in REFERENCE_QUANTILES], axis=1))
    if data.embeddings is not None:
        tasks = tasks._replace(embeddings=jnp.asarray(data.embeddings, jnp.float32))
    if data.domain is not None:
        number = np.unique(data.domain, return_inverse=True)[1]
        tasks = tasks._replace(domain=jnp.asarray(number, jnp.int32))
    return tasks


def _schedules(data: Responses, schedule: tuple[str, ...]) -> np.ndarray:
    """Returns the index [N] of the schedule of every task."""
    if not schedule:
        raise InputError(f"schedules are none: name some of {', '.join(SCHEDULES)}")
    for name in schedule:
        check_choice("schedule", name, SCHEDULES)
    num_tasks = data.responses.shape[1]
    if len(schedule) == 1 or data.domain is None:
        return np.arange(num_tasks) % len(schedule)
    names, index = np.unique(data.domain, return_inverse=True)
    if len(names) != len(schedule):
        raise InputError(
            f"{len(schedule)} schedules for {len(names)} domains: give one for all, or one for each"
        )
    return index


def _cumulative(x: np.ndarray) -> Array:
    """Sums, for each row of x [P, N] and the end, the rows before it, [P + 1, N]."""
    return jnp.asarray(np.pad(np.cumsum(x, axis=0, dtype=np.int32), ((1, 0), (0, 0))))


def _around(table: np.ndarray, quantile: float) -> Array:
    """Computes the pass rates [N] of the rows around a quantile.

    They are NaN where all answers of these rows are missing.
    """
    start = np.clip(
        round(quantile * len(table)) - REFERENCE_ROWS // 2, 0, max(len(table) - REFERENCE_ROWS, 0)
    )
    rows = table[start : start + REFERENCE_ROWS]
    count = (rows >= 0).sum(axis=0)
    rates = np.where(count > 0, (rows == 1).sum(axis=0) / np.maximum(count, 1), np.nan)
    return jnp.asarray(rates, jnp.float32)


def _feedback(ids: Array, successes: Array, trials: Array) -> Feedback:
    """Makes feedback of counts; a rollout spends one token."""
    successes, trials = (x.astype(jnp.float32) for x in (successes, trials))
    return Feedback(ids, successes, trials, trials)
