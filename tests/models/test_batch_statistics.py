"""Batch statistics are those of the real examples, on any number of devices, as in plain flax."""

from functools import cache, partial

import jax
import numpy as np
import optax
import pytest
from cases import some
from flax import linen, nnx
from jax import numpy as jnp
from virtual_replicas import initial_state, under_vmap

import ctde_jax as ctde
from ctde_jax import aggregate, models
from ctde_jax.aggregate.reducer import IndependentReducer, reducer
from ctde_jax.cost import collectives
from ctde_jax.data import Split
from ctde_jax.devices import replica
from ctde_jax.errors import InputError
from ctde_jax.models.tasks import classification
from ctde_jax.rounds.gradient import make_gradient
from ctde_jax.rounds.round import make_round
from ctde_jax.rounds.state import axes as axes_of

FEATURES, CLASSES, BATCH = 5, 3, 16
EXAMPLES = 90  # 5 full batches and one of 10
INPUTS = np.random.default_rng(0).normal(1, 2, (EXAMPLES, FEATURES)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, CLASSES, EXAMPLES).astype(np.int32)
SPLIT = Split(jnp.asarray(INPUTS), jnp.asarray(LABELS))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        norm = linen.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")
        x = linen.relu(norm(linen.Dense(8, name="first")(x)))
        norm = linen.BatchNorm(not train, momentum=0.5, use_fast_variance=False, name="exact_norm")
        x = linen.relu(norm(linen.Dense(8, name="second")(x)))
        return linen.Dense(CLASSES, name="last")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = nnx.Linear(FEATURES, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.exact_norm = nnx.BatchNorm(8, momentum=0.5, use_fast_variance=False, rngs=rngs)
        self.last = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.exact_norm(self.second(nnx.relu(self.norm(self.first(x)))))))


class Drawing(Nnx):
    """Depends on its key in bits but not in value, so a batch is cut into 8 shards."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return super().__call__(x) + 0 * self.dropout(jnp.ones((1, CLASSES)))


def plain_apply(api: str):
    """The training step in flax without this package: `(params, state, x) -> (outputs, state)`."""
    if api == "linen":
        return lambda params, state, x: Linen().apply(
            {"params": params, **state}, x, train=True, mutable=[*state]
        )
    graph, _, _ = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)

    def apply(params, state, x):
        module = nnx.merge(graph, nnx.State(params), nnx.State(state))
        module.train()
        outputs = module(x)
        return outputs, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return apply


APIS = {"linen": partial(models.from_linen, Linen()), "nnx": partial(models.from_nnx, Nnx)}


def plain_loss(api, params, state, inputs, labels):
    outputs, state = plain_apply(api)(params, state, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean(), state


def assert_close(tree, other, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), tree, other)


@cache
def plain_loop(api: str, steps: int):
    """Returns losses, parameters and averages of a flax loop over the trainer's batches."""
    data = dataset()
    inputs = (np.asarray(data.train.inputs) - data.shift) * data.scale
    init_key, _ = jax.random.split(jax.random.key(0))
    params, state = APIS[api]().init(init_key, jnp.asarray(inputs[:1]))
    optimizer = optax.sgd(0.1, momentum=0.9)
    opt_state = optimizer.init(params)
    step = jax.jit(jax.value_and_grad(partial(plain_loss, api), has_aux=True))
    losses, epoch_steps = [], -(-EXAMPLES // BATCH)
    for number in range(steps):
        epoch, position = divmod(number, epoch_steps)
        batch = np.random.default_rng((0, epoch)).permutation(EXAMPLES)[
            position * BATCH : (position + 1) * BATCH
        ]
        (loss, state), grads = step(params, state, inputs[batch], LABELS[batch])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return losses, params, state


def dataset() -> ctde.data.Dataset:
    return ctde.data.from_arrays(INPUTS, LABELS, INPUTS[:20], LABELS[:20])


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("count", some([1, 2, 4, 8], 4))
def test_default_equals_a_plain_flax_loop_on_any_number_of_devices(api, count):
    """20 steps; three of them have a batch of 10 examples, one or two on each of 8 devices."""
    trained = ctde.fit(
        APIS[api](),
        dataset(),
        optax.sgd(0.1, momentum=0.9),
        devices=ctde.devices.start(count),
        batch_size=BATCH,
        steps=20,
        log_every=1,
        show=False,
    )
    losses, params, state = plain_loop(api, 20)
    assert_close([row["loss"] for row in trained.history if row["split"] == "train"], losses)
    assert_close((trained.params, trained.model_state), (params, state))


@cache
def on_replicas(model, accumulation_steps=1):
    gradient = make_gradient(model, classification, accumulation_steps=accumulation_steps)

    def on_replica(params, model_state, indices):
        grads, new_state, sums = gradient(params, model_state, SPLIT, indices, jax.random.key(3))
        weight = sums["examples"]
        return (
            replica.weighted_mean(grads, weight),
            replica.agreed_state(new_state, model_state, weight),
            sums,
        )

    return first_of(on_replica)


def first_of(on_replica):
    """Runs `on_replica(params, state, indices)` on virtual replicas; returns the first result."""
    run = jax.jit(jax.vmap(on_replica, in_axes=(None, None, 0), axis_name=replica.AXIS))
    return lambda *arguments: jax.tree.map(lambda x: x[0], run(*arguments))


def padded_batch(examples: int, replicas: int, batch_size: int = BATCH) -> np.ndarray:
    """Returns a padded batch of the first examples, `int32[replica, per_replica]`."""
    order = np.arange(examples, dtype=np.int32)
    return np.concatenate([order, np.resize(~order, batch_size - examples)]).reshape(-1, replicas).T


@jax.jit
def closed_form(params, statistics, rows, weights):
    """Gradient and running averages in closed form; examples with weight 0 are excluded."""

    def normalize(name, params, x, momentum):
        mean = weights @ x / weights.sum()
        var = weights @ (x - mean[None]) ** 2 / weights.sum()
        before, new = statistics[name], {"mean": mean, "var": var}
        after[name] = {key: momentum * before[key] + (1 - momentum) * new[key] for key in new}
        x = (x - mean[None]) / jnp.sqrt(var[None] + 1e-5)
        return jax.nn.relu(x * params[name]["scale"][None] + params[name]["bias"][None])

    def loss(params):
        def dense(name, x):
            return x @ params[name]["kernel"] + params[name]["bias"][None]

        x = normalize("norm", params, dense("first", SPLIT.inputs[rows]), 0.9)
        x = normalize("exact_norm", params, dense("second", x), 0.5)
        log_p = jax.nn.log_softmax(dense("last", x))
        return -(weights @ log_p[jnp.arange(len(rows)), SPLIT.labels[rows]]) / weights.sum(), dict(
            after
        )

    after = {}
    return jax.grad(loss, has_aux=True)(params)


def expected_results(params, state, examples: list[int]):
    rows = np.resize(examples, BATCH)
    return closed_form(
        params,
        state.get("batch_stats", state),
        rows,
        (np.arange(BATCH) < len(examples)).astype(np.float32),
    )


def assert_matches(grads, after, expected):
    assert_close((grads, after.get("batch_stats", after)), expected, rtol=1e-4)


@cache
def model_of(api: str) -> models.Model:
    return APIS[api]() if api in APIS else models.from_nnx(Drawing)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
@pytest.mark.parametrize("api", APIS)
def test_gradient_of_every_short_batch_is_that_of_its_real_examples(api, replicas):
    """Some replicas have no examples, such as 7 of 8 in a batch of one."""
    params, state = model_of(api).init(jax.random.key(0), SPLIT.inputs[:1])
    for examples in range(1, BATCH + 1):
        grads, after, _ = on_replicas(model_of(api))(
            params, state, padded_batch(examples, replicas)
        )
        assert_matches(grads, after, expected_results(params, state, list(range(examples))))


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_shards_share_the_statistics_of_their_batch(replicas):
    params, state = model_of("drawing").init(jax.random.key(0), SPLIT.inputs[:1])
    for examples in (1, 3, 11, 16):
        grads, after, _ = on_replicas(model_of("drawing"))(
            params, state, padded_batch(examples, replicas)
        )
        assert_matches(grads, after, expected_results(params, state, list(range(examples))))


@pytest.mark.slow
@pytest.mark.parametrize("api", [*APIS, "drawing"])
def test_microbatches_are_the_same_on_any_number_of_devices(api):
    """Positions 0 to 3 modulo 8, then 4 to 7, normalized separately; the second may be empty."""
    params, state = model_of(api).init(jax.random.key(0), SPLIT.inputs[:1])
    for examples in (3, 6, 13, 16):
        groups = [[i for i in range(examples) if i % 8 // 4 == group] for group in (0, 1)]
        groups = [group for group in groups if group]
        after, grads = state, optax.tree.zeros_like(params)
        for group in groups:
            group_grads, after = expected_results(params, after, group)
            grads = optax.tree.add(grads, optax.tree.scale(len(group) / examples, group_grads))
        for replicas in (1, 2, 4):
            found, found_after, _ = on_replicas(model_of(api), accumulation_steps=2)(
                params, state, padded_batch(examples, replicas)
            )
            assert_matches(found, found_after, (grads, after))


@pytest.mark.parametrize("shared", ["averaged", "synchronized"])
@pytest.mark.parametrize("api", APIS)
def test_local_steps_normalize_with_the_real_examples_of_the_replica(api, shared):
    """The last replica has no examples, and its results are finite."""
    model = APIS[api](shared)
    params, state = model.init(jax.random.key(0), SPLIT.inputs[:1])
    gradient = make_gradient(model, classification)
    indices = np.array([[0, 1, 2, 3], [4, 5, ~4, ~5], [6, ~6, ~6, ~6], [~0, ~0, ~0, ~0]], np.int32)
    run = jax.jit(
        jax.vmap(
            partial(gradient, alone=True),
            in_axes=(None, None, None, 0, None),
            axis_name=replica.AXIS,
        )
    )
    grads, after, sums = run(params, state, SPLIT, indices, jax.random.key(0))
    for index, row in enumerate(indices[:3]):
        found = jax.tree.map(lambda x, index=index: x[index], (grads, after))
        assert_matches(*found, expected_results(params, state, list(row[row >= 0])))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, after, sums)))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[3], y), after, state)


def test_local_steps_have_no_collectives():
    """The compiled round has one collective, outside the loop of the local steps."""
    strategy, devices = ctde.Strategy(inner_steps=3), jax.devices()[:4]
    model, optimizer, axes = models.from_nnx(Nnx), optax.sgd(0.1), axes_of(strategy)
    train_round = make_round(make_gradient(model, classification), optimizer, strategy)
    on_devices = replica.parallel(train_round, devices, (axes, None, 0, None), (axes, 0))
    batches = np.arange(48, dtype=np.int32).reshape(4, 3, 4)
    compiled = on_devices.lower(
        initial_state(model, strategy, jax.random.key(0), optimizer),
        SPLIT,
        batches,
        jax.random.key(0),
    )
    found = collectives.read(compiled.compile().as_text())
    assert {one.op for one in found} == {"all-reduce"}
    assert {one.times for one in found} == {1}


# Variants of batch normalization, each compared with flax on the real examples.


class Subclass(nnx.BatchNorm):
    def __call__(self, x):
        return super().__call__(2 * x) + 1


class Reshaped(nnx.Module):
    """Merges the positions of an example with the batch axis."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(FEATURES, rngs=rngs)

    def __call__(self, x):
        positions = jnp.stack([x, x**2, jnp.sin(x)], axis=1)
        return self.norm(positions.reshape(-1, FEATURES)).reshape(positions.shape).sum(1)


class TimeFirst(Reshaped):
    def __call__(self, x):
        return self.norm(jnp.stack([x, x**2, jnp.sin(x)])).sum(0)


class Images(Reshaped):
    def __call__(self, x):
        return self.norm(x[:, None, None] * jnp.arange(1.0, 7).reshape(1, 2, 3, 1)).sum((1, 2))


class ChannelsFirst(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(FEATURES, axis=1, rngs=rngs)

    def __call__(self, x):
        return self.norm(x[:, :, None] * jnp.arange(1.0, 7).reshape(1, 1, 6)).sum(2)


class ExplicitMask(Reshaped):
    def __call__(self, x):
        return self.norm(x, mask=x > 0)


class Members(nnx.Module):
    """An ensemble, by `nnx.vmap`."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.vmap(lambda rngs: nnx.BatchNorm(FEATURES, rngs=rngs), in_axes=(0,))(
            rngs.split(3)
        )

    def __call__(self, x):
        return nnx.vmap(lambda norm, x: norm(jnp.tanh(x)), in_axes=(0, None))(self.norm, x).sum(0)


class Scanned(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.vmap(lambda rngs: nnx.BatchNorm(FEATURES, rngs=rngs), in_axes=(0,))(
            rngs.split(3)
        )

    def __call__(self, x):
        def layer(x, norm):
            return jnp.sin(norm(x))

        return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.norm)


class Remat(Reshaped):
    def __call__(self, x):
        return nnx.remat(lambda norm, x: norm(jnp.exp(x)))(self.norm, x)


class Jitted(Reshaped):
    @nnx.jit
    def __call__(self, x):
        return self.norm(x)


class Frozen(Reshaped):
    """One layer is constructed frozen, and one is frozen by the argument of its call."""

    def __init__(self, rngs: nnx.Rngs):
        self.frozen = nnx.BatchNorm(FEATURES, use_running_average=True, rngs=rngs)
        self.norm = nnx.BatchNorm(FEATURES, rngs=rngs)

    def __call__(self, x):
        return self.norm(x, use_running_average=True) + self.frozen(x, use_running_average=True)


class ExplicitMode(Reshaped):
    def __call__(self, x):
        return self.norm(x, use_running_average=False)


def layer(**options):
    return lambda rngs: nnx.BatchNorm(FEATURES, **options, rngs=rngs)


NNX = {
    "plain": layer(),
    "subclass": lambda rngs: Subclass(FEATURES, rngs=rngs),
    "without scale and bias": layer(use_scale=False, use_bias=False),
    "momentum 0": layer(momentum=0.0),
    "momentum 1": layer(momentum=1.0),
    "bfloat16": layer(dtype=jnp.bfloat16),
    "slow variance": layer(use_fast_variance=False),
    "merged positions": Reshaped,
    "time first": TimeFirst,
    "images": Images,
    "channels first": ChannelsFirst,
    "explicit mask": ExplicitMask,
    "nnx.vmap": Members,
    "nnx.scan": Scanned,
    "nnx.remat": Remat,
    "nnx.jit": Jitted,
    "frozen": Frozen,
    "explicit mode": ExplicitMode,
}


class LinenSubclass(linen.BatchNorm):
    @linen.compact
    def __call__(self, x, use_running_average=None):
        return super().__call__(2 * x, use_running_average) + 1


class LinenLayer(linen.Module):
    """Passes the mode in the call."""

    options: dict
    kind: type = linen.BatchNorm

    @linen.compact
    def __call__(self, x, train: bool):
        return self.kind(**self.options)(x, use_running_average=not train)


class LinenFrozen(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        return linen.BatchNorm(use_running_average=True)(x)


class LinenPositions(linen.Module):
    layout: str

    @linen.compact
    def __call__(self, x, train: bool):
        norm, positions = (
            linen.BatchNorm(use_running_average=not train),
            jnp.stack([x, x**2, jnp.sin(x)], axis=1),
        )
        if self.layout == "merged":
            return norm(positions.reshape(-1, FEATURES)).reshape(positions.shape).sum(1)
        if self.layout == "time first":
            return norm(positions.swapaxes(0, 1)).sum(0)
        return norm(x, mask=x > 0)


class LinenLifted(linen.Module):
    lift: str

    @linen.compact
    def __call__(self, x, train: bool):
        if self.lift == "remat":
            return linen.remat(linen.BatchNorm)(use_running_average=not train)(jnp.exp(x))
        if self.lift == "jit":
            return linen.jit(linen.BatchNorm)(use_running_average=not train)(x)
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        if self.lift == "vmap":
            members = linen.vmap(linen.BatchNorm, in_axes=None, axis_size=3, **axes)
            return members(use_running_average=not train)(jnp.tanh(x)).sum(0)

        def body(norm, x, _):
            return jnp.sin(norm(x)), None

        norm = linen.BatchNorm(use_running_average=not train)
        return linen.scan(body, length=3, **axes)(norm, x, None)[0]


LINEN = {
    "plain": LinenLayer({}),
    "subclass": LinenLayer({}, LinenSubclass),
    "axis 1, without scale and bias": LinenLayer(
        {"axis": 1, "use_scale": False, "use_bias": False}
    ),
    "momentum 0": LinenLayer({"momentum": 0.0}),
    "momentum 1": LinenLayer({"momentum": 1.0}),
    "bfloat16": LinenLayer({"dtype": jnp.bfloat16}),
    "slow variance": LinenLayer({"use_fast_variance": False}),
    "frozen": LinenFrozen(),
    "merged positions": LinenPositions("merged"),
    "time first": LinenPositions("time first"),
    "explicit mask": LinenPositions("explicit mask"),
    "remat": LinenLifted("remat"),
    "jit": LinenLifted("jit"),
    "vmap": LinenLifted("vmap"),
    "scan": LinenLifted("scan"),
}

cubes = ctde.Task(
    lambda outputs, labels: jnp.sum((outputs.astype(jnp.float32) - 0.5) ** 3, axis=-1)
)


def check_variant(model: models.Model, flax_apply) -> None:
    """Compares outputs, gradients and running averages with flax, on 1 and 4 replicas."""
    inputs = SPLIT.inputs[:BATCH]
    params, state = model.init(jax.random.key(0), inputs)
    params = jax.tree.map(lambda x: x + jnp.linspace(0.1, 0.3, x.size).reshape(x.shape), params)
    for examples in (11, 13):

        def loss(params, examples=examples):
            outputs, after = flax_apply(params, state, inputs[:examples])
            return cubes.loss(outputs, SPLIT.labels[:examples]).mean(), after

        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
        for replicas in (1, 4):
            gradient = make_gradient(model, cubes)

            def on_replica(params, state, indices, gradient=gradient):
                grads, new_state, sums = gradient(params, state, SPLIT, indices, jax.random.key(0))
                weight = sums["examples"]
                return (
                    replica.weighted_mean(grads, weight),
                    replica.agreed_state(new_state, state, weight),
                    replica.add_up(sums),
                )

            replica_grads, replica_state, sums = first_of(on_replica)(
                params, state, padded_batch(examples, replicas)
            )
            rtol = (
                2e-2
                if any(
                    x.dtype == jnp.bfloat16
                    for x in jax.tree.leaves(flax_apply(params, state, inputs)[0])
                )
                else 1e-4
            )
            np.testing.assert_allclose(sums["loss"] / sums["examples"], value, rtol=rtol)
            assert_close((replica_grads, replica_state), (grads, after), rtol=rtol, atol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize("name", NNX)
def test_nnx_variant_counts_real_examples_only(name):
    graph, _, _ = nnx.split(NNX[name](nnx.Rngs(0)), nnx.Param, ...)

    def apply(params, state, x):
        module = nnx.merge(graph, nnx.State(params), nnx.State(state))
        outputs = module(x)
        return outputs, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))

    check_variant(models.from_nnx(NNX[name]), apply)


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEN)
def test_linen_variant_counts_real_examples_only(name):
    module = LINEN[name]
    check_variant(
        models.from_linen(module),
        lambda params, state, x: module.apply(
            {"params": params, **state}, x, train=True, mutable=[*state]
        ),
    )


@pytest.mark.slow
def test_message_of_an_independent_reducer_depends_on_one_replica():
    """For robust rules and private averages: gradients of a replica's real examples."""

    def update(message, state, params=None, **extra_args):
        return replica.weighted_mean(message, 1.0), message

    recorder = partial(reducer, lambda params: optax.tree.zeros_like(params), update)
    strategy = ctde.Strategy(reduce=recorder(independent=True))
    model = models.from_linen(Linen())
    current = initial_state(model, strategy, jax.random.key(0))
    batches = padded_batch(11, 4)[:, None]
    train_round = under_vmap(
        make_round(make_gradient(model, classification), optax.sgd(0.1, 0.9), strategy), strategy
    )
    after, _ = train_round(current, SPLIT, batches, jax.random.key(0))
    for index, (row,) in enumerate(batches):
        message = jax.tree.map(lambda x, index=index: x[index], after.reduce_state)
        assert_close(
            message,
            expected_results(current.params, current.model_state, list(row[row >= 0]))[0],
            rtol=1e-4,
        )


@pytest.mark.parametrize(
    ("reduce", "is_independent"),
    [
        (aggregate.mean(), False),
        (aggregate.two_phase(), False),
        (aggregate.two_phase(combine=aggregate.median()), True),
        (aggregate.private(1.0, 0.1), True),
    ],
)
def test_reducers_without_weights_are_independent(reduce, is_independent):
    assert isinstance(reduce, IndependentReducer) == is_independent


def test_custom_model_with_state_must_take_the_mask():
    model = models.from_linen(Linen())
    without_mask = models.Model(
        model.init, lambda params, state, inputs, key: model.apply(params, state, inputs, key)
    )
    with pytest.raises(
        InputError, match="model has state, so its apply must take a fifth argument, mask"
    ):
        ctde.fit(without_mask, dataset(), optax.sgd(0.1), batch_size=BATCH, steps=1, show=False)
