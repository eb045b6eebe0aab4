"""How large a request body may be: in bytes, and in JSON values, which cost more than their bytes.

Both follow from the longest request that the server can run. Values are counted while the body
arrives, so that a body that is too expensive is never decoded.
"""

from dataclasses import dataclass

from ...shared.errors import RequestError
from ...shared.resolve import default_body_mb

_MAX_NODES = 50_000  # decoding so many takes some 20 ms
_SPARE_VALUES = 100_000


@dataclass(frozen=True)
class BodyLimits:
    """The most that one body may have. A value is an element of an array or a member of an object;
    a node is an object, an array or a member."""

    num_bytes: int
    num_values: int
    num_nodes: int = _MAX_NODES

    @classmethod
    def of(cls, max_body_mb: float | None, max_tokens: int, vocab_size: int) -> "BodyLimits":
        """For requests of `max_tokens` tokens. A body may list a prompt and a whole vocabulary."""
        megabytes = max_body_mb or default_body_mb(max_tokens)
        return cls(int(megabytes * (1 << 20)), max_tokens + vocab_size + _SPARE_VALUES)


class Shape:
    """Counts the values of a JSON text that arrives in parts. Never counts too few."""

    def __init__(self, limits: BodyLimits) -> None:
        self.num_values = self.num_nodes = 0
        self._limits = limits
        self._is_in_string = 0
        self._tail = b""  # a backslash whose next character has not arrived

    @property
    def num_bytes(self) -> int:
        """Most memory that the decoded text takes besides its strings."""
        return 40 * self.num_values + 250 * self.num_nodes

    def add(self, data: bytes) -> None:
        """Raises RequestError when the text has more values than it may."""
        data = self._tail + data
        num_backslashes = len(data) - len(data.rstrip(b"\\"))
        self._tail = b"\\" if num_backslashes % 2 else b""
        data = data[: len(data) - len(self._tail)]
        parts = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[self._is_in_string :: 2])
        self._is_in_string ^= (len(parts) - 1) & 1
        self.num_values += max(outside.count(b","), len(parts) // 4)
        self.num_nodes += sum(map(outside.count, (b"{", b"[", b":")))
        limits = self._limits
        if self.num_values > limits.num_values:
            raise RequestError(f"the body's JSON lists more than {limits.num_values} values")
        if self.num_nodes > limits.num_nodes:
            kinds = "objects, arrays and members"
            raise RequestError(f"the body's JSON has more than {limits.num_nodes} {kinds}")
