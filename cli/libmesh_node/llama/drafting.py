"""Whether a draft model is worth its time, by what the server itself measures.

One step with a draft yields the token that the model would have made anyway, and those that were guessed right. It is worth
its time if it yields more tokens than as many plain steps would in the same time:

    worth = (1 + accepted per step) x seconds of a plain step / seconds of a step with a draft

How many are accepted is counted in real use, from `/metrics`; what the steps cost is tried out when nobody is being answered.
A server that is never idle is judged by what it accepts alone: with next to nothing accepted a draft brings next to nothing,
whatever it costs, and where many are answered at once it costs most.

An answer of two tokens tells a plain step: the first one comes from the prompt, and for the second, being the last,
llama-server guesses nothing. A longer answer tells a step with a draft.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import trio

LEAST_STEPS = 200
"""Steps in use before there is a verdict; further ones follow whenever as many have been made."""

MARGIN = 0.97
"""A draft is given up if it is worth less. A restart costs more than the last three per cent bring."""

HOPELESS_STEPS, HOPELESS = 4 * LEAST_STEPS, 0.1
"""A draft is given up, too, if in so many steps it never was idle, and fewer guesses per step were right."""

TRIES = 5
"""Of each cost; the least counts, since all that disturbs makes a step longer."""

TRY_LIMIT = 30.0
"""Seconds for one try."""

_LONG = 16  # tokens of a try with drafts: a few steps
_COUNTER = re.compile(
    rb"^llamacpp:spec_decode_num_(drafts|accepted_tokens|draft_tokens)_total ([0-9.e+]{1,24})$", re.M
)


@dataclass(frozen=True, slots=True)
class Guesses:
    """Since the server's start: steps with a draft, tokens guessed in them, and those that were right."""

    steps: float = 0.0
    guessed: float = 0.0
    accepted: float = 0.0

    def __sub__(self, other: Guesses) -> Guesses:
        return Guesses(self.steps - other.steps, self.guessed - other.guessed, self.accepted - other.accepted)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of one step, of one request at a time."""

    plain: float
    drafted: float


def read_guesses(metrics: bytes) -> Guesses | None:
    """The counts by llama-server's answer to `/metrics`; `None` if it does not tell, as older ones do not."""
    try:
        found = {name: float(value) for name, value in _COUNTER.findall(metrics)}
    except ValueError:
        return None
    if len(found) < 3:
        return None
    return Guesses(found[b"drafts"], found[b"draft_tokens"], found[b"accepted_tokens"])


def worth(seen: Guesses, costs: StepCosts) -> float:
    """How many times faster the draft makes the server; below 1 it makes it slower."""
    return (1 + seen.accepted / max(1.0, seen.steps)) * costs.plain / costs.drafted


class DraftTrial:
    """Gathers what is needed for a verdict. The caller brings the counts, and the costs once they are `due`."""

    def __init__(self) -> None:
        self.costs: StepCosts | None = None
        self._base: Guesses | None = None
        self._seen = Guesses()

    def saw(self, counts: Guesses | None) -> None:
        """What `read_guesses` has told. The first is where counting begins."""
        if counts is not None and self._base is not None:
            self._seen = counts - self._base
        elif counts is not None:
            self._base = counts

    @property
    def due(self) -> bool:
        """Whether enough was seen to judge by."""
        return self._seen.steps >= LEAST_STEPS

    @property
    def hopeless(self) -> bool:
        """Whether it is to be given up whatever steps cost."""
        seen = self._seen
        return seen.steps >= HOPELESS_STEPS and seen.accepted < HOPELESS * seen.steps

    def verdict(self) -> str | None:
        """Why the draft is to be given up, in words; `None` if it is worth its time, or nobody knows and there is hope.

        Counting begins again.
        """
        seen, costs, hopeless = self._seen, self.costs, self.hopeless
        self._base, self._seen = None, Guesses()
        right = 100 * seen.accepted / max(1.0, seen.guessed)
        if costs is None and hopeless:
            return f"its draft guesses right {right:.0f} % of the time, which brings next to nothing"
        if costs is None or (value := worth(seen, costs)) >= MARGIN:
            return None
        return f"its draft guesses right {right:.0f} % of the time, which makes it {value:.2f} times as fast as without"


async def measure_costs(port: int) -> StepCosts | None:
    """Try out what steps cost on the llama-server at `port`, which should have nothing else to do.

    `None` if it does not tell, for example since the model ends its answers at once.
    """
    plain: list[float] = []
    drafted: list[float] = []
    for _ in range(TRIES):
        for tokens, found in ((2, plain), (_LONG, drafted)):
            with trio.move_on_after(TRY_LIMIT):
                seconds = _seconds_per_step(await _complete(port, tokens), tokens)
                if seconds is not None:
                    found.append(seconds)
    return StepCosts(min(plain), min(drafted)) if plain and drafted else None


def _seconds_per_step(answer: bytes, tokens: int) -> float | None:
    """Of an answer of `tokens` tokens. The first one takes no time of its own: it belongs to the prompt."""
    try:
        timings = json.loads(answer.partition(b"\r\n\r\n")[2])["timings"]
        made, accepted = int(timings["predicted_n"]), int(timings.get("draft_n_accepted", 0))
        steps, guessed = made - 1 - accepted, int(timings.get("draft_n", 0))
        seconds = float(timings["predicted_ms"]) / 1000
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    if made != tokens or steps <= 0 or seconds <= 0 or (guessed > 0) != (tokens > 2):
        return None
    return seconds / steps


async def _complete(port: int, tokens: int) -> bytes:
    about = {"prompt": "Once upon a time", "n_predict": tokens, "temperature": 0, "cache_prompt": False}
    body = json.dumps({**about, "ignore_eos": True}).encode()
    head = f"POST /completion HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    answer = bytearray()
    try:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while len(answer) < 1 << 18 and (data := await stream.receive_some(65536)):
                answer += data
    except (OSError, trio.BrokenResourceError):
        return b""
    return bytes(answer)
