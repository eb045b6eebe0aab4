import contextlib
import os
import socket
from pathlib import Path

import pytest
from glimmer.deploy.launcher.listen import bind_port
from glimmer.shared.errors import ConfigError, PortError


def test_a_bound_port_is_ours_but_refuses_connections() -> None:
    port = bind_port("127.0.0.1", 0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port.number))
    port.listener.listen()
    with socket.create_connection(("127.0.0.1", port.number)):
        pass
    port.close()


def test_a_port_that_loads_names_its_process() -> None:
    free = bind_port("127.0.0.1", 0)
    number = free.number
    free.close()
    port = bind_port("127.0.0.1", number)
    with pytest.raises(PortError, match=rf"port {number} is in use by process {os.getpid()} \("):
        bind_port("localhost", number)
    port.close()
    bind_port("127.0.0.1", number).close()


@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_of_another_program_names_its_process(reuse: bool) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = other.getsockname()[1]
        with pytest.raises(PortError, match=rf"in use by process {os.getpid()} \("):
            bind_port("0.0.0.0", number)


def test_connections_of_a_server_that_stopped_are_not_in_the_way() -> None:
    port = bind_port("127.0.0.1", 0)
    number = port.number
    port.share_with_successor()
    port.listener.listen()
    with socket.create_connection(("127.0.0.1", number)):
        accepted, _ = port.listener.accept()
        accepted.close()  # first to close: it stays in TIME_WAIT
    port.close()
    bind_port("127.0.0.1", number).close()


@pytest.mark.parametrize("host", ["203.0.113.1", "no.such.host.invalid"])
def test_a_host_that_is_not_here_is_a_config_error(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host}"):
        bind_port(host, 0)


def test_ipv6_works_where_the_machine_has_it() -> None:
    if not socket.has_ipv6:
        pytest.skip("python has no IPv6")
    try:
        port = bind_port("::1", 0)
    except ConfigError:
        pytest.skip("this machine has no IPv6 address")
    assert port.listener.family == socket.AF_INET6
    port.close()


def test_a_directory_of_another_kind_in_the_way_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names in a temporary directory can be taken by anybody."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    port = bind_port("127.0.0.1", 0)
    number = port.number
    port.close()
    with contextlib.closing(bind_port("127.0.0.1", number)):
        (claim,) = tmp_path.glob("glimmer-*")
        assert claim.stat().st_mode & 0o777 == 0o700
    assert not claim.exists()
    claim.mkdir(mode=0o755)
    bind_port("127.0.0.1", number).close()
    claim.rmdir()
    claim.touch()
    bind_port("127.0.0.1", number).close()
    claim.unlink()
    precious = tmp_path / "precious"
    precious.mkdir(mode=0o700)
    (precious / "config.json").touch()
    claim.symlink_to(precious)
    bind_port("127.0.0.1", number).close()
    assert [path.name for path in precious.iterdir()] == ["config.json"]


def test_a_closing_port_serves_connections_that_are_made_and_refuses_later_ones() -> None:
    port = bind_port("127.0.0.1", 0)
    port.listener.listen()
    shared = socket.socket(fileno=os.dup(port.fileno()))  # as a frontend has it
    with socket.create_connection(("127.0.0.1", port.number)) as made, shared:
        port.stop_handshakes()
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.1", port.number), timeout=0.2)
        number = port.number
        port.close_listener()
        accepted, _ = shared.accept()
        shared.close()
        with accepted:
            made.sendall(b"question")
            assert accepted.recv(100) == b"question"
            accepted.sendall(b"answer")
            assert made.recv(100) == b"answer"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", number))
    port.close()
