"""The JSON that OpenAI's chat and completions routes have in common: chunks, usage, whole replies.

What never changes in a stream is encoded once: a chunk costs one small string.
"""

import time
from typing import Any

from aiohttp import web

from ..wire.body import encode_json, reply
from ..wire.schema import OpenAiBody

Json = dict[str, Any]
PREFIX = b"data: "
DONE = b"data: [DONE]\n\n"


class Chunks:
    """The chunks of one reply, all ready to be sent."""

    def __init__(self, kind: str, reply_id: str, body: OpenAiBody) -> None:
        self._head: Json = {
            "id": reply_id,
            "object": kind,
            "created": int(time.time()),
            "model": body.model,
        }
        options = body.stream_options
        self.include_usage = options is not None and bool(options.include_usage)
        self._before = PREFIX + encode_json(self._head)[:-1] + b',"choices":[{"index":'
        self._end = b'}],"usage":null}\n\n' if self.include_usage else b"}]}\n\n"
        self._plain_end = b',"logprobs":null,"finish_reason":null' + self._end

    def chunk(
        self,
        index: int,
        news: bytes,
        logprobs: Json | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        """A chunk of choice `index`; `news` is its JSON member, as `"text":"..."`."""
        start = self._before + b"%d," % index + news
        if logprobs is None and finish_reason is None:
            return start + self._plain_end
        logprobs_json, reason = encode_json(logprobs), encode_json(finish_reason)
        return start + b',"logprobs":%b,"finish_reason":%b' % (logprobs_json, reason) + self._end

    def end(self, usage: Json) -> bytes:
        """What closes the stream: the counts, without choices, if asked for, and [DONE]."""
        if not self.include_usage:
            return DONE
        return PREFIX + encode_json({**self._head, "choices": [], "usage": usage}) + b"\n\n" + DONE

    def whole_reply(self, kind: str, choices: list[Json], usage: Json) -> web.Response:
        """The reply of a request that does not stream."""
        return reply({**self._head, "object": kind, "choices": choices, "usage": usage})


def usage_json(prompt_tokens: int, output_tokens: int, cached_tokens: int) -> Json:
    """OpenAI's counts; output tokens are summed over choices."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens, "audio_tokens": 0},
    }
