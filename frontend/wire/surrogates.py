"""JSON with half of a surrogate pair in a string, such as half an emoji that JavaScript cut in two.
A decoder refuses it; here each half becomes U+FFFD."""

import re
from typing import Any

import msgspec

_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u([dD][89a-fA-F]..)|.)",
    re.DOTALL,
)


def decode_json(data: bytes, kind: Any) -> Any:
    """JSON as `kind`. Raises what msgspec raises, except for halves of surrogate pairs."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError):
        repaired = _repair(data)
        if repaired == data:
            raise
        return msgspec.json.decode(repaired, type=kind)


def _repair(data: bytes) -> bytes:
    if b"\xed" in data:  # the halves as bytes
        try:
            pairs = data.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass")
            data = pairs.decode("utf-16", "replace").encode()
        except UnicodeDecodeError:
            return data
    return _ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], data)
