"""The numbers of a step, computed on the device from arrays.

| name | meaning | normalizer |
|---|---|---|
| `reward` | weighted sum of the rewards that apply, and the overlong penalty | samples with a success |
| `reward_std` | standard deviation of a group's sums | tasks |
| `frac_reward_zero_std` | groups whose sums are all equal, to rounding | tasks |
| `rewards/<name>/mean`, `/std` | one reward function | samples to which it applies and on which no grader failed |
| `rewards/<kind>` | rewards lost to timeout, crash, wrong_length, error, invalid | count |
| `completions/{mean,min,max}_length` | tokens up to and including the end, EOS or a stop string's | samples |
| `completions/clipped_ratio` | completions cut at the longest length | samples |
| `completions/overlong_penalty` | what their lengths add to the rewards, 0 or less; with overlong_buffer | samples |
| `sampling/importance_sampling_ratio/{min,mean,max}` | policy / truncated sampling distribution, before any cap | tokens |
| `num_tokens`, `rollouts` | tokens and completions sampled since the start of the run, of reference sets too | count |
| `policy_loss` | the loss without KL and entropy bonus, see `learn.grpo` | as the loss; mean over updates |
| `entropy` | of the policy at the sampling temperature | tokens or rows, as the loss; mean over updates |
| `kl` | KL(policy, reference) by `kl_estimator`; with kl_coef | tokens or rows, as the loss; mean over updates |
| `approx_kl`, `clip_ratio/{low,high,delta,region}_mean` | see `learn.grpo` | likewise |
| `replay/fraction` | groups that are of earlier steps | tasks |
| `replay/age` | steps since their rollout | replayed groups |
| `replay/ess` | (sum w)^2 / (n sum w^2), w = policy / what sampled it: the effective sample size | replayed tokens |
| `grad_norm`, `learning_rate` | before clipping | mean over updates |
| `rollout/utilization` | tokens of the completions / tokens computed, with those behind their ends | - |
| `rollout/segments` | how often the rollout's program changed: a longer cache or fewer rows | count |
| `update/utilization` | tokens in the loss / computed, with prompts and what is free in bins | mean over updates |
| `skipped_updates` | updates with a loss or gradient that is not finite; means over updates leave them out | count |
| `select/effective_group_ratio` | groups whose successes are not all equal | tasks |
| `select/effective_group_ratio/<domain>` | the same of a domain, where there are 2 to 32 | its tasks in the batch |
| `success/<domain>` | success of a domain, where there are 2 to 32 | its samples with a success |
| `select/brier` | (believed pass rate - success)^2 | samples |
| `select/pearson` | of believed and observed pass rates | tasks of the batch |
| `select/auc` | of believed 4 p (1 - p) for "the group is informative" | pairs of tasks |
| `select/coverage` | tasks rolled out at least once so far | tasks in the table |
| `select/references`, `select/references/trained` | groups of the reference set, and of these trained on | count |
| `select/references/{brier,pearson,auc,effective_group_ratio}` | as above, of tasks drawn uniformly | as above |
| `dynamic_sampling/resamples` | how often more tasks were chosen and rolled out | count |
| `dynamic_sampling/rejected` | groups whose successes are all equal | groups rolled out |
| `dynamic_sampling/surplus` | informative groups beyond the slots of the batch | count |
| `dynamic_sampling/informative` | groups whose successes are not all equal | groups learned from, but replayed ones |
| `select/seconds`, `timing/*`, `step_time` | wall clock | seconds |
| `timing/tokens_per_second` | tokens of the completions, by the seconds of their rollout | - |
| `eval/<name>/greedy`, `/avg@k` | success on held-out tasks | tasks |
| `eval/<name>/pass@k` | tasks that one of k samples solves, estimated without bias from all samples (arXiv 2107.03374) | tasks |
| `eval/<name>/maj@k` | success of the answer that most of the k samples of a task give, where the rewards extract answers (arXiv 2203.11171) | tasks |
| `eval/<name>/{mean,median}_length`, `/clipped_ratio` | tokens of the samples; those without an end | samples |
| `eval/<name>/<domain>/greedy`, `/avg@k` | the same of a domain, where a set has several | its tasks |

With dynamic sampling, `select/*` are of all tasks chosen in a step; rewards and completions are
those of the tasks chosen first, a sample of what the selector chooses that no outcome has changed.

A number that does not exist (a Pearson correlation without spread) is null in metrics.jsonl.
"""  # noqa: E501

import jax
import jax.numpy as jnp

from jaxrft.learn import masked
from jaxrft.types import Array, Choice, Feedback, Rollout, Tasks

MOST_DOMAINS = 32  # more of them have no metrics of their own
BINS = 20  # of a histogram of pass rates


def rewards(
    values: Array,
    valid: Array,
    names: tuple[str, ...],
    total: Array,
    total_valid: Array,
    informative: Array,
) -> dict[str, Array]:
    """Computes the metrics of the rewards of a batch.

    `values`, `valid` [B, G, F]: the rewards, and which are valid. `total`, `total_valid` [B, G]:
    their sums, and which exist. `informative` [B]: the groups whose sums are not all equal.
    """
    metrics = {
        "reward": masked.mean(total, total_valid),
        "reward_std": jnp.mean(masked.std(total, total_valid, axis=1)),
        "frac_reward_zero_std": 1.0 - jnp.mean(informative.astype(jnp.float32)),
    }
    for index, name in enumerate(names):
        column = values[..., index], valid[..., index]
        metrics[f"rewards/{name}/mean"] = masked.mean(*column)
        metrics[f"rewards/{name}/std"] = masked.std(*column)
    return metrics


def completions(rollout: Rollout) -> dict[str, Array]:
    """Computes the metrics of the completions of a rollout, and of their importance ratios."""
    lengths = rollout.lengths.astype(jnp.float32)
    log_ratio = masked.zero(rollout.logprobs - rollout.sampling_logprobs, rollout.mask)
    ratio = jnp.exp(log_ratio)
    inside = rollout.mask > 0
    return {
        "completions/mean_length": jnp.mean(lengths),
        "completions/min_length": jnp.min(lengths),
        "completions/max_length": jnp.max(lengths),
        "completions/clipped_ratio": 1.0 - jnp.mean(rollout.finished.astype(jnp.float32)),
        "sampling/importance_sampling_ratio/mean": masked.mean(ratio, rollout.mask),
        "sampling/importance_sampling_ratio/min": jnp.min(jnp.where(inside, ratio, jnp.inf)),
        "sampling/importance_sampling_ratio/max": jnp.max(jnp.where(inside, ratio, 0.0)),
    }


def selection(
    choice: Choice, feedback: Feedback, informative: Array, last_seen: Array
) -> dict[str, Array]:
    """Measures how good the predictions for this batch were, and how much of the table was seen.

    `informative` [B]; `last_seen` [N], -1 = never. Rows of the task N are padding.
    """
    believed = choice.pass_rate
    trials = feedback.trials
    exists = feedback.ids < last_seen.shape[0]
    observed = feedback.successes / jnp.maximum(trials, 1.0)
    # E (p - y)^2 over y in {0, 1}; a fractional success counts as its share of ones.
    squares = observed * (1.0 - believed) ** 2 + (1.0 - observed) * believed**2
    return {
        "select/effective_group_ratio": masked.mean(informative, exists),
        "select/brier": jnp.sum(trials * squares) / jnp.maximum(jnp.sum(trials), 1.0),
        "select/pearson": pearson(believed, observed, trials > 0),
        "select/auc": auc(believed * (1.0 - believed), informative, exists),
        "select/coverage": jnp.mean((last_seen >= 0).astype(jnp.float32)),
    }


def by_domain(
    feedback: Feedback,
    informative: Array,
    choice: Choice,
    tasks: Tasks,
    names: tuple[str, ...],
) -> dict[str, Array]:
    """Computes the share of `informative` groups [B] in each of the domains `names`, and the
    success.

    They are NaN for a domain without a task in the batch. Returns {} for a single domain, or for
    more than MOST_DOMAINS.
    """
    if tasks.domain is None or not 1 < len(names) <= MOST_DOMAINS:
        return {}
    domain = tasks.domain.at[choice.ids].get(mode="fill", fill_value=-1)  # of padding, none
    member = jax.nn.one_hot(domain, len(names), axis=0)  # [domains, B]
    ratio = member @ informative.astype(jnp.float32) / jnp.sum(member, axis=1)
    success = member @ feedback.successes / (member @ feedback.trials)
    shares = {
        f"select/effective_group_ratio/{name}": ratio[index] for index, name in enumerate(names)
    }
    return shares | {f"success/{name}": success[index] for index, name in enumerate(names)}


def histogram(pass_rate: Array) -> Array:
    """Counts pass rates [N] in BINS equal bins from 0 to 1, [BINS] int32; NaN is not counted."""
    bins = jnp.clip((pass_rate * BINS).astype(jnp.int32), 0, BINS - 1)
    known = ~jnp.isnan(pass_rate)
    return jnp.zeros(BINS, jnp.int32).at[bins].add(known.astype(jnp.int32))


def pearson(x: Array, y: Array, mask: Array) -> Array:
    """Computes the Pearson correlation of x and y [B] where the mask is set.

    It is NaN when either does not vary.
    """
    x = masked.zero(x - masked.mean(x, mask), mask)
    y = masked.zero(y - masked.mean(y, mask), mask)
    return jnp.sum(x * y) / jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))


def auc(score: Array, positive: Array, mask: Array) -> Array:
    """Computes the chance that a positive of [B] scores higher than a negative.

    Ties count half. It is NaN without both, and when a score is NaN.
    """
    pairs = ((positive & mask)[:, None] & (~positive & mask)[None]).astype(jnp.float32)
    above = 0.5 * (1.0 + jnp.sign(score[:, None] - score[None]))
    ratio = jnp.sum(pairs * above) / jnp.sum(pairs)
    return jnp.where(jnp.any(jnp.isnan(score)), jnp.nan, ratio)
