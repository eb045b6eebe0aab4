"""The directory for files that can be made again."""

import os
import tempfile
from pathlib import Path

from .config import environment


def user_cache_dir() -> Path:
    """The user's cache directory, or a temporary one if that is not writable."""
    xdg_cache = environment().get("XDG_CACHE_HOME", "")
    try:
        base = Path(xdg_cache) if xdg_cache.startswith("/") else Path("~/.cache").expanduser()
        cache = base / "glimmer"
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK | os.X_OK):
            return cache
    except (OSError, RuntimeError):
        pass
    cache = Path(tempfile.gettempdir()) / f"glimmer-cache-{os.geteuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    return cache
