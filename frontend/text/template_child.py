"""The process that renders chat templates (`python -m glimmer.frontend.text.template_child PID`).

It may hang, exhaust its memory or die without harm to the server. `template.py` says which messages
it answers.
"""

import resource
import sys
from collections.abc import Callable

import msgspec

from ..child import serve
from .control import Disguise
from .template import make_environment

_MAX_MEMORY = 4 << 30  # bytes of address space
_MAX_CHARS = 32 << 20  # of one prompt; the server holds no more for a template that never ends


def make_answer(setup: bytes) -> Callable[[bytes], bytes]:
    """A function from the arguments of a rendering to its answer."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    start = msgspec.json.decode(setup)
    render = make_environment().from_string(start["template"]).render
    disguise = Disguise(start["added"])

    def answer(message: bytes) -> bytes:
        try:
            arguments = msgspec.json.decode(message)
            is_disguised = disguise.is_needed(message)
            if is_disguised:
                arguments = disguise.apply(arguments)
            text = render({**start["variables"], **arguments})
            if len(text) > _MAX_CHARS:
                return b"!it prints %d characters, at most %d" % (len(text), _MAX_CHARS)
            if is_disguised:
                return b"~" + text.encode("utf-8", "surrogatepass")
            return b"=" + text.encode("utf-8", "replace")
        except Exception as error:  # a template may raise anything
            return b"!" + f"{type(error).__name__}: {error}"[:1000].encode("utf-8", "replace")

    return answer


if __name__ == "__main__":
    sys.exit(serve(make_answer))
