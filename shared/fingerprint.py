"""The files that decide which tokens a server gives, and whether they are the same as at its start.

The launcher notes a stamp of each file in the configuration. Every process that starts later, after
a crash for example, compares the files with the stamps and refuses to go on over other ones: it
would continue the replies of the old model with tokens of another.

A stamp is "size mtime_ns inode digest", or "absent". Size, time and inode are compared first for
weights. If only time or inode differ, or for small files in any case, the digest decides, so a file
that was touched or copied over itself is the same. Hashing all weights would take minutes. So the
digest of a large file of weights covers its header and the first bytes of each tensor, unless
`--verify_checksums` has hashed all of it anyway.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .config import ServeConfig
from .errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_ABSENT = "absent"
_WHOLE, _SAMPLED = "sha256", "sampled"
_SMALL_BYTES = 64 << 20  # of weights that are hashed whole
_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 32 << 20
_THREADS = 16  # they mostly wait for the disk


def model_files(config: ServeConfig) -> list[Path]:
    """All files that decide which tokens a server gives, also those that may be absent."""
    directory = Path(config.model_dir)
    files = [directory / name for name in _SMALL_FILES]
    if config.chat_template is not None:
        files.append(Path(config.chat_template))
    if config.load_format != "dummy":
        drafts = (config.mtp_draft_model_dir or ()) if config.mtp_mode is not None else ()
        for place in dict.fromkeys((directory, *map(Path, drafts))):
            files += [place / INDEX_FILE, *_shards(place)]
    return files


def take_fingerprint(
    config: ServeConfig, known: Mapping[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """(path, stamp) of all `model_files`, for `ServeConfig.model_files`. `known` has stamps that
    were made before."""
    paths = [str(path) for path in model_files(config)]
    known = known or {}
    with ThreadPoolExecutor(_THREADS) as pool:
        stamps = list(pool.map(lambda path: known.get(path) or make_stamp(Path(path)), paths))
    return tuple(zip(paths, stamps, strict=True))


def make_stamp(path: Path, whole: bool = False) -> str:
    """The stamp of a file as it is now. `whole`: its digest is that of all bytes."""
    try:
        status = path.stat()
        kind = _WHOLE if whole or not _is_large(path, status) else _SAMPLED
        digest = _digest(path, kind)
    except FileNotFoundError:
        return _ABSENT
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino} {digest}"


def digest_of(stamp: str) -> str:
    """The SHA-256 of all bytes, in hex digits; "" if the stamp has none."""
    kind, _, digest = stamp.rpartition(" ")[2].partition(":")
    return digest if kind == _WHOLE else ""


def changed_files(config: ServeConfig) -> list[str]:
    """Names of the files that are not those of `config.model_files` any more."""
    with ThreadPoolExecutor(_THREADS) as pool:
        same = list(pool.map(lambda entry: _is_same(*entry), config.model_files))
    changed = [Path(path) for (path, _), ok in zip(config.model_files, same, strict=True) if not ok]
    return [path.name if path.parent == Path(config.model_dir) else str(path) for path in changed]


def check_unchanged(config: ServeConfig) -> None:
    """Raise ModelError naming the files that changed since the server started."""
    if changed := changed_files(config):
        raise ModelError(describe_changes(changed))


def describe_changes(changed: list[str]) -> str:
    """The text of the error."""
    return (
        f"the model changed on disk while the server ran: {', '.join(changed)}. Restart the server "
        "to serve the new files, or put the old ones back"
    )


def _is_same(path: str, stamp: str) -> bool:
    if " " not in stamp or stamp.startswith("unreadable"):
        return make_stamp(Path(path)) == stamp
    size, mtime, inode, digest = stamp.split(" ")
    try:
        status = Path(path).stat()
        if str(status.st_size) != size:
            return False
        is_untouched = (mtime, inode) == (str(status.st_mtime_ns), str(status.st_ino))
        if is_untouched and path.endswith(".safetensors"):
            return True
        return _digest(Path(path), digest.partition(":")[0]) == digest
    except OSError:
        return False


def _is_large(path: Path, status: os.stat_result) -> bool:
    return path.suffix == ".safetensors" and status.st_size > _SMALL_BYTES


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        if kind == _WHOLE:
            return f"{kind}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        header = file.read(min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES))
        digest = hashlib.sha256(header)
        for begin in _tensor_begins(header):
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, begin))
        return f"{kind}:{digest.hexdigest()}"


def _tensor_begins(header: bytes) -> list[int]:
    """Where in a file of weights its tensors begin; none if the header is not one."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return [8 + len(header) + int(entry["data_offsets"][0]) for entry in entries.values()]
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        return []


def _shards(directory: Path) -> list[Path]:
    try:
        names = set(json.loads((directory / INDEX_FILE).read_bytes())["weight_map"].values())
        return [directory / name for name in sorted(names)]
    except FileNotFoundError:
        return [directory / SINGLE_FILE]
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError):
        return []  # the check of the weights says what is wrong
