"""Runs a rollout as compiled segments: rows leave when they have ended, waiting prompts enter."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrft import mesh as meshes
from jaxrft.config import Config
from jaxrft.lm import compaction, rollout, stop_strings
from jaxrft.lm.compaction import Grid
from jaxrft.lm.model import Policy
from jaxrft.lm.policy import LanguageModel
from jaxrft.lm.rollout import Decoding, Entrants, Inputs, Left, Samples
from jaxrft.lm.stop_strings import StopMatcher
from jaxrft.mesh import constrain
from jaxrft.streams import stream_key
from jaxrft.types import Array, InputError, PyTree, Rollout


class Watcher(Protocol):
    """Does something on the host while the device decodes."""

    def left(self, samples: Samples) -> None:
        """Receives what is known of all rows, after some have moved."""
        ...

    def wait(self, stopped: Callable[[], bool]) -> None:
        """Works while a segment runs, until `stopped()` or until there is nothing to do."""
        ...


class Work(NamedTuple):
    """What a rollout computed."""

    drawn: int  # tokens, with those behind the ends of rows
    segments: int


class Batch(NamedTuple):
    """The arguments of a rollout: arrays, or their `jax.ShapeDtypeStruct`s."""

    params: PyTree  # all parameters, frozen ones and adapters
    step: PyTree
    prompts: PyTree  # [B, P] right-padded
    lengths: PyTree  # [B]
    ids: PyTree  # [B], of the tasks
    stream: PyTree = None  # the number of another random stream
    stop: PyTree = None  # the matcher of stop strings, host arrays too; None = there are none


class _Stop(NamedTuple):
    """Why a segment stopped: `rollout.Status` on the host."""

    ended: bool
    time: int
    grid: int
    free: int


class _Place(NamedTuple):
    """Where a rollout stands."""

    inputs: Inputs
    state: Decoding
    left: Left | None
    grid: int
    length: int  # of the cache
    time: int  # columns written


class CompiledRollout:
    """The programs of a rollout, compiled when they are first needed; rows are sharded over the
    mesh.

    Waits for the device only between two segments, for four replicated scalars, on which all
    processes decide alike.
    """

    def __init__(
        self,
        lm: LanguageModel,
        config: Config,
        mesh: meshes.AnyMesh,
        use: str,
        settings: rollout.Sampling,
        max_rows: int | None = None,
    ):
        """Prepares the programs; `use` is the random stream.

        With more than `max_rows` rows, prompts wait. Raises InputError if two groups on each shard
        are more than that.
        """
        self.settings = settings
        self._waiting = ThreadPoolExecutor(max_workers=1)  # for the device
        self.shards = meshes.shards(mesh, "batch")
        self.max_rows = max_rows
        _check_max_rows(max_rows, settings.num_generations, self.shards)
        self.cache_lengths = rollout.cache_lengths(settings.max_completion_length)
        # rows of each segment, and tokens that it drew of each
        self._segments: list[tuple[int, int]] = []
        self._rows = 0
        # on the host
        self.stop: StopMatcher | None = (
            stop_strings.of_tokenizer(lm.tokenizer, lm.config.vocab_size, config.stop)
            if config.stop
            else None
        )
        self._on_devices = partial(meshes.place, where=meshes.sharding(mesh))

        key = partial(_key, config.seed, use)
        policy = lm.policy
        rows = meshes.sharding(mesh, "batch")
        cells = meshes.sharding(mesh, "batch", None)
        self.start = jax.jit(partial(start, policy, key, settings))
        self.prepare_weights = jax.jit(policy.prepare_weights)
        self.admit = jax.jit(
            partial(admit, policy, key, settings, self.shards), static_argnames="count"
        )
        self.empty = jax.jit(
            partial(rollout.empty, policy, settings=settings), static_argnames="full"
        )
        self.nothing_left = jax.jit(rollout.nothing_left, static_argnums=(0, 1, 2))
        self.resize = jax.jit(policy.resize_cache, static_argnums=(1, 2))
        self.decode = jax.jit(
            partial(rollout.decode, policy, settings=settings),
            static_argnames=("length", "grids"),
            donate_argnums=1,
            out_shardings=(None, meshes.sharding(mesh)),
        )
        self.compact = jax.jit(
            partial(rollout.compact, policy), static_argnames=("now", "smaller", "length")
        )
        self.enter = jax.jit(
            partial(rollout.enter, policy, settings=settings),
            static_argnames=("full", "half", "length"),
        )
        self.finish = jax.jit(
            partial(rollout.finish, shards=self.shards),
            out_shardings=Rollout._make((cells, rows, cells, cells, cells, rows)),
        )

    def _wait_for(self, status: rollout.Status, watcher: Watcher | None) -> "_Stop":
        """Waits until the device has a status, while the `watcher` works."""
        if watcher is not None:
            arrived = self._waiting.submit(jax.device_get, status)
            watcher.wait(arrived.done)
            status = arrived.result()
        return _Stop(*(x.item() for x in jax.device_get(status)))

    def waits(self, prompts: int) -> bool:
        """Decides whether some of the `prompts` wait until others have ended."""
        rows = prompts * self.settings.num_generations
        return self.max_rows is not None and rows > self.max_rows

    def grids(self, prompts: int) -> tuple[Grid, ...]:
        """Returns the grids of a rollout of `prompts`, from the largest to the smallest."""
        generations, limit = self.settings.num_generations, self.settings.max_completion_length
        if self.max_rows is not None and self.waits(prompts):
            return compaction.waiting_grids(self.max_rows // self.shards, generations, limit)
        return compaction.grids(prompts // self.shards, generations, limit)

    def entering(self, prompts: int) -> int:
        """Counts the prompts that enter at once on each shard, where some wait."""
        return self.grids(prompts)[1].rows // self.settings.num_generations

    def num_programs(self, prompts: int) -> int:
        """Counts the programs of `decode` that a rollout of `prompts` may run."""
        count = len(self.grids(prompts))
        lengths = (rollout.grid_lengths(self.cache_lengths, each, count) for each in range(count))
        return sum(map(len, lengths))

    def __call__(
        self,
        params: PyTree,
        step: Array | np.int32,
        prompts: Array,
        lengths: Array,
        ids: Array | np.ndarray,
        stream: Array | np.int32 | None = None,
        *,
        watcher: Watcher | None = None,
    ) -> Rollout:
        """Samples completions.

        `params` are all parameters, frozen ones and adapters; `stream` the number of another random
        stream. The `watcher` is told when rows have moved, and works while the device decodes.
        """
        stop = jax.tree.map(self._on_devices, self.stop)
        batch = Batch(params, step, prompts, lengths, ids, stream, stop)
        count = prompts.shape[0]
        grids = self.grids(count)
        self._segments = []
        self._rows = count * self.settings.num_generations
        waiting = deque[int]()
        if self.waits(count):
            waiting.extend(range(-(-count // (self.shards * self.entering(count)))))
            place = self._first_entrants(batch, waiting.popleft())
        else:
            inputs, state = self.start(batch)
            place = _Place(inputs, state, None, 0, self.cache_lengths[0], 1)
        moved = False
        while True:
            rows = grids[place.grid].rows * self.shards
            state, status = self.decode(
                place.inputs, place.state, length=place.length, grids=grids[place.grid :]
            )
            place = place._replace(state=state)
            if watcher is not None and moved and place.left is not None:
                watcher.left(place.left.samples)
            now = self._wait_for(status, watcher)
            self._segments.append((rows, now.time - place.time))
            if now.ended and not waiting:
                break
            moved = True
            if waiting and now.grid:
                place = self._enter(batch, place, now, waiting.popleft())
            elif now.grid or now.free:
                smaller = place.grid if waiting else place.grid + now.grid
                place = self._compact(place, grids, now, smaller)
            else:
                length = self._length(place.grid, grids, now.time)
                cache = self.resize(place.state.cache, length, 0)
                place = place._replace(
                    state=place.state._replace(cache=cache), length=length, time=now.time
                )
                moved = False
        if place.left is None:
            return self.finish(place.state.samples)
        return self.finish(place.state.samples, place.inputs.entered, place.left)

    def _first_entrants(self, batch: Batch, number: int) -> _Place:
        """Returns a grid that the first of the waiting prompts have entered."""
        count = batch.prompts.shape[0]
        full = self.grids(count)[0]
        entrants = self.admit(batch, np.int32(number), count=self.entering(count))
        inputs, state = self.empty((), entrants, full=full)
        left = self.nothing_left(
            self._rows, full.rows * self.shards, self.settings.max_completion_length
        )
        inputs = inputs._replace(weights=self.prepare_weights(batch.params), stop=batch.stop)
        place = _Place(inputs, state, left, 0, self.cache_lengths[0], 1)
        nothing = _Stop(ended=True, time=1, grid=1, free=0)
        return self._enter(batch, place, nothing, number, entrants)

    def _enter(
        self,
        batch: Batch,
        place: _Place,
        now: _Stop,
        number: int,
        entrants: Entrants | None = None,
    ) -> _Place:
        """Lets the next prompts enter, the group `number` of those that enter at once."""
        count = batch.prompts.shape[0]
        grids = self.grids(count)
        full, half, *_ = grids
        if entrants is None:
            entrants = self.admit(batch, np.int32(number), count=self.entering(count))
        time = now.time - now.free
        length = self._length(0, grids, time)
        inputs, state, left = self.enter(
            place.inputs._replace(weights=()),
            place.state,
            place.left,
            np.int32(now.free),
            entrants,
            np.int32(number * half.rows),
            full=full,
            half=half,
            length=length,
        )
        inputs = inputs._replace(weights=place.inputs.weights)
        return _Place(inputs, state, left, 0, length, time)

    def _compact(self, place: _Place, grids: tuple[Grid, ...], now: _Stop, smaller: int) -> _Place:
        """Moves the live rows into the grid number `smaller`, or frees columns of the same."""
        time = now.time - now.free
        length = self._length(smaller, grids, time)
        inputs, state, left = self.compact(
            place.inputs._replace(weights=()),
            place.state,
            place.left,
            np.int32(now.free),
            now=grids[place.grid],
            smaller=grids[smaller],
            length=length,
        )
        inputs = inputs._replace(weights=place.inputs.weights)
        return _Place(inputs, state, left, smaller, length, time)

    def _length(self, grid: int, grids: tuple[Grid, ...], time: int) -> int:
        """Returns the length of the cache for the next token of a grid at this `time`."""
        allowed = rollout.grid_lengths(self.cache_lengths, grid, len(grids))
        return min(each for each in allowed if each >= time)

    def work(self) -> Work:
        """Counts what the last rollout computed."""
        drawn = sum(rows * tokens for rows, tokens in self._segments)
        return Work(self._rows + drawn, len(self._segments))

    def eval_shape(self, batch: Batch) -> Rollout:
        """Returns the shapes of a rollout."""
        return self.finish.eval_shape(self.start.eval_shape(batch)[1].samples)


Key = Callable[[Array, Array | None], Array]
"""(step, number of another random stream or None) -> the key of a rollout."""


def _check_max_rows(max_rows: int | None, num_generations: int, shards: int) -> None:
    """Raises InputError if two groups on each shard are more than `max_rows`."""
    least = 2 * num_generations * shards
    if max_rows is not None and max_rows < least:
        raise InputError(
            f"max_concurrent_rows is {max_rows:,}: it must be at least {least:,}, two groups of "
            f"{num_generations:,} completions on each of {shards:,} shards, or 0"
        )


def _key(seed: int, use: str, step: Array, stream: Array | None) -> Array:
    return stream_key(seed, step, use if stream is None else stream)


def start(
    policy: Policy, key: Key, settings: rollout.Sampling, batch: Batch
) -> tuple[Inputs, Decoding]:
    """Starts a rollout whose prompts all enter at once."""
    entrants = _admit(policy, key, settings, batch)
    return rollout.start(policy, batch.params, entrants, batch.stop, settings=settings)


def admit(
    policy: Policy,
    key: Key,
    settings: rollout.Sampling,
    shards: int,
    batch: Batch,
    number: Array,
    count: int,
) -> Entrants:
    """Computes the prompts number * count to (number + 1) * count - 1 of each shard."""
    part = partial(_part, number=number, count=count, shards=shards)
    batch = batch._replace(
        prompts=part(batch.prompts), lengths=part(batch.lengths), ids=part(batch.ids)
    )
    return _admit(policy, key, settings, batch)


def _admit(policy: Policy, key: Key, settings: rollout.Sampling, batch: Batch) -> Entrants:
    """Computes the prompts of a batch, and the first token of each sample."""
    return rollout.admit(
        policy,
        batch.params,
        key(batch.step, batch.stream),
        batch.prompts,
        batch.lengths,
        batch.ids,
        settings=settings,
    )


def _part(x: Array, number: Array, count: int, shards: int) -> Array:
    """Takes the rows number * count to (number + 1) * count - 1 of each shard, 1 behind its end.

    A padding prompt thus has one token.
    """
    by_shard = x.reshape(shards, -1, *x.shape[1:])
    missing = -by_shard.shape[1] % count
    padding = [(0, missing) if axis == 1 else (0, 0) for axis in range(by_shard.ndim)]
    padded = jnp.pad(by_shard, padding, constant_values=1)
    part = jax.lax.dynamic_slice_in_dim(padded, number * count, count, axis=1)
    return constrain(part.reshape(-1, *x.shape[1:]), "batch", *(None,) * (x.ndim - 1))


def compile_rollout(
    lm: LanguageModel,
    config: Config,
    mesh: meshes.AnyMesh,
    *,
    use: str = "rollout",
    num_generations: int | None = None,
    greedy: bool = False,
    max_rows: int | None = None,
) -> CompiledRollout:
    """Returns the rollout that the config asks for; `use` is the random stream.

    At most `max_rows` rows are decoded at once, None for all.
    """
    settings = rollout.Sampling(
        num_generations=config.num_generations if num_generations is None else num_generations,
        max_completion_length=config.max_completion_length,
        eos_ids=lm.eos_ids,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        greedy=greedy,
    )
    return CompiledRollout(lm, config, mesh, use, settings, max_rows)
