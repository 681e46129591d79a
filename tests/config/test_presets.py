"""Every preset is available by name, cites its paper, and trains."""

import re

import optax
import optax.contrib
import pytest
from cases import STRATEGY_NAMES

import ctde_jax as ctde
from ctde_jax import config
from ctde_jax.config import build, output, presets
from ctde_jax.errors import InputError

MODEL = ctde.models.mlp([64, 32, 10])
OF_ITS_OWN_NAME = {"ddp", "gossip"}


def test_presets_are_the_published_methods():
    assert list(presets.PRESETS) == [
        *("ddp", "local-sgd", "post-local-sgd", "qsr", "fedavg", "fedprox", "fedadam", "slowmo"),
        *("diloco", "streaming-diloco", "mu-loco", "sparse-loco", "iso-loco", "gossip", "no-loco"),
    ]


@pytest.mark.parametrize("name", [name for name in presets.PRESETS if name != "ddp"])
def test_help_names_the_paper_of_every_method(name, capsys):
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    match = re.search(
        rf"{name}: [^;]+\((after )?[A-Z]\w+( et al\.)?, \d{{4}}\).*?; sets --[a-z]", text
    )
    assert match, text


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_every_method_learns_the_digits(name, digits):
    """Four devices, five epochs; the accuracy of a random guess is 10 %."""
    inner = (
        optax.contrib.muon(0.02)
        if "optimizer" in presets.PRESETS[name].options
        else optax.adam(0.01)
    )
    strategy = ctde.strategy(
        name, sync_every=0 if name == "ddp" else 4, synchronous_steps=8 * (name == "post-local-sgd")
    )
    devices = ctde.devices.start(4)
    trained = ctde.fit(
        MODEL, digits, inner, strategy, devices=devices, batch_size=64, epochs=5, show=False
    )
    assert trained.history[-1]["accuracy"] > 0.9


def test_command_line_and_python_build_the_same_strategy():
    arguments = ["--strategy", "fedadam", "--sync-every", "7"]
    by_command = build.build_strategy(config.parse(arguments).aggregation)
    by_name = ctde.strategy("fedadam", sync_every=7)
    params = {"w": optax.tree.zeros_like([1.0])}
    assert (
        (by_command.inner_steps, by_command.diverges)
        == (by_name.inner_steps, by_name.diverges)
        == (7, False)
    )
    assert by_command.outer.init(params) == by_name.outer.init(params)


@pytest.mark.parametrize(
    ("options", "per_host", "of_reducer"),
    [
        ({"name": "diloco"}, 4, 1),
        ({"name": "diloco", "reduce": "int4"}, 4, 4),
        ({"name": "sparse-loco"}, 4, 4),
        ({"name": "local-sgd", "combine": "median"}, 4, 4),
        ({"name": "ddp", "reduce": "int4"}, 1, 4),
        ({"name": "ddp", "reduce": "int4", "exchange": "gathered"}, 1, 4),
    ],
)
def test_hosts_average_their_gradients_in_local_steps_or_before_the_exchange(
    options, per_host, of_reducer
):
    strategy = ctde.strategy(**options, per_host=4)
    assert strategy.per_host == per_host
    assert getattr(strategy.reduce, "per_host", 1) == of_reducer


def test_plan_describes_hosts():
    names = (
        output.names(config.parse([*arguments, "--per-host", "4"]), ctde.data.digits())["strategy"]
        for arguments in ([], ["--sync-every", "8", "--reduce", "int4"])
    )
    assert list(names) == [
        "mean of the gradients at every step, mean of the gradients of each 4 devices first",
        "mean of the parameters after every 8 local steps, mean of the gradients of each 4 devices "
        "in the local steps, compressed by int4",
    ]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: ctde.strategy("dilco"),
            "strategy must be one of .* got 'dilco'; did you mean 'diloco'",
        ),
        (
            lambda: ctde.strategy("diloco", inner_steps=4),
            "strategy's option must be one of .* got 'inner_steps'",
        ),
        (
            lambda: ctde.strategy("ddp", outer="nesterov"),
            "outer requires sync_every of at least 1, got 0",
        ),
        (
            lambda: ctde.strategy("gossip", reduce="int4"),
            "reduce must not be set with graph ring",
        ),
        (
            lambda: ctde.strategy("gossip", combine="median"),
            "combine must not be set with graph ring",
        ),
        (
            lambda: ctde.strategy("ddp", reduce="top_k", keep=5000),
            "k must be from 1 to 4096, the chunk size",
        ),
        (
            lambda: ctde.strategy("ddp", reduce="power_sgd", rank=0),
            "rank must be at least 1, got 0",
        ),
        (
            lambda: ctde.strategy("ddp", reduce="power_sgd", combine="median"),
            "combine must be average with reduce power_sgd or exchange gathered, got median",
        ),
        (
            lambda: ctde.strategy("ddp", reduce="int4", exchange="gathered", combine="krum"),
            "combine must be average with reduce power_sgd or exchange gathered, got krum",
        ),
        (
            lambda: ctde.strategy("ddp", combine="trimmed_mean", byzantine=-1),
            "byzantine must be at least 0, got -1",
        ),
        (
            lambda: ctde.strategy("diloco", reduce="int3"),
            "reduce must be one of .* got 'int3'; did you mean 'int8'",
        ),
        (lambda: ctde.strategy("diloco", outer="x"), "outer must be one of average, .* got 'x'"),
        (
            lambda: ctde.strategy("diloco", outer_learning_rate=-1.0),
            "outer_learning_rate must be greater than 0",
        ),
        (
            lambda: ctde.strategy("diloco", outer_momentum=7.0),
            "outer_momentum must be at least 0 and less than 1",
        ),
        (
            lambda: ctde.strategy("ddp", graph="ring"),
            "graph requires sync_every of at least 1, got 0",
        ),
        (lambda: ctde.strategy("ddp", proximal=0.1), "proximal requires sync_every"),
        (
            lambda: ctde.strategy("gossip", fragments=4),
            "fragments must not be set with graph ring",
        ),
        (
            lambda: ctde.strategy("iso-loco", fragments=2),
            "isotropic must not be set with fragments",
        ),
        (
            lambda: ctde.strategy("diloco", fragments=2, reduce="power_sgd"),
            "reduce must not be power_sgd with fragments",
        ),
        (
            lambda: ctde.strategy("ddp", dp_noise_multiplier=1.0),
            "dp_noise_multiplier requires dp_clip_norm, got none",
        ),
        (
            lambda: ctde.strategy("ddp", dp_clip_norm=1.0, dp_noise_multiplier=1.0, reduce="int8"),
            "reduce must not be set with dp_noise_multiplier",
        ),
        (
            lambda: ctde.strategy(
                "ddp", dp_clip_norm=1.0, dp_noise_multiplier=1.0, combine="median"
            ),
            "combine must not be set with dp_noise_multiplier",
        ),
        (
            lambda: ctde.strategy("post-local-sgd", dp_clip_norm=1.0),
            "synchronous_steps must be 0 with dp_clip_norm",
        ),
        (
            lambda: ctde.strategy("post-local-sgd", combine="median"),
            "synchronous_steps must be 0 with combine median",
        ),
        (
            lambda: ctde.strategy("ddp", reduce="top_k", keep=100, kept_as="int4"),
            "keep must be a multiple of 8",
        ),
        (lambda: ctde.strategy("local-sgd", fragments=0), "fragments must be at least 1, got 0"),
        (lambda: ctde.strategy("local-sgd", per_host=0), "per_host must be at least 1, got 0"),
        (lambda: ctde.strategy("gossip", per_host=2), "per_host must not be set with graph ring"),
        (
            lambda: ctde.strategy("ddp", exact=True, per_host=2),
            "per_host must not be set with exact",
        ),
        (
            lambda: ctde.strategy("streaming-diloco", per_host=2),
            "per_host must be 1 with fragments, .* got 2",
        ),
        (
            lambda: ctde.strategy("ddp", reduce="power_sgd", per_host=2),
            "per_host must be 1 with reduce power_sgd, .* got 2",
        ),
        (
            lambda: ctde.strategy("fedavg", dp_clip_norm=1.0, shared_steps=20),
            "shared_steps must be 0 with dp_clip_norm",
        ),
        (
            lambda: ctde.strategy("ddp", shared_steps=20),
            "shared_steps requires sync_every of at least 1, got 0",
        ),
        (
            lambda: ctde.strategy("post-local-sgd", shared_steps=16),
            "shared_steps must be 0 with synchronous_steps, got 16",
        ),
        (
            lambda: ctde.strategy("local-sgd", shared_steps=20),
            "shared_steps must be a multiple of the 8 inner steps of a round, got 20",
        ),
        (
            lambda: ctde.strategy("qsr"),
            "sync_growth requires the learning rate of a run; in Python, use ctde.aggregate",
        ),
        (
            lambda: ctde.strategy("fedavg", dp_clip_norm=1.0, per_host=2),
            "per_host must be 1 with dp_clip_norm, .* got 2",
        ),
    ],
)
def test_invalid_strategy_is_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


@pytest.mark.slow
def test_clip_norm_applies_to_streamed_fragments(digits):
    """A clip norm close to 0 keeps the parameters at their initial values."""
    clipped = ctde.strategy(
        "streaming-diloco", sync_every=2, dp_clip_norm=1e-9, outer="average", fragments=2
    )
    unclipped = ctde.strategy("streaming-diloco", sync_every=2, outer="average", fragments=2)

    def accuracy(strategy: ctde.Strategy) -> float:
        arguments = {"devices": ctde.devices.start(2), "batch_size": 64, "steps": 40, "show": False}
        return ctde.fit(MODEL, digits, optax.adam(0.01), strategy, **arguments).history[-1][
            "accuracy"
        ]

    assert accuracy(clipped) < 0.6 < 0.85 < accuracy(unclipped)
