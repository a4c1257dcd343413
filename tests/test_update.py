import math
from functools import partial

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrft.learn import grpo, masked, packing, update
from jaxrft.lm import model, rollout
from jaxrft.types import InputError

WIDTH, VOCABULARY = 8, 24


def apply(params, tokens, positions, valid, prefix=None, segments=None):
    """A policy quick to compile: the next token depends on the last one and on the sum of the
    prompt, its prefix.

    The first token of a completion depends on the prompt's last only.
    """
    x = params["embed"][tokens]
    # [1, rows, 1, D]
    total = jnp.sum(jnp.where(valid[..., None], x, 0.0), axis=1, keepdims=True)[None]
    if prefix is not None:
        x = x + jnp.repeat(prefix[0], tokens.shape[0] // prefix.shape[1], axis=0)
    # a segment's first slot reads the prompt's last token, and its prompt lies elsewhere
    if segments is not None:
        own, prompt = segments.ids, segments.prompt
        same = (own[:, :, None] == own[:, None, :]) & valid[:, None, :]
        begin = jnp.min(jnp.where(same, positions[:, None, :], TIME + 99), axis=2)
        of_prompt = (own[:, None, :] == prompt[:, :, None]) | (
            same & (positions[:, None, :] == begin[:, :, None])
        )
        later = (own != prompt) & (positions > begin)
        seen = of_prompt & valid[:, None, :] & later[:, :, None]
        x = x + jnp.einsum("rts,rsd->rtd", seen.astype(x.dtype), x)
    return jnp.tanh(jnp.einsum("rtd,de->rte", x, params["mix"])), total


def unembed(params, hidden):
    return jnp.einsum("...d,vd->...v", hidden, params["unembed"])


def decode(params, prefix, tokens, positions, slot, cache):
    """It needs no cache, since the next token depends on no other one of the completion."""
    hidden, _ = apply(
        params, tokens[:, None], positions[:, None], jnp.ones((len(tokens), 1), bool), prefix
    )
    return unembed(params, hidden[:, 0]), cache


POLICY = model.Policy(
    apply=apply,
    unembed=unembed,
    init_cache=lambda rows, length: (),
    resize_cache=lambda cache, length, first: cache,
    prepare_weights=lambda params: params,
    prepare_prompts=lambda prefix: prefix,
    decode=decode,
)
DECODER = model.ModelConfig(
    vocab_size=1024,
    hidden_size=8,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)
TASKS, GROUP, TIME = 4, 4, 6
ROWS = TASKS * GROUP
KEY = jax.random.key(9)


@pytest.fixture(scope="module")
def params():
    shapes = {"embed": (VOCABULARY, WIDTH), "mix": (WIDTH, WIDTH), "unembed": (VOCABULARY, WIDTH)}
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(0.0, 0.7, shape).astype(np.float32))
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def batch(params):
    """Ragged prompts and completions, one row empty, sampled by a policy some updates away."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(2, 24, (TASKS, 5), np.int32)
    lengths = np.array([5, 2, 3, 4], np.int32)
    tokens = rng.integers(2, 24, (ROWS, TIME), np.int32)
    mask = np.arange(TIME)[None] < rng.integers(1, TIME + 1, (ROWS, 1))
    mask[5] = False
    logprobs, _ = learner_logprobs(params, prompts, lengths, tokens)
    logprobs = logprobs + rng.normal(0.0, 0.3, (ROWS, TIME)).astype(np.float32)
    groups = (TASKS, GROUP, TIME)
    return update.Batch(
        jnp.asarray(prompts),
        jnp.asarray(lengths),
        jnp.asarray(tokens).reshape(groups),
        jnp.asarray(mask, jnp.float32).reshape(groups),
        logprobs.reshape(groups),
        jnp.asarray(rng.normal(size=(TASKS, GROUP)).astype(np.float32)),
    )


learner_logprobs = jax.jit(partial(update.completion_logprobs, POLICY))


def make(policy=POLICY, **options):
    """An update whose clipping by norm does not act."""
    sizes = {
        "mini_batch_size": TASKS,
        "micro_batch_size": ROWS,
        "learning_rate": 1e-3,
        "max_grad_norm": 1e9,
    }
    return update.make(policy, **sizes | options)


def run(params, batch, ref_params=None, **options):
    """(params, optimizer state, metrics) after a step from a fresh optimizer."""
    learner = make(**options)
    return jax.jit(learner.step)(KEY, params, learner.init(params), batch, ref_params)


def gradient(state):
    """The gradient of the first update, from Adam's first moment (1 - 0.9) g."""
    return jax.tree.map(lambda x: x / 0.1, optax.tree_utils.tree_get(state, "mu"))


def assert_close(got, want, atol=1e-5):
    chex.assert_trees_all_close(got, want, rtol=1e-7, atol=atol)


def plain_loss(params, batch, ref_params=None, *, loss_type, kl_coef=0.0, kl_estimator="k3"):
    """The loss of a whole batch, without micro-batches."""
    tokens, mask, behavior = (
        x.reshape(ROWS, TIME) for x in (batch.tokens, batch.mask, batch.logprobs)
    )
    where = (batch.prompts, batch.lengths, tokens)
    logprobs, _ = update.completion_logprobs(POLICY, params, *where)
    advantages = batch.advantages.reshape(-1, 1)
    options = {"loss_type": loss_type, "max_completion_length": TIME}
    loss, metrics = grpo.policy_loss(logprobs, behavior, advantages, mask, **options)
    if kl_coef:
        reference, _ = update.completion_logprobs(POLICY, ref_params, *where)
        estimates = grpo.KL_ESTIMATORS[kl_estimator](logprobs, reference, behavior)
        metrics["kl"] = masked.mean(estimates, mask)  # with dapo
        loss = loss + kl_coef * metrics["kl"]
    return loss, metrics


plain_gradient = jax.jit(
    jax.value_and_grad(plain_loss, has_aux=True),
    static_argnames=("loss_type", "kl_coef", "kl_estimator"),
)


@pytest.mark.parametrize(
    "loss_type",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("grpo", "gspo")))
        for name in grpo.LOSS_TYPES
    ],
)
@pytest.mark.parametrize(  # half a group, two groups
    "micro_batch_size", [2, pytest.param(8, marks=pytest.mark.slow)]
)
def test_micro_batches_change_no_number(params, batch, loss_type, micro_batch_size):
    (loss, metrics), want = plain_gradient(params, batch, loss_type=loss_type)
    _, state, got = run(params, batch, loss_type=loss_type, micro_batch_size=micro_batch_size)
    assert_close(gradient(state), want)
    assert_close({name: got[name] for name in metrics}, metrics)
    np.testing.assert_allclose(got["policy_loss"], loss, atol=1e-5)
    np.testing.assert_allclose(got["grad_norm"], optax.global_norm(want), rtol=1e-5)
    assert metrics["clip_ratio/region_mean"] > 0  # clipping was tried


def test_bins_of_two_shapes_change_no_number(monkeypatch, params, batch):
    """Completions of one or two tokens have bins of their own, and one of the groups is in both."""
    monkeypatch.setattr(packing, "LONG", 0)
    monkeypatch.setattr(packing, "PROMPT_SHARE", 0)  # a completion a bin
    shapes = update.bin_shapes(batch, 1)
    assert list(shapes) == [2, TIME] and shapes[2].length < shapes[TIME].length
    sizes = packing.sample_sizes(batch.mask)
    is_short = (sizes > 0) & (sizes <= 2)
    assert np.any(np.any(is_short, axis=1) & np.any(sizes > 2, axis=1))
    (_, metrics), want = plain_gradient(params, batch, loss_type="dapo")
    _, state, got = run(params, batch, loss_type="dapo", micro_batch_size=1)
    assert_close(gradient(state), want)
    assert_close({name: got[name] for name in metrics}, metrics)


def test_mini_batches_partition_the_tasks_of_each_pass(params, batch):
    """At learning rate 0 the mean over equal mini-batches of a mean over rows is the mean over all
    rows.
    """
    batch = batch._replace(mask=batch.mask.at[..., 0].set(1.0))  # no row is empty
    (loss, _), _ = plain_gradient(params, batch, loss_type="grpo")
    for mini_batch_size, num_iterations, updates in ((4, 3, 3), (2, 2, 4)):
        sizes = {
            "mini_batch_size": mini_batch_size,
            "micro_batch_size": 4,
            "num_iterations": num_iterations,
        }
        after, state, metrics = run(params, batch, loss_type="grpo", learning_rate=0.0, **sizes)
        assert optax.tree_utils.tree_get(state, "ScaleByAdamState").count == updates
        np.testing.assert_allclose(metrics["policy_loss"], loss, atol=1e-5)
        chex.assert_trees_all_equal(after, params)


def test_the_first_ratio_after_a_rollout_is_one(params):
    prompts, lengths = (
        jnp.array([[2, 3, 4], [5, 6, 0], [7, 0, 0], [8, 9, 0]]),
        jnp.array([3, 2, 1, 2]),
    )
    options = {
        "num_generations": GROUP,
        "max_completion_length": TIME,
        "eos_ids": (0,),
        "temperature": 0.6,
    }
    generate = jax.jit(partial(rollout.generate, POLICY, **options))
    got = generate(params, jax.random.key(0), prompts, lengths, jnp.arange(TASKS))
    tokens, mask, logprobs = (
        x.reshape(TASKS, GROUP, TIME) for x in (got.tokens, got.mask, got.logprobs)
    )
    advantages = jnp.tile(jnp.array([[1.0, -1.0, 2.0, -2.0]]), (TASKS, 1))
    on_policy = update.Batch(prompts, lengths, tokens, mask, logprobs, advantages)
    for temperature, is_one in ((0.6, True), (1.0, False)):
        *_, metrics = run(params, on_policy, temperature=temperature)
        ratios = [abs(float(metrics[name])) for name in ("approx_kl", "clip_ratio/region_mean")]
        assert (max(ratios) < 1e-5) == is_one
        if is_one:
            want = -jnp.sum(advantages[..., None] * mask) / jnp.sum(mask)
            np.testing.assert_allclose(metrics["policy_loss"], want, atol=1e-5)


def test_token_weights_entropy_and_two_sided_clip_over_micro_batches(params, batch):
    weights = jnp.exp(0.3 * batch.logprobs - batch.mask)
    options = {"loss_type": "grpo", "delta": 1.3, "entropy_coef": 0.4}

    def plain(params):
        tokens, mask, behavior = (
            x.reshape(ROWS, TIME) for x in (batch.tokens, batch.mask, batch.logprobs)
        )
        where = (batch.prompts, batch.lengths, tokens)
        logprobs, entropy = update.completion_logprobs(
            POLICY, params, *where, entropy_gradient=True
        )
        of = {"weights": weights.reshape(ROWS, TIME), "loss_type": "grpo", "delta": 1.3}
        loss, metrics = grpo.policy_loss(
            logprobs, behavior, batch.advantages.reshape(-1, 1), mask, **of
        )
        rows = jnp.sum(jnp.any(mask > 0, axis=1), dtype=jnp.float32)
        metrics["entropy"] = jnp.sum(masked.mean(entropy, mask, axis=1)) / rows
        return loss - 0.4 * metrics["entropy"], metrics

    want, metrics = jax.jit(jax.grad(plain, has_aux=True))(params)
    for micro_batch_size in (2, ROWS):
        sizes = {"micro_batch_size": micro_batch_size}
        _, state, got = run(params, batch._replace(weights=weights), **options | sizes)
        assert_close(gradient(state), want)
        assert_close({name: got[name] for name in metrics}, metrics)
    assert metrics["clip_ratio/delta_mean"] > 0


def test_a_gradient_of_the_entropy_is_traced_only_with_its_bonus(params, batch):
    """And then the policy becomes less sure, whatever the rewards say."""
    still = batch._replace(advantages=jnp.zeros((TASKS, GROUP)))
    *_, without = run(params, still)
    assert without["grad_norm"] == 0.0
    *_, first = run(params, still, entropy_coef=0.1)
    *_, later = run(params, still, entropy_coef=0.1, num_iterations=8, learning_rate=1e-2)
    assert first["grad_norm"] > 0 and later["entropy"] > first["entropy"]


@pytest.mark.parametrize("kl_estimator", grpo.KL_ESTIMATORS)
def test_kl_to_a_reference(params, batch, kl_estimator):
    """Of a batch that another policy sampled, whole and in micro-batches of two groups; garbage
    under the mask too.
    """
    other, options = (
        jax.tree.map(lambda x: x * 0.7, params),
        {"kl_coef": 0.5, "kl_estimator": kl_estimator},
    )
    (_, metrics), want = plain_gradient(params, batch, other, loss_type="dapo", **options)
    dirty = batch._replace(logprobs=jnp.where(batch.mask > 0, batch.logprobs, jnp.nan))
    _, state, got = run(params, dirty, other, micro_batch_size=8, **options)
    assert metrics["kl"] > 0.01
    np.testing.assert_allclose(got["kl"], metrics["kl"], atol=1e-5)
    assert_close(gradient(state), want)


def test_without_kl_the_reference_is_never_evaluated(params, batch):
    """With a reference at hand no pass of the policy more is traced than without; with kl_coef
    twice as many.
    """
    traced = []
    policy = POLICY._replace(
        apply=lambda *arguments: traced.append(arguments[0]) or POLICY.apply(*arguments)
    )
    without, weighted = make(policy), make(policy, kl_coef=0.1)
    state = without.init(params)
    jax.make_jaxpr(without.step)(KEY, params, state, batch)
    passes, traced[:] = len(traced), []
    jax.make_jaxpr(without.step)(KEY, params, state, batch, params)
    assert len(traced) == passes
    traced[:] = []
    jax.make_jaxpr(weighted.step)(KEY, params, state, batch, params)
    assert len(traced) == 2 * passes


def test_zero_advantages_give_exactly_no_gradient(params, batch):
    after, state, metrics = run(params, batch._replace(advantages=jnp.zeros((TASKS, GROUP))))
    assert metrics["grad_norm"] == 0.0
    chex.assert_trees_all_equal(after, params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state, metrics)))


def test_an_update_that_is_not_finite_is_skipped_and_counted(params, batch):
    """Of mini-batches of two tasks, one has a task without a finite loss; the others' updates are
    made.
    """
    bad = batch._replace(advantages=batch.advantages.at[1, 2].set(jnp.nan))
    after, state, metrics = run(
        params, bad, mini_batch_size=2, num_iterations=3, micro_batch_size=4
    )
    assert (
        metrics["skipped_updates"] == 3
        and optax.tree_utils.tree_get(state, "ScaleByAdamState").count == 3
    )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((after, state, metrics)))
    assert any(
        np.any(x != y) for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True)
    )
    learner = make(num_iterations=2)
    step = jax.jit(learner.step)
    for loss in (jnp.nan, jnp.inf):
        worst = batch._replace(advantages=jnp.full_like(batch.advantages, loss))
        same, skipped, metrics = step(KEY, after, state, worst)
        chex.assert_trees_all_equal((same, skipped.optax), (after, state.optax))
        assert skipped.skipped == state.skipped + 2 and metrics["skipped_updates"] == 2
        assert np.isnan(metrics["policy_loss"]) and np.isnan(metrics["grad_norm"])
    assert step(KEY, after, skipped, batch)[1].skipped == 0


def sizes(jaxpr):
    """The number of elements of every array that a program computes, in its inner programs too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_logits_of_all_positions_never_exist(monkeypatch):
    """Forward and backward: the largest array is the logits of a chunk."""
    policy, time = model.decoder(DECODER), 8
    shapes = jax.eval_shape(partial(model.init, config=DECODER), jax.random.key(0))
    int32, float32 = (
        partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.float32)
    )
    groups = (TASKS, GROUP, time)
    batch = update.Batch(
        int32((TASKS, 3)),
        int32((TASKS,)),
        int32(groups),
        float32(groups),
        float32(groups),
        float32((TASKS, GROUP)),
    )
    ((length, bins_per_round),) = update.bin_shapes(batch, ROWS).values()

    def largest():
        learner = make(policy, kl_coef=0.1)
        program = jax.make_jaxpr(learner.step)(
            KEY, shapes, jax.eval_shape(learner.init, shapes), batch, shapes
        )
        return max(sizes(program.jaxpr))

    assert largest() == bins_per_round * length * 1024  # they fit into one chunk
    monkeypatch.setattr(update, "CHUNK", bins_per_round * 1024 * 8)
    assert largest() == bins_per_round * 1024 * 7  # 34 slots are five chunks of seven


def test_chunks_change_no_number(monkeypatch, params, batch):
    """Of at most 4 positions: 5 are two chunks of 3, and the last one is padded."""
    where = (batch.prompts, batch.lengths, batch.tokens.reshape(ROWS, TIME)[:, :5])

    def mean(params):
        logprobs, entropy = update.completion_logprobs(POLICY, params, *where, temperature=0.7)
        return jnp.mean(logprobs), (logprobs, entropy)

    want = jax.jit(jax.grad(mean, has_aux=True))(params)
    monkeypatch.setattr(update, "CHUNK", 4 * ROWS * VOCABULARY)
    assert_close(jax.jit(jax.grad(mean, has_aux=True))(params), want)


def test_logprobs_and_entropy_by_hand():
    """A policy that gives two tokens the chances 3/4 and 1/4, at temperature 1/2 9/10 and 1/10."""
    policy = helpers.learner_policy(
        apply=lambda params, tokens, *_: (jnp.zeros((*tokens.shape, 1)), None),
        unembed=lambda params, hidden: hidden + params[(None,) * (hidden.ndim - 1)],
    )
    params = jnp.log(jnp.array([3.0, 1.0]))
    where = (jnp.zeros((1, 2), jnp.int32), jnp.array([2]), jnp.array([[0, 1, 0]]))
    for temperature, chances in ((1.0, np.array([0.75, 0.25])), (0.5, np.array([0.9, 0.1]))):
        logprobs, entropy = update.completion_logprobs(
            policy, params, *where, temperature=temperature
        )
        np.testing.assert_allclose(logprobs, np.log(chances)[[[0, 1, 0]]], rtol=1e-5)
        np.testing.assert_allclose(
            entropy, np.full((1, 3), -np.sum(chances * np.log(chances))), rtol=1e-5
        )


def test_the_entropys_gradient_by_hand():
    """d H / d logit_j = -p_j (log p_j + H), for two tokens with the chances 3/4 and 1/4."""
    policy = helpers.learner_policy(
        apply=lambda params, tokens, *_: (jnp.zeros((*tokens.shape, 1)), None),
        unembed=lambda params, hidden: hidden + params[(None,) * (hidden.ndim - 1)],
    )
    where = (jnp.zeros((1, 2), jnp.int32), jnp.array([2]), jnp.array([[0, 1, 0]]))

    def entropy(params, wanted):
        return jnp.mean(
            update.completion_logprobs(policy, params, *where, entropy_gradient=wanted)[1]
        )

    chances, params = np.array([0.75, 0.25]), jnp.log(jnp.array([3.0, 1.0]))
    expected = -chances * (np.log(chances) - np.sum(chances * np.log(chances)))
    np.testing.assert_allclose(jax.grad(entropy)(params, True), expected, rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(entropy)(params, False), [0, 0])


def test_learning_rate_warms_up():
    _, schedule = update.adamw(learning_rate=1.0, warmup_steps=4)
    np.testing.assert_allclose(
        [schedule(i) for i in range(7)], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0], rtol=1e-6
    )
    _, schedule = update.adamw(learning_rate=0.3)
    assert [float(schedule(i)) for i in (0, 9)] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("linear", [0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        # 0.2 + 0.8 (1 + cos(pi i / 4)) / 2
        ("cosine", [0.5, 1.0, 0.882843, 0.6, 0.317157, 0.2, 0.2]),
    ],
)
def test_learning_rate_falls_after_the_warm_up_by_hand(kind, wanted):
    options = {"learning_rate": 1.0, "num_updates": 5, "min_learning_rate_ratio": 0.2}
    _, schedule = update.adamw(warmup_steps=1, learning_rate_schedule=kind, **options)
    np.testing.assert_allclose([schedule(i) for i in range(7)], wanted, rtol=1e-5)
    _, schedule = update.adamw(learning_rate_schedule=kind, learning_rate=1.0, num_updates=2)
    np.testing.assert_allclose([schedule(i) for i in range(4)], [1.0, 0.5, 0.0, 0.0], atol=1e-7)


def test_schedules_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="schedule is 'step': it must be constant, linear or co"):
        update.adamw(learning_rate=1.0, learning_rate_schedule="step")
    for updates in (None, 3):
        with pytest.raises(InputError, match=f"num_updates is {updates}: it must be above .*, 3"):
            update.rate_schedule("linear", learning_rate=1.0, warmup_steps=3, num_updates=updates)


def test_adamw_by_hand():
    """The first change is the learning rate against the gradient's sign, and the decay; gradients
    are clipped.
    """
    options = {"learning_rate": 0.2, "warmup_steps": 1, "weight_decay": 0.5, "max_grad_norm": 1.0}
    optimizer, _ = update.adamw(**options)
    params = {"a": jnp.array([2.0, -4.0])}
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        change, state = optimizer.update({"a": jnp.array([3.0, -4.0])}, state, params)
    np.testing.assert_allclose(change["a"], [-0.1 * (1 + 1.0), -0.1 * (-1 - 2.0)], rtol=1e-5)
    np.testing.assert_allclose(gradient(state)["a"], [0.6, -0.8], rtol=1e-5)


@pytest.mark.parametrize(
    ("decay", "last"),
    [
        ({}, 4e-3),
        pytest.param(
            {"learning_rate_schedule": "linear", "num_updates": 7}, 3e-3, marks=pytest.mark.slow
        ),
        ({"learning_rate_schedule": "cosine", "num_updates": 5}, 2e-3),
    ],
    ids=["constant", "linear", "cosine"],
)
def test_steps_are_traced_once_and_keep_float32(batch, decay, last):
    """The decoder, in bfloat16 arithmetic too; metrics give each step's own learning rate."""
    chex.clear_trace_counter()  # of the steps of other parameters of this test
    params = {row.name: jnp.full(row.shape, 0.1, jnp.float32) for row in model.table(DECODER)}
    policy = model.decoder(DECODER, dtype=jnp.bfloat16, remat="none")
    learner = make(policy, warmup_steps=3, learning_rate=4e-3, **decay)
    step = jax.jit(chex.assert_max_traces(learner.step, n=1))
    state = learner.init(params)
    rates = []
    for number in range(5):
        params, state, metrics = step(jax.random.fold_in(KEY, number), params, state, batch)
        rates.append(metrics["learning_rate"])
        assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
    assert {x.dtype for x in jax.tree.leaves((params, state))} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    np.testing.assert_allclose(rates, [1e-3, 2e-3, 3e-3, 4e-3, last], rtol=1e-5)


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_good_samples_become_likelier(params, batch, loss_type):
    """And bad ones less likely, over a few updates."""
    prompts = (batch.prompts, batch.lengths, batch.tokens.reshape(ROWS, TIME))
    before, _ = learner_logprobs(params, *prompts)
    learner = make(num_iterations=4, learning_rate=1e-3, loss_type=loss_type)
    after, _, _ = jax.jit(learner.step)(
        KEY,
        params,
        learner.init(params),
        batch._replace(logprobs=before.reshape(batch.logprobs.shape)),
    )
    change = (learner_logprobs(after, *prompts)[0] - before).reshape(batch.mask.shape) * batch.mask
    assert float(jnp.sum(change * batch.advantages[..., None])) > 0.1


@pytest.mark.slow
def test_proximal_clip_is_centered_on_the_policy_before_the_update(params, batch):
    """Of two groups that are replayed; of the others it is centered on their own
    log-probabilities.
    """
    replayed = jnp.array([[False], [True], [False], [True]])
    mixed = batch._replace(replayed=jnp.broadcast_to(replayed, (TASKS, GROUP)))
    tokens, mask, behavior = (
        x.reshape(ROWS, TIME) for x in (batch.tokens, batch.mask, batch.logprobs)
    )
    before, _ = learner_logprobs(params, batch.prompts, batch.lengths, tokens)
    old = jnp.repeat(replayed, GROUP, axis=0)

    @jax.jit
    @jax.value_and_grad
    def loss(params, proximal_logprobs):
        logprobs, _ = update.completion_logprobs(
            POLICY, params, batch.prompts, batch.lengths, tokens
        )
        return grpo.policy_loss(
            logprobs,
            behavior,
            batch.advantages.reshape(-1, 1),
            mask,
            proximal_logprobs=proximal_logprobs,
        )[0]

    around_behavior = loss(params, behavior)
    around_proximal = loss(params, jnp.where(old, before, behavior))
    assert abs(around_behavior[0] - around_proximal[0]) > 1e-3
    weights = jnp.exp(before - behavior)[(mask > 0) & old]
    size = jnp.sum(weights) ** 2 / jnp.sum(weights**2) / weights.size
    # Rounds of two groups and of half a group: log-probabilities must return to their samples.
    for clip_center, rows, (value, grads) in (
        ("behavior", 8, around_behavior),
        ("proximal", 8, around_proximal),
        ("proximal", 2, around_proximal),
    ):
        _, state, found = run(params, mixed, clip_center=clip_center, micro_batch_size=rows)
        assert_close(gradient(state), grads)
        np.testing.assert_allclose(found["policy_loss"], value, atol=1e-5)
        np.testing.assert_allclose(found["replay/ess"], size, rtol=1e-4)


def test_without_replayed_groups_nothing_changes(params, batch):
    *state, metrics = run(params, batch)
    *other, found = run(params, batch._replace(replayed=jnp.zeros((TASKS, GROUP), bool)))
    assert np.isnan(found.pop("replay/ess"))
    assert_close((other, found), (state, metrics), atol=1e-7)


def memory(vocabulary, tasks, rows, *, time=4096):
    """Bytes that a compiled step takes beside its arguments, and those of its batch and embeddings;
    nothing is run.
    """
    f32, i32 = (
        partial(jax.ShapeDtypeStruct, dtype=jnp.float32),
        partial(jax.ShapeDtypeStruct, dtype=jnp.int32),
    )
    embeddings = {name: f32((vocabulary, WIDTH)) for name in ("embed", "unembed")}
    params, cells = embeddings | {"mix": f32((WIDTH, WIDTH))}, (tasks, GROUP, time)
    batch = update.Batch(
        i32((tasks, 5)), i32((tasks,)), i32(cells), f32(cells), f32(cells), f32((tasks, GROUP))
    )
    learner = make(mini_batch_size=tasks, micro_batch_size=rows)
    given = (jax.eval_shape(lambda: KEY), params, jax.eval_shape(learner.init, params), batch)
    step = jax.jit(learner.step, donate_argnums=(1, 2)).lower(*given).compile()
    sizes = (
        sum(4 * math.prod(x.shape) for x in jax.tree.leaves(tree)) for tree in (batch, embeddings)
    )
    return step.memory_analysis().temp_size_in_bytes, *sizes


@pytest.mark.slow
def test_memory_grows_with_the_micro_batch_not_with_the_vocabulary_or_the_batch():
    """Four chunks of logits at most, whatever the vocabulary; all logits of 64 rows would be 160 GB
    with the larger.
    """
    least, batch, _ = memory(512, 64, 64)
    large, _, embeddings = memory(151936, 64, 64)
    longer, more, _ = memory(512, 128, 64)
    narrow, deep = (memory(512, 64, rows, time=512)[0] for rows in (2, 8))
    assert max(least, large - embeddings) < 4 * 4 * update.CHUNK
    assert longer <= least + more - batch
    assert deep > narrow + 6 * 512 * WIDTH * 4  # its hidden states, at least
