"""API keys: those of the flags, and those of `--api_key_file`, which can change while serving.

A line of the file is `name:sha256`, then words that may follow: `admin`, and limits such as
`requests=8`. The same name with two digests is one user, who changes from one key to the other.
Only digests are kept, here and in the file.
"""

import dataclasses
import hmac
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...shared.config import ServeConfig
from ...shared.errors import ConfigError
from ...shared.secrets import key_digest

_MAX_FILE_BYTES = 1 << 20
_MAX_KEYS = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_ADMIN = "admin"


@dataclass(frozen=True)
class Limits:
    """The most that a key may use. None: no limit. Names are those of the file."""

    requests: int | None = None  # open at the same time
    queued_tokens: int | None = None  # prompt tokens of requests without a first token
    tokens_per_minute: int | None = None  # of prompts and outputs


@dataclass(frozen=True)
class Key:
    """One API key. `name` says whose it is, in logs and for limits, fairness and caching."""

    name: str
    digest: str
    is_admin: bool = False
    limits: Limits = Limits()


def parse_keys(text: str, defaults: Limits) -> tuple[Key, ...]:
    """The keys of a file's text. `defaults` are the limits of users who are no admins and whose
    line names none. Raises ConfigError naming the line, and never showing what may be a key."""
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            try:
                keys.append(_parse_line(words, defaults))
            except ValueError as error:
                raise ConfigError(f"line {number}: {error}") from None
    if len(keys) > _MAX_KEYS:
        raise ConfigError(f"{len(keys)} keys, at most {_MAX_KEYS}")
    by_name: dict[str, Key] = {}
    digests = set()
    for key in keys:
        first = by_name.setdefault(key.name, key)
        if (first.limits, first.is_admin) != (key.limits, key.is_admin):
            raise ConfigError(f"the lines of {key.name} have different limits")
        if key.digest in digests:
            raise ConfigError(f"the key of {key.name} is there twice")
        digests.add(key.digest)
    return tuple(keys)


def _parse_line(words: list[str], defaults: Limits) -> Key:
    name, _, digest = words[0].partition(":")
    if not _NAME.fullmatch(name):
        raise ValueError("needs name:sha256; a name has up to 64 letters, digits and . _ -")
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{name} needs the SHA-256 of the key, which is 64 hex digits")
    values: dict[str, int] = {}
    names = [field.name for field in dataclasses.fields(Limits)]
    for word in words[1:]:
        option, _, value = word.partition("=")
        if option in names and value.isdecimal() and 0 < int(value) <= 1 << 40:
            values[option] = int(value)
        elif word != _ADMIN:
            known = ", ".join([_ADMIN, *(f"{option}=NUMBER" for option in names)])
            raise ValueError(f"{name}: unknown word {word:.40}; there are: {known}")
    is_admin = _ADMIN in words[1:]
    limits = dataclasses.replace(Limits() if is_admin else defaults, **values)
    return Key(name, digest.lower(), is_admin, limits)


def load_keys(config: ServeConfig) -> tuple[Key, ...]:
    """All keys: of the flags and of the file. Raises ConfigError naming the file and the
    problem."""
    limits = Limits(
        config.key_max_requests, config.key_max_queued_tokens, config.key_tokens_per_minute
    )
    # A name of the file cannot have a "#".
    keys = [Key(f"api_key#{n}", d, False, limits) for n, d in enumerate(config.api_key, 1)]
    keys += [Key(f"admin_api_key#{n}", d, True) for n, d in enumerate(config.admin_api_key, 1)]
    if config.api_key_file is not None:
        try:
            with Path(config.api_key_file).open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
            if len(data) > _MAX_FILE_BYTES:
                raise ConfigError(f"more than {_MAX_FILE_BYTES} bytes")
            keys += parse_keys(data.decode(), limits)
        except OSError as error:
            raise ConfigError(f"--api_key_file {config.api_key_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"--api_key_file {config.api_key_file}: not a text file") from None
        except ConfigError as error:
            raise ConfigError(f"--api_key_file {config.api_key_file}: {error}") from None
    return tuple(keys)


def format_keys(keys: Iterable[Key]) -> str:
    """The text of a file with these keys, limits included. Keys of flags are left out."""
    lines = []
    for key in keys:
        if "#" not in key.name:
            limits = [f"{k}={v}" for k, v in dataclasses.asdict(key.limits).items() if v]
            words = [f"{key.name}:{key.digest}", *([_ADMIN] if key.is_admin else []), *limits]
            lines.append(" ".join(words) + "\n")
    return "".join(lines)


class KeyRing:
    """The keys in use. `replace` changes them between two requests."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self.replace(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys.values())

    def replace(self, keys: Iterable[Key]) -> None:
        """Use these from now on."""
        self._keys = {key.digest: key for key in sorted(keys, key=lambda key: key.is_admin)}

    def find(self, headers: Mapping[str, str]) -> Key | None:
        """The key that a request sent, in `Authorization: Bearer` or in `x-api-key`; an admin key
        if it sent several. The time that this takes tells nothing about keys: they are looked up
        and compared by their digests, which no client can choose."""
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        sent = [token.strip()] if scheme.lower() == "bearer" else []
        sent.append(headers.get("x-api-key", ""))
        digests = [key_digest(text) for text in sent if text]
        candidates = [(self._keys.get(digest), digest) for digest in digests]
        found = [key for key, d in candidates if key and hmac.compare_digest(key.digest, d)]
        return max(found, key=lambda key: key.is_admin, default=None)
