"""Compiled grammars for this frontend's requests: asks the compiling process, keeps what it made.

The process (`compile_child.py`) starts with the first grammar and is replaced when it dies. Its
files lie in a directory of this frontend's own; the oldest ones that no request uses are removed
when all together grow too large.
"""

import asyncio
import hashlib
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import msgspec

from ...shared.config import ServeConfig
from ...shared.errors import OverloadedError, RequestError, UnavailableError
from ...shared.messages import Grammar
from ..text.detokenize import Vocabulary
from .compile_child import Answer, Order, Setup
from .source import GrammarSource

CACHE_FACTOR = 8  # files in use or kept: so many times the largest one allowed
_MAX_WAITING = 256  # compilations asked for and not answered
_START_S = 60.0  # for a process that starts on a busy machine
_LENGTH = struct.Struct("!I")
_encode = msgspec.msgpack.encode
logger = logging.getLogger(__name__)


class _Lost(Exception):  # noqa: N818 - not an error of anybody's request
    """The compiling process died."""


class GrammarCompiler:
    """Sources to files. Everything happens on the event loop of the caller."""

    def __init__(
        self, config: ServeConfig, vocabulary: Vocabulary, end_ids: tuple[int, ...], directory: Path
    ) -> None:
        self.directory = directory
        shutil.rmtree(directory, ignore_errors=True)  # of a process that died in this one's place
        self._config = config
        self._vocabulary = vocabulary
        self._end_ids = end_ids
        cores = os.cpu_count() or 1
        self._threads = max(1, min(8, cores // 4))
        self._slots = asyncio.Semaphore(max(2, min(4, cores // 2)))
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._closing = False
        self._numbers = 0
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._compiling: dict[str, asyncio.Task[int]] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self._users: Counter[str] = Counter()

    async def compile(self, source: GrammarSource) -> Grammar:
        """The compiled grammar of `source`. Raises RequestError naming the field that is wrong or
        too much, OverloadedError when too many wait, UnavailableError when the process dies."""
        encoded = msgspec.json.encode(source)
        limit = int(self._config.grammar_source_kb * 1024)
        if len(encoded) > limit:
            raise _refused(source, "", f"exceeds {limit >> 10} kB (--grammar_source_kb)")
        name = hashlib.sha256(encoded).hexdigest()[:32]
        if name in self._sizes:
            self._sizes.move_to_end(name)
        else:
            if len(self._compiling) >= _MAX_WAITING:
                raise OverloadedError("too many grammars wait to be compiled", retry_after_s=1.0)
            if name not in self._compiling:
                task = asyncio.create_task(self._make(name, source, encoded))
                self._compiling[name] = task
                task.add_done_callback(lambda done: self._made(name, done))
            self._keep(name, await asyncio.shield(self._compiling[name]))
        return Grammar(name, str(self.directory / name))

    def hold(self, name: str) -> None:
        """A request uses this grammar: its file stays."""
        self._users[name] += 1

    def release(self, name: str) -> None:
        """The request has ended."""
        self._users[name] -= 1
        if not self._users[name]:
            del self._users[name]

    async def close(self) -> None:
        """End the process and remove the files. Compilations that run fail."""
        self._closing = True
        if self._process is not None:
            self._process.kill()
        for task in list(self._compiling.values()):
            task.cancel()
        ends = [*self._compiling.values(), *([self._reading] if self._reading else [])]
        await asyncio.gather(*ends, return_exceptions=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def num_held(self) -> int:
        """Grammars that requests use."""
        return len(self._users)

    @property
    def process_id(self) -> int | None:
        """Of the compiling process, if there is one."""
        return self._process.pid if self._process else None

    # --- one grammar -----------------------------------------------------------------------

    async def _make(self, name: str, source: GrammarSource, encoded: bytes) -> int:
        async with self._slots:
            for _ in range(2):  # once more if the process died: perhaps another one's fault
                try:
                    answer = await self._ask(name, encoded)
                except _Lost:
                    continue
                if answer.error:
                    raise _refused(source, answer.field, answer.error)
                return answer.size
        raise UnavailableError("the grammar compiler does not start", retry_after_s=5.0)

    def _made(self, name: str, task: asyncio.Task[int]) -> None:
        del self._compiling[name]
        if not task.cancelled():
            task.exception()  # those who waited have it, if there are any left

    def _keep(self, name: str, size: int) -> None:
        self._sizes[name] = size
        self._sizes.move_to_end(name)
        limit = self._config.grammar_compiled_mb * (1 << 20) * CACHE_FACTOR
        total = sum(self._sizes.values())
        for old in list(self._sizes):
            if total <= limit or old == name:
                return
            if not self._users[old]:
                total -= self._sizes.pop(old)
                (self.directory / old).unlink(missing_ok=True)

    async def _ask(self, name: str, encoded: bytes) -> Answer:
        async with self._starting:
            writer = self._writer or await self._start()
        self._numbers += 1
        number = self._numbers
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            _write(writer, _encode(Order(number, name, encoded)))
            result: Answer = await answer
            return result
        finally:
            self._waiting.pop(number, None)

    # --- the process -------------------------------------------------------------------------

    async def _start(self) -> asyncio.StreamWriter:
        config = self._config
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs:
            # Not in a thread: the kernel ends the process with the thread that started it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.compile_child", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        setup = Setup(
            directory=str(self.directory),
            tokens=self._vocabulary.token_bytes,
            added_ids=self._vocabulary.added_ids,
            end_ids=list(self._end_ids),
            threads=self._threads,
            memory_mb=config.grammar_memory_mb,
            compiled_mb=config.grammar_compiled_mb,
            timeout_s=config.grammar_timeout_s,
        )
        _write(self._writer, _encode(setup))
        self._reading = asyncio.create_task(self._read_answers(reader))
        return self._writer

    async def _read_answers(self, reader: asyncio.StreamReader) -> None:
        """Until the process ends; what it has not answered then is lost."""
        try:
            async with asyncio.timeout(_START_S):
                await _read(reader)  # it is ready; orders may be on their way already
            while True:
                answer = msgspec.msgpack.decode(await _read(reader), type=Answer)
                future = self._waiting.get(answer.number)
                if future is not None and not future.done():
                    future.set_result(answer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            if not self._closing:
                logger.warning("the grammar compiler has died; the next grammar starts another one")
        finally:
            process, writer = self._process, self._writer
            assert process is not None, "reads only while there is a process"
            assert writer is not None, "reads only while there is a process"
            self._process = self._writer = self._reading = None
            writer.close()
            process.kill()
            process.wait()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(_Lost())


def _write(writer: asyncio.StreamWriter, message: bytes) -> None:
    writer.write(_LENGTH.pack(len(message)) + message)


async def _read(reader: asyncio.StreamReader) -> bytes:
    length = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))[0]
    return await reader.readexactly(length)


def _refused(source: GrammarSource, field: str, problem: str) -> RequestError:
    """The error of a client; without a field it is about the largest part of the source."""
    if not field:
        parts = zip(source.functions, source.fields, strict=True)
        sizes = [(len(msgspec.json.encode(function)), name) for function, name in parts]
        if source.format is not None:
            sizes.append((len(msgspec.json.encode(source.format)), source.format.field))
        field = max(sizes)[1]
    return RequestError(f"{field}: {problem}", field=field)
