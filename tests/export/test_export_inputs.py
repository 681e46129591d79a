"""A perceptron is exported for numpy with features of any dtype."""

import json

import jax
import numpy as np
import optax
import pytest

import ctde_jax as ctde
from ctde_jax import bundle as node
from ctde_jax import execute
from ctde_jax.errors import InputError

STORED = {
    "int64": "int32",
    "int32": "int32",
    "int16": "int32",
    "int8": "int32",
    "uint16": "int32",
    "uint8": "uint8",
    "bool": "int32",
    "float16": "float32",
    "float32": "float32",
    "float64": "float32",
}
"""The dtype in which a data set stores features."""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", STORED)
def test_perceptron_with_features_of_any_dtype_is_exported_for_numpy(
    dtype, tmp_path, monkeypatch, capsys
):
    rng = np.random.default_rng(0)
    features, labels = (
        rng.integers(0, 2 if dtype == "bool" else 9, (200, 4)).astype(dtype),
        rng.integers(0, 3, 200),
    )
    data = ctde.data.from_arrays(features, labels)
    assert data.train.inputs.dtype == STORED[dtype]
    options = {"devices": ctde.devices.start(1), "batch_size": 20, "steps": 5, "show": False}
    trained = ctde.fit(ctde.models.mlp([4, 8, 3]), data, optax.adam(0.1), **options)
    written = ctde.write_bundle(
        trained, data, tmp_path / "bundle", ["numpy", "onnx", "jax"], show=False
    )
    assert written.left_out == {}

    # The expected outputs: two dense layers in float64, applied to the user's features.
    layers = [jax.tree.map(np.float64, trained.params["layers"][index]) for index in (0, 1)]
    scale = 255 if dtype == "uint8" else 1
    hidden = np.tanh(features / scale @ layers[0]["kernel"] + layers[0]["bias"])
    expected = hidden @ layers[1]["kernel"] + layers[1]["bias"]
    for runtime in written.bundle.card.artifacts:
        np.testing.assert_allclose(
            node.load(written.bundle, runtime)(features), expected, atol=1e-5
        )
        assert node.load(written.bundle, runtime)(features[:0]).shape == (0, 3)

    # The same features from files.
    np.save(tmp_path / "features.npy", features)
    np.savetxt(tmp_path / "features.csv", np.float64(features), delimiter=",")
    monkeypatch.chdir(tmp_path)
    for file in ("features.npy", "features.csv"):
        assert execute.main(["bundle", "--input", file, "--json"]) == 0
        labels = [int(json.loads(line)["label"]) for line in capsys.readouterr().out.splitlines()]
        assert labels == expected.argmax(-1).tolist()

    # Features of another scale are refused by every runtime.
    other = features.astype("uint8" if STORED[dtype] == "float32" else "float32")
    for runtime in written.bundle.card.artifacts:
        with pytest.raises(InputError, match=f"as the model was trained on {STORED[dtype]}"):
            node.load(written.bundle, runtime)(other)
