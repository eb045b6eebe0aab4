"""The launcher's signals: which ones it handles, and whether a SIGHUP means a lost terminal."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator


def can_open_terminal() -> bool:
    """Whether this process has a terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def handlers(
    on_stop: Callable[[], None], on_hang_up: Callable[[], None], wake_fd: int
) -> Iterator[None]:
    """Route signals to these functions and let them end a wait. A SIGHUP that nohup ignores stays
    ignored."""
    previous_fd = signal.set_wakeup_fd(wake_fd, warn_on_full_buffer=False)
    actions = {signal.SIGTERM: on_stop, signal.SIGINT: on_stop, signal.SIGHUP: on_hang_up}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        del actions[signal.SIGHUP]
    previous = {
        number: signal.signal(number, lambda *_, action=action: action())
        for number, action in actions.items()
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
