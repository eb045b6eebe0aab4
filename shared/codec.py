"""Messages to bytes and back: MessagePack on the wire, types checked on arrival.

`msgpack` reads and writes bytes, `msgspec` checks types. Bytes from a socket are not trusted: sizes
are limited before memory is allocated, every field is checked, and `CodecError` is the only error.
"""

import msgpack
import msgspec

from .errors import CodecError
from .messages import AnyMessage, Message

MAX_MESSAGE_BYTES = 64 << 20  # a plan with several 200k-token prompts is about 3 MB
_MALFORMED = (
    msgspec.MsgspecError,
    msgpack.UnpackException,
    ValueError,
    TypeError,
    RecursionError,
)
_LIMITS = {
    "max_str_len": 1 << 20,
    "max_bin_len": 1 << 20,
    "max_array_len": 8 << 20,
    "max_map_len": 1 << 10,
    "max_ext_len": 0,
}


def encode(message: Message) -> bytes:
    """The MessagePack bytes of a message."""
    return msgpack.packb(msgspec.to_builtins(message))  # type: ignore[no-any-return]


def decode(data: bytes) -> AnyMessage:
    """The message in `data`. Raises CodecError unless that is exactly one well-formed message of a
    known type."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise CodecError(f"message of {len(data)} bytes, limit {MAX_MESSAGE_BYTES}")
    try:
        message: AnyMessage = msgspec.convert(msgpack.unpackb(data, **_LIMITS), AnyMessage)
    except _MALFORMED as error:
        raise CodecError(f"malformed message: {error}") from error
    return message
