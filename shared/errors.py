"""The errors of Glimmer, as a tree. Each leaf has an exit code or an HTTP status.

GlimmerError
  StartError            the server cannot start; `exit_code` tells the caller why
    UsageError    2     bad command line
    ConfigError   3     values that contradict each other or do not fit this machine
    ModelError    4     checkpoint missing, truncated, inconsistent, changed, failing its self-test
    PortError     5     address or runtime directory already in use
    GpuError      6     GPU lost or unusable
  RequestError   400    the client's mistake; `field` names the parameter
    TooLargeError 413   body over the size limit
    NotFoundError 404   no such model
  UnauthorizedError 401 no API key, or a wrong one
  ForbiddenError 403    the API key is not an admin's
  OverloadedError 429   queue full; `retry_after_s`
    KeyLimitError 429   a limit of the API key
  UnavailableError 503  draining, starting or engine lost; `retry_after_s`
  EngineError    500    the server's fault
  CodecError            a malformed message from another process: counted and dropped
"""


class GlimmerError(Exception):
    """Base of all errors raised on purpose."""


class StartError(GlimmerError):
    """The server cannot start. The text is one line: the problem, and what to change."""

    exit_code = 1


class UsageError(StartError):
    exit_code = 2


class ConfigError(StartError):
    exit_code = 3


class ModelError(StartError):
    exit_code = 4


class PortError(StartError):
    exit_code = 5


class GpuError(StartError):
    exit_code = 6


class HttpError(GlimmerError):
    """An error that becomes an HTTP reply, or the last SSE event of a stream."""

    status = 500
    type = "InternalServerError"
    reason = "error"  # in metrics
    code: str | None = None  # OpenAI's name of the problem; None: the status

    def __init__(self, message: str, field: str | None = None, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after_s = retry_after_s


class RequestError(HttpError):
    """The client's mistake. `field` is the parameter's path, such as `parameters.top_p`."""

    status = 400
    type = "BadRequestError"
    reason = "invalid"


class ContextLengthError(RequestError):
    """A prompt has more tokens than fit, with one token of output, into `limit`. Agents look for
    these words and then shorten the conversation. With `num_chars`, the tokens were not counted."""

    code = "context_length_exceeded"

    def __init__(self, num_tokens: int, limit: int, field: str, num_chars: int = 0) -> None:
        self.num_tokens, self.limit = num_tokens, limit
        self.estimate = f" (estimated from {num_chars} characters)" if num_chars else ""
        super().__init__(
            f"{field}: This model's maximum context length is {limit} tokens. However, the prompt "
            f"has {num_tokens} tokens{self.estimate}, and must leave room for one of output.",
            field,
        )


class TooLargeError(RequestError):
    status = 413
    reason = "too_large"


class UnsupportedCodingError(RequestError):
    """A body is compressed in a way that is not read here."""

    status = 415


class NotFoundError(RequestError):
    status = 404
    type = "NotFoundError"
    reason = "not_found"


class UnauthorizedError(HttpError):
    status = 401
    type = "AuthenticationError"
    reason = "unauthorized"


class ForbiddenError(HttpError):
    status = 403
    type = "PermissionDeniedError"
    reason = "forbidden"


class OverloadedError(HttpError):
    status = 429
    type = "RateLimitError"
    reason = "overloaded"


class KeyLimitError(OverloadedError):
    reason = "key_limit"


class UnavailableError(HttpError):
    status = 503
    type = "ServiceUnavailableError"
    reason = "unavailable"


class EngineError(HttpError):
    status = 500


class CodecError(GlimmerError):
    """A malformed message from another process."""
