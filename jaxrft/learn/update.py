"""The training step: mini-batches, packed into bins, log-probabilities in chunks, one optimizer
update each.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec, Sharding

from jaxrft import mesh as meshes
from jaxrft.learn import grpo, masked, packing, replay
from jaxrft.learn.packing import Bins
from jaxrft.lm import blocks, sampling
from jaxrft.lm.model import Params, Policy, all_params
from jaxrft.lm.rollout import prefill
from jaxrft.mesh import constrain
from jaxrft.shapes import REAL, check_shapes
from jaxrft.types import Array, InputError, PyTree

# The number of logits that a device computes at a time, 256 MB in float32. A larger vocabulary
# means fewer positions.
CHUNK = 2**26

Metrics = dict[str, Array]  # scalars


class Batch(NamedTuple):
    """The groups of B tasks that a step learns from."""

    prompts: Array  # [B, P] int32, right-padded
    lengths: Array  # [B] int32, of the prompts
    tokens: Array  # [B, G, T] int32
    mask: Array  # [B, G, T] float32, 0 = leaves the loss
    logprobs: Array  # [B, G, T] float32, of the policy that sampled the tokens
    advantages: Array  # [B, G] float32
    # [B, G] bool, whether the group is of an earlier step; None in a run without replay
    replayed: Array | None = None
    # [B, G, T] float32, of the policy around which ratios are clipped; None = `logprobs`
    proximal_logprobs: Array | None = None
    weights: Array | None = None  # [B, G, T] float32, of the tokens' losses; None = 1 each


class OptimizerState(NamedTuple):
    """The state of the optimizer, and the number of updates that were just skipped."""

    skipped: Array  # [] int32, latest updates in a row that were skipped
    optax: optax.OptState


class Step(Protocol):
    """Learns from a batch."""

    def __call__(
        self,
        key: Array,
        params: PyTree,
        optimizer_state: OptimizerState,
        batch: Batch,
        ref_params: PyTree | None = None,
        frozen: Params | None = None,
    ) -> tuple[PyTree, OptimizerState, Metrics]:
        """Returns (params, optimizer_state, metrics).

        Trains `params`; a policy whose parameters are a dict may have others, `frozen`, which are
        not trained. Raises InputError for arrays of the batch whose shapes or kinds of numbers do
        not fit.
        """
        ...


class Update(NamedTuple):
    """A training step, ready to be jitted; donate `params` and `optimizer_state`."""

    init: Callable[[PyTree], OptimizerState]
    """params -> optimizer_state, float32."""
    step: Step


def check_batch(batch: Batch) -> None:
    """Raises InputError for arrays of a batch whose shapes or kinds of numbers do not fit."""
    check_shapes(
        tokens=(batch.tokens, "BGT", int),
        prompts=(batch.prompts, "BP", int),
        lengths=(batch.lengths, "B", int),
        mask=(batch.mask, "BGT", REAL),
        logprobs=(batch.logprobs, "BGT", float),
        advantages=(batch.advantages, "BG", float),
        replayed=(batch.replayed, "BG", REAL),
        proximal_logprobs=(batch.proximal_logprobs, "BGT", float),
        weights=(batch.weights, "BGT", REAL),
    )


def rate_schedule(
    kind: str,
    *,
    learning_rate: float,
    warmup_steps: int = 0,
    num_updates: int | None = None,
    min_ratio: float = 0.0,
) -> optax.Schedule:
    """Creates the learning rate of each update, from 0 on.

    It rises linearly over `warmup_steps` updates. From then on it is "constant", or falls to
    `min_ratio` of `learning_rate` over the other ones of `num_updates`: "linear", or along half a
    period of a "cosine". Raises InputError for another kind, and for a decay that has no updates.
    """
    if kind not in ("constant", "linear", "cosine"):
        raise InputError(
            f"learning_rate_schedule is {kind!r}: it must be constant, linear or cosine"
        )
    warmup = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    if kind == "constant":
        return warmup if warmup_steps else optax.constant_schedule(learning_rate)
    decay_steps = (num_updates or 0) - warmup_steps
    if decay_steps <= 0:
        raise InputError(
            f"num_updates is {num_updates}: it must be above warmup_steps, {warmup_steps}, since "
            f"the learning rate decays over the rest"
        )
    if kind == "linear":
        decay = optax.linear_schedule(learning_rate, min_ratio * learning_rate, decay_steps)
    else:
        decay = optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=min_ratio)
    return optax.join_schedules([warmup, decay], [warmup_steps]) if warmup_steps else decay


def adamw(
    *,
    learning_rate: float,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    learning_rate_schedule: str = "constant",
    num_updates: int | None = None,
    min_learning_rate_ratio: float = 0.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Creates AdamW behind clipping by global norm, and the schedule of its learning rate, of
    `rate_schedule`.
    """
    schedule = rate_schedule(
        learning_rate_schedule,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        num_updates=num_updates,
        min_ratio=min_learning_rate_ratio,
    )
    return (
        optax.chain(
            optax.clip_by_global_norm(max_grad_norm),
            optax.adamw(schedule, weight_decay=weight_decay, mu_dtype=jnp.float32),
        ),
        schedule,
    )


def completion_logprobs(
    policy: Policy,
    params: PyTree,
    prompts: Array,
    lengths: Array,
    tokens: Array,
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
) -> tuple[Array, Array]:
    """Computes log pi of completions [R, T] after prompts [B, P], and the entropy of each step.

    Both are [R, T], at `temperature`. Row r follows prompt r // (R / B), which is computed once.
    Logits exist for a few positions at a time only. The entropy carries a gradient, which costs
    another pass over the logits, only with `entropy_gradient`.
    """
    check_shapes(
        tokens=(tokens, "RT", int), prompts=(prompts, "BP", int), lengths=(lengths, "B", int)
    )
    rows, steps = tokens.shape
    if rows % prompts.shape[0]:
        raise InputError(
            f"tokens has {rows} rows: it must have as many for each of {prompts.shape[0]} prompts"
        )
    generations = rows // prompts.shape[0]
    last, prefix = prefill(policy, params, prompts, lengths)
    positions = (
        jnp.repeat(lengths, generations)[:, None] + jnp.arange(steps - 1, dtype=jnp.int32)[None]
    )
    hidden = jnp.repeat(last, generations, axis=0)[:, None]
    if steps > 1:
        rest, _ = policy.apply(
            params, tokens[:, :-1], positions, jnp.ones(positions.shape, bool), prefix
        )
        hidden = jnp.concatenate([hidden, rest], axis=1)
    return _chunked_logprobs(policy, params, hidden, tokens, temperature, entropy_gradient)


def _chunked_logprobs(
    policy: Policy,
    params: PyTree,
    hidden: Array,
    tokens: Array,
    temperature: float,
    entropy_gradient: bool,
) -> tuple[Array, Array]:
    """Computes log pi of tokens [R, T] and entropies [R, T] from hidden states [R, T, D].

    It computes them in chunks of time, so that few logits exist at once.

    On a mesh each shard of the rows goes through its chunks by itself: what `unembed` uses is
    gathered over `data` and `fsdp` once before the loop, and its gradient, summed by each device
    over its own rows, is reduced once after it. The cost is a full copy of it and of its gradient
    in the parameters' dtype, sharded over `model` only.
    """

    def chunk(params: PyTree, hidden: Array, tokens: Array) -> tuple[Array, Array]:
        logp = jax.nn.log_softmax(policy.unembed(params, hidden) / temperature)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        if not entropy_gradient:
            entropy = jax.lax.stop_gradient(entropy)
        return sampling.pick(logp, tokens), entropy

    mesh = jax.sharding.get_abstract_mesh()
    axes = meshes.RULES["batch"]
    shards = meshes.shards(mesh, "batch")
    vocabulary = jax.eval_shape(policy.unembed, params, hidden[:, :1]).shape[-1] // meshes.shards(
        mesh, "vocab"
    )
    width = max(1, CHUNK // (hidden.shape[0] // shards * vocabulary))
    if shards == 1:
        return blocks.over_time(partial(chunk, params), width, hidden, tokens)

    def shard(params: PyTree, hidden: Array, tokens: Array) -> tuple[Array, Array]:
        # The transpose of pcast is the sum over devices, which runs once here, not in the loop.
        params = jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), params)
        return blocks.over_time(partial(chunk, params), width, hidden, tokens)

    rows = PartitionSpec(axes)
    return jax.shard_map(
        shard, in_specs=(PartitionSpec(), rows, rows), out_specs=(rows, rows), axis_names=set(axes)
    )(params, hidden, tokens)


def bin_shapes(batch: Batch, rows: int) -> dict[int, packing.Shape]:
    """Chooses the shapes of the bins of a batch on the ambient mesh, of which `rows` full
    completions fit into memory, by the longest completion.
    """
    groups, group_size, steps = batch.tokens.shape
    return packing.choose_shapes(
        prompt_length=batch.prompts.shape[1],
        completion_length=steps,
        num_generations=group_size,
        rows=rows,
        samples=groups * group_size,
        shards=meshes.shards(jax.sharding.get_abstract_mesh(), "batch"),
    )


class PackedBatch(NamedTuple):
    """A batch, replicated on all devices, and the bins of its samples of one shape."""

    batch: Batch
    layout: packing.Packing
    shape: packing.Shape

    @property
    def rounds(self) -> Array:
        """Counts the rounds in which all bins are computed. [] int32."""
        return -(-self.layout.count // self.shape.bins_per_round)

    @property
    def slots(self) -> Array:
        """Counts the slots of all rounds. [] int32."""
        return self.rounds * self.shape.bins_per_round * self.shape.length

    def bins(self, number: Array) -> Bins:
        """Fills the bins of a round, of which each device computes the same number."""
        batch = self.batch
        bins = packing.fill_bins(
            self.layout, self.shape, number, batch.prompts, batch.lengths, batch.tokens
        )
        return jax.tree.map(lambda x: constrain(x, "batch", "time"), bins)


def pack(batch: Batch, shapes: dict[int, packing.Shape]) -> list[PackedBatch]:
    """Packs the samples of a batch into bins, each of the first shape that is for its length.

    `shapes` by the longest completion, in ascending order.
    """
    # Replicated, since any bin may hold any sample. The batch is small next to the activations.
    batch = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), batch)
    if len(shapes) == 1:
        (shape,) = shapes.values()
        return [PackedBatch(batch, packing.pack(batch.lengths, batch.mask, shape), shape)]
    size = packing.sample_sizes(batch.mask)
    packed = []
    shorter = 0
    for longest, shape in shapes.items():
        is_here = (size > shorter) & (size <= longest)
        mask = jnp.where(is_here[..., None], batch.mask, 0)
        packed.append(PackedBatch(batch, packing.pack(batch.lengths, mask, shape), shape))
        shorter = longest
    return packed


def of_slots(x: Array, bins: Bins) -> Array:
    """Returns the numbers of samples [B, G] or of their tokens [B, G, T] at the slots of bins, [M,
    C].
    """
    if x.ndim == 2:
        return x.reshape(-1)[bins.sample]
    return x.reshape(-1, x.shape[2])[bins.sample, bins.time]


def bin_logprobs(
    policy: Policy,
    params: PyTree,
    batch: Batch,
    bins: Bins,
    *,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[Array, Array]:
    """Computes `completion_logprobs` of bins: log pi of the token that a slot predicts, and the
    entropy, [M, C].
    """
    hidden, _ = policy.apply(params, bins.tokens, bins.positions, bins.valid, None, bins.segments)
    return _chunked_logprobs(
        policy, params, hidden, of_slots(batch.tokens, bins), temperature, entropy_gradient
    )


def with_proximal_logprobs(
    policy: Policy, params: PyTree, batch: Batch, *, rows: int, temperature: float
) -> Batch:
    """Sets `proximal_logprobs` of a batch: those of replayed groups are computed under `params`."""
    if batch.replayed is None:
        return batch

    def add(packed: PackedBatch, number: Array, proximal_logprobs: Array) -> Array:
        replayed = packed.batch.replayed
        assert replayed is not None
        bins = packed.bins(number)
        logprobs, _ = bin_logprobs(policy, params, packed.batch, bins, temperature=temperature)
        is_replayed = bins.predicts & of_slots(replayed, bins)
        # the others get an index out of range, and are dropped
        sample = jnp.where(is_replayed, bins.sample, proximal_logprobs.shape[0])
        return proximal_logprobs.at[sample, bins.time].set(logprobs, mode="drop")

    parts = pack(batch, bin_shapes(batch, rows))
    proximal_logprobs = parts[0].batch.logprobs.reshape(-1, batch.logprobs.shape[2])
    for part in parts:
        proximal_logprobs = jax.lax.fori_loop(0, part.rounds, partial(add, part), proximal_logprobs)
    return batch._replace(proximal_logprobs=proximal_logprobs.reshape(batch.logprobs.shape))


class Objective(NamedTuple):
    """The options of the loss that the policy minimizes."""

    loss_type: str
    epsilon: float
    epsilon_high: float | None
    delta: float | None
    kl_coef: float
    entropy_coef: float
    temperature: float
    kl_estimator: str = "k3"


def make(
    policy: Policy,
    *,
    mini_batch_size: int,
    micro_batch_size: int,
    num_iterations: int = 1,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    clip_center: str = "behavior",
    learning_rate: float = 1e-6,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    learning_rate_schedule: str = "constant",
    num_updates: int | None = None,
    min_learning_rate_ratio: float = 0.0,
) -> Update:
    """Builds the learning step: passes over a batch, with one AdamW update for each mini-batch.

    A step takes `num_iterations` passes. `mini_batch_size` counts tasks. Each pass draws new
    mini-batches and packs their completions into bins (see `learn.packing`), whose gradients are
    summed in float32. `micro_batch_size` limits memory: it is the number of full-length completions
    that the bins of a round may hold. It does not change the result. The loss is that of
    `grpo.policy_loss`, plus kl_coef * KL, minus entropy_coef * entropy, all reduced alike; a
    reference policy is evaluated only if `kl_coef` > 0, the entropy differentiated only if
    `entropy_coef` > 0. `kl_estimator` is one of `grpo.KL_ESTIMATORS`. The ratios of replayed groups
    are clipped around 1 (`clip_center` "behavior") or pi / mu of the step's first policy
    ("proximal"). An update whose loss or gradient is not finite is skipped: parameters and
    optimizer stay the same, bit for bit. Metrics are means over the other updates; the effective
    sample size is that of all their replayed tokens. For the learning rate see `rate_schedule`; an
    update that is skipped does not count.
    """
    optimizer, schedule = adamw(
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        learning_rate_schedule=learning_rate_schedule,
        num_updates=num_updates,
        min_learning_rate_ratio=min_learning_rate_ratio,
    )
    apply_update = partial(_apply_update, optimizer)
    objective = Objective(
        loss_type, epsilon, epsilon_high, delta, kl_coef, entropy_coef, temperature, kl_estimator
    )

    def step(
        key: Array,
        params: PyTree,
        optimizer_state: OptimizerState,
        batch: Batch,
        ref_params: PyTree | None = None,
        frozen: Params | None = None,
    ) -> tuple[PyTree, OptimizerState, Metrics]:
        check_batch(batch)
        tasks = batch.advantages.shape[0]
        if clip_center == "proximal":
            before = all_params(params, frozen)
            batch = with_proximal_logprobs(
                policy, before, batch, rows=micro_batch_size, temperature=temperature
            )
        passes = jax.vmap(lambda k: jax.random.permutation(k, tasks))(
            jax.random.split(key, num_iterations)
        )

        def update(
            carry: tuple[PyTree, OptimizerState], rows: Array
        ) -> tuple[PyTree, tuple[Metrics, Array]]:
            params, state = carry
            mini_batch = batch
            if mini_batch_size < tasks:
                mini_batch = jax.tree.map(lambda x: x[rows], batch)
            grads, metrics = gradient(
                policy, objective, params, mini_batch, ref_params, frozen, rows=micro_batch_size
            )
            metrics |= {
                "grad_norm": optax.global_norm(grads),
                "learning_rate": _learning_rate(schedule, state),
            }
            is_finite = jnp.isfinite(metrics["policy_loss"]) & jnp.isfinite(metrics["grad_norm"])
            # jnp.where would keep the old and the new parameters in memory
            carry = jax.lax.cond(is_finite, apply_update, _skip_update, params, state, grads)
            return carry, (metrics, is_finite)

        carry = params, optimizer_state
        mini_batches = passes.reshape(-1, mini_batch_size)
        carry, (metrics, is_finite) = jax.lax.scan(update, carry, mini_batches)
        metrics = jax.tree.map(lambda x: _mean_of(x, is_finite), metrics)
        metrics["skipped_updates"] = jnp.sum(~is_finite, dtype=jnp.float32)
        if batch.replayed is not None:
            metrics["replay/ess"] = replay.effective_sample_size(metrics["replay/ess"])
        return *carry, metrics

    def init(params: PyTree) -> OptimizerState:
        return OptimizerState(jnp.zeros((), jnp.int32), optimizer.init(params))

    return Update(init=init, step=step)


def _apply_update(
    optimizer: optax.GradientTransformation, params: PyTree, state: OptimizerState, grads: PyTree
) -> tuple[PyTree, OptimizerState]:
    """Returns the parameters and the optimizer's state after an update."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
        updates, optax_state = optimizer.update(grads, state.optax, params)
    state = OptimizerState(jnp.zeros_like(state.skipped), optax_state)
    return optax.apply_updates(params, updates), state


def _skip_update(
    params: PyTree, state: OptimizerState, grads: PyTree
) -> tuple[PyTree, OptimizerState]:
    """Returns the parameters and the optimizer's state as they are, and counts the update."""
    return params, state._replace(skipped=state.skipped + 1)


def _mean_of(x: Array, valid: Array) -> Array:
    """Averages x [U, ...] over the updates that are `valid` [U] bool; NaN if none is."""
    mask = valid.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.sum(jnp.where(mask, x, 0.0), axis=0) / jnp.sum(valid, dtype=jnp.float32)


def gradient(
    policy: Policy,
    objective: Objective,
    params: PyTree,
    batch: Batch,
    ref_params: PyTree | None,
    frozen: Params | None,
    *,
    rows: int,
) -> tuple[PyTree, Metrics]:
    """Computes the gradient with respect to `params` and the metrics of a mini-batch, of which
    `rows` completions fit into memory.

    The sum over rounds of bins is a loop outside of the gradient; their number depends on the data.
    """
    mask = batch.mask.reshape(-1, batch.mask.shape[-1])
    normalizer = grpo.normalizer(mask, objective.loss_type, mask.shape[1])
    parts = pack(batch, bin_shapes(batch, rows))

    def round_gradient(packed: PackedBatch, number: Array) -> tuple[PyTree, Metrics]:
        bins = packed.bins(number)

        def round_loss(params: PyTree) -> tuple[Array, Metrics]:
            return loss(
                policy,
                objective,
                all_params(params, frozen),
                batch=packed.batch,
                bins=bins,
                ref_params=ref_params,
                normalizer=normalizer,
            )

        return jax.grad(round_loss, has_aux=True)(params)

    def add(packed: PackedBatch, number: Array, total: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, total, round_gradient(packed, number))

    shapes = jax.eval_shape(partial(round_gradient, parts[0]), jnp.zeros((), jnp.int32))
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    for part in parts:
        total = jax.lax.fori_loop(0, part.rounds, partial(add, part), total)
    grads, metrics = total
    computed = sum(part.slots for part in parts)
    metrics["update/utilization"] = masked.count(mask) / jnp.maximum(computed, 1).astype(
        jnp.float32
    )
    return grads, metrics


def loss(
    policy: Policy,
    objective: Objective,
    params: PyTree,
    *,
    batch: Batch,
    bins: Bins,
    ref_params: PyTree | None,
    normalizer: Array,
) -> tuple[Array, Metrics]:
    """Computes the loss of some bins of a mini-batch, divided by the mini-batch's normalizer."""
    temperature = objective.temperature
    needs_entropy = objective.entropy_coef > 0
    logprobs, entropy = bin_logprobs(
        policy, params, batch, bins, temperature=temperature, entropy_gradient=needs_entropy
    )
    mask = jnp.where(bins.predicts, of_slots(batch.mask, bins).astype(jnp.float32), 0.0)
    behavior = of_slots(batch.logprobs, bins)
    sequences = bins.segments.ids
    length = batch.tokens.shape[2]

    def optional(x: Array | None) -> Array | None:
        return None if x is None else of_slots(x, bins)

    value, metrics = grpo.policy_loss(
        logprobs,
        behavior,
        of_slots(batch.advantages, bins),
        mask,
        proximal_logprobs=optional(batch.proximal_logprobs),
        weights=optional(batch.weights),
        sequences=sequences,
        loss_type=objective.loss_type,
        epsilon=objective.epsilon,
        epsilon_high=objective.epsilon_high,
        delta=objective.delta,
        normalizer=normalizer,
        max_completion_length=length,
    )
    reduction = grpo.LOSS_TYPES[objective.loss_type].reduction
    weights = reduction.weights(mask, length, sequences) / normalizer
    metric_weights = reduction.metric_weights(mask, length, sequences) / normalizer
    entropy = masked.zero(entropy, mask)
    metrics["policy_loss"] = value
    metrics["entropy"] = jnp.sum(metric_weights * entropy)
    if batch.replayed is not None:
        replayed = mask * of_slots(batch.replayed, bins).astype(mask.dtype)
        metrics["replay/ess"] = replay.weight_moments(logprobs, behavior, replayed)
    if needs_entropy:
        value = value - objective.entropy_coef * jnp.sum(weights * entropy)
    if objective.kl_coef > 0:
        reference, _ = bin_logprobs(policy, ref_params, batch, bins, temperature=temperature)
        reference = jax.lax.stop_gradient(masked.zero(reference, mask))
        kl = grpo.KL_ESTIMATORS[objective.kl_estimator](
            masked.zero(logprobs, mask), reference, masked.zero(behavior, mask)
        )
        value = value + objective.kl_coef * jnp.sum(weights * kl)
        metrics["kl"] = jnp.sum(metric_weights * kl)
    return value, metrics


def _learning_rate(schedule: optax.Schedule, state: OptimizerState) -> Array:
    """Computes the learning rate of the next update from the optimizer's own count of updates."""
    count = optax.tree_utils.tree_get(state, "ScaleByScheduleState").count
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
        return jnp.asarray(schedule(count), jnp.float32)


def optimizer_shardings(learner: Update, params: PyTree, replicated: Sharding) -> PyTree:
    """Builds the shardings of the optimizer's state.

    A parameter's moments are sharded as the parameter. Everything else is `replicated`.
    """
    shapes = jax.eval_shape(learner.init, params)
    return optax.tree_map_params(
        learner.init,
        lambda _, x: x.sharding,
        shapes,
        params,
        transform_non_params=lambda _: replicated,
    )
