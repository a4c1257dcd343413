"""Every public function of `learn` names the argument whose shape or dtype does not fit."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from jaxrft.learn import grpo, losses, masked, replay, reward_shaping, update
from jaxrft.lm import model
from jaxrft.types import InputError

B, G, P, T = 2, 4, 3, 5
REWARDS = jnp.zeros((B, G))
CELLS = jnp.zeros((B * G, T))
SIGNALS = jnp.zeros((B, G, 2))
BOUNDS = losses.Bounds(CELLS, CELLS, CELLS)
LIKE = replay.shapes(num_generations=G, prompt_length=P, completion_length=T)
GROUPS = jax.tree.map(lambda x: jnp.zeros((B, *x.shape[1:]), x.dtype), LIKE)
RING = replay.ring(capacity=4, batch_size=2)
BUFFER = RING.init(LIKE)
POLICY = model.decoder(model.ModelConfig(8, 8, 8, 1, 2, 1, 4))
PROMPTS = jnp.zeros((B, P), jnp.int32)
LENGTHS = jnp.ones(B, jnp.int32)
TOKENS = jnp.zeros((B * G, T), jnp.int32)
BATCH = update.Batch(PROMPTS, LENGTHS, *GROUPS[2:6])
KEY = jax.random.key(0)


def step(**changes):
    learner = update.make(POLICY, mini_batch_size=B, micro_batch_size=B * G)
    return learner.step(KEY, {}, update.OptimizerState(jnp.int32(0), ()), BATCH._replace(**changes))


def policy_loss(**changes):
    rows = {"logprobs": CELLS, "behavior_logprobs": CELLS, "advantages": CELLS, "mask": CELLS}
    return grpo.policy_loss(**rows | changes)


def importance_weights(**changes):
    rows = {"logprobs": CELLS, "sampling_logprobs": CELLS, "mask": CELLS}
    return grpo.importance_weights(**rows | changes, importance_sampling_correction="token")


def completion_logprobs(tokens=TOKENS, prompts=PROMPTS, lengths=LENGTHS):
    return update.completion_logprobs(POLICY, {}, prompts, lengths, tokens)


WRONG = [
    (
        masked.zero,
        lambda: masked.zero(CELLS, CELLS[1:]),
        r"mask has shape \(7, 5\): it must be "
        r"\(8, 5\), as that of x",
    ),
    (masked.zero, lambda: masked.zero(CELLS.astype(complex), CELLS), "x is complex64"),
    (masked.mean, lambda: masked.mean(CELLS, CELLS[0]), r"mask has shape \(5,\)"),
    (masked.std, lambda: masked.std(CELLS, CELLS[0]), r"mask has shape \(5,\)"),
    (masked.count, lambda: masked.count(CELLS.astype(complex)), "mask is complex64"),
    (
        grpo.informative,
        lambda: grpo.informative(REWARDS[0]),
        r"rewards has shape \(4,\): it "
        r"must be \[B, G\]",
    ),
    (
        grpo.informative,
        lambda: grpo.informative(REWARDS, REWARDS[1:]),
        r"mask has shape .* "
        r"here \[2, 4\]",
    ),
    (
        grpo.informative,
        lambda: grpo.informative(REWARDS, tolerance=REWARDS[0]),
        r"tolerance has shape \(4,\)",
    ),
    (
        grpo.leveled,
        lambda: grpo.leveled(REWARDS, REWARDS, tolerance=REWARDS[0]),
        r"tolerance has shape \(4,\)",
    ),
    (
        grpo.advantages,
        lambda: grpo.advantages([[1.0, 0.0]]),
        r"rewards is \[\[1.0, 0.0\]\]: it must be an array",
    ),
    (grpo.advantages, lambda: grpo.advantages(REWARDS.astype(complex)), "rewards is complex64"),
    (
        grpo.normalizer,
        lambda: grpo.normalizer(CELLS[0], "grpo"),
        r"mask has shape \(5,\): it "
        r"must be \[R, T\]",
    ),
    (
        grpo.policy_loss,
        lambda: policy_loss(logprobs=TOKENS),
        "logprobs is int32: its dtype must be float",
    ),
    (grpo.policy_loss, lambda: policy_loss(advantages=CELLS[:, 0]), r"advantages has shape \(8,\)"),
    (
        grpo.policy_loss,
        lambda: policy_loss(advantages=CELLS[1:, :1]),
        r"advantages has shape "
        r"\(7, 1\)",
    ),
    (grpo.policy_loss, lambda: policy_loss(weights=CELLS[:, :1]), r"weights has shape \(8, 1\)"),
    (
        grpo.policy_loss,
        lambda: policy_loss(proximal_logprobs=CELLS[1:]),
        r"proximal_logprobs has "
        r"shape \(7, 5\)",
    ),
    (
        grpo.importance_weights,
        lambda: importance_weights(mask=CELLS[1:]),
        r"^logprobs .* here "
        r"\[7, 5\]",
    ),
    (
        grpo.importance_weights,
        lambda: importance_weights(sampling_logprobs=TOKENS),
        "sampling_logprobs is int32",
    ),
    (grpo.kl_k3, lambda: grpo.kl_k3(CELLS, CELLS[1:]), r"ref_logprobs has shape \(7, 5\)"),
    (
        grpo.kl_corrected,
        lambda: grpo.kl_corrected(CELLS, CELLS, CELLS[1:]),
        r"behavior_logprobs has shape \(7, 5\)",
    ),
    (
        losses.ppo_losses,
        lambda: losses.ppo_losses(CELLS, CELLS, REWARDS, BOUNDS),
        r"advantages has "
        r"shape \(2, 4\)",
    ),
    (
        losses.cispo_losses,
        lambda: losses.cispo_losses(CELLS, CELLS, REWARDS, BOUNDS),
        r"advantages has "
        r"shape \(2, 4\)",
    ),
    (
        losses.token_log_ratio,
        lambda: losses.token_log_ratio(CELLS, REWARDS),
        r"mask has shape \(2, 4\)",
    ),
    (
        losses.sequence_log_ratio,
        lambda: losses.sequence_log_ratio(CELLS, REWARDS),
        r"mask has shape \(2, 4\)",
    ),
    (
        reward_shaping.total,
        lambda: reward_shaping.total(SIGNALS, SIGNALS, jnp.ones(3), success=0),
        r"reward_weights has shape \(3,\): it must be \[F\], here \[2\]",
    ),
    (
        reward_shaping.total,
        lambda: reward_shaping.total(SIGNALS, SIGNALS[1:], jnp.ones(2), success=0),
        r"valid has shape \(1, 4, 2\): .* here \[2, 4, 2\]",
    ),
    (
        reward_shaping.magnitude,
        lambda: reward_shaping.magnitude(REWARDS, REWARDS, jnp.ones(2)),
        r"must be \[B, G, F\]",
    ),
    (
        reward_shaping.take_reward,
        lambda: reward_shaping.take_reward(SIGNALS, jnp.zeros(3)),
        r"which has shape \(3,\)",
    ),
    (
        reward_shaping.overlong,
        lambda: reward_shaping.overlong(
            CELLS.astype(complex), max_completion_length=9, overlong_buffer=3
        ),
        "lengths is complex64",
    ),
    (
        replay.ring,
        lambda: RING.add(BUFFER, GROUPS._replace(tokens=SIGNALS)),
        r"tokens has shape \(2, 4, 2\): the buffer",
    ),
    (
        replay.ring,
        lambda: RING.add(BUFFER, GROUPS._replace(task=REWARDS[:, 0])),
        "task has dtype float32: the buffer",
    ),
    (
        replay.ring,
        lambda: RING.add(BUFFER, GROUPS._replace(valid=REWARDS)),
        "valid has dtype float32: the buffer has bool",
    ),
    (
        replay.metrics,
        lambda: replay.metrics(GROUPS, jnp.zeros(3, bool), jnp.int32(1)),
        r"it must be \[B\], here \[3\]",
    ),
    (
        replay.metrics,
        lambda: replay.metrics(GROUPS, jnp.zeros(2), jnp.int32(1)),
        "replayed is float32",
    ),
    (
        replay.weight_moments,
        lambda: replay.weight_moments(CELLS, CELLS[1:], CELLS),
        "behavior_logprobs has shape",
    ),
    (
        replay.effective_sample_size,
        lambda: replay.effective_sample_size(CELLS),
        r"moments has "
        r"shape .* must be \[3\]",
    ),
    (
        update.make,
        lambda: step(advantages=REWARDS[1:]),
        r"advantages has shape \(1, 4\): .* here \[2, 4\]",
    ),
    (update.make, lambda: step(lengths=PROMPTS), r"lengths has shape \(2, 3\)"),
    (
        update.make,
        lambda: step(prompts=PROMPTS.astype(float)),
        "prompts is float32: its dtype must be int",
    ),
    (
        update.make,
        lambda: step(logprobs=BATCH.tokens),
        "logprobs is int32: its dtype must be float",
    ),
    (
        update.completion_logprobs,
        lambda: completion_logprobs(tokens=TOKENS[1:]),
        "tokens has 7 rows: .* of 2 prompts",
    ),
    (
        update.completion_logprobs,
        lambda: completion_logprobs(lengths=LENGTHS[1:]),
        r"lengths has shape \(1,\)",
    ),
]
# Their arguments are no arrays, they take arrays of any shape, or they are called by `make` with
# arrays it checked.
OTHERS = {
    grpo.rounding,
    replay.shapes,
    update.adamw,
    update.with_proximal_logprobs,
    update.bin_logprobs,
    update.bin_shapes,
    update.check_batch,
    update.gradient,
    update.loss,
    update.of_slots,
    update.optimizer_shardings,
    update.pack,
    update.rate_schedule,
}


@pytest.mark.parametrize("call, message", [row[1:] for row in WRONG])
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_every_public_function_is_here():
    public = set()
    for module in (grpo, losses, masked, replay, reward_shaping, update):
        functions = inspect.getmembers(module, inspect.isfunction)
        public |= {
            f
            for name, f in functions
            if f.__module__ == module.__name__ and not name.startswith("_")
        }
    assert public == {row[0] for row in WRONG} | OTHERS
