"""Checks the API key of every request before its handler runs. Only servers with keys have this.

A path that is not named here needs a key, also one that does not exist.
"""

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from ...shared.config import ServeConfig
from ...shared.errors import ForbiddenError, UnauthorizedError
from ..context import CONTEXT, RequestContext
from .keys import KeyRing, load_keys
from .meter import Meter

PUBLIC_PATHS = frozenset({"/health", "/healthz", "/ping", "/liveness", "/readiness"})
# These are about all users together. Other handlers call `check_admin` if they must.
ADMIN_PATHS = frozenset({"/metrics", "/flush_cache"})


class Access:
    """The keys of a server. One per process; raises ConfigError if their file cannot be read."""

    def __init__(self, config: ServeConfig) -> None:
        self._shares_prefixes = config.shared_prefix_cache
        self.keys = KeyRing(load_keys(config))
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

    def _identify(self, request: web.Request) -> None:
        key = self.keys.find(request.headers)
        if key is None:
            has_key = "Authorization" in request.headers or "x-api-key" in request.headers
            problem = "the API key is wrong" if has_key else "an API key is needed"
            raise UnauthorizedError(f"{problem}: send Authorization: Bearer KEY, or x-api-key: KEY")
        context = request[CONTEXT]
        context.key = key
        context.tenant = key.name
        context.hides_cached = self._shares_prefixes
        if not self._shares_prefixes:
            context.salt = key.name + ":"  # a name has no ":", so no salt of a user imitates it

    def metered(self, handler: Handler) -> Handler:
        """`handler` of a generating route within the limits of the key."""

        async def handle(request: web.Request) -> web.StreamResponse:
            context = request[CONTEXT]
            with self._meter(context).admitted(context):
                return await handler(request)

        return handle

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Tell what is left of the key's limits. Called before any response is sent."""
        if CONTEXT in request and request[CONTEXT].key is not None:
            response.headers.update(self._meter(request[CONTEXT]).headers())

    def _meter(self, context: RequestContext) -> Meter:
        key = context.key
        assert key is not None, "the guard has let it pass"
        meter = self._meters.get(key.name)
        if meter is None:
            meter = self._meters[key.name] = Meter(key.limits)
        elif meter.limits != key.limits:
            meter.change_limits(key.limits)
        return meter


def check_admin(request: web.Request) -> None:
    """Raise ForbiddenError unless the request has an admin key."""
    key = request[CONTEXT].key
    if key is None or not key.is_admin:
        raise ForbiddenError(f"{request.path:.100} needs an admin key")
