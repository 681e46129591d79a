"""Flower messages that carry one payload of bytes."""

# pyright: reportMissingImports=false
from flwr.app import ConfigRecord, Error, Message, RecordDict

# Flower's type of a message; its category "query" carries any content.
MESSAGE_TYPE = "query"
_RECORD = "payload"
# Of Flower's error codes: the client app failed.
_FAILED = 2


def content_of(payload: bytes) -> RecordDict:
    """Returns the content of a message with this payload; Flower adds about 180 bytes to it."""
    return RecordDict({_RECORD: ConfigRecord({"bytes": payload})})


def payload_of(message: Message) -> bytes | None:
    """Returns the payload of a message, or None if a foreign app made the message."""
    record = message.content.get(_RECORD)
    payload = record.get("bytes") if isinstance(record, ConfigRecord) else None
    return payload if isinstance(payload, bytes) else None


def reply(payload: bytes, request: Message) -> Message:
    """Returns the answer to a message."""
    return Message(content_of(payload), reply_to=request)


def failure(sentence: str, request: Message) -> Message:
    """Returns the answer to a message that could not be computed."""
    return Message(Error(code=_FAILED, reason=sentence), reply_to=request)
