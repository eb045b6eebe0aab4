"""Binds the HTTP port first of all, without listening on it.

A port conflict is therefore reported within a second, with the process that owns the port. Clients
get "connection refused" until a frontend calls listen().
"""

import contextlib
import ctypes
import errno
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...shared.errors import ConfigError, PortError
from .runtime_dir import RuntimeDir, claim_name, describe

_LISTEN_STATE = "0A"  # in /proc/net/tcp
_SO_ATTACH_FILTER = 26  # not in the socket module
# Classic BPF over the TCP header: code, jump if true, jump if false, operand.
_DROP_SYN = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte with the flags
        (0x45, 0, 1, 0x02),  # if SYN is not set, skip one instruction
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # accept
    )
)


@dataclass(frozen=True)
class HttpPort:
    """A bound TCP socket, and a locked directory named after the port. The kernel shows no owner of
    a port that is only bound; the directory tells other servers of this user who owns it."""

    listener: socket.socket
    claim: RuntimeDir | None

    @property
    def number(self) -> int:
        """The port number, chosen by the kernel if it was given as 0."""
        return int(self.listener.getsockname()[1])

    def fileno(self) -> int:
        """The file descriptor of the listener."""
        return self.listener.fileno()

    def share_with_successor(self) -> None:
        """Let the next server bind this port while old connections are in TIME_WAIT. Call this
        just before a frontend listens: until then, others could bind the port as well."""
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def stop_handshakes(self) -> None:
        """Let no new connection begin, in any process that shares the socket: a filter drops all
        packets with the SYN flag. Clients try again, and are refused once the socket is closed.
        Connections that are made already can be accepted, whereas closing would reset them."""
        program = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
        filter_ = struct.pack("HL", len(_DROP_SYN) // 8, ctypes.addressof(program))
        with contextlib.suppress(OSError):  # a sandbox without filters
            self.listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)

    def close_listener(self) -> None:
        """Listen no more. The port still counts as this server's."""
        self.listener.close()

    def close(self) -> None:
        """Release the port."""
        self.listener.close()
        if self.claim is not None:
            self.claim.remove()


def bind_port(host: str, port: int, flag: str = "--port") -> HttpPort:
    """Bind `host`:`port` (0: any free one), which `flag` sets. Raises PortError naming the owner if
    it is taken, ConfigError if this machine has no such address."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    claim = _claim(str(address[0]), port, flag) if port else None
    listener = socket.socket(family, kind)
    try:
        _bind(listener, address)
    except OSError as error:
        listener.close()
        if claim is not None:
            claim.remove()
        raise _explain(error, host, port, flag) from error
    return HttpPort(listener, claim)


def _bind(listener: socket.socket, address: tuple[Any, ...]) -> None:
    """Bind without SO_REUSEADDR if possible, since others could bind the same port with it. The
    option is needed if connections of a server that just stopped are in TIME_WAIT."""
    try:
        listener.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)


def _explain(error: OSError, host: str, port: int, flag: str) -> ConfigError | PortError:
    if error.errno == errno.EADDRINUSE:
        owner = describe(_listening_pid(port))
        return PortError(f"port {port} is in use by {owner}; stop it or choose another {flag}")
    if error.errno == errno.EACCES:
        return PortError(f"port {port} is not open to this user; choose a {flag} above 1023")
    return ConfigError(f"--host {host}: {error.strerror}; give an address of this machine")


def _claim(address: str, port: int, flag: str) -> RuntimeDir | None:
    network = os.stat("/proc/self/ns/net").st_ino  # containers may share the directory
    try:
        return claim_name(f"port-{network}-{address}-{port}")
    except BlockingIOError as error:
        raise PortError(
            f"port {port} is in use by {error.strerror}; stop that server or choose another {flag}"
        ) from None


def _listening_pid(port: int) -> int | None:
    """The process that listens on a TCP port; None if it cannot be seen."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN_STATE and fields[1].endswith(f":{port:04X}"):
                    inodes.add(f"socket:[{fields[9]}]")
    for link in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        with contextlib.suppress(OSError):
            if os.readlink(link) in inodes:
                return int(link.parts[2])
    return None
