"""Checks the API key of every request before its handler runs. Only servers with keys have this.

A path that is not named here needs a key, also one that does not exist.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from multidict import CIMultiDict

from ...shared.config import ServeConfig
from ...shared.errors import (
    ConfigError,
    ForbiddenError,
    HttpError,
    OverloadedError,
    UnauthorizedError,
)
from ...shared.log_format import request_fields
from ..context import CONTEXT, RequestContext
from ..wire.connection import Budget
from .keys import Key, KeyRing, Limits, format_keys, load_keys
from .meter import Meter
from .reload import Reloader
from .shared_usage import UsageTable

logger = logging.getLogger(__name__)

PUBLIC_PATHS = frozenset({"/health", "/healthz", "/ping", "/liveness", "/readiness"})
# These are about all users together. Other handlers call `check_admin` if they must.
ADMIN_PATHS = frozenset({"/metrics", "/flush_cache"})
_KEYS_PER_TURN = 64  # of the event loop
_FOLLOW_S = 1.0
_KEY_HEADER = re.compile(rb"\r\n(authorization|x-api-key):[ \t]*([^\r\n]*)", re.IGNORECASE)


class Access:
    """The keys of a server. One per process; raises ConfigError if their file cannot be read."""

    def __init__(
        self, config: ServeConfig, budget: Budget | None = None, usage: UsageTable | None = None
    ) -> None:
        """`budget` counts the bytes that are held for all clients. `usage` is shared with the other
        HTTP processes, if there are any."""
        self._config = config
        self._budget = budget or Budget(int(config.max_client_mb * (1 << 20)))
        self._usage = usage
        self._keys = KeyRing(())
        paths = [] if config.api_key_file is None else [config.api_key_file]
        self.reloader = Reloader("API keys", paths, self._load)
        self._meters: dict[str, Meter] = {}  # by name of the user

    def guard(self) -> Middleware:
        """The middleware that refuses requests without a key, and notes whose the others are."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            resource = request.match_info.route.resource
            path = "" if resource is None else resource.canonical  # "": no such path or method
            if path not in PUBLIC_PATHS:
                self._identify(request)
                if path in ADMIN_PATHS:
                    check_admin(request)
            return await handler(request)

        return check

    def _load(self) -> None:
        try:
            keys = load_keys(self._config)
        except ConfigError as error:
            kept = self._kept_file()
            if self._keys or kept is None or not kept.exists():
                raise
            # This process replaces one that had keys: it goes on with those.
            keys = load_keys(dataclasses.replace(self._config, api_key_file=str(kept)))
            logger.error("the old API keys stay in use: %s", error)
        else:
            self._keep(keys)
        self._keys.replace(keys)

    def _kept_file(self) -> Path | None:
        """Where the digests of the last good key file are kept, for a process that starts while
        the file is broken."""
        runtime_dir = self._config.runtime_dir
        if self._config.api_key_file is None or runtime_dir is None:
            return None
        return Path(runtime_dir) / "api-keys"

    def _keep(self, keys: tuple[Key, ...]) -> None:
        path = self._kept_file()
        if path is not None:
            new = path.with_name(f"api-keys-{os.getpid()}")
            with contextlib.suppress(OSError):  # a full disk must not keep new keys from being used
                new.touch(mode=0o600)
                new.write_text(format_keys(keys))
                new.replace(path)

    def key_of_head(self, head: bytes) -> Key | None:
        """The key in the bytes of a request's head."""
        headers = (
            (name.decode(), value.decode("utf-8", "surrogateescape"))
            for name, value in _KEY_HEADER.findall(head)
        )
        return self._keys.find(CIMultiDict(headers))

    def refusal_of_head(self, head: bytes) -> tuple[HttpError | None, dict[str, str]]:
        """Look at a generating request that is not parsed. Returns the error if it has no valid key
        or a limit of the key is reached, and what headers tell of the limits."""
        key = self.key_of_head(head)
        if key is None:
            return unauthorized(), {}
        meter = self._meter(key)
        try:
            meter.check()
        except OverloadedError as error:
            return error, meter.headers()
        return None, meter.headers()

    def _identify(self, request: web.Request) -> None:
        key = self._keys.find(request.headers)
        if key is None:
            raise unauthorized()
        context = request[CONTEXT]
        context.connection.budget.move(self._meter(key).budget)
        context.key = key
        context.tenant = key.name
        request_fields.get()["key"] = key.name
        context.hides_cached = self._config.shared_prefix_cache
        if not context.hides_cached:
            context.salt = key.name + ":"  # a name has no ":", so no salt of a user imitates it

    def metered(self, handler: Handler) -> Handler:
        """`handler` of a generating route within the limits of the key."""

        async def handle(request: web.Request) -> web.StreamResponse:
            context = request[CONTEXT]
            with self._meter(_key(context)).admitted(context):
                return await handler(request)

        return handle

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Tell what is left of the key's limits. Called before any response is sent."""
        if CONTEXT in request and request[CONTEXT].key is not None:
            response.headers.update(self._meter(_key(request[CONTEXT])).headers())

    async def follow_others(self) -> None:
        """Tell the other HTTP processes every second what keys use here, until cancelled."""
        while True:
            for number, key in enumerate(self._keys):
                if key.limits != Limits():
                    self._meter(key).settle()
                if number % _KEYS_PER_TURN == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(_FOLLOW_S)

    def _meter(self, key: Key) -> Meter:
        meter = self._meters.get(key.name)
        if meter is None:
            shared = None if self._usage is None else self._usage.of(key.name)
            budget = Budget(self._budget.limit // 2, self._budget, "this key's requests")
            meter = self._meters[key.name] = Meter(key.limits, shared=shared, budget=budget)
        elif meter.limits != key.limits:
            meter.change_limits(key.limits)
        return meter


def _key(context: RequestContext) -> Key:
    assert context.key is not None, "the guard has let it pass"
    return context.key


def unauthorized() -> UnauthorizedError:
    """The error for a request without a key, or with a wrong one."""
    return UnauthorizedError(
        "a valid API key is needed: send Authorization: Bearer KEY, or x-api-key: KEY"
    )


def check_admin(request: web.Request) -> None:
    """Raise ForbiddenError unless the request has an admin key."""
    key = request[CONTEXT].key
    if key is None or not key.is_admin:
        raise ForbiddenError(f"{request.path:.100} needs an admin key")
