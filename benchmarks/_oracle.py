"""An upper bound for selectors: runs that select by measured pass rates of the current policy.

The pass rates are measured by rollouts that are not counted. So the oracle is a bound, not a
method.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np

from jaxrft import mesh as meshes
from jaxrft.errors import InputError
from jaxrft.rewards.grading import check_rewards, grade_rollout, trainer_state
from jaxrft.select import selectors
from jaxrft.select.checks import check_count
from jaxrft.simulate.oracle import oracle, reveal
from jaxrft.streams import STREAMS, stream_key
from jaxrft.train.state import TrainState
from jaxrft.train.step import Step
from jaxrft.types import Array, Choice


@contextlib.contextmanager
def known_pass_rates(*, measured: int = 512, measure_every: int = 4) -> Iterator[None]:
    """Lets the runs of the block select by `oracle`, which the package does not have.

    Every `measure_every` steps, before it selects, the pass rates of `measured` tasks drawn at
    random, or of all tasks if there are fewer, are measured by `num_generations` rollouts each.
    They are part of the selector's state, and of checkpoints. Raises InputError for fewer tasks
    than a batch.
    """
    measured = check_count("measured", measured)
    measure_every = check_count("measure_every", measure_every)
    select = Step.select

    def measure_and_select(
        step: Step, state: TrainState, *, batch_size: int, exclude: np.ndarray, stream: int
    ) -> tuple[Choice, TrainState]:
        is_oracle = step.setup.config.select.name == "oracle"
        first = stream == STREAMS.index("select")  # of the choices in this step
        if is_oracle and first and int(state.step) % measure_every == 0:
            if measured < batch_size:
                raise InputError(
                    f"measured is {measured}: it must be at least batch_size {batch_size}"
                )
            rates = measure(step, state, measured=measured)
            state = state._replace(selector=reveal(state.selector, rates))
        return select(step, state, batch_size=batch_size, exclude=exclude, stream=stream)

    known = mock.patch.dict(selectors.SELECTORS, oracle=oracle)
    measuring = mock.patch.object(Step, "select", measure_and_select)
    with known, measuring:
        yield


def measure(step: Step, state: TrainState, *, measured: int) -> Array:
    """Rolls out `measured` tasks by the current policy; returns the pass rates [N], NaN of the
    other tasks.
    """
    setup = step.setup
    config = setup.config
    done = int(state.step)
    key = stream_key(config.seed, done + 1, "measure")
    ids = np.asarray(jax.random.permutation(key, setup.num_tasks)[:measured])
    rates = np.full(setup.num_tasks, np.nan, np.float32)
    for start in range(0, len(ids), config.batch_size):
        part = np.take(ids, range(start, start + config.batch_size), mode="wrap")
        rolled = step.roll_out(
            state._replace(step=state.step + 1), part, stream=STREAMS.index("measure")
        )
        rewards = grade_rollout(
            config,
            setup.lm,
            rolled.rollout,
            step.pool,
            step.table,
            part,
            trainer_state=trainer_state(config, done),
        )
        rewards = check_rewards(config, rewards, step.pool, num_tasks=len(part), first=False)
        successes = rewards.success.reshape(len(part), -1)
        rates[part] = successes.mean(axis=1)
    return meshes.place_table(rates, setup.mesh, setup.num_tasks)
