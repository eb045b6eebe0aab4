"""Key files that change while the server runs."""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from glimmer.frontend.access.guard import Access
from glimmer.frontend.access.reload import Reloader, keep_current
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ConfigError
from glimmer.shared.messages import Reload
from glimmer.shared.secrets import key_digest

A, B = key_digest("sk-a"), key_digest("sk-b")


async def ask(server: Any, key: str) -> int:
    headers = {"x-api-key": key}
    async with server.session.get(server.url + "/v1/models", headers=headers) as reply:
        return int(reply.status)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"a:{A} requests=1\n")
    return path


@contextlib.contextmanager
def watching(server: Any, answers: list[str] | None = None) -> Iterator[asyncio.Event]:
    """`answers`: those to requests to read the file at once."""
    answers = [] if answers is None else answers
    asked = server.frontend.client.state.reload
    task = asyncio.create_task(
        keep_current([server.frontend.access.reloader], asked, answers.append)
    )
    yield asked
    task.cancel()


async def test_a_change_is_noticed_and_running_requests_go_on(start: Any, file: Path) -> None:
    server = await start(api_key_file=str(file))
    server.engine.manual = True
    with watching(server):
        headers = {"x-api-key": "sk-a"}
        asking = asyncio.create_task(server.post("/generate", {"inputs": [1]}, headers=headers))
        [submit] = await server.engine.submitted()
        assert [await ask(server, key) for key in ("sk-a", "sk-b")] == [200, 401]
        new = file.with_name("new")  # as an editor, or kubernetes, replaces a file
        new.write_text(f"b:{B}\n")
        new.replace(file)
        async with asyncio.timeout(10):
            while await ask(server, "sk-b") != 200:
                await asyncio.sleep(0.05)
        assert await ask(server, "sk-a") == 401
        server.engine.tokens(submit, [275])
        server.engine.finish(submit, "stop", 1)
        assert (await asking)[0] == 200


async def test_sighup_reads_at_once_and_limits_change(start: Any, file: Path) -> None:
    server = await start(api_key_file=str(file))
    server.engine.manual = True
    with watching(server):
        headers = {"x-api-key": "sk-a"}
        asking = [asyncio.create_task(server.post("/generate", {"inputs": [1]}, headers=headers))]
        await server.engine.submitted(1)
        assert (await server.post("/generate", {"inputs": [1]}, headers=headers))[0] == 429
        file.write_text(f"a:{A} requests=2\nb:{B}")
        server.engine.send(Reload())
        async with asyncio.timeout(10):
            while await ask(server, "sk-b") != 200:
                await asyncio.sleep(0.005)
        asking.append(
            asyncio.create_task(server.post("/generate", {"inputs": [1]}, headers=headers))
        )
        for submit in await server.engine.submitted(2):
            server.engine.finish(submit, "stop")
        assert [status for status, _ in await asyncio.gather(*asking)] == [200, 200]


@pytest.mark.parametrize("content", ["a:b\n", None, "\udcff", f"a:{A}\nb:{A}\n"])
def test_a_broken_file_keeps_the_old_keys_and_says_so_once(
    file: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    access = Access(ServeConfig(api_key_file=str(file)))
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content.encode("utf-8", "surrogateescape"))
    for _ in range(5):
        access.reloader.check()
    assert len(caplog.records) == 1
    assert f"the old API keys stay in use: --api_key_file {file}: " in caplog.text
    assert access.key_of_head(b"GET / HTTP/1.1\r\nx-api-key: sk-a\r\n") is not None
    file.write_text(f"b:{B}\n")
    access.reloader.check()
    assert access.key_of_head(b"GET / HTTP/1.1\r\nX-API-Key:sk-b\r\n") is None, "not at rest yet"
    access.reloader.check()
    assert access.key_of_head(b"GET / HTTP/1.1\r\nX-API-Key:sk-b\r\n") is not None
    assert access.key_of_head(b"GET / HTTP/1.1\r\nAuthorization: Bearer sk-b\r\n") is not None
    assert access.key_of_head(b"GET / HTTP/1.1\r\nx-api-key: sk-a\r\n") is None


def test_a_file_that_is_being_written_is_not_read_yet(tmp_path: Path) -> None:
    path, loads = tmp_path / "f", []
    path.write_text("0")
    reloader = Reloader("things", [str(path)], lambda: loads.append(path.read_text()))
    assert loads == ["0"]
    for number in range(1, 4):
        path.write_text("." * number)
        reloader.check()
    assert loads == ["0"]
    reloader.check()
    reloader.check()
    assert loads == ["0", "..."]


def test_a_process_that_starts_while_the_file_is_broken_has_the_last_good_keys(
    file: Path, tmp_path: Path
) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    config = ServeConfig(
        api_key_file=str(file), runtime_dir=str(runtime), admin_api_key=(key_digest("root"),)
    )
    Access(config)
    file.write_text("broken")
    second = Access(config)
    for key, is_right in (("sk-a", True), ("root", True), ("sk-b", False)):
        found = second.key_of_head(b"GET / HTTP/1.1\r\nx-api-key: " + key.encode() + b"\r\n")
        assert (found is not None) == is_right
        assert key != "sk-a" or (found is not None and found.limits.requests == 1)
    assert [name.name for name in runtime.iterdir()] == ["api-keys"]
    assert os.stat(runtime / "api-keys").st_mode & 0o077 == 0
    assert "root" not in (runtime / "api-keys").read_text()
    (runtime / "api-keys").unlink()
    with pytest.raises(ConfigError, match="line 1"):
        Access(config)


async def test_who_asks_for_new_files_hears_when_they_are_read_and_what_is_wrong(
    start: Any, file: Path
) -> None:
    server = await start(api_key_file=str(file))
    answers: list[str] = []
    with watching(server, answers) as asked:
        for text in (f"b:{B}\n", "what is this"):
            file.write_text(text)
            asked.set()
            await server.settle(lambda: not asked.is_set())
        await server.settle(lambda: len(answers) == 2)
        assert await ask(server, "sk-b") == 200
    assert answers[0] == ""
    assert answers[1].startswith("the old API keys stay in use: ")
