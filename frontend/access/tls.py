"""HTTPS: `--ssl_certfile` and `--ssl_keyfile`, which can be replaced while the server runs."""

import logging
import os
import ssl
from pathlib import Path

from ...shared.config import ServeConfig
from ...shared.errors import ConfigError
from .reload import Reloader

_MAX_BYTES = 1 << 20
logger = logging.getLogger(__name__)


class Tls:
    """The certificate in use. Each handshake takes the current one; open connections keep theirs.

    `kept_fd` is a file in memory with the last good pair, which outlives this process: one that
    starts while the files are missing or half-written uses it. Raises ConfigError if there is no
    pair that can be used."""

    current: ssl.SSLContext | None = None

    def __init__(self, config: ServeConfig, kept_fd: int | None = None) -> None:
        self._config, self._kept_fd = config, kept_fd
        paths = [path for path in (config.ssl_certfile, config.ssl_keyfile) if path is not None]
        self.reloader = Reloader("certificate and key", paths, self._load)
        assert self.current is not None, "just loaded"
        # A listening socket keeps its context. Loading a pair of files into a context that is in
        # use could leave it with one of them, so every handshake is passed on to a whole context.
        self.context = self.current
        self.context.sni_callback = self._choose

    def _load(self) -> None:
        try:
            context = load_certificate(self._config)
        except ConfigError as error:
            if self.current is not None or not self._has_kept():
                raise
            context = _context()
            context.load_cert_chain(f"/proc/self/fd/{self._kept_fd}")
            logger.error("the old certificate and key stay in use: %s", error)
        else:
            self._keep()
        self.current = context

    def _has_kept(self) -> bool:
        return self._kept_fd is not None and os.fstat(self._kept_fd).st_size > 0

    def _keep(self) -> None:
        if self._kept_fd is None:
            return
        files = (self._config.ssl_certfile, self._config.ssl_keyfile)
        pair = b"\n".join([Path(file).read_bytes() for file in files if file is not None])
        if len(pair) <= _MAX_BYTES:
            os.pwrite(self._kept_fd, pair, 0)
            os.ftruncate(self._kept_fd, len(pair))

    def _choose(
        self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext
    ) -> None:
        assert self.current is not None, "just loaded"
        connection.context = self.current


def _context() -> ssl.SSLContext:
    return ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)


def load_certificate(config: ServeConfig) -> ssl.SSLContext:
    """A server's context (TLS 1.2 or newer) with the pair of files. Raises ConfigError."""
    context = _context()
    certificate, key = config.ssl_certfile, config.ssl_keyfile
    assert certificate is not None, "only called with a certificate"
    flags = f"--ssl_certfile {certificate}" + (f" --ssl_keyfile {key}" if key else "")
    is_encrypted = False

    def give_no_password() -> str:
        """Instead of a question on the terminal."""
        nonlocal is_encrypted
        is_encrypted = True
        return ""

    try:
        context.load_cert_chain(certificate, key, password=give_no_password)
    except ssl.SSLError as error:
        reason = (error.reason or "not in PEM format").replace("_", " ").lower()
        reason = "the key is encrypted, which is not supported" if is_encrypted else reason
        raise ConfigError(f"{flags}: {reason}") from None
    except OSError as error:
        raise ConfigError(f"{flags}: {error.strerror}") from None
    return context
