"""How the API says no: in the error shape of the protocol that the client speaks.

OpenAI's envelope everywhere, Anthropic's on `/v1/messages`, so that both SDKs raise their proper exception classes.
Sources: OpenAI API reference, "Error codes"; Anthropic API reference, "Errors".
"""

from __future__ import annotations

import json

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A request that gets no answer from a model. The text tells the person what to do next.

    Attributes:
        status: HTTP status.
        code: a stable word for programs, such as `model_not_found`.
        param: the request field at fault, or `None`.
        retry_after: seconds after which another try makes sense; `None` where it does not.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after


def encode_error(error: ApiError, path: str) -> bytes:
    """The JSON body for `error` on a request for `path`."""
    message = str(error)
    if speaks_anthropic(path):
        kind = ANTHROPIC_TYPES.get(
            error.status, "invalid_request_error" if error.status < 500 else "api_error"
        )
        return _json({"type": "error", "error": {"type": kind, "message": message}})
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return _json({"error": {"message": message, "type": kind, "param": error.param, "code": error.code}})


def encode_stream_error(error: ApiError, path: str) -> bytes:
    """The server-sent event for an `error` that comes after the answer has begun.

    Starts with a blank line, as the stream may have broken in the middle of an event. The named events are those of
    the two protocols that name theirs; for the others the OpenAI SDK looks for `error` in the data.
    """
    if speaks_anthropic(path):
        return b"\n\nevent: error\ndata: " + encode_error(error, path) + b"\n\n"
    if "/responses" in path:
        data = {"type": "error", "code": error.code, "message": str(error), "param": None}
        return b"\n\nevent: error\ndata: " + _json(data) + b"\n\n"
    return b"\n\ndata: " + encode_error(error, path) + b"\n\n"


def speaks_anthropic(path: str) -> bool:
    """Whether `path` belongs to Anthropic's Messages API."""
    return path.startswith("/v1/messages")


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
