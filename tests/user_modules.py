"""Modules of users by special property; `test_user_modules.py` trains all of them."""

from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from ctde_jax.errors import InputError
from ctde_jax.models import tasks

FEATURES, CLASSES, EXAMPLES = 6, 3, 16
RNG = np.random.default_rng(0)
INPUTS = {
    "features": RNG.normal(size=(EXAMPLES, FEATURES)).astype(np.float32),
    "pictures": RNG.normal(size=(EXAMPLES, 8, 8, 1)).astype(np.float32),
    "sequences": RNG.normal(size=(EXAMPLES, 5, FEATURES)).astype(np.float32),
    "tokens": RNG.integers(0, 7, (EXAMPLES, 5)).astype(np.int32),
    "bytes": np.full((EXAMPLES, FEATURES), [0, 50, 100, 150, 200, 255], np.uint8),
}
LABELS = RNG.integers(0, CLASSES, EXAMPLES).astype(np.int32)


class Case(NamedTuple):
    """A module, and the arguments with which a plain loop calls it."""

    module: Any
    """The argument of `fit`."""

    inputs: str = "features"
    train: dict[str, Any] = {}
    """Keyword arguments of `__call__` in training."""

    infer: dict[str, Any] = {}
    task: tasks.Task = tasks.classification
    make: Any = None
    """Builds the module from rngs, or is the linen module; by default `module` itself."""

    at_start: dict[str, Any] | None = None
    """Keyword arguments of linen's `init`; by default those of inference."""

    is_random: bool = False
    streams: tuple[str, ...] = ("dropout",)


def cross_entropy(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


class Normed(nnx.Module):
    """A network of 4 features and 3 classes with dropout and batch statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


class LinenNormed(nn.Module):
    """Like `Normed`."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


# --- nnx ---------------------------------------------------------------------


class Plain(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.last = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


class ArrayAttribute(Plain):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.scale = jnp.linspace(0.5, 1.5, FEATURES)
        self.shift = np.ones(FEATURES, np.float32)
        self.projection = jax.random.normal(rngs.params(), (FEATURES, FEATURES))

    def __call__(self, x):
        return super().__call__((x * self.scale[None] + self.shift[None]) @ self.projection)


class KeepsAShape(Plain):
    """Stores the shape of its input, which does not affect the output."""

    def __call__(self, x):
        self.last_shape = x.shape
        return super().__call__(x)


class KeywordRngs(Plain):
    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(rngs)


class NeedsSizes(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.layer = nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


class CalledWithRngs(Plain):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs: nnx.Rngs):
        return self.last(self.dropout(nnx.relu(self.first(x)), rngs=rngs))


class NnxDropout(Plain):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.first(x))))


class NnxMode(NnxDropout):
    def __call__(self, x, *, is_train: bool = False):
        return self.last(self.dropout(nnx.relu(self.first(x)), deterministic=not is_train))


class Vae(nnx.Module):
    """Returns class scores, a reconstruction, and the divergence of its code."""

    def __init__(self, rngs: nnx.Rngs):
        self.mean = nnx.Linear(FEATURES, 2, rngs=rngs)
        self.deviation = nnx.Linear(FEATURES, 2, rngs=rngs)
        self.decode = nnx.Linear(2, FEATURES, rngs=rngs)
        self.classify = nnx.Linear(2, CLASSES, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        mean, deviation = self.mean(x), nnx.softplus(self.deviation(x))
        code = mean + deviation * jax.random.normal(self.rngs.noise(), mean.shape)
        divergence = 0.5 * (mean**2 + deviation**2 - 2 * jnp.log(deviation) - 1).sum(-1)
        return {
            "logits": self.classify(code),
            "inputs": x,
            "again": self.decode(code),
            "divergence": divergence,
        }


def negative_elbo(outputs, labels):
    error = jnp.square(outputs["again"] - outputs["inputs"]).mean(-1)
    return cross_entropy(outputs["logits"], labels) + 0.1 * error + 0.01 * outputs["divergence"]


class Running(nnx.Variable):
    """A variable type that a user defines."""


class CustomVariable(Plain):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.largest, self.calls = Running(jnp.zeros(FEATURES)), nnx.Variable(0)

    def __call__(self, x):
        self.largest[...] = 0.9 * self.largest[...] + 0.1
        self.calls[...] += 1
        return super().__call__(x + self.largest[...][None])


class Sowing(Plain):
    def __call__(self, x):
        hidden = nnx.relu(self.first(x))
        self.sow(nnx.Intermediate, "hidden", hidden)
        return self.last(hidden)


class IntegerParam(Plain):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.order = nnx.Param(jnp.arange(FEATURES)[::-1])

    def __call__(self, x):
        return super().__call__(x[:, self.order[...]])


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.second = self.first
        self.last = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(self.second(nnx.tanh(self.first(x))))


class Lora(Plain):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.first = nnx.LoRA(FEATURES, 2, 8, base_module=self.first, rngs=rngs)


class Containers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(FEATURES, FEATURES, rngs=rngs) for _ in range(2)])
        self.heads = nnx.Dict(out=nnx.Linear(FEATURES, CLASSES, rngs=rngs))
        self.tables = nnx.data({"shift": jnp.ones(FEATURES)})

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x + self.tables["shift"][None]))
        return self.heads["out"](x)


class NnxScan(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs: nnx.Rngs):
            return nnx.Linear(FEATURES, FEATURES, rngs=rngs)

        self.layers, self.last = make(rngs), nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return nnx.tanh(layer(x))

        return self.last(forward(x, self.layers))


class NnxRemat(Plain):
    def __call__(self, x):
        return self.last(nnx.remat(lambda layer, x: nnx.tanh(layer(x)))(self.first, x))


class Lstm(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(FEATURES, 8, rngs=rngs), rngs=rngs)
        self.last = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(self.rnn(x)[:, -1])


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, FEATURES, decode=False, rngs=rngs)
        self.last = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last((x + self.attention(self.norm(x))).mean(1))


class Bag(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.last = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(self.embed(x).mean(1))


class MnistCnn(nnx.Module):
    """The network of flax's MNIST tutorial, smaller."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, kernel_size=(3, 3), rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(16, 8, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.linear2 = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.avg_pool(nnx.relu(self.dropout1(self.conv1(x))))
        x = self.avg_pool(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.dropout2(self.linear1(x.reshape(x.shape[0], -1))))
        return self.linear2(x)


class GroupNormed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.last = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class NnxBatchNorm(Plain):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


@flax.struct.dataclass
class Outputs:
    logits: jax.Array
    inputs: jax.Array


class DataclassOutputs(Plain):
    def __call__(self, x):
        return Outputs(super().__call__(x), x)


class RefusedFlag(Plain):
    """Trains because the flag is never set."""

    def __call__(self, x, late=False):
        if late:
            self.late = nnx.Variable(jnp.zeros(FEATURES))
        return super().__call__(x)


class TupleOutputs(Plain):
    def __call__(self, x):
        return super().__call__(x), x.argmax(-1)


def sequential(rngs):
    return nnx.Sequential(
        nnx.Linear(FEATURES, 8, rngs=rngs), nnx.relu, nnx.Linear(8, CLASSES, rngs=rngs)
    )


# --- linen -------------------------------------------------------------------


class LinenDropout(nn.Module):
    """Applies dropout; a subclass names the argument of the mode."""

    @nn.compact
    def body(self, x, train):
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(8)(x)))
        return nn.Dense(CLASSES)(x)


class IsTrain(LinenDropout):
    def __call__(self, x, is_train=False):
        return self.body(x, is_train)


class Eval(LinenDropout):
    def __call__(self, x, *, eval: bool = True):
        return self.body(x, not eval)


class Positional(LinenDropout):
    def __call__(self, x, wobble):
        return self.body(x, wobble)


class Determ(LinenDropout):
    def __call__(self, x, determ: bool = True):
        return self.body(x, not determ)


class DropoutFlag(LinenDropout):
    def __call__(self, x, dropout=True, return_hidden=False):
        logits = self.body(x, dropout)
        return (logits, x) if return_hidden else logits


class AnyKeyword(LinenDropout):
    def __call__(self, x, **modes):
        return self.body(x, modes.get("training", False))


class ModeField(LinenDropout):
    train: bool = True

    def __call__(self, x):
        return self.body(x, self.train)


class WordMode(LinenDropout):
    def __call__(self, x, mode="train"):
        return self.body(x, mode == "train")


class NoiseStream(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(8)(x)
        if self.has_rng("noise") and train:
            x += 0.1 * jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=not train)(x))


class SownLosses(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(8)(x)
        self.sow("losses", "l2", jnp.square(x).mean())
        self.sow("intermediates", "hidden", x)
        return nn.Dense(CLASSES)(nn.tanh(self.perturb("hidden", x)))


class TrainOnly(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        if train:
            x = x + nn.Dense(FEATURES, name="extra")(x)
            steps = self.variable("counts", "steps", lambda: jnp.zeros((), jnp.int32))
            if not self.is_initializing():
                steps.value += 1
        return nn.Dense(CLASSES, name="last")(x)


class LinenScan(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dropout(0.3, deterministic=not train)(
                    nn.tanh(nn.Dense(FEATURES)(x))
                ), None

        stack = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return nn.Dense(CLASSES)(stack()(x, None)[0])


class Setup(nn.Module):
    def setup(self):
        self.layers = [nn.Dense(8), nn.Dense(CLASSES)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(nn.tanh(x))
        return x


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        start = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(CLASSES)(nn.tanh(nn.Dense(8, kernel_init=start)(x)))


class IntegerTable(nn.Module):
    @nn.compact
    def __call__(self, x):
        order = self.param("order", lambda key: jnp.arange(FEATURES)[::-1])
        return nn.Dense(CLASSES)(x[:, order])


class LinenSpectral(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.SpectralNorm(nn.Dense(8))(x, update_stats=train)
        return nn.WeightNorm(nn.Dense(CLASSES))(nn.relu(x))


class LinenGru(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.RNN(nn.GRUCell(8))(x)[:, -1])


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool):
        x = nn.Embed(7, 8)(x) + self.param("places", nn.initializers.normal(0.1), (5, 8))[None]
        y = nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=deterministic)(
            nn.LayerNorm()(x)
        )
        x = x + nn.Dropout(0.1, deterministic=deterministic)(y)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(CLASSES)(x.mean(1))


class LinenBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x, is_train=False):
        x = nn.BatchNorm(use_running_average=not is_train)(nn.Dense(8)(x))
        return nn.Dense(CLASSES)(nn.relu(x))


TRAIN, INFER = {"train": True}, {"train": False}

NNX = {
    "plain class": Case(Plain),
    "array attributes": Case(ArrayAttribute),
    "attribute that is only written": Case(KeepsAShape),
    "keyword-only rngs": Case(KeywordRngs),
    "partial of a class that needs sizes": Case(partial(NeedsSizes, FEATURES, CLASSES)),
    "function of rngs": Case(lambda rngs: NeedsSizes(FEATURES, CLASSES, rngs)),
    "built module": Case(Plain(nnx.Rngs(7)), make=lambda rngs: Plain(nnx.Rngs(7))),
    "rngs in the call": Case(CalledWithRngs, is_random=True),
    "dropout": Case(NnxDropout, is_random=True),
    "mode in the call": Case(
        NnxMode, train={"is_train": True}, infer={"is_train": False}, is_random=True
    ),
    "variational autoencoder": Case(Vae, task=tasks.Task(negative_elbo), is_random=True),
    "custom variable type": Case(CustomVariable),
    "sow": Case(Sowing),
    "integer parameter": Case(IntegerParam),
    "tied weights": Case(Tied),
    "LoRA": Case(Lora),
    "containers": Case(Containers),
    "scanned layers": Case(NnxScan),
    "remat": Case(NnxRemat),
    "LSTM": Case(Lstm, "sequences"),
    "attention": Case(Attention, "sequences"),
    "bag of words": Case(Bag, "tokens"),
    "MNIST tutorial": Case(MnistCnn, "pictures", is_random=True),
    "group norm": Case(GroupNormed, "pictures"),
    "sequential": Case(sequential),
    "dataclass": Case(
        DataclassOutputs,
        task=tasks.Task(lambda outputs, labels: cross_entropy(outputs.logits, labels)),
    ),
    "tuple": Case(
        TupleOutputs, task=tasks.Task(lambda outputs, labels: cross_entropy(outputs[0], labels))
    ),
    "batch norm": Case(NnxBatchNorm),
    "flag that cannot be on": Case(RefusedFlag),
}

LINEN = {
    "linen is_train": Case(
        IsTrain(), train={"is_train": True}, infer={"is_train": False}, is_random=True
    ),
    "linen eval": Case(Eval(), train={"eval": False}, infer={"eval": True}, is_random=True),
    "linen positional mode": Case(
        Positional(), train={"wobble": True}, infer={"wobble": False}, is_random=True
    ),
    "linen determ": Case(Determ(), train={"determ": False}, infer={"determ": True}, is_random=True),
    "linen dropout flag": Case(
        DropoutFlag(), train={"dropout": True}, infer={"dropout": False}, is_random=True
    ),
    "linen any keyword": Case(
        AnyKeyword, train={"training": True}, make=AnyKeyword(), is_random=True
    ),
    "linen mode field": Case(ModeField(), is_random=True),
    "linen noise stream": Case(
        NoiseStream(), train=TRAIN, infer=INFER, is_random=True, streams=("dropout", "noise")
    ),
    "linen sown losses": Case(SownLosses(), train=TRAIN, infer=INFER),
    "linen layer only in training": Case(TrainOnly(), train=TRAIN, infer=INFER, at_start=TRAIN),
    "linen scan and remat": Case(LinenScan(), train=TRAIN, infer=INFER, is_random=True),
    "linen setup": Case(Setup, make=Setup()),
    "linen partitioned": Case(lambda: Partitioned(), make=Partitioned()),
    "linen integer parameter": Case(IntegerTable(), make=IntegerTable()),
    "linen spectral norm": Case(LinenSpectral(), train=TRAIN, infer=INFER),
    "linen GRU": Case(LinenGru(), "sequences"),
    "linen transformer": Case(
        LinenTransformer(),
        "tokens",
        {"deterministic": False},
        {"deterministic": True},
        is_random=True,
    ),
    "linen batch norm": Case(LinenBatchNorm(), train={"is_train": True}, infer={"is_train": False}),
}

MODULES = {**NNX, **LINEN}

# --- refused -----------------------------------------------------------------


def nnx_class(call, put=lambda module, rngs: None):
    """Returns an nnx class that calls `call(module, inputs)`."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layer = nnx.Linear(FEATURES, CLASSES, rngs=rngs)
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.embed = nnx.Embed(7, CLASSES, rngs=rngs)
            put(self, rngs)

        def __call__(self, x):
            return call(self, x)

    return Net


def count_calls(module, x):
    module.calls = getattr(module, "calls", 0) + 1
    return module.layer(x)


def start_from_data(module, x):
    if not getattr(module, "is_ready", False):
        module.is_ready = True
        x = x - x.mean(0, keepdims=True)
    return module.layer(x)


def keep_first(module, x):
    if getattr(module, "is_first", True):
        module.kept[...] = x.mean(0)
        module.is_first = False
    return module.layer(x - module.kept[...][None])


def copy_once(module, x):
    if getattr(module, "is_first", True):
        module.kept[...] = module.other[...]
        module.is_first = False
    return module.layer(x - module.kept[...][None])


def put_statistics(module, rngs):
    module.kept = nnx.BatchStat(jnp.zeros(FEATURES))
    module.other = nnx.BatchStat(jnp.ones(FEATURES))


def create_late(module, x):
    module.ema = nnx.Variable(jnp.zeros(FEATURES))
    return module.layer(x)


def keep_in_closure(module, rngs):
    table = jnp.arange(6.0)
    module.function = lambda x: x * table[None]


class SeveralArrays(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return nn.Dense(CLASSES)(x * mask)


class OutputFlag(nn.Module):
    @nn.compact
    def __call__(self, x, doubled=False):
        return nn.Dense(CLASSES)(x * (2.0 if doubled else 1.0))


class Cache(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.MultiHeadDotProductAttention(2, decode=True)(x).mean(1))


class SharedDense(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(CLASSES)
        return dense(dense(x)).mean(1)


class Pooled(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.Conv(4, (3, 3))(x), (2, 2), (2, 2))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


def refuse_sizes():
    raise InputError("layer_sizes", f"must start with {FEATURES}, got 4.")


class RefusesSizes(nn.Module):
    @nn.compact
    def __call__(self, x, wobble):
        refuse_sizes()


class NnxRefusesSizes(Plain):
    def __call__(self, x, wobble):
        refuse_sizes()


class AlwaysDropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=False)(x))


class NoCall(nnx.Module):
    pass


class Unregistered:
    pass


def softmax_over_batch(module, x):
    return jax.nn.softmax(module.layer(x), axis=0)


def embedding_minus_mean(module, x):
    embedded = module.embed(x).mean(1)
    return embedded - embedded.mean(0, keepdims=True)


class ConvolvesExamples(nn.Module):
    """Reads a batch of pictures without channels as one picture."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.Conv(4, (3, 3))(x).reshape(len(x), -1))


class ZeroHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(8)(x - x.mean(0, keepdims=True)))
        return nn.Dense(CLASSES, kernel_init=nn.initializers.zeros)(x)


MIXING = {
    "mean": (nnx_class(lambda m, x: m.layer(x - x.mean(0, keepdims=True))), "features"),
    "maximum": (nnx_class(lambda m, x: m.layer(x / x.max())), "features"),
    "maximum of equal maxima": (nnx_class(lambda m, x: m.layer(x / x.max())), "bytes"),
    "softmax": (nnx_class(softmax_over_batch), "features"),
    "neighbor": (nnx_class(lambda m, x: m.layer(jnp.roll(x, 1, axis=0))), "features"),
    "one output of several": (
        nnx_class(lambda m, x: {"logits": m.layer(x), "shares": softmax_over_batch(m, x)}),
        "features",
    ),
    "embedding": (nnx_class(embedding_minus_mean), "tokens"),
    "before zeros": (ZeroHead(), "features"),
    "linen convolution": (ConvolvesExamples(), "sequences"),
}
"""In inference the outputs of one example depend on the other examples of the batch."""

INDEPENDENT = {
    "normalized example": (
        nnx_class(lambda m, x: m.layer(x - x.mean(1, keepdims=True))),
        "features",
    ),
    "a number for the batch": (
        nnx_class(lambda m, x: {"logits": m.layer(x), "balance": m.layer(x).mean()}),
        "features",
    ),
    "NaN": (nnx_class(lambda m, x: m.layer(x) * jnp.nan), "features"),
    "infinite": (nnx_class(lambda m, x: m.layer(x) / 0), "features"),
    "numbered rows": (nnx_class(lambda m, x: m.layer(x) + jnp.arange(len(x))[:, None]), "features"),
    "tokens": (Bag, "tokens"),
    "batch norm": (NnxBatchNorm, "features"),
    "attention": (Attention, "sequences"),
}

REFUSED = {
    "no channel axis": (
        nnx_class(lambda m, x: m.conv(x)),
        "sequences",
        r"float32\[1, 5, 6\].*user_modules.py:.*channel axis",
    ),
    "another size": (
        nnx_class(lambda m, x: m.layer(x[:, :4])),
        "features",
        (
            r"float32\[1, 6\].* nnx.Linear was built with in_features=6, but the last axis of its "
            r"inputs has 4\.$"
        ),
    ),
    "another size in a sequence": (
        nnx_class(lambda m, x: m.layer(m.layer(x)).mean(1)),
        "sequences",
        r" nnx.Linear was built with in_features=6, but the last axis of its inputs has 3\.$",
    ),
    "another size after an embedding": (
        nnx_class(lambda m, x: m.layer(m.embed(x)).mean(1)),
        "tokens",
        r" nnx.Linear was built with in_features=6, but the last axis of its inputs has 3\.$",
    ),
    "another size after flattening": (
        nnx_class(lambda m, x: m.layer(x.reshape(len(x), -1))),
        "pictures",
        r" nnx.Linear was built with in_features=6, but the last axis of its inputs has 64\.$",
    ),
    "not flattened": (
        nnx_class(
            lambda m, x: m.wide(x),
            lambda m, rngs: setattr(m, "wide", nnx.Linear(64, CLASSES, rngs=rngs)),
        ),
        "pictures",
        r" Flatten the inputs: x.reshape\(len\(x\), -1\)\.$",
    ),
    "another number of channels": (
        nnx_class(lambda m, x: m.conv(m.conv(x)).mean((1, 2))),
        "pictures",
        r" nnx.Conv was built with in_features=1, but the last axis of its inputs has 4\.$",
    ),
    "another number of channels, after an axis was added": (
        nnx_class(lambda m, x: m.conv(m.conv(x[..., None])).mean((1, 2))),
        "sequences",
        r" nnx.Conv was built with in_features=1, but the last axis of its inputs has 4\.$",
    ),
    "another number of channels in a sequence": (
        nnx_class(
            lambda m, x: m.over(x).mean(1),
            lambda m, rngs: setattr(m, "over", nnx.Conv(64, CLASSES, (3,), rngs=rngs)),
        ),
        "sequences",
        r" nnx.Conv was built with in_features=64, but the last axis of its inputs has 6\.$",
    ),
    "dropout without rngs": (
        nnx_class(
            lambda m, x: m.layer(m.dropout(x)),
            lambda m, rngs: setattr(m, "dropout", nnx.Dropout(0.5)),
        ),
        "features",
        r" Build the layer with random streams, as in nnx.Dropout\(0.1, rngs=rngs\)\.$",
    ),
    "linen layer of two sizes": (
        SharedDense(),
        "sequences",
        r"return dense\(dense\(x\)\).mean\(1\)\)\.$",
    ),
    "linen picture without a channel axis": (
        Pooled(),
        "sequences",
        r"ZeroDivisionError.*-1\)\)\)\.$",
    ),
    "InputError": (
        RefusesSizes(),
        "features",
        "^layer_sizes must start with 6, got 4",
    ),
    "nnx InputError": (
        NnxRefusesSizes,
        "features",
        "^layer_sizes must start with 6, got 4",
    ),
    "floats into an embedding": (
        nnx_class(lambda m, x: m.embed(x).mean(1)),
        "features",
        "This code requires integers",
    ),
    "tokens into a dense layer": (
        nnx_class(lambda m, x: m.layer(x)),
        "tokens",
        r"int32\[1, 5\].*The inputs are integers",
    ),
    "fixed batch size": (
        nnx_class(lambda m, x: m.layer(x.reshape(8, -1))),
        "features",
        "The batch size varies",
    ),
    "branch on a value": (
        nnx_class(lambda m, x: m.layer(x) if x.sum() > 0 else x),
        "features",
        "use jnp.where or lax.cond",
    ),
    "numpy": (
        nnx_class(lambda m, x: m.layer(np.sort(x))),
        "features",
        "jnp or lax instead of numpy",
    ),
    "no outputs": (
        nnx_class(lambda m, x: None),
        "features",
        "must return an array, got None; end __call__ with a return statement",
    ),
    "a scalar": (
        nnx_class(lambda m, x: m.layer(x).mean()),
        "features",
        r"for each example.*got float32\[\] for one example",
    ),
    "flat outputs": (nnx_class(lambda m, x: m.layer(x).ravel()), "features", "keep the first axis"),
    "an object": (
        nnx_class(lambda m, x: Unregistered()),
        "features",
        "got Unregistered; register a dataclass as a pytree",
    ),
    "a tuple for classes": (
        nnx_class(lambda m, x: (m.layer(x), x)),
        "features",
        "one array for a task that predicts classes",
    ),
    "writes parameters": (
        nnx_class(
            lambda m, x: m.norm(x),
            lambda m, rngs: setattr(m, "norm", nnx.SpectralNorm(m.layer, rngs=rngs)),
        ),
        "features",
        "must not write to its parameters",
    ),
    "counts in Python": (nnx_class(count_calls), "features", "must not change calls in __call__"),
    "starts from the first batch": (
        nnx_class(start_from_data),
        "features",
        "must not change is_ready in __call__",
    ),
    "statistics of the first batch": (
        nnx_class(keep_first, put_statistics),
        "features",
        "must not change is_first in __call__",
    ),
    "statistics that are copied once": (
        nnx_class(copy_once, put_statistics),
        "features",
        "must not change is_first in __call__",
    ),
    "late variable": (nnx_class(create_late), "features", "ema is created in __call__"),
    "array in a closure": (
        nnx_class(lambda m, x: m.function(x), keep_in_closure),
        "features",
        "stores one inside function",
    ),
    "needs sizes": (
        NeedsSizes,
        "features",
        r"NeedsSizes requires inputs, outputs, rngs; pass functools.partial",
    ),
    "no call": (NoCall, "features", "must have a method __call__"),
    "several arrays": (
        SeveralArrays(),
        "features",
        "SeveralArrays.__call__ also takes mask; pass from_linen",
    ),
    "flag of the outputs": (OutputFlag(), "features", "also takes doubled; pass from_linen"),
    "mode in words": (WordMode(), "features", "also takes mode; pass from_linen"),
    "cache": (
        Cache(),
        "sequences",
        "must not have state whose shape depends on the number of examples",
    ),
    "dropout in inference": (AlwaysDropout(), "features", "Dropout is active in inference"),
    "optimizer": (
        nnx.Optimizer(Plain(nnx.Rngs(0)), optax.sgd(0.1), wrt=nnx.Param),
        "features",
        "got Optimizer",
    ),
    "bound": (Setup().bind({}), "features", "must not be bound to variables"),
    "not a module": (3, "features", "must be an nnx or linen module.* got int 3"),
    "a function of arrays": (
        jax.nn.relu,
        "features",
        "the constructor of your module raised TypeError",
    ),
}
