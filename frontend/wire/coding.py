"""Bodies of requests as they were before a client compressed them, in pieces of bounded size."""

import asyncio
import zlib
from collections.abc import AsyncIterator

from aiohttp import web

from ...shared.errors import RequestError, UnsupportedCodingError

_PIECE = 64 << 10  # bytes; decoding so many takes well below a millisecond
_ZLIB_OR_GZIP = 47  # window bits
_FIELD = "Content-Encoding"


def pieces(request: web.Request) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises UnsupportedCodingError for codings other than gzip and
    deflate, and RequestError when the bytes are not in the coding."""
    coding = request.headers.get(_FIELD, "identity").strip().lower()
    if coding == "identity":
        return request.content.iter_any()
    if coding in ("gzip", "x-gzip", "deflate"):
        return _inflated(request, coding)
    problem = f"{coding:.40} is not supported: send the body plain, or as gzip"
    raise UnsupportedCodingError(f"{_FIELD}: {problem}", _FIELD)


async def _inflated(request: web.Request, coding: str) -> AsyncIterator[bytes]:
    inflate = zlib.decompressobj(_ZLIB_OR_GZIP)
    try:
        async for data in request.content.iter_any():
            while data:
                yield inflate.decompress(data, _PIECE)
                data = inflate.unconsumed_tail
                if inflate.unused_data:
                    raise zlib.error("bytes after its end")
                await asyncio.sleep(0)  # others are served in between
    except zlib.error as error:
        raise RequestError(f"{_FIELD}: the body is not {coding}: {error}", _FIELD) from None
    if not inflate.eof:
        raise RequestError(f"{_FIELD}: the body ends within its {coding} data", _FIELD)
