"""The counts of all HTTP processes together, which the launcher adds up.

With these every process answers a scrape of `/metrics` for the whole server.
"""

import asyncio
import contextlib
import os

from ...shared.messages import Counts
from ...shared.transport import Sender
from .client import EngineState
from .tally import Tally

_ANSWER_S = 0.5  # a launcher that is busy for longer leaves a scrape with older sums


class ServerTotals:
    """This process's link to the sums. Made on the main event loop."""

    def __init__(self, launcher: Sender, index: int, tally: Tally, state: EngineState) -> None:
        """`tally`: what process `index` counts."""
        self._launcher, self._index, self._tally, self._state = launcher, index, tally, state
        self._loop = asyncio.get_running_loop()
        self._serial = 0

    def report(self) -> int:
        """Tell the launcher what this process has counted. Returns the number of the report."""
        self._serial += 1
        self._tally.refresh()
        counts = Counts("frontend", self._index, os.getpid(), self._tally.values, self._serial)
        self._launcher.send(counts)
        return self._serial

    async def refresh(self) -> None:
        """Report and wait for the sums that include it, but not for long. May be called on any
        event loop; returns late, not never, while the main one hangs."""
        with contextlib.suppress(TimeoutError):
            if asyncio.get_running_loop() is self._loop:
                await asyncio.wait_for(self._refresh(), _ANSWER_S)
            else:
                future = asyncio.run_coroutine_threadsafe(self._refresh(), self._loop)
                await asyncio.wait_for(asyncio.wrap_future(future), _ANSWER_S)

    async def _refresh(self) -> None:
        serial, state = self.report(), self._state
        while state.launcher is None or state.launcher.serial < serial:
            state.launcher_news.clear()
            await state.launcher_news.wait()
