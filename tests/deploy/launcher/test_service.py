"""What a server tells systemd, heard on a socket that plays systemd."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from glimmer.deploy.launcher.service import ServiceManager
from server import ServiceListener, under_systemd

Serve = Callable[..., Any]  # the fixture in ../conftest.py


@pytest.fixture(params=["path", "@abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path_factory: Any
) -> Iterator[tuple[str, ServiceListener]]:
    """An address and what listens there."""
    path = str(tmp_path_factory.mktemp("n") / "notify")
    address = path if request.param == "path" else f"@glimmer-test-{os.getpid()}"
    listener = ServiceListener(address)
    yield address, listener
    listener.close()


def test_a_server_tells_its_start_its_life_and_its_stop(
    serve: Serve, manager: tuple[str, ServiceListener]
) -> None:
    address, heard = manager
    flags = ("--drain_delay_s", "0.1", "--drain_timeout_s", "20", "--start_timeout_s", "77")
    server = serve(*flags, wrapper=under_systemd(address))
    ready = heard.wait_for(READY="1")
    assert all("READY" not in message for message in heard.heard[:ready])
    loading = heard.wait_for(STATUS="worker 0: loading weights 75%")
    assert loading < ready
    assert heard.heard[loading]["EXTEND_TIMEOUT_USEC"] == "77000000"
    line = server.ready_line()
    assert heard.heard[ready]["STATUS"] == line.partition(": ")[2].strip()
    assert heard.wait_for(WATCHDOG="1") > ready
    for child in server.children():
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & child.environ().keys()
    server.signal(signal.SIGTERM)
    stopping = heard.heard[heard.wait_for(STOPPING="1")]
    assert 20 < int(stopping["EXTEND_TIMEOUT_USEC"]) / 1e6 < 60
    assert server.wait() == 0


def test_a_reload_ends_when_all_frontends_have_answered(
    serve: Serve, manager: tuple[str, ServiceListener], tmp_path: Path
) -> None:
    address, heard = manager
    if address.startswith("@"):
        pytest.skip("the form of the address changes nothing about reloads")
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{'0' * 64}\n")
    flags = ("--api_key_file", str(keys), "--httpserver_workers", "2")
    server = serve(*flags, wrapper=under_systemd(address))
    heard.wait_for(READY="1")
    heard.forget()
    before = time.monotonic()
    server.signal(signal.SIGHUP)
    reloading = heard.wait_for(RELOADING="1")
    assert before <= int(heard.heard[reloading]["MONOTONIC_USEC"]) / 1e6 <= time.monotonic()
    assert heard.wait_for(READY="1") > reloading
    assert server.log.count("frontend told: Reload()") == 2
    server.signal(signal.SIGHUP)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_server_without_files_survives_a_reload(
    serve: Serve, tmp_path_factory: pytest.TempPathFactory
) -> None:
    address = str(tmp_path_factory.mktemp("n") / "notify")
    with contextlib.closing(ServiceListener(address)) as heard:
        server = serve(wrapper=under_systemd(address))
        heard.wait_for(READY="1")
        heard.forget()
        server.signal(signal.SIGHUP)
        assert heard.wait_for(READY="1") > heard.wait_for(RELOADING="1")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_the_watchdog_starves_when_steps_do_not_advance_or_the_launcher_is_frozen(
    serve: Serve, tmp_path_factory: pytest.TempPathFactory
) -> None:
    address = str(tmp_path_factory.mktemp("n") / "notify")
    with contextlib.closing(ServiceListener(address)) as heard:
        flags = ("--step_timeout_s", "1", "--model_owner", "stuck-steps")
        server = serve(*flags, wrapper=under_systemd(address, watchdog_s=2.0))
        heard.wait_for(READY="1")
        heard.wait_for(WATCHDOG="1")
        time.sleep(4)  # limit of a step, half of the watchdog's time, and a few ticks
        heard.forget()
        time.sleep(1.5)
        heard.read()
        assert not any("WATCHDOG" in message for message in heard.heard)
        server.signal(signal.SIGTERM)
        server.wait()
        healthy = serve(wrapper=under_systemd(address, watchdog_s=2.0))
        heard.forget()
        heard.wait_for(READY="1")
        heard.forget()
        heard.wait_for(WATCHDOG="1")
        psutil.Process(healthy.pid).suspend()
        heard.forget()
        time.sleep(1.5)
        heard.read()
        assert not heard.heard
        psutil.Process(healthy.pid).resume()
        heard.wait_for(WATCHDOG="1")


def test_systemd_shows_why_a_start_failed(
    serve: Serve, tmp_path: Path, manager: tuple[str, ServiceListener]
) -> None:
    address, heard = manager
    server = serve("--model_dir", str(tmp_path), wrapper=under_systemd(address))
    assert server.wait() == 4
    heard.read()
    assert "has no config.json" in heard.heard[-1]["STATUS"]


def test_without_systemd_or_after_its_end_nothing_happens(tmp_path: Path) -> None:
    for address in ("", str(tmp_path / "gone")):
        service = ServiceManager(address)
        assert service.is_there == bool(address)
        service.ready("fine")
        service.alive()
