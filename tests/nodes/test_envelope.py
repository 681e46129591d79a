"""Messages between a server and its nodes."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ctde_jax as ctde
from ctde_jax.nodes.envelope import pack, unpack


@given(
    st.dictionaries(st.text(min_size=1).filter(lambda name: name != "sizes"), st.integers()),
    st.lists(st.binary(max_size=50), max_size=4),
)
def test_unpack_inverts_pack(header, parts):
    assert unpack(pack(header, parts)) == (header, parts)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(content):
    with suppress(ctde.InputError):
        unpack(content)


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_changed_byte_is_no_crash(place, value):
    written = bytearray(pack({"kind": "message", "round": 3}, [b"abc", b""]))
    written[place % len(written)] = value
    with suppress(ctde.InputError):
        unpack(bytes(written))


@pytest.mark.parametrize("name", ["round", "missing"])
def test_values_have_the_type_that_is_asked_for(name):
    message = unpack(pack({"round": True}))
    with pytest.raises(ctde.InputError, match=f"must have {name} in its header"):
        message.value(name, int)
    assert message.value("round", bool) is True
