"""The guard of the SuperLink: nodes reach the Fleet API only, and after the server is ready."""

import asyncio

import pytest

from ctde_jax.nodes.flower.paths import OPEN, SECRET
from ctde_jax.nodes.flower.superlink import Guard

MINE = [(SECRET.encode(), b"secret")]


def statuses(*requests: tuple[str, list[tuple[bytes, bytes]]]) -> list[int]:
    """Returns the statuses of requests of one guard, in order."""
    found = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(event):
        if event["type"] == "http.response.start":
            found.append(event["status"])

    async def run():
        guard = Guard(app, "secret", most_bytes=100)
        for path, headers in requests:
            await guard({"type": "http", "path": path, "headers": headers}, None, send)

    asyncio.run(run())
    return found


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/", OPEN, "/v1/fleet"]
)
@pytest.mark.parametrize("headers", [[], [(SECRET.encode(), b"guess")]])
def test_only_the_server_reaches_more_than_the_fleet_api(path, headers):
    assert statuses((path, headers), (path, MINE))[0] == 403
    assert statuses((path, MINE))[0] in (200, 204)


def test_nodes_wait_until_the_server_is_ready():
    pull = ("/v1/fleet/pull-messages", [(b"content-length", b"5")])
    assert statuses(pull, (OPEN, MINE), pull) == [503, 204, 200]


@pytest.mark.parametrize(
    ("length", "status"), [(b"100", 200), (b"101", 413), (b"1" * 30, 413), (b"x", 411), (b"", 411)]
)
def test_requests_of_nodes_have_a_limited_length(length, status):
    pull = ("/v1/fleet/push-object", [(b"content-length", length)])
    assert statuses((OPEN, MINE), pull) == [204, status]
    assert statuses((OPEN, MINE), ("/v1/fleet/push-object", []))[1] == 411
