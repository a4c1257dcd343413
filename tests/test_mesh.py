import math
import re
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxrft import mesh as meshes
from jaxrft.config import Config, TasksConfig
from jaxrft.learn import update
from jaxrft.lm import compaction, model, rollout
from jaxrft.lm.policy import LanguageModel
from jaxrft.lm.segments import Batch, compile_rollout
from jaxrft.types import InputError

CONFIG = model.ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
POLICY = model.decoder(CONFIG, remat="none")
TASKS, GROUP, TIME = 8, 2, 5
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((2, 2, 2), (2, 2, 2)), ((-1, 2, 1), (4, 2, 1)), ((1, -1, 4), (1, 2, 4)), ((), (8, 1, 1))],
)
def test_one_size_takes_what_is_left(sizes, shape):
    assert tuple(meshes.make(*sizes).shape.items()) == tuple(zip(meshes.AXES, shape, strict=True))


def test_a_mesh_of_some_devices():
    assert meshes.make(-1, 2, devices=jax.devices()[:4]).devices.shape == (2, 2, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (3, 1, 1),
            "data=3, fsdp=1, model=1 does not divide the 8 devices: make the product "
            "of the sizes 8",
        ),
        ((2, 2, 1), "data=2, fsdp=2, model=1 does not divide the 8 devices"),
        ((-1, 3, 1), "data=-1, fsdp=3, model=1 does not divide the 8 devices"),
        ((16, 1, 1), "data=16"),
        ((-1, -1, 1), "at most one may be -1"),
        ((0, 1, 1), "data=0, .*sizes are positive"),
        ((4, 2, -2), "model=-2: sizes are positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        meshes.make(*sizes)


def test_a_mesh_axis_serves_the_first_dimension_that_asks():
    both = ("data", "fsdp")
    assert meshes.spec("vocab", "embed") == P(("model",), ("fsdp",))
    assert meshes.spec("batch", "time", "embed") == P(both, None, None)
    assert meshes.spec("embed", "batch") == P(("fsdp",), ("data",))
    assert meshes.spec("batch", None, "vocab") == P(both, None, ("model",))
    assert meshes.spec() == P()


def test_shards_and_division(mesh):
    assert [meshes.shards(mesh, axis) for axis in ("batch", "embed", "vocab", "time")] == [
        4,
        2,
        2,
        1,
    ]
    assert meshes.shards(None, "batch") == 1
    meshes.check_divides(mesh, "batch_size", 12, "batch")
    with pytest.raises(
        InputError, match="batch_size 6 does not divide .* data=2 x fsdp=2: choose a multiple of 4"
    ):
        meshes.check_divides(mesh, "batch_size", 6, "batch")


def test_constrain_needs_a_mesh_of_ours(mesh):
    x = jnp.zeros((8, 3))
    assert meshes.constrain(x, "batch", None) is x
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):  # somebody else's
        assert meshes.constrain(x, "batch", None) is x
    with jax.set_mesh(mesh):
        placed = jax.jit(lambda x: meshes.constrain(x, "batch", None))(x)
    assert placed.sharding.shard_shape(x.shape) == (2, 3)


def test_arrays_of_the_host_are_placed(mesh):
    x = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    placed = meshes.from_host(mesh, x, "batch", None)
    np.testing.assert_array_equal(placed, x)
    assert placed.sharding.shard_shape(x.shape) == (2, 3)


def test_a_table_is_sharded_over_tasks_where_it_has_a_row_a_task(mesh):
    table = {
        "rates": np.ones((8, 2), np.float32),
        "count": np.int32(3),
        "other": np.ones((4, 2), np.float32),
    }
    placed = meshes.place_table(table, mesh, 8)
    shapes = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in placed.items()}
    assert shapes == {"rates": (2, 2), "count": (), "other": (4, 2)}
    odd = meshes.place_table(np.ones(7, np.float32), mesh, 7)  # 4 devices do not divide 7 tasks
    assert odd.sharding.is_fully_replicated


@pytest.fixture(scope="module")
def params():
    # quicker than compiling model.init; norms and biases are random too
    rng = np.random.default_rng(0)
    draws = {
        row.name: rng.normal(row.constant, (row.fan_in or 16) ** -0.5, row.shape)
        for row in model.table(CONFIG)
    }
    return {name: jnp.asarray(draw, jnp.float32) for name, draw in draws.items()}


@pytest.fixture(scope="module")
def prompts():
    """Prompts [B, P] with ragged lengths [B] and ids [B]."""
    rng = np.random.default_rng(0)
    ragged = rng.integers(1, 5, TASKS, np.int32), np.arange(TASKS, dtype=np.int32)
    return rng.integers(2, 32, (TASKS, 4), np.int32), *ragged


def place(mesh, params):
    return jax.device_put(params, model.shardings(CONFIG, mesh))


def place_rows(mesh, tree):
    """Puts arrays with a row a task where a step expects them."""
    return jax.tree.map(lambda x: meshes.from_host(mesh, x, "batch", *(None,) * (x.ndim - 1)), tree)


def test_a_greedy_rollout_is_the_same_on_the_mesh(mesh, params, prompts):
    options = {
        "num_generations": GROUP,
        "max_completion_length": TIME,
        "eos_ids": (0, 1),
        "greedy": True,
    }
    generate = jax.jit(partial(rollout.generate, POLICY, **options))
    want = generate(params, KEY, *prompts)
    with jax.set_mesh(mesh):
        got = generate(place(mesh, params), KEY, *place_rows(mesh, prompts))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    assert got.tokens.sharding.shard_shape(got.tokens.shape) == (TASKS * GROUP // 4, TIME)


def make(micro_batch_size=TASKS * GROUP):
    sizes = {"mini_batch_size": TASKS, "micro_batch_size": micro_batch_size}
    return update.make(POLICY, **sizes, learning_rate=1e-4, max_grad_norm=1e9)


@pytest.fixture(scope="module")
def batch(prompts):
    rng = np.random.default_rng(1)
    groups = (TASKS, GROUP, TIME)
    return update.Batch(
        *prompts[:2],
        tokens=rng.integers(0, 32, groups, np.int32),
        mask=(np.arange(TIME) < rng.integers(1, TIME + 1, (TASKS, GROUP, 1))).astype(np.float32),
        logprobs=rng.normal(-3.0, 0.5, groups).astype(np.float32),
        advantages=rng.normal(size=(TASKS, GROUP)).astype(np.float32),
    )


def test_an_update_is_the_same_on_the_mesh(mesh, params, batch):
    """Given the same tokens: the parameters, the gradient (Adam's first moment is a tenth of it),
    the metrics.

    One device computes more bins at once than a shard of the mesh, whose bins have other shapes.
    """
    learner = make()
    want = jax.jit(learner.step)(
        KEY, params, learner.init(params), jax.tree.map(jnp.asarray, batch)
    )
    learner, placed = make(micro_batch_size=4), place(mesh, params)
    shardings = update.optimizer_shardings(learner, placed, meshes.sharding(mesh))
    state = jax.jit(learner.init, out_shardings=shardings)(placed)
    with jax.set_mesh(mesh):
        got = jax.jit(learner.step)(KEY, placed, state, place_rows(mesh, batch))
    assert_close(got[0], want[0])
    assert_close(
        *(optax.tree_utils.tree_get(state, "mu") for state in (got[1], want[1])), atol=1e-6
    )
    for metrics in (got[2], want[2]):
        assert 0 < metrics.pop("update/utilization") <= 1  # more bins, of which more are free
    assert_close(got[2], want[2])


def assert_close(got, want, atol=1e-5):
    chex.assert_trees_all_close(got, want, rtol=1e-7, atol=atol)


def collectives(compiled, *operations):
    """(whether in a loop, its number of elements) of every array that these operations of a program
    give.
    """
    text = compiled.as_text()
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    looped, left = set(), set(re.findall(r"body=%?([\w.-]+)", text))
    while left:
        looped.add(name := left.pop())
        left |= (
            set(re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", bodies[name])) - looped
        )
    operation = re.compile(rf"= (.*?) (?:{'|'.join(operations)})(?:-start)?\(")
    return [
        (name in looped, math.prod(int(size) for size in shape.split(",") if size))
        for name, body in bodies.items()
        for result in operation.findall(body)
        for shape in re.findall(r"\w\[([\d,]*)\]", result)
    ]


def shapes_of(tree):
    """What a program is compiled for in place of arrays on the mesh."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_the_unembedding_is_gathered_and_its_gradient_reduced_outside_of_the_chunks(
    monkeypatch, mesh, batch
):
    """A chunk a position, of the bins of a round. The embedding is the unembedding."""
    monkeypatch.setattr(update, "CHUNK", 1)
    config = CONFIG._replace(vocab_size=1024, tie_word_embeddings=True)
    objective = update.Objective(
        "dapo", 0.2, None, None, kl_coef=0.0, entropy_coef=0.0, temperature=1.0
    )
    loss = partial(
        update.loss, model.decoder(config), objective, ref_params=None, normalizer=jnp.float32(1.0)
    )
    where = model.shardings(config, mesh)
    params = {
        row.name: meshes.place(np.zeros(row.shape, np.float32), where[row.name])
        for row in model.table(config)
    }

    def gradient(params, batch):
        (packed,) = update.pack(batch, update.bin_shapes(batch, TASKS * GROUP))
        of = partial(loss, batch=packed.batch, bins=packed.bins(0))
        return jax.grad(of, has_aux=True)(params)

    with jax.set_mesh(mesh):
        program = jax.jit(gradient).lower(shapes_of(params), shapes_of(place_rows(mesh, batch)))
        found = collectives(program.compile(), "all-gather", "all-reduce", "reduce-scatter")
    # a device's part of it is larger than a layer
    large = [looped for looped, size in found if size >= 1024 * 16 / 8]
    assert large and not any(large)


@pytest.mark.parametrize(
    ("once", "lora"), [(True, None), (False, None), (True, model.LoRA(2, 4.0, ("k", "down")))]
)
def test_a_rollout_gathers_the_parameters_once(mesh, params, prompts, once, lora):
    """No weight is gathered in the loop over tokens; a layer at a time if so configured."""
    sizes = {"batch_size": TASKS, "num_generations": GROUP, "max_completion_length": TIME}
    config = Config(
        model="policy", tasks=TasksConfig(), output_dir="run", gather_for_rollout=once, **sizes
    )
    shape = CONFIG._replace(lora=lora)
    adapters = {row.name: np.zeros(row.shape, np.float32) for row in model.adapters(shape)}
    placed = jax.device_put(params | adapters, model.shardings(shape, mesh))
    decoder = model.decoder(shape, gather_for_decode=once)
    policy = LanguageModel(shape, decoder, placed, {}, None, (0, 1), Path())
    generate = compile_rollout(policy, config, mesh)
    with jax.set_mesh(mesh):
        inputs = generate.start(Batch(placed, np.int32(0), *place_rows(mesh, prompts)))
        found = collectives(generate.decode.lower(*inputs, length=TIME).compile(), "all-gather")
    smallest = 16 * 8 * CONFIG.num_kv_heads // 2  # a layer's weights of keys, on a device
    assert any(looped and size >= smallest for looped, size in found) != once


def test_rows_move_to_a_smaller_grid_without_exchanges_between_devices(
    monkeypatch, mesh, params, prompts
):
    monkeypatch.setattr(compaction, "SHORT", 0)
    sizes = {"batch_size": TASKS, "num_generations": GROUP, "max_completion_length": TIME}
    config = Config(model="policy", tasks=TasksConfig(), output_dir="run", **sizes)
    placed = jax.device_put(params, model.shardings(CONFIG, mesh))
    policy = LanguageModel(CONFIG, model.decoder(CONFIG), placed, {}, None, (0, 1), Path())
    generate = compile_rollout(policy, config, mesh)
    full, half, *_ = generate.grids(TASKS)
    with jax.set_mesh(mesh):
        inputs, state = generate.start(Batch(placed, np.int32(0), *place_rows(mesh, prompts)))
        arguments = (inputs._replace(weights=()), state, None, np.int32(0))
        program = generate.compact.lower(*arguments, now=full, smaller=half, length=TIME).compile()
    assert not collectives(program, "all-gather", "all-reduce", "all-to-all", "collective-permute")
    moved, drawn, left = program.output_shardings
    before = [x.sharding.spec[:2] for x in jax.tree.leaves((inputs.prompts, state.cache))]
    after = [x.spec[:2] for x in jax.tree.leaves((moved.prompts, drawn.cache))]
    assert after == before


def test_the_moments_of_a_parameter_lie_where_it_lies(mesh, params):
    placed = place(mesh, params)
    shardings = update.optimizer_shardings(make(), placed, meshes.sharding(mesh))
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(shardings, name)
        assert moments == {key: value.sharding for key, value in placed.items()}
    assert optax.tree_utils.tree_get(shardings, "ScaleByAdamState").count == meshes.sharding(mesh)


def test_every_device_computes_as_many_bins(mesh):
    """8 tasks of 2 samples over 4 devices: in any round a device has a quarter of the bins, and no
    sample is lost.
    """
    rng = np.random.default_rng(0)
    cells = (TASKS, GROUP, TIME)
    mask = (np.arange(TIME) < rng.integers(1, TIME + 1, (TASKS, GROUP, 1))).astype(np.float32)
    batch = update.Batch(
        prompts=rng.integers(0, 32, (TASKS, 3), np.int32),
        lengths=rng.integers(1, 4, TASKS, np.int32),
        tokens=rng.integers(0, 32, cells, np.int32),
        mask=mask,
        logprobs=np.zeros(cells, np.float32),
        advantages=np.zeros((TASKS, GROUP), np.float32),
    )

    def bins(batch, number):
        (packed,) = update.pack(batch, update.bin_shapes(batch, 8))
        return packed.bins(number), packed.rounds

    found = []
    with jax.set_mesh(mesh):
        rounds = jax.jit(bins)(place_rows(mesh, batch), 0)[1]
        for number in range(int(rounds)):
            each, _ = jax.jit(bins)(place_rows(mesh, batch), number)
            assert (
                each.tokens.sharding.shard_shape(each.tokens.shape)[0] == each.tokens.shape[0] // 4
            )
            found += zip(
                *(np.asarray(x)[np.asarray(each.predicts)] for x in (each.sample, each.time)),
                strict=True,
            )
    assert sorted(found) == sorted(zip(*np.nonzero(mask.reshape(-1, TIME)), strict=True))


@pytest.mark.parametrize("axes", [("data",), ("data", "model"), ("x",)])
def test_the_mesh_of_another_program_splits_nothing(axes):
    """Whatever its axes are called: our pure functions then compute as without a mesh."""
    theirs = jax.make_mesh(
        (8, 1)[: len(axes)], axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )
    assert [meshes.shards(theirs, name) for name in ("batch", "vocab", "task")] == [1, 1, 1]
    with jax.set_mesh(theirs):
        assert meshes.constrain(jnp.ones((8, 8)), "batch", "vocab").shape == (8, 8)
