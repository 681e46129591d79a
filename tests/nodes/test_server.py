"""Rounds, absence, kills and hostile messages, with nodes in this process."""

import json
from contextlib import contextmanager

import jax
import numpy as np
import optax
import pytest
from nodes_here import Direct, make_nodes, run_federation

import ctde_jax as ctde
from ctde_jax.nodes.envelope import pack, unpack
from ctde_jax.nodes.federation import Federation
from ctde_jax.nodes.link import run_rounds, send_bundle
from ctde_jax.nodes.opening import open_server

NODES = 3
INT4 = ctde.aggregate.two_phase(
    ctde.aggregate.error_feedback(ctde.aggregate.quantize(bits=4, block=64))
)


def federation_of(reduce=INT4, rounds=6, **options):
    strategy = ctde.Strategy(inner_steps=2, reduce=reduce, outer=optax.sgd(0.7, momentum=0.9))
    model = ctde.models.mlp([64, 10])
    return Federation(model, optax.adam(0.01), strategy, NODES, rounds, batch_size=24, **options)


@pytest.fixture(scope="module")
def parts(digits):
    return ctde.data.partition.iid(digits.train.labels, NODES)


@pytest.fixture
def opened(tmp_path, digits, parts):
    """Opens a server with nodes; each call continues the run, with new objects."""

    @contextmanager
    def opened(federation=None, **options):
        federation = federation or federation_of()
        nodes = make_nodes(tmp_path, federation, digits, parts)
        saving = ctde.Saving(tmp_path / "server")
        with open_server(federation, digits, saving, show=False, **options) as server:
            yield server, nodes

    return opened


def params_of(server):
    return server.evaluated_center()[0]


def check_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def rounds_of(server):
    return [row["round"] for row in server.record.log.rows if row["split"] == "train"]


@pytest.mark.slow
def test_a_run_that_is_killed_after_every_round_has_the_same_bits(tmp_path, digits, parts, opened):
    expected = run_federation(tmp_path / "whole", federation_of(), digits, parts)
    for number in range(6):
        # A server and nodes that know no more than their folders.
        with opened() as (server, nodes):
            assert server.round == number
            run_rounds(server, Direct(nodes), rounds=1)
    check_equal(params_of(server), params_of(expected))
    assert [row["step"] for row in server.record.log.rows if row["split"] == "train"] == [
        2 * number for number in range(1, 7)
    ]


@pytest.mark.slow
def test_a_message_is_the_same_after_a_kill_before_and_after_it_was_written(opened):
    with opened() as (server, nodes):
        run_rounds(server, Direct(nodes), rounds=2)
        request = server.request("key 1")
        first = nodes["key 1"].answer(request)
    with opened() as (server, nodes):
        # The server introduces itself to the new process of the node first.
        assert unpack(nodes["key 1"].answer(request)).header["kind"] == "unknown"
        nodes["key 1"].answer(server.request("key 1"))
        again = nodes["key 1"].answer(request)
        assert again == first
        assert nodes["key 1"].answer(request) == first
        run_rounds(server, Direct(nodes))
        assert server.is_complete


@pytest.mark.slow
def test_a_round_that_was_closed_but_not_saved_is_closed_again(opened, tmp_path, monkeypatch):
    with opened() as (server, nodes):
        run_rounds(server, Direct(nodes), rounds=2)
        monkeypatch.setattr(server, "save", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_rounds(server, Direct(nodes), rounds=1)
    with opened() as (server, nodes):
        assert server.round == 2
        run_rounds(server, Direct(nodes))
    rows = (tmp_path / "server" / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, rows) if row["split"] == "train"]
    assert steps == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_a_node_that_was_away_follows_the_answers(opened):
    with opened(quorum=2) as (server, nodes):
        away = {"key 2": False}
        link = Direct(nodes, lambda identity: away.get(identity, False))
        run_rounds(server, link, rounds=1)
        away["key 2"] = True
        run_rounds(server, link, rounds=3)
        away["key 2"] = False
        request = unpack(server.request("key 2"))
        assert request.header["since"] == 0
        assert not request.header["snapshot"]
        assert len(request.parts) == 2 * 4
        run_rounds(server, link)
    taken = [len(each["nodes"]) for each in rounds_of(server)]
    assert taken == [3, 2, 2, 2, 3, 3]
    centers = [node._member._state.center for node in nodes.values()]
    check_equal(centers[0], centers[2])


@pytest.mark.slow
@pytest.mark.parametrize("keep_answers", [1, 200])
def test_a_node_that_was_away_for_long_costs_at_most_a_snapshot(opened, keep_answers):
    federation = federation_of(ctde.aggregate.mean(), rounds=6)
    with opened(federation, quorum=2, keep_answers=keep_answers) as (server, nodes):
        link = Direct(nodes, lambda identity: identity == "key 2" and server.round < 5)
        run_rounds(server, link, rounds=5)
        nodes["key 2"].answer(server.request("key 2"))
        server._members.find("key 2").has_joined = True
        request = server.request("key 2")
        snapshot = sum(leaf.nbytes for leaf in jax.tree.leaves(server.state.center))
        assert unpack(request).header["snapshot"]
        assert len(request) < snapshot + 500
        run_rounds(server, link)
    check_equal(*[nodes[key]._member._state.center for key in ("key 0", "key 2")])


@pytest.mark.slow
def test_fifty_missed_rounds_cost_at_most_a_snapshot(opened):
    federation = federation_of(rounds=52)
    with opened(federation, quorum=2) as (server, nodes):
        link = Direct(nodes, lambda identity: identity == "key 2" and 1 <= server.round < 51)
        run_rounds(server, link, rounds=51)
        request = server.request("key 2")
        snapshot = sum(leaf.nbytes for leaf in jax.tree.leaves(server.state.center))
        assert len(request) < snapshot + 500
        run_rounds(server, link)
        assert rounds_of(server)[-1]["nodes"] == ["node 0", "node 1", "node 2"]
    check_equal(*[nodes[key]._member._state.center for key in ("key 0", "key 2")])


@pytest.mark.slow
def test_a_late_message_is_added_to_the_next_one(opened, digits):
    # Without compression, the sum of all messages is the sum of all changes of the node.
    federation = federation_of(ctde.aggregate.mean(), rounds=3)
    with opened(federation, quorum=2) as (server, nodes):
        run_rounds(server, Direct(nodes), rounds=1)
        slow = nodes["key 2"]
        late = slow.answer(server.request("key 2"))
        message = slow._member._state.message
        run_rounds(server, Direct(nodes, lambda identity: identity == "key 2"), rounds=1)
        server.accept("key 2", late, now=0.0)
        before = slow._member._local

        def local(center, opt_state, step):
            result = before(center, opt_state, step)
            local.message = result.message
            return result

        slow._member._local = local
        run_rounds(server, Direct(nodes), rounds=1)
        assert rounds_of(server)[-1]["late"] == ["node 2"]
        assert rounds_of(server)[-1]["nodes"] == ["node 0", "node 1", "node 2"]
        sent = jax.tree.map(np.add, local.message, message)
        check_equal(slow._member._state.message, sent)


@pytest.mark.slow
def test_error_feedback_keeps_the_sum_of_messages_that_were_not_taken(opened):
    with opened(quorum=2) as (server, nodes):
        run_rounds(server, Direct(nodes), rounds=1)
        slow = nodes["key 2"]
        slow.answer(server.request("key 2"))
        before = slow._member._state
        run_rounds(server, Direct(nodes, lambda identity: identity == "key 2"), rounds=1)
        slow.answer(server.request("key 2"))
        after = slow._member._state
        # The residual is that after the late message was encoded, and the message is not lost.
        assert any(leaf.any() for leaf in jax.tree.leaves(after.undelivered))
        check_equal(after.undelivered, before.message)
        check_equal(after.sender, before.sent)


def test_a_round_waits_for_the_quorum_and_then_for_the_deadline(opened):
    with opened(quorum=2) as (server, nodes):
        slow = Direct(nodes)
        slow.push = lambda requests: Direct.push(
            slow, {key: value for key, value in requests.items() if key != "key 0"}
        )
        run_rounds(server, slow, deadline=0.2, rounds=1)
        assert rounds_of(server)[-1]["nodes"] == ["node 1", "node 2"]


def tampered(reply, change):
    envelope = unpack(reply)
    header = {**envelope.header}
    parts = list(envelope.parts)
    change(header, parts)
    return pack(header, parts)


def with_numbers(number):
    def change(header, parts):
        parts[0] = np.full(len(parts[0]) // 4, number, np.float32).tobytes()[:-4] + parts[0][-4:]

    return change


HOSTILE = {
    "garbage": lambda reply: b"\xff" * 100,
    "nothing": lambda reply: b"",
    "short": lambda reply: tampered(reply, lambda header, parts: parts.__setitem__(0, b"1234")),
    "long": lambda reply: tampered(reply, lambda header, parts: parts.__setitem__(0, bytes(10**6))),
    "NaN": lambda reply: tampered(reply, with_numbers(np.nan)),
    "infinity": lambda reply: tampered(reply, with_numbers(np.inf)),
    "future": lambda reply: tampered(reply, lambda header, parts: header.update(round=99)),
    "past": lambda reply: tampered(reply, lambda header, parts: header.update(round=-1)),
    "no round": lambda reply: tampered(reply, lambda header, parts: header.pop("round")),
    "foreign": lambda reply: tampered(reply, lambda header, parts: header.update(run="other")),
    "weight": lambda reply: tampered(
        reply, lambda header, parts: header["sums"].update(examples=1e9)
    ),
    "negative": lambda reply: tampered(
        reply, lambda header, parts: header["sums"].update(examples=-1)
    ),
    "loss": lambda reply: tampered(
        reply, lambda header, parts: header["sums"].update(loss=float("nan"))
    ),
    "words": lambda reply: tampered(reply, lambda header, parts: header.update(sums="many")),
    "kind": lambda reply: tampered(reply, lambda header, parts: header.update(kind=[1])),
}


@pytest.fixture(scope="module")
def waiting(tmp_path_factory, digits, parts):
    """A server that has closed a round, and the reply of a node in the next one."""
    folder = tmp_path_factory.mktemp("waiting")
    federation = federation_of(ctde.aggregate.mean(), rounds=3)
    nodes = make_nodes(folder, federation, digits, parts)
    saving = ctde.Saving(folder / "server")
    with open_server(federation, digits, saving, show=False, quorum=2) as server:
        run_rounds(server, Direct(nodes), rounds=1)
        yield server, nodes["key 2"].answer(server.request("key 2")), nodes


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_is_refused_in_one_sentence(waiting, name):
    server, reply, _ = waiting
    lines = []
    server.say = lines.append
    server.accept("key 2", HOSTILE[name](reply), now=0.0)
    (line,) = lines
    assert line.startswith("refused    node 2: ")
    assert line.endswith(".")
    assert "\n" not in line
    # The node is asked again after a pause, and no message is taken.
    assert not server.wants("key 2", now=1.0)
    assert server.wants("key 2", now=10.0)


def test_after_hostile_messages_the_run_goes_on(waiting):
    server, _, nodes = waiting
    lines = []
    nodes["key 2"]._member._say = lines.append
    # The node learns of the refusal as well.
    nodes["key 2"].answer(server.request("key 2"))
    (line,) = lines
    assert line.startswith("refused    the server has refused the last reply: ")
    run_rounds(server, Direct(nodes))
    assert server.is_complete
    assert rounds_of(server)[1]["refused"] == ["node 2"]


def test_a_message_that_comes_twice_counts_once(opened):
    with opened() as (server, nodes):
        run_rounds(server, Direct(nodes), rounds=1)
        replies = {key: node.answer(server.request(key)) for key, node in nodes.items()}
        for key in ("key 0", "key 0", "key 1", "key 0"):
            server.accept(key, replies[key], now=0.0)
        assert not server.has_quorum
        server.accept("key 2", replies["key 2"], now=0.0)
        server.close()
        assert rounds_of(server)[-1]["nodes"] == ["node 0", "node 1", "node 2"]


@pytest.mark.slow
def test_a_node_with_a_message_far_out_is_named(opened):
    federation = federation_of(ctde.aggregate.mean(), rounds=2)
    with opened(federation) as (server, nodes):
        honest = nodes["key 1"].answer

        def answer(request):
            reply = honest(request)
            if unpack(reply).header["kind"] != "message":
                return reply
            return tampered(reply, with_numbers(1e3))

        nodes["key 1"].answer = answer
        run_rounds(server, Direct(nodes))
    assert rounds_of(server)[-1]["far_out"] == ["node 1"]


@pytest.mark.slow
def test_a_run_from_the_start_has_no_nodes_of_the_earlier_one(opened, tmp_path, digits, parts):
    with opened() as (server, nodes):
        run_rounds(server, Direct(nodes), rounds=2)
        before = unpack(server.request("key 0")).header["run"]
    saving = ctde.Saving(tmp_path / "server", resume=False)
    with open_server(federation_of(), digits, saving, show=False) as server:
        assert server.round == 0
        assert unpack(server.request("key 0")).header["run"] != before
    assert (tmp_path / "server" / "previous-1" / "nodes.json").exists()


@pytest.mark.slow
def test_an_index_belongs_to_one_node(opened, tmp_path, digits, parts):
    with opened() as (server, nodes):
        run_rounds(server, Direct(nodes), rounds=1)
        lines = []
        server.say = lines.append
        twin = make_nodes(tmp_path / "twin", federation_of(), digits, parts)["key 0"]
        server.accept("other", twin.answer(server.request("other")), now=0.0)
        assert lines == [
            "refused    node 3: index must be that of one node only, but node 0 has 0."
        ]


@pytest.mark.slow
def test_a_node_with_another_model_is_refused(opened, tmp_path, digits, parts):
    federation = federation_of()
    other = Federation(
        ctde.models.mlp([64, 8, 10]),
        federation.optimizer,
        federation.strategy,
        NODES,
        6,
        batch_size=24,
    )
    with opened() as (server, _):
        lines = []
        server.say = lines.append
        twin = make_nodes(tmp_path / "twin", other, digits, parts)["key 0"]
        server.accept("key 0", twin.answer(server.request("key 0")), now=0.0)
        assert "model must have the parameters of the server's" in lines[0]


@pytest.mark.slow
def test_a_node_refuses_the_folder_of_other_data(opened, tmp_path, digits, parts):
    with opened() as (server, nodes):
        run_rounds(server, Direct(nodes), rounds=1)
    with opened() as (server, nodes):
        twin = make_nodes(tmp_path, federation_of(), digits, parts[::-1])["key 0"]
        reply = unpack(twin.answer(server.request("key 0")))
        assert reply.header["kind"] == "refusal"
        assert "must be new, or that of the same run and data" in reply.header["reason"]
        assert twin.failure is not None


def test_a_message_that_is_not_finite_is_not_sent(opened):
    federation = federation_of()
    diverging = Federation(
        federation.model, optax.sgd(1e38), federation.strategy, NODES, 6, batch_size=24
    )
    with opened(diverging) as (server, nodes):
        nodes["key 0"].answer(server.request("key 0"))
        server.accept("key 0", nodes["key 0"].answer(server.request("key 0")), now=0.0)
        reply = unpack(nodes["key 0"].answer(server.request("key 0")))
        assert reply.header["kind"] == "refusal"
        assert "is NaN or infinite" in reply.header["reason"]


@pytest.mark.slow
def test_a_full_disk_of_a_node_is_reported_and_its_state_stays(opened, monkeypatch):
    with opened(quorum=2) as (server, nodes):
        run_rounds(server, Direct(nodes), rounds=1)
        member = nodes["key 2"]._member
        before = member._state, member._progress

        def fail(*arguments):
            raise ctde.InputError("folder", "must be a writable folder with enough free space.")

        with monkeypatch.context() as patch:
            patch.setattr(member, "_write", fail)
            reply = unpack(nodes["key 2"].answer(server.request("key 2")))
            assert "enough free space" in reply.header["reason"]
        assert member._progress.sent is None
        run_rounds(server, Direct(nodes))
        assert server.is_complete
        assert before is not None


def test_nodes_receive_the_bundle_and_end(opened, tmp_path, digits):
    with opened(federation_of(rounds=2)) as (server, nodes):
        link = Direct(nodes)
        run_rounds(server, link)
        result = server.record.result(server.evaluated_center(), (), None, {}, False, ())
        written = ctde.write_bundle(result, digits, tmp_path / "bundle", ["numpy"], show=False)
        server.offer(tmp_path / "bundle")
        assert server.lacks_bundle
        send_bundle(server, link, seconds=10)
        assert not server.lacks_bundle
    for node in nodes.values():
        assert node.is_done
        assert ctde.open_bundle(node.folder / "bundle").sha256 == written.bundle.sha256


@pytest.mark.slow
def test_a_damaged_bundle_is_refused_and_the_old_one_stays(opened, tmp_path, digits):
    with opened(federation_of(rounds=1)) as (server, nodes):
        run_rounds(server, Direct(nodes))
        result = server.record.result(server.evaluated_center(), (), None, {}, False, ())
        ctde.write_bundle(result, digits, tmp_path / "bundle", ["numpy"], show=False)
        server.offer(tmp_path / "bundle")
        request = unpack(server.request("key 0"))
        header = request.header
        for name in ("../evil", ""):
            names = [name, *header["names"][1:]]
            reply = nodes["key 0"].answer(pack({**header, "names": names}, request.parts))
            assert unpack(reply).header["kind"] == "refusal"

        # One bit of the last file, which is the model.
        *others, model = request.parts
        damaged = model[:-1] + bytes([model[-1] ^ 1])
        reply = nodes["key 0"].answer(pack(header, [*others, damaged]))
        assert unpack(reply).header["kind"] == "refusal"
        assert not (nodes["key 0"].folder / "bundle").exists()
