"""HTTPS: `--ssl_certfile` and `--ssl_keyfile`, which can be replaced while the server runs."""

import ssl

from ...shared.config import ServeConfig
from ...shared.errors import ConfigError
from .reload import Reloader


class Tls:
    """The certificate in use. Each handshake takes the current one; open connections keep theirs.
    Raises ConfigError if it cannot be used."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        paths = [path for path in (config.ssl_certfile, config.ssl_keyfile) if path is not None]
        self.reloader = Reloader("certificate and key", paths, self._load)
        # A listening socket keeps its context. Loading a pair of files into a context that is in
        # use could leave it with one of them, so every handshake is passed on to a whole context.
        self.context = load_certificate(config)
        self.context.sni_callback = self._choose

    def _load(self) -> None:
        self.current = load_certificate(self._config)

    def _choose(
        self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext
    ) -> None:
        connection.context = self.current


def load_certificate(config: ServeConfig) -> ssl.SSLContext:
    """A server's context (TLS 1.2 or newer) with the pair of files. Raises ConfigError."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
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
