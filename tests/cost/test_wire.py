"""Counted bytes of handwritten and compiled programs, and of real sockets."""

import json
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import jax
import numpy as np
import optax
import pytest
from conftest import ALL_DEVICES
from jax import lax
from jax import numpy as jnp

from ctde_jax import Strategy, data, models, wire
from ctde_jax.cost import collectives, hlo, targets, traffic
from ctde_jax.devices import replica
from ctde_jax.devices.replica import AXIS
from ctde_jax.errors import InputError
from ctde_jax.models.tasks import classification
from ctde_jax.rounds import Resident
from ctde_jax.rounds.round import make_rounds

REPLICAS = 4
DEVICES = ALL_DEVICES[:REPLICAS]
GROUPS = "replica_groups={{0,1,2,3}}"

SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
"""


def module(body: str, devices: int = REPLICAS, before: str = "") -> str:
    """Returns a program whose entry has `%x = f32[100]`, `%u = u8[80]` and these lines."""
    return f"""HloModule by_hand, is_scheduled=true, num_partitions={devices}
{SUM}{before}
ENTRY %main (x: f32[100], u: u8[80]) -> f32[] {{
  %x = f32[100]{{0}} parameter(0), metadata={{op_name="x (one), replica_groups=no"}}
  %u = u8[80]{{0:T(1024)(128)(4,1)S(1)}} parameter(1)
{indent(body, "  ")}
  ROOT %result = f32[] constant(0)
}}
"""


def computation(name: str, body: str) -> str:
    """Returns a computation with `%p.NAME = f32[100]` and this line, which defines `%r.NAME`."""
    return f"""
%{name} (p: f32[100]) -> f32[100] {{
  %p.{name} = f32[100]{{0}} parameter(0)
  {body}
  ROOT %out.{name} = f32[100]{{0}} copy(%p.{name})
}}
"""


def reduce_in(name: str, group: str = GROUPS) -> str:
    return computation(
        name, f"%r.{name} = f32[100]{{0}} all-reduce(%p.{name}), {group}, to_apply=%sum"
    )


LINES = {
    "all-reduce": (
        f"%r = f32[100]{{0}} all-reduce(%x), channel_id=1, {GROUPS}, to_apply=%sum",
        400,
        600,
    ),
    "reduce-scatter": (
        f"%r = f32[25]{{0}} reduce-scatter(%x), {GROUPS}, dimensions={{0}}, to_apply=%sum",
        400,
        300,
    ),
    "all-gather": (f"%r = u8[320]{{0}} all-gather(%u), {GROUPS}, dimensions={{0}}", 80, 240),
    "all-to-all": (f"%r = u8[80]{{0}} all-to-all(%u), {GROUPS}, dimensions={{0}}", 80, 60),
    "collective-permute": (
        "%r = f32[100]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
        400,
        400,
    ),
}


@pytest.mark.parametrize("op", LINES)
def test_bytes_of_each_collective_match_its_formula(op: str):
    line, payload, sent = LINES[op]

    (one,) = collectives.read(module(line))

    assert (one.op, one.payload, one.sent, one.times, one.certain) == (op, payload, sent, 1, True)


def test_group_of_one_and_permutation_onto_itself_send_nothing():
    alone = "%r = f32[100]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3}}, to_apply=%sum"
    itself = "%s = f32[100]{0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}"

    assert collectives.read(module(f"{alone}\n{itself}")) == []


def test_asynchronous_collective_is_counted_at_its_start():
    lines = f"""
  %start = (f32[100]{{0}}, f32[400]{{0}}) all-gather-start(%x), {GROUPS}, dimensions={{0}}
  %done = f32[400]{{0}} all-gather-done(%start)
  %shift = (f32[100]{{0}}, f32[100]{{0}}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{{{0,1}}}}
  %shifted = f32[100]{{0}} collective-permute-done(%shift)
  %wrapped = ((f32[100]{{0}}), f32[100]{{0}}, s32[]) async-start(%x), calls=%wrap
  %waiting = ((f32[100]{{0}}), f32[100]{{0}}, s32[]) async-update(%wrapped), calls=%wrap
  %unwrapped = f32[100]{{0}} async-done(%waiting), calls=%wrap"""

    found = collectives.read(module(lines, before=reduce_in("wrap")))

    assert [(one.op, one.sent) for one in found] == [
        ("all-gather", 1200),
        ("collective-permute", 400),
        ("all-reduce", 600),
    ]


def test_merged_collective_counts_all_its_operands():
    line = (
        f"%r = (f32[100]{{0}}, /*index=1*/u8[80]{{0}}) all-reduce(%x, /*index=1*/%u), {GROUPS}, "
        "to_apply=%sum"
    )

    (one,) = collectives.read(module(line))

    assert (one.dtypes, one.payload) == (("f32", "u8"), 480)


@pytest.mark.parametrize(
    ("groups", "size", "crossing"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4, 0),
        ("[2,4]<=[8]", 4, 0),
        ("[4,2]<=[2,4]T(1,0)", 2, 1),  # {0,4}, {1,5}, {2,6}, {3,7}
        ("[1,8]<=[8]", 8, 2 / 8),  # the ring leaves the first host once, and the second once
        ("{}", 8, 2 / 8),
        ("{{0,4,1,5},{2,6,3,7}}", 4, 1),
    ],
)
def test_replica_groups_determine_the_bytes_between_hosts(groups: str, size: int, crossing: float):
    line = f"%r = f32[100]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%sum"

    (one,) = collectives.read(module(line, devices=8), hosts=[0] * 4 + [1] * 4)

    assert one.group_size == size
    assert one.sent == pytest.approx(2 * (size - 1) / size * 400)
    assert (one.total, one.across) == pytest.approx((8 * one.sent, crossing * 8 * one.sent))


def test_all_to_all_crosses_hosts_by_pairs():
    (one,) = collectives.read(module(LINES["all-to-all"][0]), hosts=[0, 0, 1, 1])

    # Of the three other devices, two are on the other host.
    assert one.across / one.total == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("s4[9]{0:E(4)}", 5),
        ("s4[9]{0}", 9),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
        ("pred[7]{0}", 7),
        ("f8e4m3fn[6]", 6),
        ("c64[]", 8),
        ("f32[0,3]{1,0}", 0),
        ("(f32[2]{0}, (u8[3]{0}, token[]))", 11),
    ],
)
def test_shapes_have_the_bytes_of_their_elements(shape: str, size: int):
    assert hlo.count_bytes(shape) == size


def loop(name: str, operand: str, trip_count: int | None) -> str:
    """Returns the loop over `counted`; without `trip_count`, its condition gives the count."""
    known = (
        ""
        if trip_count is None
        else f', backend_config={{"known_trip_count":{{"n":"{trip_count}"}}}}'
    )
    return (
        f"%loop.{name} = (s32[], f32[100]{{0}}) while(%{operand}), condition=%test.{name}, "
        f"body=%body.{name}{known}"
    )


def counted(name: str, inside: str, step: int, limit: str = "constant(17)") -> str:
    """Returns a loop's computations, which increase the state's first element by `step` to 17."""
    return f"""
%body.{name} (s: (s32[], f32[100])) -> (s32[], f32[100]) {{
  %s = (s32[]{{:T(128)}}, f32[100]{{0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  %y = f32[100]{{0}} get-tuple-element(%s), index=1
  %by = s32[]{{:T(128)}} constant({step})
  %next = s32[]{{:T(128)}} add(%i, %by)
  {inside}
  ROOT %t = (s32[], f32[100]{{0}}) tuple(%next, %y)
}}

%test.{name} (s: (s32[], f32[100])) -> pred[] {{
  %s = (s32[], f32[100]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] {limit}
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}
"""


def start_at(first: str) -> str:
    return f"%first = s32[] {first}\n  %t = (s32[], f32[100]{{0}}) tuple(%first, %x)\n"


REDUCE_Y = f"%r = f32[100]{{0}} all-reduce(%y), {GROUPS}, to_apply=%sum"


def test_trip_counts_of_nested_loops_multiply():
    inner = "%t2 = (s32[], f32[100]{0}) tuple(%i, %y)\n  " + loop("in", "t2", 5)
    computations = counted("in", REDUCE_Y, 1) + counted("out", inner, 1)

    (one,) = collectives.read(
        module(start_at("constant(0)") + loop("out", "t", 3), before=computations)
    )

    assert (one.loops, one.times) == ((3, 5), 15)


@pytest.mark.parametrize(
    ("first", "step", "trip_count"), [(0, 1, 17), (3, 1, 14), (0, 4, 5), (17, 1, 0)]
)
def test_trip_count_is_read_from_the_condition_if_the_backend_omits_it(
    first: int, step: int, trip_count: int
):
    program = module(
        start_at(f"constant({first})") + loop("it", "t", None), before=counted("it", REDUCE_Y, step)
    )

    assert sum(one.times for one in collectives.read(program)) == trip_count


@pytest.mark.parametrize(
    ("first", "limit"),
    [("constant(0)", "custom-call()"), ("custom-call()", "constant(17)")],
    ids=["limit", "start"],
)
def test_loop_of_unknown_length_is_an_error_only_within_a_round(first: str, limit: str):
    """The loop is an error only if it contains collectives."""

    def program(inside: str) -> str:
        return module(
            start_at(first) + loop("it", "t", None), before=counted("it", inside, 1, limit)
        )

    def in_a_round(inside: str) -> str:
        inner = start_at(first).replace("%t ", "%t2 ").replace("%x", "%y")
        before = counted("in", inside, 1, limit) + counted(
            "out", f"{inner}  {loop('in', 't2', None)}", 1
        )
        return module(start_at("constant(0)") + loop("out", "t", 3), before=before)

    assert collectives.read(program("")) == collectives.read(in_a_round("")) == []
    assert [one.loops for one in collectives.read(program(REDUCE_Y))] == [(1,)]
    with pytest.raises(InputError, match=r"%loop.in runs until a condition holds; use lax.scan"):
        collectives.read(in_a_round(REDUCE_Y))


CONDITIONAL = "%c = f32[100]{0} conditional(%x, %x, %x), "


def test_conditional_counts_its_largest_branch():
    before = (
        reduce_in("large")
        + reduce_in("small", "replica_groups={{0,1},{2,3}}")
        + computation("none", "")
    )
    line = CONDITIONAL + "branch_computations={%small, %large, %none}"

    measured = traffic.measure(module(line, before=before), inner_steps=0)

    assert (measured.sent, measured.certain) == (600, False)
    assert "at most" in traffic.sentence(measured, 100, REPLICAS)


def test_conditional_with_equal_branches_is_certain():
    line = CONDITIONAL + "true_computation=%one, false_computation=%other"

    measured = traffic.measure(
        module(line, before=reduce_in("one") + reduce_in("other")), inner_steps=0
    )

    assert (measured.sent, measured.certain) == (600, True)


def test_fusions_and_calls_are_followed():
    lines = "%f = f32[100]{0} fusion(%x), kind=kCustom, calls=%one, control-predecessors={%x}\n"
    lines += "%g = f32[100]{0} call(%x), to_apply=%other"

    assert len(collectives.read(module(lines, before=reduce_in("one") + reduce_in("other")))) == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "%r = f32[100]{0} ragged-all-to-all(%x, %x)",
            "hlo_text must only contain collectives of known size, .* ragged-all-to-all %r",
        ),
        (
            "%r = (f32[100]{0}, token[]) send(%x)",
            "hlo_text must only contain collectives of known size",
        ),
    ],
)
def test_uncountable_collective_is_an_error(line: str, sentence: str):
    with pytest.raises(InputError, match=sentence):
        collectives.read(module(line))


def test_transfer_to_the_host_is_not_counted():
    assert (
        collectives.read(module("%r = (f32[100]{0}, token[]) send(%x), is_host_transfer=true"))
        == []
    )


def test_text_without_a_program_is_an_error():
    with pytest.raises(
        InputError, match="hlo_text must be one HLO module, got a text with 0 ENTRY"
    ):
        collectives.read("nothing")
    with pytest.raises(InputError, match="hosts must name the host of each of 4 devices, got 2"):
        collectives.read(module(""), hosts=[0, 1])


def send_to_next(x: jax.Array) -> jax.Array:
    return lax.ppermute(x, AXIS, [(i, (i + 1) % REPLICAS) for i in range(REPLICAS)])


COMPILED = {
    "psum": (lambda x: lax.psum(x, AXIS), jnp.float32, 6),
    "psum_scatter": (lambda x: lax.psum_scatter(x, AXIS, tiled=True), jnp.float32, 3),
    "all_gather": (lambda x: lax.all_gather(x, AXIS), jnp.uint8, 3),
    "all_to_all": (lambda x: lax.all_to_all(x, AXIS, 0, 0, tiled=True), jnp.uint8, 0.75),
    "ppermute in a scan of 5": (
        lambda x: lax.scan(lambda x, _: (send_to_next(x) + 1, None), x, None, 5)[0],
        jnp.float32,
        20,
    ),
    "psum of bfloat16 is widened": (lambda x: lax.psum(x, AXIS), jnp.bfloat16, 6),
    "psum in pairs": (
        lambda x: lax.psum(x, AXIS, axis_index_groups=[[0, 2], [1, 3]]),
        jnp.float32,
        4,
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_bytes_of_a_compiled_program_are_exact(name: str):
    """Counts the bytes that each of four devices sends per element."""
    function, dtype, bytes_per_element = COMPILED[name]
    program = replica.parallel(function, DEVICES, in_axes=(0,), out_axes=0)

    text = program.lower(jax.ShapeDtypeStruct((REPLICAS, 4096), dtype)).compile().as_text() or ""

    assert traffic.measure(text, inner_steps=0).sent == bytes_per_element * 4096


STRATEGIES = {
    "synchronous": Strategy(),
    "local": Strategy(inner_steps=3),
    "diloco": Strategy(inner_steps=3, outer=optax.sgd(0.7, momentum=0.9, nesterov=True)),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_mean_sends_the_parameters_and_the_weight(name: str, digits):
    strategy = STRATEGIES[name]
    steps = max(1, strategy.inner_steps)

    measured = compiled(strategy, digits)

    assert measured.sent == measured.peak == 2 * 3 / 4 * 4 * (PARAMS + 1)
    assert measured.sent_per_step == measured.sent / steps
    assert (measured.total, measured.across, measured.within) == (
        4 * measured.sent,
        0,
        4 * measured.sent,
    )
    assert measured.launches == 1
    assert measured.certain
    assert traffic.in_local_steps(measured) == []


@pytest.mark.parametrize("block_steps", [1, 4], ids=["round by round", "in blocks"])
def test_one_round_of_many_is_counted(block_steps: int):
    def train_round(state, split, batches, key):
        return send_to_next(state), {"examples": jnp.zeros(len(batches))}

    axes = {"in_axes": (0, None, 0, None, None, None), "out_axes": (0, 0)}
    rounds = replica.parallel(make_rounds(train_round, block_steps), DEVICES, **axes)
    batches, number = (
        jax.ShapeDtypeStruct((REPLICAS, 10, 1, 2), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )

    compiled = rounds.lower(
        jax.ShapeDtypeStruct((REPLICAS, 100), jnp.float32), (), batches, number, number, ()
    ).compile()

    (one,) = traffic.measure(compiled.as_text() or "", inner_steps=0).collectives
    assert (one.op, one.times, one.sent) == ("collective-permute", 1, 400)


def test_collective_in_the_local_steps_is_found(digits):
    """The check exists to find models that average parameters in every local step."""
    chatty = models.Model(
        MODEL.init, lambda params, *rest: MODEL.apply(lax.pmean(params, AXIS), *rest)
    )

    measured = compiled(STRATEGIES["local"], digits, model=chatty)

    assert {one.loops for one in traffic.in_local_steps(measured)} == {(1, 3)}
    assert measured.peak < measured.sent


MODEL = models.mlp([64, 8, 10])
PARAMS = 64 * 8 + 8 + 8 * 10 + 10


def compiled(strategy: Strategy, digits, model: models.Model = MODEL) -> traffic.Traffic:
    batches = data.deal(digits.train, REPLICAS, 16, seed=0)
    model = models.with_raw_inputs(model, digits.shift, digits.scale)
    program = targets.compile_rounds(
        model, digits, classification, optax.adam(0.01), strategy, Resident(batches), DEVICES
    )
    return traffic.measure(program.as_text(), strategy.inner_steps)


def test_command_prints_the_table(capsys):
    assert wire.main(["--devices", "4", "--hidden-sizes", "8", "--sync-every", "3"]) == 0

    shown = " ".join(capsys.readouterr().out.split())
    assert f"{2 * 3 * (PARAMS + 1):,}" in shown
    assert "every 3 steps in 1 collective, 3 times fewer bytes" in shown


def test_command_prints_a_table_for_each_phase(capsys):
    """QSR on the digits: 230 steps, of which the first 88 have rounds of 4 steps."""
    assert wire.main(["--devices", "4", "--hidden-sizes", "8", "--strategy", "qsr"]) == 0

    shown = " ".join(capsys.readouterr().out.split())
    for start in (0, 88, 128, 160, 192):
        assert f"bytes sent by each device, from step {start} " in shown
    rounds = 88 / 4 + 40 / 8 + 32 / 16 + 1 + 1
    sent = rounds * 2 * 3 * (PARAMS + 1)
    assert f"each device sends {sent / 1000:.1f} kB in 230 steps" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--target", "tpu"],
            (
                "error: --target must be a target such as tpu:v5e:2x4 (a slice of 2 x 4 chips) or "
                "gpu:h100:2x4"
            ),
        ),
        (["--target"], "got none."),
        (["--target=gpu:b1:2x4"], "got gpu:b1:2x4."),
        (["--sync-evry", "3"], "error: --sync-evry is not an option"),
    ],
)
def test_command_reports_invalid_arguments(arguments: list[str], sentence: str, capsys):
    assert wire.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_target_without_its_plugin_is_an_error(monkeypatch):
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    with pytest.raises(
        InputError,
        match=r"target must be a target whose plugin is installed \(pip install 'jax\[tpu\]'\)",
    ):
        targets.devices("tpu:v5e:2x4")


@pytest.mark.slow
def test_sockets_send_the_counted_bytes():
    """Three processes send within 3 % of the bytes counted in the compiled programs."""
    names = "all-reduce,all-gather u8,all-to-all u8,collective-permute,diloco,diloco int4"
    script = Path(__file__).parents[2] / "benchmarks" / "sockets.py"
    command = [
        sys.executable,
        script,
        "--json",
        "--processes",
        "3",
        "--only",
        names,
        "--size",
        "786432",
    ]

    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert finished.returncode == 0, finished.stderr[-4000:]
    rows = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [row["name"] for row in rows] == names.split(",")
    np.testing.assert_allclose(
        [row["sockets"] for row in rows], [row["wire"] for row in rows], rtol=0.03
    )
