"""Every artifact equals the trained model, at every batch size, for every example."""

import json
import subprocess
from pathlib import Path

import bundles
import jax
import numpy as np
import optax
import pytest
from cases import some
from flax import linen
from jax import numpy as jnp

import ctde_jax as ctde
from ctde_jax import bundle as node
from ctde_jax.bundle import parity
from ctde_jax.errors import InputError
from ctde_jax.export import onnx, write
from ctde_jax.export.program import LeftOut, make_program
from ctde_jax.models import count_params

EXPORTED = some(bundles.MODELS, "mlp", "linen", "lstm-text")
PERCEPTRONS = ("mlp", "linen")
STEPWISE = ("lstm", "gru", "lstm-text", "gru-text")


@pytest.mark.parametrize("name", EXPORTED)
def test_every_artifact_agrees_with_the_model(name):
    """On the whole test split, at every batch size, with the same number of correct predictions."""
    (trained, data), written = bundles.trained(name), bundles.written(name)
    card = written.bundle.card
    assert {*card.artifacts} == (
        {"numpy", "onnx", "jax"} if name in PERCEPTRONS else {"onnx", "jax"}
    )
    assert written.left_out.keys() == ({*()} if name in PERCEPTRONS else {"numpy"})
    expected = trained.evaluate(data.test)
    assert card.facts["trained_model"]["measured"] == expected
    for artifact in card.artifacts.values():
        receipt = artifact.receipt
        assert receipt["largest_difference"].keys() == {"1", "3", "7", "64"}
        assert 0 <= receipt["relative"] <= 1e-5
        assert round(receipt["measured"]["accuracy"] * expected["examples"], 3) == round(
            expected["accuracy"] * expected["examples"], 3
        )
        assert receipt["measured"]["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert (artifact.step is not None) == (name in STEPWISE)
        assert receipt.get("place_by_place", 0) <= 1e-5
        assert all(low <= middle <= high for low, middle, high in receipt["milliseconds"].values())


@pytest.mark.parametrize("name", EXPORTED)
def test_artifacts_accept_any_number_of_raw_inputs(name):
    (trained, data), written = bundles.trained(name), bundles.written(name)
    inputs = data.test.inputs[:5]
    for runtime in written.bundle.card.artifacts:
        found = node.load(written.bundle, runtime)(inputs)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, trained.predict(inputs), atol=2e-5)


def test_every_file_has_a_checksum():
    """The checksums of the card agree with those that `sha256sum --check` computes."""
    bundle = bundles.written("mlp").bundle
    done = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=bundle.folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files = {path.name for path in bundle.folder.iterdir()}
    assert (
        {line.split(": ")[0] for line in done.stdout.splitlines()}
        == files - {"SHA256SUMS"}
        == {
            *bundle.card.files,
            "card.json",
        }
    )
    for name in bundle.card.files:
        assert len(bundle.read(name)) == bundle.card.files[name].size


def test_card_describes_the_model():
    card = bundles.written("mlp").bundle.card
    assert (card.predicts, card.input_shape, card.input_dtype, card.highest) == (
        "classes",
        (8, 8),
        "uint8",
        16,
    )
    assert card.output_shape == (10,)
    assert card.classes == tuple("0123456789")
    assert card.facts["model"]["parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    assert card.facts["training"]["step"] == 60
    assert card.versions["jax"] == jax.__version__
    text = bundles.written("lstm-text").bundle.card
    assert (text.predicts, text.input_dtype, text.carry) == ("tokens", "int32", ((16,),) * 4)
    assert text.vocabulary == bundles.trained("lstm-text")[1].vocabulary


def test_onnx_file_contains_the_class_names():
    session = pytest.importorskip("onnxruntime").InferenceSession(
        bundles.written("mlp").bundle.read("model.onnx")
    )
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == [*"0123456789"]


def test_examples_have_the_outputs_of_the_trained_model():
    trained, data = bundles.trained("mlp")
    stored = node.tensors.parse(bundles.written("mlp").bundle.read("examples.safetensors"))
    assert len(stored["inputs"]) == 100
    np.testing.assert_array_equal(stored["inputs"], data.test.inputs[:100])
    np.testing.assert_array_equal(stored["labels"], data.test.labels[:100])
    np.testing.assert_allclose(
        stored["outputs"], trained.predict(data.test.inputs[:100]), atol=1e-5
    )


def test_artifact_with_different_outputs_is_not_written(monkeypatch, tmp_path):
    """Its file is not written, the card gives the reason, and other artifacts are unaffected."""
    trained, data = bundles.trained("mlp")

    def halved(program):
        return write_stablehlo(program._replace(run=lambda x: [program.run(x)[0] / 2]))

    write_stablehlo = write.to_stablehlo
    monkeypatch.setattr(write, "to_stablehlo", halved)
    written = ctde.write_bundle(trained, data, tmp_path / "bundle", ["numpy", "jax"], show=False)
    assert {*written.bundle.card.artifacts} == {"numpy"}
    assert "differs by" in written.left_out["jax"]
    assert "more than 1e-05" in written.left_out["jax"]
    assert not (tmp_path / "bundle" / "model.stablehlo").exists()
    assert written.bundle.card.facts["left_out"] == written.left_out


@pytest.mark.slow
def test_stepwise_program_with_different_outputs_is_omitted(monkeypatch, tmp_path):
    trained, data = bundles.trained("lstm-text")
    monkeypatch.setattr(write.receipt, "compare_steps", lambda *arguments: 0.01)
    written = ctde.write_bundle(trained, data, tmp_path / "bundle", ["jax"], show=False)
    assert written.bundle.card.artifacts["jax"].step is None
    assert written.left_out.keys() == {"jax, one position at a time"}
    assert not (tmp_path / "bundle" / "step.stablehlo").exists()


def test_format_without_its_packages_names_the_installation(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    trained, data = bundles.trained("mlp")
    written = ctde.write_bundle(trained, data, tmp_path / "bundle", ["numpy", "onnx"], show=False)
    assert written.left_out == {"onnx": "needs `pip install 'ctde_jax[onnx]'`"}


def test_int8_weights_are_smaller_and_not_the_default():
    pytest.importorskip("onnxruntime")
    assert "onnx-int8" not in bundles.written("mlp").bundle.card.artifacts
    artifacts = bundles.written("mlp", "onnx", "onnx-int8").bundle.card.artifacts
    receipt, float32 = artifacts["onnx-int8"].receipt, artifacts["onnx"].receipt
    assert receipt["relative"] > 1e-5
    assert receipt["measured"]["accuracy"] > float32["measured"]["accuracy"] - 0.05
    assert receipt["bytes"] < float32["bytes"]


@pytest.mark.slow
def test_weights_of_a_transformer_are_quantized():
    onnx_package = pytest.importorskip("onnx")
    bundle = bundles.written("transformer", "onnx-int8").bundle
    arrays = onnx_package.load_from_string(bundle.read("model.int8.onnx")).graph.initializer
    kinds = (onnx_package.TensorProto.INT8, onnx_package.TensorProto.UINT8)
    quantized = sum(int(np.prod(array.dims)) for array in arrays if array.data_type in kinds)
    assert quantized > 0.8 * count_params(bundles.trained("transformer")[0].params)


@pytest.mark.parametrize(
    ("equation", "is_product"),
    [
        ("abc,cd->abd", True),
        ("ab,bc->ac", True),
        ("abcd,de->abce", True),
        ("abc,dc->abd", False),
        ("abc,cd->adb", False),
        ("abc,acd->abd", False),
        ("aba,ac->abc", False),
        ("abc,cb->ab", False),
        ("abc->ab", False),
        ("ab,bc,cd->ad", False),
    ],
)
def test_einsum_that_is_a_matrix_product_is_recognized(equation, is_product):
    """ONNX Runtime computes matrix products faster, and its tools quantize only these."""
    assert onnx._is_product(equation) is is_product


@pytest.mark.slow
def test_only_a_bundle_is_replaced(tmp_path):
    trained, data = bundles.trained("mlp")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(
        InputError, match=r"must be new or an existing bundle, got .*mine, which contains"
    ):
        ctde.write_bundle(trained, data, tmp_path / "mine", ["numpy"], show=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    for formats, file in ((["jax"], "model.stablehlo"), (["numpy"], "weights.safetensors")):
        ctde.write_bundle(trained, data, tmp_path / "bundle", formats, examples=0, show=False)
        assert (tmp_path / "bundle" / file).exists()
    assert not (tmp_path / "bundle" / "model.stablehlo").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "others", [{"card.json": '{"suit": "hearts"}', "thesis.txt": ""}, {"thesis.txt": ""}]
)
def test_folder_with_other_files_is_not_replaced(others, tmp_path):
    """Neither a folder with another kind of card, nor a bundle with an additional file."""
    trained, data = bundles.trained("mlp")
    folder = tmp_path / "mine"
    if "card.json" in others:
        folder.mkdir()
    else:
        ctde.write_bundle(trained, data, folder, ["numpy"], show=False)
    for name, content in others.items():
        (folder / name).write_text(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        InputError, match=r"must be new or an existing bundle, got .*mine, which contains"
    ):
        ctde.write_bundle(trained, data, folder, ["numpy"], show=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["rename", "rmtree", "write"])
def test_bundle_survives_a_failed_replacement(fails, tmp_path, monkeypatch):
    """The next process restores or removes files that a killed process has left."""
    trained, data = bundles.trained("mlp")
    first = ctde.write_bundle(trained, data, tmp_path / "bundle", ["numpy"], show=False).bundle

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if fails == "rename":
        rename = Path.rename
        monkeypatch.setattr(
            Path,
            "rename",
            lambda self, to: fail() if self.name.endswith(".partial") else rename(self, to),
        )
    elif fails == "write":
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:  # like a process that is killed between both renames
        (tmp_path / "bundle").rename(tmp_path / ".bundle.replaced")
        (tmp_path / ".bundle.partial").mkdir()
        monkeypatch.setattr(write, "_write", fail)
    with pytest.raises(
        InputError, match=r"with enough free space, but writing to .*bundle failed: No space left"
    ):
        ctde.write_bundle(trained, data, tmp_path / "bundle", ["jax"], show=False)
    monkeypatch.undo()
    assert ctde.open_bundle(tmp_path / "bundle").sha256 == first.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    ctde.write_bundle(trained, data, tmp_path / "bundle", ["jax"], show=False)
    assert ctde.open_bundle(tmp_path / "bundle").card.artifacts.keys() == {"jax"}


@pytest.mark.slow
def test_bundle_may_be_a_link_or_the_working_folder(tmp_path, monkeypatch):
    trained, data = bundles.trained("mlp")
    ctde.write_bundle(trained, data, tmp_path / "bundle", ["numpy"], show=False)
    (tmp_path / "link").symlink_to("bundle")
    ctde.write_bundle(trained, data, tmp_path / "link", ["jax"], show=False)
    assert ctde.open_bundle(tmp_path / "bundle").card.artifacts.keys() == {"jax"}
    monkeypatch.chdir(tmp_path / "bundle")
    ctde.write_bundle(trained, data, ".", ["numpy"], show=False)
    assert ctde.open_bundle(tmp_path / "bundle").card.artifacts.keys() == {"numpy"}


def test_bundle_is_kept_if_no_format_can_be_exported(tmp_path, monkeypatch):
    trained, data = bundles.trained("mlp")
    first = ctde.write_bundle(trained, data, tmp_path / "bundle", ["numpy"], show=False).bundle
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"in which the model can be exported .*pip install 'ctde_jax"
    ):
        ctde.write_bundle(trained, data, tmp_path / "bundle", ["onnx"], show=False)
    assert ctde.open_bundle(tmp_path / "bundle").sha256 == first.sha256


def test_missing_runtime_omits_only_its_format(tmp_path, monkeypatch):
    trained, data = bundles.trained("mlp")
    monkeypatch.setattr(
        node.runtimes, "find_spec", lambda name: None if name == "onnxruntime" else name
    )
    written = ctde.write_bundle(trained, data, tmp_path / "bundle", ["numpy", "onnx"], show=False)
    assert written.bundle.card.artifacts.keys() == {"numpy"}
    assert "onnx is not installed; run `pip install onnxruntime`" in written.left_out["onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fourier", "bfloat16"])
def test_model_is_exported_in_the_formats_that_can_express_it(kind, tmp_path):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = x.reshape(x.shape[0], -1)
            if kind == "fourier":
                x = jnp.abs(jnp.fft.fft(x))
            return linen.Dense(10, param_dtype=jnp.bfloat16 if kind == "bfloat16" else jnp.float32)(
                x
            )

    data, options = (
        ctde.data.digits(),
        {"devices": ctde.devices.start(1), "batch_size": 32, "steps": 3, "show": False},
    )
    trained = ctde.fit(ctde.models.from_linen(Net()), data, optax.adam(0.01), **options)
    written = ctde.write_bundle(trained, data, tmp_path / "bundle", show=False)
    assert "jax" in written.bundle.card.artifacts
    assert "float32 dense layers" in written.left_out["numpy"]
    assert kind == "bfloat16" or "jax2onnx cannot convert the model" in written.left_out["onnx"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"formats": ["onyx"]}, "formats must be one of .* did you mean 'onnx'"),
        ({"examples": -1}, "examples must be at least 0, got -1"),
    ],
)
def test_mistake_is_reported_in_one_sentence(options, sentence, tmp_path):
    trained, data = bundles.trained("mlp")
    with pytest.raises(InputError, match=sentence):
        ctde.write_bundle(trained, data, tmp_path / "bundle", show=False, **options)
    assert not [*tmp_path.iterdir()]


def test_program_has_no_operations_of_training():
    """It has no random keys, custom gradients or inner calls, and masks are constants."""

    def inference(x):
        key = jax.random.key(0)
        mask = jnp.where(jnp.tri(4, dtype=bool), True, False)
        jax.random.fold_in(key, 3)
        return [jnp.where(mask, jax.nn.relu(x), 0.0)]

    program = make_program(inference, jax.ShapeDtypeStruct((4, 4), np.float32))
    names = {
        equation.primitive.name for equation in jax.make_jaxpr(program.run)(*program.like).eqns
    }
    assert names <= {"max", "select_n", "broadcast_in_dim"}


def test_program_has_any_batch_size_even_if_python_reads_it():
    def counts(x):
        return [x.reshape(len(x), -1).sum(axis=1), x * len(x.reshape(len(x), -1)[0])]

    program = make_program(counts, jax.ShapeDtypeStruct((2, 3), np.float32))
    x = np.arange(30, dtype=np.float32).reshape(5, 2, 3)
    sums, scaled = jax.export.export(jax.jit(program.run))(*program.like).call(x)
    np.testing.assert_allclose(sums, x.reshape(5, -1).sum(axis=1))
    np.testing.assert_allclose(scaled, 6 * x)


def test_operation_that_onnx_lacks_is_named():
    pytest.importorskip("jax2onnx")

    def calls_python(x):
        return [
            jax.pure_callback(
                np.sort, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="broadcast_all"
            )
        ]

    program = make_program(calls_python, jax.ShapeDtypeStruct((3,), np.float32))
    with pytest.raises(LeftOut, match=r"jax2onnx cannot convert the model .*pure_callback"):
        onnx.to_onnx(program, ["inputs"], ["outputs"], {})


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu"])
def test_chain_of_dense_layers_is_recognized(activation):
    assert _layers(ctde.models.mlp([64, 12, 8, 10], activation)).activation == activation


@pytest.mark.slow
def test_other_networks_are_no_chains_of_dense_layers():
    assert _layers(ctde.models.rnn_classifier(8, 10, 4)) is None
    assert _layers(ctde.models.from_linen(bundles.Noisy())) is None


def _layers(model: ctde.models.Model):
    data = ctde.data.digits()
    trained = ctde.fit(
        model,
        data,
        optax.adam(0.01),
        devices=ctde.devices.start(1),
        batch_size=32,
        steps=2,
        show=False,
    )
    return write.find_layers(trained, write.gather(trained, data), data.test.inputs[:4])


@pytest.mark.parametrize("batch", [1, 64])
def test_nan_at_one_batch_size_is_detected(batch, monkeypatch, tmp_path):
    """Comparisons with NaN are false, so that a maximum of two numbers may drop it."""
    trained, data = bundles.trained("mlp")
    load = write.load

    def with_nan(*arguments):
        predict = load(*arguments)
        return lambda inputs: np.where(len(inputs) == batch, np.float32(np.nan), predict(inputs))

    monkeypatch.setattr(write, "load", with_nan)
    with pytest.raises(InputError, match="numpy: differs by inf from the trained model"):
        ctde.write_bundle(trained, data, tmp_path / "bundle", ["numpy"], show=False)
    with pytest.raises(InputError, match="onnx-int8: differs by inf from the trained model"):
        ctde.write_bundle(trained, data, tmp_path / "bundle", ["onnx-int8"], show=False)


def test_wrong_outputs_are_distinguished_from_rounding():
    expected = np.array([[1.0, -40.0], [0.5, 0.25]], np.float32)
    assert parity.relative_difference(expected, expected) == 0
    assert parity.relative_difference(
        expected + np.float32([[0, 4e-4], [0, 0]]), expected
    ) == pytest.approx(1e-5, rel=0.1)
    assert parity.relative_difference(
        expected + np.float32([[0, 0], [0, 1e-3]]), expected
    ) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.slow
def test_federated_training_improves_an_exported_model(tmp_path):
    """Exports a model, improves it by federated averaging on four nodes, and exports it again."""
    data = ctde.data.digits()
    nodes = ctde.data.partition.dirichlet(data.train.labels, 4, 0.5, seed=0)
    accuracies = []
    for rounds in (1, 40):
        fedavg = ctde.strategy("fedavg", sync_every=8)
        options = {
            "devices": ctde.devices.start(4),
            "partition": nodes,
            "batch_size": 64,
            "show": False,
        }
        trained = ctde.fit(
            ctde.models.mlp([64, 16, 10]), data, optax.sgd(0.1), fedavg, steps=8 * rounds, **options
        )
        written = ctde.write_bundle(trained, data, tmp_path / "bundle", ["numpy"], show=False)
        found = node.load(written.bundle, "numpy")(data.test.inputs)
        accuracies.append((found.argmax(-1) == data.test.labels).mean())
        assert accuracies[-1] == pytest.approx(trained.tested["accuracy"])
    assert accuracies[1] > max(0.85, accuracies[0])
