"""Peers that resume what they should not, or not what they should."""

from __future__ import annotations

from typing import Any

from libmesh import resume_wire, wire
from libmesh._pb import mesh_pb2 as pb
from libmesh.framing import frame, receive_frame
from libmesh.net.base import Stream
from libmesh.net.journal import Journal, Lifeline
from libmesh.resume_wire import Progress
from libmesh.resuming import FarTunnel, Resumption
from tests.conformance.mutants.base import Patch, mutant


@mutant("resume.no_session", "it would resume")
def promises_to_resume_everything(patch: Patch) -> None:
    encode = wire.encode_opened
    patch.setattr(wire, "encode_opened", lambda word, resumable=False: encode(word, resumable=True))


@mutant("resume.unknown", "it answered yes")
def resumes_what_was_never_opened(patch: Patch) -> None:
    async def agree(self: Resumption, stream: Stream) -> None:
        await receive_frame(stream, wire.MAX_OPEN)
        await stream.send_all(frame(resume_wire.encode_resumed(None, 0, False)))
        await stream.aclose()

    patch.setattr(Resumption, "answer_resume", agree)


@mutant("resume.bad_session", "a session of 0 bytes")
def takes_any_name_for_a_session(patch: Patch) -> None:
    def lenient(data: bytes) -> Progress:
        message = pb.Progress.FromString(data)
        return Progress(message.session, message.received, message.ended)

    patch.setattr(resume_wire, "decode_progress", lenient)


@mutant("resume.goes_on", "")
def says_to_have_a_byte_less_and_takes_it_twice(patch: Patch) -> None:
    encode = resume_wire.encode_resumed
    patch.setattr(
        resume_wire,
        "encode_resumed",
        lambda refusal, received, ended: encode(refusal, max(0, received - 1), ended),
    )


@mutant("resume.goes_on", "unknown")
def forgets_a_tunnel_with_its_connection(patch: Patch) -> None:
    patch.setattr(FarTunnel, "is_lost", lambda self, stream: False)


@mutant("resume.between_us", "asked for another's")
def gives_a_tunnel_to_whoever_names_it(patch: Patch) -> None:
    class Loose(dict[Any, Any]):
        def get(self, wanted: Any, default: Any = None) -> Any:
            return next((tunnel for (_, session), tunnel in self.items() if session == wanted[1]), default)

    make = Resumption.__init__

    def init(self: Resumption, *given: Any) -> None:
        make(self, *given)
        self.tunnels = Loose()

    patch.setattr(Resumption, "__init__", init)


@mutant("resume.lie", "a claim of")
def believes_any_claim(patch: Patch) -> None:
    patch.setattr(FarTunnel, "takes", lambda self, progress: True)


@mutant("resume.reset", "was reset", slow=True)
def goes_on_with_a_tunnel_that_was_reset(patch: Patch) -> None:
    patch.setattr(FarTunnel, "is_lost", lambda self, stream: True)


@mutant("resume.acknowledged", "it says nothing", slow=True)
def never_says_what_it_has(patch: Patch) -> None:
    patch.setattr(Resumption, "tell", lambda self, peer, progress: None)


@mutant("resume.acknowledged", "the end", slow=True)
def never_says_that_it_has_the_end(patch: Patch) -> None:
    patch.setattr(Lifeline, "took_end", lambda self: None)


@mutant("resume.waits", "without being told", slow=True)
def keeps_without_bound(patch: Patch) -> None:
    patch.setattr(Journal, "full", property(lambda self: False))


@mutant("resume.waits", "did not go on", slow=True)
def waits_for_ever_once_it_is_full(patch: Patch) -> None:
    patch.setattr(Journal, "acknowledge", lambda self, received, ended: None)
