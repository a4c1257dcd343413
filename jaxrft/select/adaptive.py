"""Our own selector: no reference policies, no reference rollouts, nothing to tune."""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrft.mesh import constrain
from jaxrft.select import acquisition, drift, features, logit, topk
from jaxrft.select import population as populations
from jaxrft.select.base import Selector
from jaxrft.select.checks import (
    NOT_NEGATIVE,
    SHARE,
    check,
    check_balance,
    check_choice,
    check_count,
    check_flag,
    check_generations,
    check_select,
    check_table,
    credible,
)
from jaxrft.types import Array, Choice, Feedback, Tasks

NOISE = 0.015  # variance that a step adds to every logit
LARGEST = 25.0  # variance of a logit about which nothing is known any more
STALE, STALE_INTEREST = 25.0, 0.03  # steps after which a task counts as not looked at, and what that is worth
# A jump is a surprise beyond JUMP (1 is expected). When jumps are more frequent than JUMPS of the rollouts' tasks, over
# some ten steps, and are not ALONE (two within four steps), tasks that nobody looked at may have jumped too: their
# variance grows by JUMP_NOISE times the mean squared jump. First visits do not count: what they contradict is said of
# all tasks never visited. A task that jumped is learnt anew, with JUMP_VARIANCE.
JUMP, JUMPS, ALONE, JUMP_MEMORY, JUMP_NOISE, JUMP_VARIANCE = 12.0, 0.01, 1.6, 0.9, 10.0, 4.0
# Knowing has a price that rises with this power of the mean variance of the believed pass rates, so that most is spent
# where most is to be learnt. Where choosing gains more than the share GAIN of the greatest utility the variance counts
# for more, in proportion, EARLIER times at most: more is lost there by not knowing the tasks. Tasks never visited count
# in full if REACH steps could visit all tasks.
STEEPNESS, GAIN, EARLIER, REACH = 3, 0.25, 1.3, 16
FITTED = 4096  # visited tasks whose logits tell what those of the others are
# The same few tasks again and again teach a policy little of the others. Tasks never visited have the share NEW of the
# batch while they are nearly all there are, and all of it as far as features have turned out right in saying which are
# worth it; it falls with the power FADING of their share of the table. Which of them is left to chance among those that
# may be worth AMONG of the best of them, or what features say would keep the policy to one kind. As far as features
# have turned out right they are TOLD of the way from the least to the best of them. Of tasks whose utilities are less
# than ALIKE / G apart, those longest not visited are taken: the larger the groups, the more pass rates have nearly the
# greatest utility.
NEW, FADING, AMONG, TOLD, ALIKE = 0.5, 4, 0.5, 0.75, 0.7

Utility = Literal["informative", "signal"]


class AdaptiveState(NamedTuple):
    """What is believed of every task, as of its last visit and as of the next step."""

    mean: Array  # [N], logit at the last visit
    variance: Array  # [N], of the logit now
    features: Array  # [N, F], what is told of the task
    anchor: Array  # [N, 2], both movements until the last visit
    visited: Array  # [N] int32, step of the last visit; -1 = never
    population: populations.Population  # of which tasks never visited are
    drift: drift.DriftState
    jumps: Array  # [], smoothed share of the rollouts' tasks that jumped
    step: Array  # [] int32, updates so far
    believed: logit.Moments  # [N], of the next step
    tokens: Array | None  # [N], of a rollout at the last visit, 0 = unknown; None where they cost nothing


def adaptive(
    num_generations: int,
    *,
    utility: Utility = "informative",
    price: ArrayLike = 0.0425,
    curiosity: ArrayLike = 3.5,
    floor: ArrayLike = 0.3,
    per_token: bool = False,
    cool_down: int = 0,
    balance: topk.Balance = "none",
) -> Selector:
    """Posterior on the logits, moved by what tasks share and corrected by what surprises; knowledge at a price.

    Belief: every logit is Gaussian, observed through the binomial counts of its visits (Laplace). Between visits its
    mean moves by the shares, learnt from the tasks that come back, of a drift common to all and of one by features,
    both learnt from the batches; its variance grows a little each step, and by much after steps in which outcomes
    contradicted predictions. A task never visited has the mean and spread of those that were, or what a regression on
    the features says, by how well either predicted first visits. Features are `Tasks.domain` and the principal
    components of `Tasks.embeddings`, if given.

    Choice: places in the batch go to the tasks of the greatest expected utility + `curiosity` * interest, until the
    batch's expected utility has fallen by the share `price` of what the greatest possible is above chance; the rest to
    the greatest utility, of nearly equal ones to those longest not visited. While hardly a task of the table has been
    visited, half of the places are for those never visited, for any that may be worth half of the best of them; as far
    as features have predicted first visits, all places, and three quarters of the way from the least to the best.
    Interest is the standard deviation of the believed pass rate, and a little for not having been looked at.
    Once pass rates are believed with a mean variance above 1 / (4 G), a single group's, `price` grows with its cube;
    the variance counts for more, up to 1.3 times, where choosing gains more over chance than a quarter of the greatest
    possible. Of tasks never visited it counts in full if 16 steps could visit all tasks, and less the larger the table
    is. With chance `floor` a step one place goes to the task longest not visited, of the domain longest not visited;
    after a task has jumped the chance is 1, then a tenth less every step, until it is `floor`.

    `utility`: the chance of an informative group (with group normalisation), or the mean of 4 p (1 - p) (without).
    `per_token`: utility and interest count by what they cost, the completion tokens of the task's last visit (0: the
    mean of the others), since harder tasks make longer rollouts.
    `price` and `floor` in [0, 1]; `curiosity` >= 0; `cool_down`: steps for which a chosen task comes last.
    `balance` of the batch between the domains: as `topk.quota` says; a task for not having been visited has the
    place of one of its own domain.
    `init` raises InputError for domains or embeddings that do not fit the table or are not finite.
    """
    num_generations = check_generations(num_generations)
    check_choice("utility", utility, get_args(Utility), " of a group")
    check("price", price, SHARE)
    check("floor", floor, SHARE)
    check("curiosity", curiosity, NOT_NEGATIVE)
    per_token = check_flag("per_token", per_token)
    cool_down = check_count("cool_down", cool_down, least=0)
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> AdaptiveState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        told = features.describe(tasks, num_tasks)
        population = populations.init(told.shape[1])
        mean, variance = populations.predict(population, jnp.zeros(num_tasks, jnp.float32))
        return AdaptiveState(
            mean=mean,
            variance=variance,
            features=told,
            anchor=jnp.zeros((num_tasks, 2), jnp.float32),
            visited=jnp.full(num_tasks, -1, jnp.int32),
            population=population,
            drift=drift.init(told.shape[1]),
            jumps=jnp.zeros((), jnp.float32),
            step=jnp.zeros((), jnp.int32),
            believed=logit.moments(mean, variance, num_generations=num_generations),
            tokens=jnp.zeros(num_tasks, jnp.float32) if per_token else None,
        )

    def select(
        key: Array, state: AdaptiveState, tasks: Tasks, *, batch_size: int, exclude: Array | None = None
    ) -> tuple[Choice, AdaptiveState]:
        batch_size = check_select(key, state.mean, tasks, batch_size=batch_size, exclude=exclude)
        key_choice, key_new, key_floor, key_stale, key_quota = jax.random.split(key, 5)
        quota = topk.quota(key_quota, tasks, batch_size=batch_size, balance=balance, exclude=exclude)
        believed, seen = state.believed, state.visited >= 0
        since = jnp.where(seen, state.step - state.visited, jnp.iinfo(jnp.int32).max)
        rate = believed.pass_rate
        worth = believed.informative if utility == "informative" else 4 * (rate * (1 - rate) - believed.variance)
        interest = jnp.sqrt(believed.variance) + STALE_INTEREST * jnp.minimum(since.astype(jnp.float32) / STALE, 1)
        if state.tokens is not None:
            worth, interest = (acquisition.per_token(x, state.tokens) for x in (worth, interest))
        chance = acquisition.by_chance(worth, quota, exclude)
        worth = acquisition.cool_down(worth, since, steps=cool_down) if cool_down else worth

        reach = min(1, REACH * batch_size / seen.shape[0])
        doubt = jnp.where(seen, believed.variance, reach * believed.variance).mean()

        def raised(gain: Array) -> Array:
            doubted = 4 * num_generations * doubt * jnp.clip(gain / GAIN, 1, EARLIER)
            return jnp.minimum(jnp.asarray(price, jnp.float32) * jnp.maximum(1, doubted) ** STEEPNESS, 1)

        ids = acquisition.priced(
            key_choice,
            worth,
            interest,
            batch_size=batch_size,
            weight=curiosity,
            price=raised,
            chance=chance,
            first=_new(key_new, state, worth, batch_size=batch_size, quota=quota, exclude=exclude),
            alike=ALIKE / num_generations,
            preference=since.astype(jnp.float32),
            quota=quota,
            exclude=exclude,
        )
        jumped = state.jumps * batch_size / (1 - JUMP_MEMORY)  # 1 after one jump, then less and less
        look = jax.random.uniform(key_floor) < jnp.maximum(jnp.asarray(floor, jnp.float32), jumped)
        ids = jax.lax.cond(look, lambda: _with_stalest(key_stale, ids, state, tasks, quota, exclude), lambda: ids)
        return Choice(ids, believed.pass_rate[ids]), state

    def update(state: AdaptiveState, tasks: Tasks, feedback: Feedback) -> AdaptiveState:
        feedback = credible(feedback, state.mean.shape[0])
        return _observe(state, feedback, num_generations=num_generations)

    def pass_rate(state: AdaptiveState, tasks: Tasks) -> Array:
        return state.believed.pass_rate

    return Selector(init, select, update, pass_rate)


def _new(
    key: Array,
    state: AdaptiveState,
    worth: Array,
    *,
    batch_size: int,
    quota: topk.Quota | None,
    exclude: Array | None,
) -> Array:
    """Ids [B] of tasks never visited that have a place for being new, of those `worth` [N] enough any; N for none."""
    key_places, key_among = jax.random.split(key)
    seen, right = state.visited >= 0, populations.share(state.population)
    places = (NEW + (1 - NEW) * right) * batch_size * (1 - seen.mean(dtype=jnp.float32)) ** FADING
    seen = seen if exclude is None else seen | exclude
    best, least = jnp.where(seen, -jnp.inf, worth).max(), jnp.where(seen, jnp.inf, worth).min()
    gap = jnp.maximum(best - least, 0)  # they are infinite when there is none
    enough = jnp.maximum(AMONG * best, least + TOLD * right * gap)
    score = jnp.where(seen, -jnp.inf, jnp.minimum(worth, enough))
    ids = topk.largest(key_among, score, batch_size=batch_size, quota=quota, exclude=exclude)
    places = (places + jax.random.uniform(key_places)).astype(jnp.int32)  # this is the mean
    chosen = (jnp.arange(batch_size) < places) & ~seen[ids]
    return jnp.where(chosen, ids, seen.shape[0])


def _with_stalest(
    key: Array,
    ids: Array,
    state: AdaptiveState,
    tasks: Tasks,
    quota: topk.Quota | None,
    exclude: Array | None,
) -> Array:
    """The batch `ids` [B] with the task longest not visited, of the domain longest not visited, in its last place.

    With a quota, in the last place of its domain.
    """
    visited = state.visited
    if tasks.domain is not None:  # one that has jumped is noticed soon, however few of its tasks seem worth a place
        domain = tasks.domain % features.DOMAINS
        last = jnp.full(features.DOMAINS, -1, visited.dtype).at[domain].max(visited)[domain]
        visited = jnp.where(last == last.min(), visited, visited + state.step + 1)  # other domains come behind
    stalest = topk.smallest(key, visited, batch_size=1, quota=quota, exclude=exclude)
    alike = jnp.ones(ids.shape, bool) if quota is None else quota.domain[ids] == quota.domain[stalest]
    place = jnp.where(alike, jnp.arange(ids.shape[0]), 0).max()
    return jnp.where((ids == stalest).any(), ids, ids.at[place].set(stalest[0]))


def _predict(state: AdaptiveState, rows: Array | slice = slice(None)) -> tuple[Array, Array]:
    """Mean and variance of the logits now, of all tasks [N] or of `rows`."""
    visited = state.visited[rows]
    moved, told = features.along(state.features[rows], state.drift.position[2:], state.population.weights)
    mean = state.mean[rows] + drift.come(state.drift, moved, state.anchor[rows])
    seen, unseen = visited >= 0, populations.predict(state.population, told)
    return jnp.where(seen, mean, unseen[0]), jnp.where(seen, state.variance[rows], unseen[1])


def _observe(state: AdaptiveState, feedback: Feedback, *, num_generations: int) -> AdaptiveState:
    """The state after a batch, ready for the next step; rows [B] without rollouts change nothing.

    If all are, there was no step. Then what is small stays as it was, and of the table nothing changes.
    """
    valid = feedback.trials > 0
    num_tasks, happened = state.mean.shape[0], valid.any()
    stays = lambda new, old: jax.tree.map(lambda x, y: jnp.where(happened, x, y), new, old)  # noqa: E731
    rows = jnp.where(valid, feedback.ids, 0)
    successes, trials = (jnp.where(valid, x, 1.0) for x in (feedback.successes, feedback.trials))
    mean, variance = _predict(state, rows)
    surprise = logit.surprise(jax.tree.map(lambda x: x[rows], state.believed), successes, trials)

    # What tasks share.
    told = state.features[rows]
    seen, noise = _innovation(mean, variance, successes, trials)
    first, jumped = valid & (state.visited[rows] < 0), valid & (surprise > JUMP)
    now = drift.moved(state.drift, told)
    moved = jnp.where(first[:, None], 0, now - state.anchor[rows])
    moving = drift.update(
        state.drift, told, seen, variance + noise + jnp.where(jumped, JUMP_VARIANCE, 0), moved, valid, jumped
    )
    mean = mean + (drift.moved(moving, told) - now) @ drift.shares(moving)

    # What jumped.
    leap = logit.observe(mean, variance + JUMP_VARIANCE, successes, trials)[0] - mean
    count, moves = valid.sum().astype(jnp.float32), jumped & ~first
    jumps = JUMP_MEMORY * state.jumps + (1 - JUMP_MEMORY) * moves.sum().astype(jnp.float32) / count
    frequent = jumps >= jnp.maximum(JUMPS, ALONE * (1 - JUMP_MEMORY) / count)
    spread = jnp.where(frequent, JUMP_NOISE * jnp.where(moves, leap * leap, 0).sum() / count, 0)

    # The tasks themselves.
    variance = variance + jnp.where(jumped, JUMP_VARIANCE, 0)
    mean, variance = logit.observe(mean, variance, successes, trials)
    ids = jnp.where(valid, feedback.ids, num_tasks)  # padding points behind the table and is dropped
    put = lambda table, x: constrain(table.at[ids].set(x, mode="drop"), "task", *[None] * (x.ndim - 1))  # noqa: E731
    visited = put(state.visited, state.step)
    variance = put(state.variance, variance)
    state = AdaptiveState(
        mean=put(state.mean, mean),
        variance=jnp.where((visited >= 0) & happened, jnp.minimum(variance + NOISE + spread, LARGEST), variance),
        features=state.features,
        anchor=put(state.anchor, drift.moved(moving, told)),
        visited=visited,
        population=stays(populations.earn(state.population, told, successes, trials, first), state.population),
        drift=stays(drift.advance(moving), state.drift),
        jumps=stays(jumps, state.jumps),
        step=state.step + happened.astype(jnp.int32),
        believed=state.believed,
        tokens=None if state.tokens is None else put(state.tokens, feedback.tokens / trials),
    )
    known = _latest(state.visited)
    population = populations.fit(
        state.population, state.features[known], *_predict(state, known), state.visited[known] >= 0
    )
    state = state._replace(population=population)
    return state._replace(believed=logit.moments(*_predict(state), num_generations=num_generations))


def _latest(visited: Array) -> Array:
    """Ids [`FITTED`], or of all tasks if they are fewer: of those equal modulo that number, the one visited last."""
    size = min(FITTED, visited.shape[0])
    table = jnp.pad(visited, (0, -visited.shape[0] % size), constant_values=-1).reshape(-1, size)
    return table.argmax(axis=0).astype(jnp.int32) * size + jnp.arange(size, dtype=jnp.int32)


def _innovation(mean: Array, variance: Array, successes: Array, trials: Array) -> tuple[Array, Array]:
    """Observed minus predicted logit [B] and the observation's variance: what would move a belief as counts do."""
    after, _ = logit.observe(mean, variance, successes, trials)
    rate = jax.nn.sigmoid(after)
    noise = 1 / (trials * rate * (1 - rate) + 1e-3)
    return (after - mean) * (variance + noise) / variance, noise
