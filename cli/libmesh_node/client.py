"""Talks to a running node over its console API, for the commands that do."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

from libmesh_node.datadir import DataDir
from libmesh_node.errors import NodeError, NodeNotRunning, NodeRefused

ANSWER_TIMEOUT = 15.0
"""Seconds a node may take to answer; joining a mesh over a bad path is the slowest thing it is asked for."""

_EVENTS_TIMEOUT = 45.0
"""Seconds without a line on `/api/events`; the node sends a keep-alive every 15."""

_FIRST_WORD_TIMEOUT = 120.0
"""Seconds without a byte of an answer, which a busy model may well need before its first."""

_ANSWER_LIMIT = 16 << 20
"""Bytes. The status of a mesh of some thousand peers fits; more is not from a node, and is refused."""


class NodeClient:
    """The console API of one node on this machine, at `127.0.0.1:port`. Holds no connection between calls.

    Every method raises `NodeNotRunning` if nothing answers, `NodeRefused` for a refusal, and `NodeError` for an answer
    that is not a node's.
    """

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`."""
        return self._call("GET", path, None)

    def post(self, path: str, body: dict[str, Any], patience: float = ANSWER_TIMEOUT) -> dict[str, Any]:
        """Carry out the command at `path`. On a timeout it is not known whether it was carried out."""
        return self._call("POST", path, body, patience)

    def delete(self, path: str, body: dict[str, Any], patience: float = ANSWER_TIMEOUT) -> dict[str, Any]:
        """As `post`, for what goes."""
        return self._call("DELETE", path, body, patience)

    def events(self) -> Iterator[dict[str, Any]]:
        """The status now, and again on each change, until the node ends (then it just stops).

        Close the iterator, or let it go, to end the connection.
        """
        try:
            yield from _events(self._connection(_EVENTS_TIMEOUT), "GET", "/api/events", None)
        except TimeoutError as error:
            raise NodeNotRunning(f"The node at console port {self.port} fell silent.") from error
        except (ConnectionError, http.client.HTTPException):
            return

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None, patience: float = ANSWER_TIMEOUT
    ) -> dict[str, Any]:
        connection = self._connection(patience)
        try:
            with connection.request_answered(method, path, body) as response:
                _raise_for_refusal(response)
                return _json_object(response.read(_ANSWER_LIMIT))
        except TimeoutError as error:
            raise NodeError(
                f"The node at console port {self.port} did not answer within {patience:g} s."
            ) from error
        except (ConnectionError, http.client.HTTPException) as error:
            raise NodeNotRunning(
                f"The node at console port {self.port} went away while it answered."
            ) from error
        finally:
            connection.close()

    def _connection(self, timeout: float) -> _Connection:
        return _Connection("127.0.0.1", self.port, timeout=timeout)


class _Connection(http.client.HTTPConnection):
    def request_answered(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> http.client.HTTPResponse:
        """Send the request and return the response's head; what goes wrong comes out as ours."""
        try:
            if body is None:
                self.request(method, path)
            else:
                self.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            return self.getresponse()
        except TimeoutError:
            raise
        except OSError as error:
            raise NodeNotRunning(f"No node answers at console port {self.port} ({_why(error)}).") from error
        except http.client.HTTPException as error:
            raise NodeError(f"What listens at port {self.port} is not a node's console.") from error


def find_node(data_dir: DataDir, console_port: int | None) -> NodeClient:
    """The node whose console is at `console_port`, else the one that runs on `data_dir`.

    Raises `NodeNotRunning`, saying where it looked and how to start one.
    """
    if console_port is not None:
        return NodeClient(console_port)
    info = data_dir.read_info()
    if info is not None:
        return NodeClient(info.console_port)
    if (pid := data_dir.holder()) is not None:
        raise NodeNotRunning(
            f"The node on {data_dir.path} (pid {pid}) is still starting. Try again in a moment."
        )
    raise NodeNotRunning(
        f"No node runs on the data folder {data_dir.path}. Start one with `libmesh-node`, "
        "or name another with --data-dir DIR or --console PORT."
    )


def stream_answer(api_port: int, question: dict[str, Any]) -> Iterator[str]:
    """The pieces of text of a chat completion, each when it comes. `question` is the body, without `stream`.

    Raises `NodeRefused` for an answer that is an error, and `NodeError` if the answer breaks off.
    """
    connection = _Connection("127.0.0.1", api_port, timeout=_FIRST_WORD_TIMEOUT)
    try:
        for event in _events(connection, "POST", "/v1/chat/completions", {**question, "stream": True}):
            if "error" in event:
                raise NodeError(f"The answer broke off: {event['error']}")
            for choice in event.get("choices", []):
                if piece := choice.get("delta", {}).get("content"):
                    yield piece
    except (OSError, http.client.HTTPException) as error:
        raise NodeError(f"The answer at API port {api_port} broke off ({error}).") from error


def _events(
    connection: _Connection, method: str, path: str, body: dict[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events (HTML standard, 9.2); `[DONE]` and comments are left out.

    Closes the connection. Raises what the socket raises if the stream breaks off.
    """
    try:
        with connection.request_answered(method, path, body) as response:
            _raise_for_refusal(response)
            data = b""
            while line := response.readline(_ANSWER_LIMIT):
                if line.startswith(b"data:"):
                    data += line[5:].strip()
                elif not line.strip():
                    if data not in (b"", b"[DONE]"):
                        yield _json_object(data)
                    data = b""
    finally:
        connection.close()


def _raise_for_refusal(response: http.client.HTTPResponse) -> None:
    if response.status < 400:
        return
    try:
        answer = _json_object(response.read(_ANSWER_LIMIT))
    except NodeError:
        answer = {}
    text = answer.get("error")
    if isinstance(text, dict):
        text = text.get("message")
    code = answer.get("code")
    raise NodeRefused(
        text if isinstance(text, str) and text else f"The node answered {response.status} {response.reason}.",
        code=code if isinstance(code, str) else "",
        status=response.status,
    )


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise NodeError("The answer is not a node's: it is no JSON, or was cut off.") from error
    if not isinstance(found, dict):
        raise NodeError("The answer is not a node's: it is no JSON object.")
    return found


def _why(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()
