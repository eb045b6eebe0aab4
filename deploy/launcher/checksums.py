"""`--verify_checksums`: compares the files of a checkpoint with the checksums that came with it.

Three kinds are known. Lists as `sha256sum` writes them: SHA256SUMS, checksums.txt, NAME.sha256. The
cache of Hugging Face, whose files are links to blobs that are named by their checksum. And the
notes that `hf download --local-dir` leaves in `.cache/huggingface`. The checksum of a file that is
not in Git LFS is Git's own, a SHA-1.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...shared.config import ServeConfig
from ...shared.errors import ConfigError, ModelError
from ...shared.fingerprint import digest_of, make_stamp, model_files

_LISTS = re.compile(r"sha256sums?(\.txt)?|checksums?(\.txt)?|.+\.sha256(sum)?", re.IGNORECASE)
_LINE = re.compile(r"\\?(?P<digest>[0-9a-f]{64})(?: [ *]|\s+)(?P<name>.+)", re.IGNORECASE)
_BSD_LINE = re.compile(r"SHA256 \((?P<name>.+)\) = (?P<digest>[0-9a-f]{64})", re.IGNORECASE)
_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}", re.IGNORECASE)
_SHA1_DIGITS = 40
_MAX_LIST_BYTES = 16 << 20
_THREADS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Expected:
    """The checksum of a file according to `source`."""

    path: Path
    digest: str
    source: str


def verify_checksums(config: ServeConfig) -> dict[str, str]:
    """Hash every file that has a checksum. Returns path -> stamp of those that the server reads.
    Raises ModelError naming each file that differs, ConfigError if there are no checksums. Warns of
    files of the model that have none."""
    started = time.monotonic()
    files = [path for path in model_files(config) if path.exists()]
    directories = dict.fromkeys(path.parent for path in files)
    expected = [entry for place in directories for entry in _listed(place)]
    expected += [entry for path in files for entry in _noted(path)]
    if not expected:
        raise ConfigError(
            f"--verify_checksums: {config.model_dir} has no checksums to compare with: no "
            "SHA256SUMS, checksums.txt or *.sha256, no links into the cache of Hugging Face, no "
            "notes of `hf download --local-dir`. Add one of these or drop the flag"
        )
    without = [path.name for path in files if path not in {entry.path for entry in expected}]
    if without:
        logger.warning("no checksum for %s: not verified", ", ".join(without))
    present = [entry for entry in expected if entry.path.exists()]
    num_bytes = sum(entry.path.stat().st_size for entry in present)
    logger.info("comparing checksums of %d files, %.2f GB", len(present), num_bytes / 1e9)
    with ThreadPoolExecutor(_THREADS) as pool:
        stamps = dict(zip(present, pool.map(_stamp, present), strict=True))
    problems = [
        f"{entry.path.name} has checksum {_digest(stamp)[:16]}..., {entry.source} says "
        f"{entry.digest[:16]}..."
        for entry, stamp in stamps.items()
        if _digest(stamp) != entry.digest
    ]
    if problems:
        raise ModelError(
            f"{config.model_dir}: {len(problems)} of {len(stamps)} checksums differ; download "
            "these files again:\n  " + "\n  ".join(problems)
        )
    absent = [entry.path.name for entry in expected if entry not in stamps]
    if absent:
        logger.warning("checksums of files that are not here: %s", ", ".join(absent))
    logger.info("%d checksums are right (%.1f s)", len(stamps), time.monotonic() - started)
    return {str(entry.path): stamp for entry, stamp in stamps.items() if digest_of(stamp)}


def _stamp(entry: _Expected) -> str:
    if len(entry.digest) == _SHA1_DIGITS:
        return f"sha1:{_git_digest(entry.path)}"
    return make_stamp(entry.path, whole=True)


def _digest(stamp: str) -> str:
    return digest_of(stamp) or stamp.rpartition(":")[2]


def _git_digest(path: Path) -> str:
    """The name that Git gives to a file of this content."""
    with path.open("rb") as file:
        digest = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        while data := file.read(1 << 20):
            digest.update(data)
        return digest.hexdigest()


def _listed(directory: Path) -> Iterator[_Expected]:
    """Checksums from the lists in a directory. Raises ModelError for a list that cannot be read, or
    that names files elsewhere."""
    for path in sorted(directory.iterdir()):
        if _LISTS.fullmatch(path.name) and path.is_file():
            yield from _entries(path)


def _entries(path: Path) -> Iterator[_Expected]:
    try:
        if path.stat().st_size > _MAX_LIST_BYTES:
            raise ModelError(f"{path} has more than {_MAX_LIST_BYTES} bytes")
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {error}") from error
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line) or _BSD_LINE.fullmatch(line)
        if found is not None:
            name, digest = found["name"], found["digest"]
        elif len(line) > _SHA1_DIGITS and _DIGEST.fullmatch(line) and path.suffix == ".sha256":
            name, digest = path.stem, line
        else:
            logger.warning("%s: line %d has no SHA-256 checksum", path, number)
            continue
        place = Path(name)
        if place.is_absolute() or ".." in place.parts:
            raise ModelError(f"{path}: line {number}: {name!r} is not in this directory")
        yield _Expected(path.parent / place, digest.lower(), path.name)


def _noted(path: Path) -> Iterator[_Expected]:
    """The checksum that Hugging Face's tools noted for a file."""
    if path.is_symlink():
        target = Path(os.readlink(path))
        if target.parent.name == "blobs" and _DIGEST.fullmatch(target.name):
            yield _Expected(path, target.name.lower(), "the cache of Hugging Face")
    note = path.parent / ".cache/huggingface/download" / f"{path.name}.metadata"
    if note.is_file() and note.stat().st_size < _MAX_LIST_BYTES:
        lines = note.read_text(errors="replace").splitlines()[1:2]  # the commit, the etag, the time
        if lines and _DIGEST.fullmatch(lines[0].strip('"')):
            yield _Expected(path, lines[0].strip('"').lower(), note.name)
