"""An export restores the process, although jax2onnx patches JAX and Flax for good."""

import json
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from cases import some
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp

import ctde_jax as ctde
from ctde_jax.export import converter
from ctde_jax.export.onnx import to_onnx
from ctde_jax.export.program import LeftOut, make_program

CONVERT_AND_COMPARE = '''
import json, logging, os, random, sys, types, warnings
import flax, jax, numpy as np, optax
from flax import linen, nnx
from jax import numpy as jnp
import ctde_jax
from ctde_jax.export.onnx import to_onnx
from ctde_jax.export.program import LeftOut, make_program

ROOTS = ("jax", "jaxlib", "flax", "optax", "numpy")

def attributes():
    """Every attribute of every module and class of these packages, \
and the sizes of their tables."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ROOTS or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, types.ModuleType):
                continue
            found[name, key] = value
            if isinstance(value, type) and str(value.__module__).split(".")[0] in ROOTS:
                found |= {(name, key, inner): each for inner, each in list(vars(value).items())}
            elif isinstance(value, (dict, list, set)):
                found[name, key, "length"] = len(value)
    return found

def process():
    loggers = {name: each for name, each in logging.root.manager.loggerDict.items() \
if name.split(".")[0] in ROOTS}
    return {
        "config": {name: str(value) for name, value in jax.config.values.items()},
        "filters": list(map(str, warnings.filters)),
        "levels": {"": logging.root.level} | \
{name: getattr(each, "level", None) for name, each in loggers.items()},
        "handlers": list(map(str, logging.root.handlers)),
        "errors": np.geterr(),
        "path": list(sys.path),
        "environment": dict(os.environ),
        "random": (random.getstate(), str(np.random.get_state())),
        "recursion": sys.getrecursionlimit(),
    }

def network(x):
    x = linen.max_pool(jnp.tanh(x), (2, 2), (2, 2))
    return [jnp.cumsum(x.reshape(x.shape[0], -1), 1)]

program = make_program(network, jax.ShapeDtypeStruct((4, 4, 2), np.float32))
callback = lambda x: [jax.pure_callback(np.sort, jax.ShapeDtypeStruct(x.shape, x.dtype), x, \
vmap_method="sequential")]
fails = make_program(callback, jax.ShapeDtypeStruct((3,), np.float32))
jax.jit(network)(np.zeros((2, 4, 4, 2), np.float32))
before = attributes(), process()
to_onnx(program, ["inputs"], ["outputs"], {})
try:
    to_onnx(fails, ["inputs"], ["outputs"], {})
    raise SystemExit("a callback was written as ONNX")
except LeftOut:
    pass
after = attributes(), process()
known = {key[:1] for key in before[0]}

def is_same(key):
    if key not in before[0]:
        return False
    old, new = before[0][key], after[0][key]
    return old is new or (type(new) in (int, float, str, tuple) and old == new)

changed = [key for key in after[0] if key[:1] in known and not is_same(key)]
gone = [key for key in before[0] if key not in after[0]]
print(json.dumps({
    "changed": [".".join(key) for key in changed], "gone": [".".join(key) for key in gone],
    "process": [name for name in before[1] if before[1][name] != after[1][name]],
    "imported": "jax2onnx" in sys.modules,
}))
'''


@pytest.mark.slow
def test_conversion_changes_no_attribute_and_no_setting():
    """Compares all modules of JAX, Flax, optax and numpy, before and after, in a new process."""
    pytest.importorskip("jax2onnx")
    done = subprocess.run(
        [sys.executable, "-c", CONVERT_AND_COMPARE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"changed": [], "gone": [], "process": [], "imported": True}


X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
FUNCTIONS = {
    "cumsum": (lambda x: jnp.cumsum(x, 1), lambda x: np.cumsum(x, 1)),
    "cumprod": (lambda x: jnp.cumprod(x, 1), lambda x: np.cumprod(x, 1)),
    "mean": (lambda x: jnp.mean(x, 1), lambda x: x.mean(1)),
    "var": (lambda x: jnp.var(x, 1), lambda x: x.var(1)),
    "sort": (lambda x: jnp.sort(x, 1), lambda x: np.sort(x, 1)),
    "concatenate": (lambda x: jnp.concatenate([x, x], 1), lambda x: np.concatenate([x, x], 1)),
    "stack": (lambda x: jnp.stack([x, x], 1), lambda x: np.stack([x, x], 1)),
    "split": (lambda x: jnp.split(x, 2, 1)[1], lambda x: np.split(x, 2, 1)[1]),
    "tile": (lambda x: jnp.tile(x, (1, 2)), lambda x: np.tile(x, (1, 2))),
    "pad": (lambda x: jnp.pad(x, 1), lambda x: np.pad(x, 1)),
    "where": (lambda x: jnp.where(x > 0, x, 0), lambda x: np.where(x > 0, x, 0)),
    "clip": (lambda x: jnp.clip(x, -1, 1), lambda x: np.clip(x, -1, 1)),
    "einsum": (lambda x: jnp.einsum("ij,kj->ik", x, x), lambda x: x @ x.T),
    "take": (lambda x: jnp.take(x, jnp.array([2, 0]), 1), lambda x: x[:, [2, 0]]),
    "roll": (lambda x: jnp.roll(x, 1, 1), lambda x: np.roll(x, 1, 1)),
    "squeeze": (lambda x: jnp.squeeze(x[:, None], 1), lambda x: x),
    "transpose": (jnp.transpose, np.transpose),
    "prod": (lambda x: jnp.prod(x, 1), lambda x: x.prod(1)),
    "logaddexp": (lambda x: jnp.logaddexp(x, 0), lambda x: np.logaddexp(x, 0)),
    "norm": (lambda x: jnp.linalg.norm(x, axis=1), lambda x: np.linalg.norm(x, axis=1)),
    "softmax": (
        lambda x: jax.nn.softmax(x, 1),
        lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True),
    ),
    "relu": (jax.nn.relu, lambda x: np.maximum(x, 0)),
    "silu": (jax.nn.silu, lambda x: x / (1 + np.exp(-x))),
    "max_pool": (
        lambda x: linen.max_pool(x[..., None], (2,), (2,))[..., 0],
        lambda x: x.reshape(3, 2, 2).max(2),
    ),
}


@pytest.fixture(scope="module")
def converted():
    """A process in which one program was converted and the conversion of another failed."""
    pytest.importorskip("jax2onnx")
    to_onnx(_program(lambda x: jnp.cumsum(x, 1)), ["inputs"], ["outputs"], {})
    with pytest.raises(LeftOut):
        to_onnx(_program(lambda x: jnp.abs(jnp.fft.fft(x))), ["inputs"], ["outputs"], {})


def _program(function):
    return make_program(lambda x: [function(x)], jax.ShapeDtypeStruct((4,), np.float32))


QUICK = ("cumsum", "var", "sort", "split", "pad", "where", "einsum", "softmax", "max_pool")


@pytest.mark.parametrize("name", some(FUNCTIONS, *QUICK))
def test_functions_of_jax_compute_the_same_after_a_conversion(name, converted):
    function, reference = FUNCTIONS[name]
    for found in (function(X), jax.jit(function)(X), jax.vmap(function)(X[None])[0]):
        np.testing.assert_allclose(found, reference(np.float64(X)), rtol=1e-5, atol=1e-5)

    # The gradient along a direction, against a difference quotient in float64.
    direction = np.random.default_rng(1).normal(size=X.shape)
    slope = (reference(X + 1e-5 * direction) - reference(X - 1e-5 * direction)).sum() / 2e-5
    gradient = jax.jit(jax.grad(lambda x: function(x).sum()))(X)
    np.testing.assert_allclose(
        (np.float64(gradient) * direction).sum(), slope, rtol=1e-3, atol=1e-4
    )


def test_flax_modules_are_not_patched(converted):
    assert "__call__" not in vars(linen.MultiHeadAttention)
    assert not hasattr(lax, "remat2_p")
    assert not hasattr(nnx, "conv_p")


def test_conversion_that_raises_restores_everything(monkeypatch):
    before = dict(vars(jnp))

    def fail(*_, **__):
        monkeypatch.setattr(jnp, "cumsum", None)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(converter, "import_module", fail)
    with pytest.raises(LeftOut, match="in the middle"):
        to_onnx(_program(jnp.tanh), ["inputs"], ["outputs"], {})
    assert vars(jnp) == before


@pytest.mark.slow
def test_export_does_not_change_later_training(tmp_path):
    """A second export writes the same file."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(jnp.cumsum(x, 1))

    rng = np.random.default_rng(0)
    data = ctde.data.from_arrays(
        rng.normal(size=(200, 5)).astype(np.float32), rng.integers(0, 3, 200)
    )
    options = {"devices": ctde.devices.start(2), "batch_size": 20, "steps": 10, "show": False}
    models = [ctde.models.from_linen(Net()) for _ in range(2)]
    trained, files = [], []
    for model in models:
        trained.append(ctde.fit(model, data, optax.adam(0.1), **options))
        for folder in ("first", "second"):
            written = ctde.write_bundle(
                trained[-1], data, tmp_path / folder, ["onnx", "jax"], show=False
            )
            files.append(written.bundle.read("model.onnx"))
    jax.tree.map(np.testing.assert_array_equal, trained[0].params, trained[1].params)
    assert len(set(files)) == 1
