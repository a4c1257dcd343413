"""Selects tasks by a dynamic Rasch model: no reference policies, no reference rollouts.

**Belief.** The logit of a task's pass rate is the policy's ability plus an offset of the task
(Rasch 1960, with covariates):

    logit p_i = a + w . phi_i + b_i        s_i ~ Binomial(n_i, p_i)

The features phi_i [F] are the domain, one-hot, and the leading principal components of the
embeddings, whichever are given. All tasks share x = (a, w); with h_i = (1, phi_i), logit p_i is h_i
. x + b_i. The offset b_i starts as N(0, spread), and its variance grows by `walk` a step; a step is
one update. Beliefs are Gaussian, and independent between x and each b_i: x has a mean and an
information matrix (the inverse of its covariance), b_i has a mean m_i and a variance v_i.

**Update** by a batch in which s_i of n_i rollouts were right: an extended Kalman filter (West &
Harrison 1997, chapter 14; for two players it is Glicko, Glickman 1999).

1. Predict. v_i is the variance after the task's last rollouts + `walk` times the steps since then;
   for a task never rolled out, m_i = 0 and v_i = spread. Let c_i be h_i, in which the components of
   embeddings are multiplied by min(v_i / spread, 1): their weights are constant, and what the
   task's former rollouts said about them is known. The logit is N(mu_i, V_i) with mu_i = h_i . x +
   m_i and V_i = c_i . information^-1 c_i + v_i. So s_i has the mean n_i p and the variance
   n_i p (1 - p) + n_i (n_i - 1) var, where p and var are mean and variance of p_i, by quadrature.
2. Change point. z_i is the standardized residual: s_i less its mean, over its deviation. If
   |z_i| > 3, the task counts as never rolled out, and mu_i, c_i and V_i are computed again.
3. Linearize at l_i, the mode of the logit given s_i under the prior N(mu_i, V_i). With q_i =
   sigmoid(l_i), the outcome has the Fisher information k_i = n_i q_i (1 - q_i), and at mu_i the
   score g_i = s_i - n_i q_i + k_i (l_i - mu_i).
4. Shared. information += sum_i c_i c_i' k_i / (1 + k_i v_i); with the new matrix, x += d where
   d = information^-1 sum_i c_i g_i / (1 + k_i v_i).
5. Offsets, given x. v_i <- v_i / (1 + k_i v_i); with the new v_i, m_i += v_i (g_i - k_i h_i . d).
6. Spread. spread = (`PRIOR_VARIANCE` + sum_i (m_i^2 + v_i)) / (1 + N) over the N tasks rolled out
   so far, this batch included, each as after its last rollouts; a step of expectation maximization.
7. Walk. f_i is the share of the variance of s_i in 1 that steps of the walk made, var being taken
   as proportional to V_i. The gradient of the log likelihood of z_i in log walk is f_i (z_i^2 - 1)
   / 2, and its Fisher information f_i^2 / 2. With z_i^2 at most 9, J += sum_i f_i^2 / 2, and then
   log walk += sum_i f_i (z_i^2 - 1) / 2 / J, where walk is at most `PRIOR_VARIANCE`.
8. Forget. Information shrinks towards that of the prior by `DECAY`, means stay: J <- (1 - DECAY) J
   + DECAY, and in the rows and columns of a and of domains information <- (1 - DECAY) information +
   DECAY prior. The weights of embeddings are constant: their block stays, and what they have in
   common with a and domains shrinks by the root of 1 - DECAY.

The prior of x is N(0, `PRIOR_VARIANCE` I), of J it is 1, of walk `FIRST_WALK`, of spread
`PRIOR_VARIANCE`.

**Choice** of B tasks by the belief for the coming step, ties at random, in three parts. Where a
part has a share of B, the number is rounded up or down at random such that the share is the mean.

* epsilon B are the tasks rolled out longest ago, those never rolled out first.
* B times the mean of 12 var over all tasks, at most B times `MOST_EXPLORATION`, are those of the
  largest var, whether or not they are among the former. A uniform pass rate has the variance 1 /
  12, so that this is the share of the table that is not known; exploring more while less is known
  is the idea of VDBE (Tokic 2010).
* The other places go by the upper confidence bound u_i + kappa sqrt(var), where u_i = E[1 - p_i^G -
  (1 - p_i)^G] is the chance of an informative group of G. Let c be the B-th largest bound. The
  tasks with a bound of at least (1 - 1 / (2 G)) c count as equal, and so do those never rolled out
  with a bound of at least (1 - `NEW_TOLERANCE`) c. Of equal tasks those rolled out longest ago are
  taken, those never rolled out first: a policy learns more from many tasks than from the same few.
  Without `NEW_TOLERANCE` policies in closed loops ended lower (benchmarks/results/adaptive.md).
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrft.mesh import constrain
from jaxrft.select import acquisition, features, logit, topk
from jaxrft.select.base import Selector
from jaxrft.select.checks import (
    NOT_NEGATIVE,
    SHARE,
    check,
    check_balance,
    check_choice,
    check_flag,
    check_generations,
    check_select,
    check_table,
    credible,
)
from jaxrft.types import Array, Choice, Feedback, Tasks

# A uniform pass rate has a logistic logit, of this variance: the prior of a, of each w and of b_i.
PRIOR_VARIANCE = np.pi**2 / 3
UNIFORM_VARIANCE = 1 / 12  # of a uniform pass rate
FIRST_WALK = PRIOR_VARIANCE / 200  # a task is forgotten in 200 steps, until outcomes say otherwise
CHANGE_POINT = 3  # standard deviations
DECAY = 0.2  # what tasks share is learned from some five batches
# most of a table much larger than a run stays unknown: half of the slots exploit what is known
MOST_EXPLORATION = 0.5
TOLERANCE = 0.5  # of one rollout in G
NEW_TOLERANCE = 0.25  # what a new task teaches beyond its own group is worth a quarter of one

Utility = Literal["informative", "signal"]


class AdaptiveState(NamedTuple):
    """What is believed of the policy and of every task."""

    shared: Array  # [1 + F], mean of (a, w)
    information: Array  # [1 + F, 1 + F], of (a, w)
    mean: Array  # [N], of the offset after the task's last rollouts
    variance: Array  # [N]
    visited: Array  # [N] int32, step of the task's last rollouts; -1 = never
    spread: Array  # [], variance of the offsets over tasks
    log_walk: Array  # [], of the variance that an offset gains in a step
    walk_information: Array  # []
    features: Array  # [N, F]
    # [N], of one of the last rollouts, 0 = unknown; None where they do not count
    tokens: Array | None
    step: Array  # [] int32, updates so far


class Learned(NamedTuple):
    """Beliefs after a batch [B], before they decay."""

    shift: Array  # [1 + F], change of the shared parameters
    information: Array  # [1 + F, 1 + F], of the shared parameters
    offset_mean: Array  # [B]
    offset_variance: Array  # [B]
    log_walk: Array
    walk_information: Array


class Offsets(NamedTuple):
    """Beliefs about the offsets of tasks, now."""

    mean: Array
    variance: Array
    walked: Array  # the part of the variance that is due to the walk


def adaptive(
    num_generations: int,
    *,
    utility: Utility = "informative",
    kappa: ArrayLike = 0.3,
    epsilon: ArrayLike = 0.02,
    per_token: bool = False,
    balance: topk.Balance = "none",
) -> Selector:
    """Chooses tasks by a dynamic Rasch model, an ability of the policy and an offset of each task.

    This module's docstring derives it.

    `utility`: "informative", the chance of an informative group (for advantages divided by the
    group's deviation), or "signal", the mean of 4 p (1 - p) (for undivided ones). `kappa` >= 0:
    weight of the standard deviation of the pass rate. `epsilon` in [0, 1]: share of the slots for
    the tasks rolled out longest ago, in expectation. `per_token`: utility and deviation count per
    completion token of the task's last rollouts, or of the mean of the others where they are
    unknown. `balance` of the batch between the domains: as `topk.quota` says. Every `update` with
    rollouts is a step of time. `init` raises InputError for domains or embeddings that do not fit
    the table or are not finite.
    """
    num_generations = check_generations(num_generations)
    check_choice("utility", utility, get_args(Utility), " of a group")
    check("kappa", kappa, NOT_NEGATIVE)
    check("epsilon", epsilon, SHARE)
    per_token = check_flag("per_token", per_token)
    check_balance(balance)

    def init(tasks: Tasks, num_tasks: int) -> AdaptiveState:
        num_tasks = check_table(tasks, num_tasks, balance=balance)
        phi = features.describe(tasks, num_tasks)
        size = 1 + phi.shape[1]
        return AdaptiveState(
            shared=jnp.zeros(size, jnp.float32),
            information=jnp.eye(size, dtype=jnp.float32) / PRIOR_VARIANCE,
            mean=jnp.zeros(num_tasks, jnp.float32),
            variance=jnp.zeros(num_tasks, jnp.float32),
            visited=jnp.full(num_tasks, -1, jnp.int32),
            spread=jnp.full((), PRIOR_VARIANCE, jnp.float32),
            log_walk=jnp.log(jnp.full((), FIRST_WALK, jnp.float32)),
            walk_information=jnp.ones((), jnp.float32),
            features=phi,
            tokens=jnp.zeros(num_tasks, jnp.float32) if per_token else None,
            step=jnp.zeros((), jnp.int32),
        )

    def select(
        key: Array,
        state: AdaptiveState,
        tasks: Tasks,
        *,
        batch_size: int,
        exclude: Array | None = None,
    ) -> tuple[Choice, AdaptiveState]:
        batch_size = check_select(key, state.visited, tasks, batch_size=batch_size, exclude=exclude)
        keys = jax.random.split(key, 7)
        quota = topk.quota(keys[0], tasks, batch_size=batch_size, balance=balance, exclude=exclude)
        believed = logit.moments(*_predict(state, tasks), num_generations=num_generations)
        gain, deviation = _gain(believed, state.tokens, utility)
        score = gain + jnp.asarray(kappa, jnp.float32) * deviation

        def largest(key: Array, score: Array) -> Array:
            return topk.largest(key, score, batch_size=batch_size, quota=quota, exclude=exclude)

        def ahead(key: Array, share: ArrayLike, ids: Array) -> Array:
            has_slot = acquisition.has_slot(key, share, batch_size=batch_size)
            # the others point behind the table, where they are dropped
            return jnp.where(has_slot, ids, score.shape[0])

        stalest = largest(keys[1], -state.visited)
        review = ahead(keys[2], epsilon, stalest)
        least_known = largest(keys[3], _coarse(deviation))
        unknown = jnp.minimum(believed.variance.mean() / UNIFORM_VARIANCE, MOST_EXPLORATION)
        explore = ahead(keys[4], unknown, least_known)

        bound = _coarse(score)
        best = largest(keys[5], bound)
        least = bound[best].min()
        if quota is not None:
            least = acquisition.least_by_domain(quota, bound[best], best)
        ranked = _stalest_first(bound, least, state, tolerance=TOLERANCE / num_generations)
        first = jnp.concatenate([review, explore])
        ids = largest(keys[6], ranked.at[first].set(jnp.inf, mode="drop"))
        return Choice(ids, believed.pass_rate[ids]), state

    def update(state: AdaptiveState, tasks: Tasks, feedback: Feedback) -> AdaptiveState:
        feedback = credible(feedback, state.visited.shape[0])
        return _update(state, tasks, feedback, num_generations=num_generations)

    def pass_rate(state: AdaptiveState, tasks: Tasks) -> Array:
        return logit.moments(*_predict(state, tasks), num_generations=num_generations).pass_rate

    return Selector(init, select, update, pass_rate)


def _gain(believed: logit.Moments, tokens: Array | None, utility: Utility) -> tuple[Array, Array]:
    """Computes the utility [N] of a group of each task, and the standard deviation [N] of its pass
    rate; both per token where `tokens` [N] are given.
    """
    rate = believed.pass_rate
    gain = believed.informative
    if utility == "signal":
        gain = 4 * (rate * (1 - rate) - believed.variance)
    deviation = jnp.sqrt(believed.variance)
    if tokens is None:
        return gain, deviation
    return acquisition.per_token(gain, tokens), acquisition.per_token(deviation, tokens)


def _stalest_first(bound: Array, least: Array, state: AdaptiveState, *, tolerance: float) -> Array:
    """Raises the bounds [N] that are equal to the `least` chosen, the stalest task's most.

    Equal are those within a relative `tolerance`, of new tasks at least `NEW_TOLERANCE`.
    """
    tolerances = jnp.full(bound.shape, tolerance)
    tolerances = jnp.where(state.visited < 0, jnp.maximum(tolerances, NEW_TOLERANCE), tolerances)
    is_equal = bound >= least * (1 - tolerances)
    steps_ago = (state.step - state.visited).astype(jnp.float32)
    return jnp.where(is_equal, bound.max() + 1 + steps_ago, bound)


def _coarse(score: Array) -> Array:
    """Rounds scores [N] to 1 / 1024 of the largest.

    Scores that are equal but for the rounding of another mesh or compiler are ties, broken at
    random by the key.
    """
    return jnp.round(score * (1024 / jnp.maximum(score.max(), 1e-30)))


def _predict(state: AdaptiveState, tasks: Tasks) -> tuple[Array, Array]:
    """Computes mean and variance [N] of the logits of all tasks, in one pass over the features.

    Deviation: covariances of the weights of components with other weights are left out. Those of a
    domain and the ability count with its variance, since features of domains are their own squares.
    """
    phi = state.features
    covariance = jnp.linalg.inv(state.information)
    of_squares = jnp.diagonal(covariance)[1:]
    of_each = jnp.where(_is_component(state, tasks)[1:], of_squares, 0)
    terms = [phi * state.shared[None, 1:], phi * phi * of_each[None]]
    mean, of_components = logit.sums(terms, axis=1)
    offsets = _offsets(state, slice(None))
    factor = _component_factor(state, offsets.variance)
    variance = covariance[0, 0] + factor**2 * of_components + offsets.variance
    if tasks.domain is not None:
        with_ability = of_squares + 2 * covariance[0, 1:]
        variance += with_ability[features.domain(tasks.domain)]
    return state.shared[0] + mean + offsets.mean, variance


def _is_component(state: AdaptiveState, tasks: Tasks) -> Array:
    """Returns which of the shared (a, w) [1 + F] weigh components of embeddings.

    The ability and the domain features come before them.
    """
    num_domains = 0 if tasks.domain is None else features.DOMAINS
    return jnp.arange(state.shared.shape[0]) > num_domains


def _offsets(state: AdaptiveState, rows: Array | slice) -> Offsets:
    """Computes the beliefs about the offsets of `rows` now."""
    visited = state.visited[rows]
    seen = visited >= 0
    steps = (state.step - visited).astype(jnp.float32)
    walked = jnp.where(seen, jnp.exp(state.log_walk) * steps, 0)
    variance = jnp.where(seen, state.variance[rows] + walked, state.spread)
    return Offsets(state.mean[rows], variance, walked)


def _component_factor(state: AdaptiveState, variance: Array) -> Array:
    """Computes the factor of the components in c, for offsets of the given variance: step 1."""
    return jnp.minimum(variance / state.spread, 1)


def _update(
    state: AdaptiveState, tasks: Tasks, feedback: Feedback, *, num_generations: int
) -> AdaptiveState:
    """Returns the state after a batch [B].

    Rows without rollouts change nothing. A batch without any rollouts is no step of time.
    """
    valid = feedback.trials > 0
    rows = Feedback(
        ids=jnp.where(valid, feedback.ids, 0),
        successes=jnp.where(valid, feedback.successes, 1.0),
        trials=jnp.where(valid, feedback.trials, 2.0),
        tokens=feedback.tokens,
    )
    believed = _learn(state, tasks, rows, valid, num_generations=num_generations)
    # padding points behind the table and is dropped
    ids = jnp.where(valid, feedback.ids, state.visited.shape[0])

    def put(table: Array, values: Array) -> Array:
        return constrain(table.at[ids].set(values, mode="drop"), "task")

    mean = put(state.mean, believed.offset_mean)
    variance = put(state.variance, believed.offset_variance)
    visited = put(state.visited, jnp.broadcast_to(state.step, ids.shape))
    has_rollouts = valid.any()
    decay = jnp.where(has_rollouts, DECAY, 0.0)
    tokens = state.tokens
    if tokens is not None:
        tokens = put(tokens, feedback.tokens / rows.trials)
    return AdaptiveState(
        shared=state.shared + believed.shift,
        information=_forget(believed.information, decay, is_component=_is_component(state, tasks)),
        mean=mean,
        variance=variance,
        visited=visited,
        spread=_spread(mean, variance, visited),
        log_walk=believed.log_walk,
        walk_information=(1 - decay) * believed.walk_information + decay,
        features=state.features,
        tokens=tokens,
        step=state.step + has_rollouts.astype(jnp.int32),
    )


def _spread(mean: Array, variance: Array, visited: Array) -> Array:
    """Estimates the variance [] of offsets between tasks from those of the visited ones: step 6."""
    seen = visited >= 0
    squares = jnp.where(seen, mean**2 + variance, 0).sum()
    return (PRIOR_VARIANCE + squares) / (1 + seen.sum().astype(jnp.float32))


def _learn(
    state: AdaptiveState, tasks: Tasks, feedback: Feedback, valid: Array, *, num_generations: int
) -> Learned:
    """Computes what the `valid` rows of feedback [B] teach: steps 1 to 5 and 7."""
    successes = feedback.successes
    trials = feedback.trials
    phi = state.features[feedback.ids]
    # h, [B, 1 + F]
    design = jnp.concatenate([jnp.ones((phi.shape[0], 1), jnp.float32), phi], axis=1)
    is_component = _is_component(state, tasks)
    covariance = jnp.linalg.inv(state.information)

    def predict(variance: Array) -> tuple[Array, Array]:
        """Computes c [B, 1 + F] and V [B] of step 1, for offsets of the given variance [B]."""
        factor = _component_factor(state, variance)
        scaled = jnp.where(is_component[None], design * factor[:, None], design)
        return scaled, jnp.sum(scaled @ covariance * scaled, axis=1) + variance

    # 1 and 2.
    mean = design @ state.shared
    offsets = _offsets(state, feedback.ids)
    _, total = predict(offsets.variance)
    believed = logit.moments(mean + offsets.mean, total, num_generations=num_generations)
    squared_innovation = logit.squared_innovation(believed, successes, trials)  # z^2
    log_walk, walk_information = _walk(
        state, believed, offsets.walked / total, squared_innovation, trials, valid
    )
    changed = squared_innovation > CHANGE_POINT**2
    prior_mean = jnp.where(changed, 0, offsets.mean)
    prior_variance = jnp.where(changed, state.spread, offsets.variance)

    # 3.
    mu = mean + prior_mean
    scaled, total = predict(prior_variance)  # c and V
    known, score = _linearize(mu, total, successes, trials)

    # 4 and 5.
    share = jnp.where(valid, 1 / (1 + known * prior_variance), 0)
    information = state.information + scaled.T @ (scaled * (known * share)[:, None])
    shift = jnp.linalg.solve(information, scaled.T @ (score * share))  # d
    variance = prior_variance / (1 + known * prior_variance)
    mean = prior_mean + variance * (score - known * (design @ shift))
    return Learned(shift, information, mean, variance, log_walk, walk_information)


def _linearize(mu: Array, variance: Array, successes: Array, trials: Array) -> tuple[Array, Array]:
    """Computes information k and score g [B] of outcomes about logits N(mu, variance): step 3."""
    mode, _ = logit.observe(mu, variance, successes, trials)
    rate = jax.nn.sigmoid(mode)
    information = trials * rate * (1 - rate)
    return information, successes - trials * rate + information * (mode - mu)


def _forget(information: Array, decay: Array, *, is_component: Array) -> Array:
    """Computes the information matrix after a step, of which that of components is kept: step 8."""
    decays = jnp.where(is_component, 0, decay)
    root = jnp.sqrt(1 - decays)
    return root[:, None] * information * root[None] + jnp.diag(decays / PRIOR_VARIANCE)


def _walk(
    state: AdaptiveState,
    believed: logit.Moments,
    walked: Array,
    squared_innovation: Array,
    trials: Array,
    valid: Array,
) -> tuple[Array, Array]:
    """Computes log walk and its information after a batch: step 7.

    `walked` [B]: share of the logits' variance that is due to the walk.
    """
    of_draws, of_rate = logit.count_variances(believed, trials)
    of_rate = jnp.maximum(of_rate, 0)  # it is negative for less than one trial
    total = jnp.maximum(of_draws + of_rate, logit.LEAST_VARIANCE)
    share = jnp.where(valid, walked * of_rate / total, 0)  # f
    information = state.walk_information + (share**2).sum() / 2
    gradient = (share * (jnp.minimum(squared_innovation, CHANGE_POINT**2) - 1)).sum() / 2
    most = jnp.log(jnp.float32(PRIOR_VARIANCE))  # a walk that forgets everything in a step
    return jnp.minimum(state.log_walk + gradient / information, most), information
