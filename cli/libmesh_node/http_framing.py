"""Where an HTTP exchange ends, so that a stream of the mesh carries several (`libmesh.Framing`).

llama-server closes the connection after each streamed answer, though it announces `Keep-Alive`. With this a node keeps its
streams to a server all the same (`http/connections.py`), and a request is spared the making of one.
"""

from __future__ import annotations

import httptools


class HttpExchange:
    """One request with its answer, as HTTP/1.1 delimits them (RFC 9112, 6).

    Loses track of all that is not plainly one: a second request before the answer to the first, an upgrade, an answer that ends
    with its connection or is announced to, and the answer to HEAD, whose length is not that of its body.
    """

    def __init__(self) -> None:
        self._request, self._answer = _Request(), _Answer()
        self._follows = True

    def asked(self, data: bytes | bytearray) -> None:
        """See `libmesh.Framing`."""
        self._follow(self._request, data)

    def answered(self, data: bytes) -> bool:
        """See `libmesh.Framing`."""
        self._follow(self._answer, data)
        return self._follows and self._answer.keeps and self._request.is_whole

    def _follow(self, side: _Request | _Answer, data: bytes | bytearray) -> None:
        if self._follows:
            try:
                side.parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                self._follows = False


class _Request:
    """What `httptools` calls for each event of the request."""

    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self._begun = self._ended = 0

    @property
    def is_whole(self) -> bool:
        """Whether there is one, and no more, and its answer says itself how long it is."""
        return self._begun == self._ended == 1 and self.parser.get_method() != b"HEAD"

    def on_message_begin(self) -> None:
        self._begun += 1

    def on_message_complete(self) -> None:
        self._ended += 1


class _Answer:
    """What `httptools` calls for each event of the answer."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.keeps = False  # it is over, and the connection is not

    def on_message_begin(self) -> None:
        self.keeps = False  # another one that nobody asked for

    def on_message_complete(self) -> None:
        is_interim = self.parser.get_status_code() < 200  # RFC 9110, 15.2
        self.keeps = not is_interim and self.parser.should_keep_alive()
