"""HTTPS, with certificates that are replaced while the server runs."""

import asyncio
import contextlib
import os
import shutil
import ssl
import sys
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from glimmer.frontend.access.tls import Tls, load_certificate
from glimmer.shared.config import ServeConfig
from glimmer.shared.errors import ConfigError

sys.path.append(str(Path(__file__).parent))
from certificates import make_certificate


def files_in(directory: Path, name: str = "first") -> dict[str, str]:
    certificate, key = make_certificate(directory, name)
    return {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}


async def name_of(server: Any, by_name: bool) -> str:
    """The common name of the certificate in a new handshake, with and without SNI."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host = "localhost" if by_name else None
    port = int(server.url.rsplit(":", 1)[1])
    _, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname=host or ""
    )
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return "first" if b"first" in der else "second" if b"second" in der else "?"


async def test_official_clients_speak_https(start: Any, tmp_path: Path) -> None:
    files = files_in(tmp_path)
    server = await start(**files)
    trusting = ssl.create_default_context(cafile=files["ssl_certfile"])
    url = server.url.replace("http:", "https:")
    async with (
        openai.DefaultAsyncHttpxClient(verify=trusting) as http,
        openai.AsyncOpenAI(base_url=url + "/v1", api_key="x", http_client=http) as client,
    ):
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], stream=True
        )
        assert len([chunk async for chunk in stream]) > 2
    with pytest.raises(aiohttp.ClientError):
        await server.get("/health")  # plain HTTP
    async with server.session.get(url + "/health", ssl=trusting) as reply:
        assert reply.status == 200


async def test_old_versions_of_tls_are_refused(start: Any, tmp_path: Path) -> None:
    server = await start(**files_in(tmp_path))
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", port, ssl=old)


@pytest.mark.parametrize("by_name", [True, False])
async def test_a_new_certificate_is_used_without_dropping_a_stream(
    start: Any, tmp_path: Path, by_name: bool
) -> None:
    files = files_in(tmp_path)
    server = await start(**files)
    trusting = ssl.create_default_context(cafile=files["ssl_certfile"])
    server.engine.manual = True
    url = server.url.replace("http:", "https:") + "/generate_stream"
    posting = asyncio.create_task(server.session.post(url, json={"inputs": [1]}, ssl=trusting))
    [submit] = await server.engine.submitted()
    server.engine.tokens(submit, [275])
    async with await posting as reply:
        assert b"token" in await reply.content.readline()
        assert await name_of(server, by_name) == "first"
        other = files_in(tmp_path, "second")
        for name, path in files.items():
            shutil.copy(other[name], path)
        assert server.frontend.tls is not None
        server.frontend.tls.reloader.check(at_once=True)
        assert await name_of(server, by_name) == "second"
        server.engine.tokens(submit, [276])
        server.engine.finish(submit, "stop", 2)
        assert b"finished" in await reply.read()


def test_a_pair_that_does_not_fit_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = files_in(tmp_path)
    tls = Tls(ServeConfig(**files))  # type: ignore[arg-type]
    before = tls.current
    for content in (Path(files_in(tmp_path, "second")["ssl_certfile"]).read_bytes(), b"", b"x"):
        Path(files["ssl_certfile"]).write_bytes(content)
        caplog.clear()
        tls.reloader.check(at_once=True)
        assert tls.current is before
        assert "the old certificate and key stay in use: --ssl_certfile" in caplog.text
    Path(files["ssl_certfile"]).unlink()
    tls.reloader.check(at_once=True)
    assert tls.current is before


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "a")
    _, other = make_certificate(tmp_path, "b")
    encrypted = make_certificate(tmp_path, "c", password="secret")
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    assert load_certificate(ServeConfig(ssl_certfile=str(both)))
    for pair, problem in (
        ((certificate, other), "key values mismatch"),
        ((certificate, tmp_path / "none"), "No such file"),
        ((tmp_path / "none", key), "No such file"),
        ((key, key), "not in pem format|pem lib|no start line"),
        (encrypted, "the key is encrypted"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            load_certificate(ServeConfig(ssl_certfile=str(pair[0]), ssl_keyfile=str(pair[1])))
        assert f"--ssl_certfile {pair[0]} --ssl_keyfile {pair[1]}: " in str(caught.value)


def test_a_process_that_starts_while_the_files_are_broken_has_the_last_good_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = files_in(tmp_path)
    config = ServeConfig(**files)  # type: ignore[arg-type]
    kept_fd = os.memfd_create("kept")
    with os.fdopen(kept_fd):
        Tls(config, kept_fd)
        good = Path(files["ssl_certfile"]).read_bytes()
        for broken in (good[: len(good) // 2], None):
            certificate = Path(files["ssl_certfile"])
            certificate.unlink() if broken is None else certificate.write_bytes(broken)
            successor = Tls(config, kept_fd)
            assert common_name(successor.context) == "first"
            assert "the old certificate and key stay in use" in caplog.text
            with pytest.raises(ConfigError):
                Tls(config)
        (tmp_path / "next").mkdir()
        for name, path in files_in(tmp_path / "next", "second").items():
            shutil.copy(path, files[name])
        successor.reloader.check(at_once=True)
        assert successor.current is not None
        assert common_name(successor.current) == "second"
        certificate.unlink()
        assert common_name(Tls(config, kept_fd).context) == "second"


def common_name(context: ssl.SSLContext) -> str:
    """The name in the certificate of a server's context, from a handshake in memory."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    der = client.getpeercert(binary_form=True) or b""
    return "first" if b"first" in der else "second" if b"second" in der else "?"
