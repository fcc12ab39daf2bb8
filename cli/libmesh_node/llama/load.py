"""How busy a llama-server is and how fast, and what it can do, as it tells itself. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_GAUGE = re.compile(
    rb"^llamacpp:(requests_processing|requests_deferred|predicted_tokens_seconds) ([0-9.e+-]{1,24})$", re.M
)
_WORK = re.compile(rb"^llamacpp:(?:prompt_tokens|tokens_predicted)_total ([0-9.e+]{1,24})$", re.M)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLoad:
    """What other nodes are told, in steps so large that it seldom changes.

    Attributes:
        busy: requests that are answered or wait, rounded up to a power of two.
        speed: tokens per second of one request, smoothed, to the next of 1, 1.5, 2, 3, 4, 6, 8, 12 and so on; 0 if unknown.
        first: seconds from a request's turn to its first token, in milliseconds to the same steps; 0 if unknown.
    """

    busy: int = 0
    speed: float = 0.0
    first: float = 0.0


IDLE = ServerLoad()


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What requests a server can take besides plain text."""

    tools: bool = False
    vision: bool = False


UNABLE = Abilities()

SMOOTHING = 0.2
"""Weight of a new measurement."""

_FIRST = re.compile(r"prompt eval time = *([0-9.]{1,16}) ms")
"""What llama-server logs of each request (tools/server/server-context.cpp, `print_timings`); `/metrics` has no count of
requests by which its sum could be divided."""


class Smoothed:
    """The mean of what was measured, of which the newest counts for the most, told in steps."""

    def __init__(self) -> None:
        self._value: float | None = None

    def add(self, value: float) -> None:
        """A measurement."""
        before = value if self._value is None else self._value
        self._value = before + SMOOTHING * (value - before)

    @property
    def told(self) -> float:
        """To the next step; 0 if nothing was measured."""
        return _step(self._value) if self._value else 0.0


class FirstToken:
    """Time to first token, smoothed over the requests of one server. Feed it the server's log."""

    def __init__(self) -> None:
        self._milliseconds = Smoothed()

    def saw(self, line: str) -> None:
        """A line of the log. Those of other things change nothing."""
        if (found := _FIRST.search(line)) is None:
            return
        try:
            self._milliseconds.add(float(found[1]))
        except ValueError:
            return

    @property
    def told(self) -> float:
        """Seconds, as in `ServerLoad.first`."""
        return self._milliseconds.told / 1000


def read_abilities(props: bytes) -> Abilities | None:
    """By llama-server's answer to `/props`, head and body; what it does not say, it cannot do. `None` if that is no answer."""
    try:
        said = json.loads(props.partition(b"\r\n\r\n")[2])
        caps, modalities = said.get("chat_template_caps") or {}, said.get("modalities") or {}
        return Abilities(tools=caps.get("supports_tools") is True, vision=modalities.get("vision") is True)
    except AttributeError:
        return UNABLE
    except (ValueError, RecursionError):
        return None


def read_load(metrics: bytes, before: ServerLoad = IDLE, speeds: Smoothed | None = None) -> ServerLoad:
    """The load by llama-server's answer to `/metrics`; `before` if it cannot be read.

    The speed, which it tells of the time since it was asked last, goes into `speeds`, and that is what is told. That of
    `before` stays where the server has not generated anything since.
    """
    speeds = speeds or Smoothed()
    try:
        gauges = {name: float(value) for name, value in _GAUGE.findall(metrics)}
    except ValueError:
        return before
    if b"requests_processing" not in gauges:
        return before
    busy = int(gauges[b"requests_processing"] + gauges.get(b"requests_deferred", 0.0))
    speed = gauges.get(b"predicted_tokens_seconds", 0.0)
    if 0 < speed < 1e6:
        speeds.add(speed)
    return ServerLoad(busy=coarse(busy), speed=speeds.told or before.speed, first=before.first)


def read_work(metrics: bytes) -> float | None:
    """Tokens read and generated since the server's start, by its answer to `/metrics`; `None` if it does not say.

    A request that came and went between two looks shows here only.
    """
    try:
        return sum(map(float, _WORK.findall(metrics))) if _WORK.search(metrics) else None
    except ValueError:
        return None


def coarse(requests: int) -> int:
    """So many requests as a power of two, rounded up."""
    return 0 if requests <= 0 else 1 << (requests - 1).bit_length()


def _step(speed: float) -> float:
    step = 1.0
    while step * 1.25 < speed:
        step *= 2
    return step * 0.75 if step > 1 and speed < step * 0.875 else step
