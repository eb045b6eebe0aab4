"""API keys as digests, and how they are kept out of the list of processes."""

import ctypes
import hashlib
import re
from pathlib import Path

_FLAG = re.compile(rb"--(?:api[_-]key|admin[a-z_-]*)[=\0]([^\0]+)")
_ARG_START, _ARG_END = 45, 46  # fields of /proc/self/stat behind the name of the program


def key_digest(key: str) -> str:
    """The SHA-256 digest of an API key, as 64 hex digits. Bytes of a header that were no UTF-8
    count as they came."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def hide_arguments() -> None:
    """Overwrite the API keys in this process's command line, which every local user can read.
    The kernel shows the memory in which it put the arguments, so that is where to write."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    for match in _FLAG.finditer(ctypes.string_at(start, end - start)):
        first, last = match.span(1)
        ctypes.memset(start + first, ord("*"), last - first)
