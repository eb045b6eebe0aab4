"""The process that renders chat templates (`python -m glimmer.frontend.text.template_child PID`).

It may hang, exhaust its memory or die without harm to the server. `template.py` starts and kills
it, and says which messages the two exchange over standard input, a socket.
"""

import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from ...shared.lifecycle import die_with_parent
from .template import make_environment, receive, send

_MAX_MEMORY = 4 << 30  # bytes of address space
_MAX_CHARS = 32 << 20  # of one prompt; the server holds no more for a template that never ends


def _answer(render: Callable[..., str], variables: dict[str, Any], message: bytes) -> bytes:
    try:
        text = render({**variables, **msgspec.json.decode(message)})
        if len(text) > _MAX_CHARS:
            return b"!it prints %d characters, at most %d" % (len(text), _MAX_CHARS)
        return b"=" + text.encode("utf-8", "replace")
    except Exception as error:  # a template may raise anything
        return b"!" + f"{type(error).__name__}: {error}"[:1000].encode("utf-8", "replace")


def main() -> int:
    """Answer until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    die_with_parent(int(sys.argv[1]), None)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    with socket.socket(fileno=0) as link:
        start = msgspec.json.decode(receive(link))
        render = make_environment().from_string(start["template"]).render
        send(link, b"ready")
        while message := receive(link):
            send(link, _answer(render, start["variables"], message))
    return 0


if __name__ == "__main__":
    sys.exit(main())
