"""Replies that are being uploaded.

Flower's `Grid.pull_messages` waits for the content of a reply as soon as the reply is announced: a
second at least, and minutes if the node was killed while it uploaded. The server would stand still.
"""

# pyright: reportMissingImports=false
from collections.abc import Collection

from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid import HttpGrid


class Arriving:
    """Pulls replies without waiting for those whose content is incomplete.

    Args:
        grid: Flower's grid. A grid that is not Flower's over HTTP, such as that of its simulation,
            has whole replies only.
    """

    def __init__(self, grid: Grid):
        self._grid = grid
        self._replies: dict[str, _Reply] = {}

    def pull(self, requests: Collection[str]) -> list[Message]:
        """Returns the replies to these requests that are complete, each once."""
        if not isinstance(self._grid, HttpGrid):
            return list(self._grid.pull_messages(requests))
        self._replies = {
            request: reply for request, reply in self._replies.items() if request in requests
        }
        # Flower announces a reply once, and then reports an error.
        not_announced = [request for request in requests if request not in self._replies]
        if not_announced:
            pulled = self._grid._runtime_client.PullMessages(
                PullAppMessagesRequest(message_ids=not_announced)
            )
            trees = pulled.message_object_trees
            for message, tree in zip(pulled.messages_list, trees, strict=True):
                self._replies[message.metadata.reply_to_message_id] = _Reply(tree)
        complete = [request for request, reply in self._replies.items() if reply.pull(self._grid)]
        return [self._replies.pop(request).message() for request in complete]


class _Reply:
    """A reply, as a tree of objects of which some have arrived."""

    def __init__(self, tree):
        self._root = tree.object_id
        self._missing = [part.object_id for part in iterate_object_tree(tree)]
        self._contents: dict[str, bytes] = {}

    def pull(self, grid: HttpGrid) -> bool:
        """Pulls the objects that have arrived; returns whether the reply is complete."""
        client = grid._runtime_client
        while self._missing:
            request = PullObjectRequest(
                node=grid.node, run_id=grid.run.run_id, object_id=self._missing[0]
            )
            pulled = client.PullObject(request)
            # It is uploaded later, or never; the link has a deadline.
            if not pulled.object_available:
                return False
            self._contents[self._missing.pop(0)] = pulled.object_content
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=grid.node, run_id=grid.run.run_id, message_object_id=self._root
            )
        )
        return True

    def message(self) -> Message:
        """Returns the message of a complete reply."""
        message = inflate_object_from_contents(self._root, self._contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = self._root
        return message
