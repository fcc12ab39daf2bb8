"""Which model a request means. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from libmesh_node.http.balance import can
from libmesh_node.http.errors import ApiError
from libmesh_node.http.wanted import Wanted
from libmesh_node.snapshot import Model

RETRY_AFTER = 5
"""Seconds we ask a client to wait when no server has its model: about a model's restart, warm."""

NEARBY_NAMES = 3

IDLE = (
    "This mesh serves no model yet. Start one here with `libmesh-node --model demo` (or the path of a .gguf file), "
    "or join a mesh that has one with `libmesh-node --join TOKEN`."
)


def find_model(models: Sequence[Model], name: str | None, notices: Sequence[str] = ()) -> Model:
    """The model that a request with `name` in its `model` field means.

    Exactly that name, or the model's whole digest; never a similar one. Without a name, the only model that is
    served, or else the only one there is. Raises `ApiError`: 503 if there are no models at all, 400 if a name is
    needed, 404 with the nearest names if nobody has it. `notices` is what is wrong with the node now; if there are no
    models, that is why.
    """
    if not models:
        raise nothing_served(models, notices)
    if not name:
        served = [model for model in models if model.servers]
        candidates = served or list(models)
        if len(candidates) == 1:
            return candidates[0]
        message = f"This mesh has several models; say which in `model`: {_listing(candidates)}."
        raise ApiError(400, "model_required", message, param="model")
    found = [model for model in models if name == model.name or name == model.digest]
    if not found:
        raise ApiError(404, "model_not_found", _unknown(models, name), param="model")
    return next((model for model in found if model.servers), found[0])


AUTO = "auto"
"""What a request says in `model` to leave the choice to the mesh; a model of that name goes before."""

FAST_ENOUGH = 10.0
"""Tokens per second at which a larger model is preferred to a faster one: people read about that fast."""


def pick_model(models: Sequence[Model], wanted: Wanted, notices: Sequence[str] = ()) -> Model:
    """The model for a request that leaves the choice to the mesh.

    Of those of which a server takes what the request brings (tools, pictures), and whose context has room for it if any has:
    the largest of those that answer fast enough for a reader, or if none is known to, the largest; ties by name. How long a
    prompt is, is a guess: where it fits nowhere, the largest context is chosen, whose server counts and says so best. Only if
    none of those that are served takes it, one that is being loaded or sleeps is chosen, and waited for; and only if there is
    none of these either, one that a standby has on its disk.

    Raises `ApiError`: 503 if there is none of all these; if none takes what the request brings, 400 with what is missing where,
    or 503 while another is coming of which nobody knows what it takes.
    """
    served = [model for model in models if model.servers]
    coming = [model for model in models if model.coming and not model.servers]
    able = [model for model in served if any(can(server, wanted) for server in model.servers)]
    able = able or [model for model in coming if can(model, wanted)]
    if not able and not served and not coming:
        able = [model for model in models if model.standbys and can(model, wanted)]
        if not able:
            raise nothing_served(models, notices)
    if not able and coming:
        message = f"{_missing(served, wanted)} {_listing(coming)} may, and will answer soon or when named; try again."
        raise ApiError(503, "no_capable_model", message, param="model", retry_after=RETRY_AFTER)
    if not able:
        raise ApiError(400, "no_capable_model", _missing(served, wanted), param="model")
    room = wanted.prompt_tokens + (wanted.max_tokens or 0)
    fitting = [model for model in able if model.context_length >= room]
    if not fitting:
        longest = max(model.context_length for model in able)
        fitting = [model for model in able if model.context_length == longest]

    def rank(model: Model) -> tuple[bool, int, str]:
        speeds = [
            server.speed for server in model.servers if can(server, wanted) and server.speed is not None
        ]
        return not speeds or max(speeds) >= FAST_ENOUGH, model.size_bytes, model.name

    return max(fitting, key=rank)


def is_available(model: Model) -> bool:
    """Whether a request for a model is answered, if only after a wait."""
    return bool(model.servers) or model.coming or model.standbys > 0


def _missing(served: Sequence[Model], wanted: Wanted) -> str:
    brought = [(word, said) for word, said in _BROUGHT if getattr(wanted, word)]
    takers = [
        f"{said} are taken by "
        + (_listing([m for m in served if any(getattr(server, word) for server in m.servers)]) or "none")
        for word, said in brought
    ]
    what = " and ".join(said for _, said in brought)
    return (
        f"No server of this mesh is known to take {what}: {'; '.join(takers)}. "
        "Name a model in `model` to ask it all the same."
    )


_BROUGHT = (("tools", "tools"), ("vision", "pictures"))


def nothing_served(models: Sequence[Model], notices: Sequence[str] = ()) -> ApiError:
    """The refusal where no model is served at this moment; `notices` as for `find_model`."""
    message = " ".join(notices)
    if models:
        said = (
            f"No model is served at this moment. A request that names one waits for it: {_listing(models)}."
        )
        message = " ".join([said, *notices])
    return ApiError(503, "no_models", message or IDLE, retry_after=RETRY_AFTER)


def no_server(model: Model) -> ApiError:
    """The refusal for a model that nobody serves at this moment."""
    message = f"No node serves `{model.name}` at the moment. It may be loading or its node may have left; try again."
    return ApiError(503, "no_server", message, retry_after=RETRY_AFTER)


def _listing(models: Sequence[Model]) -> str:
    names = [f"`{model.name}`" for model in models]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _unknown(models: Sequence[Model], name: str) -> str:
    shown = name if len(name) <= 100 else name[:99] + "…"
    by_folded = {model.name.casefold(): model.name for model in models}
    near = difflib.get_close_matches(name.casefold()[:200], by_folded, n=NEARBY_NAMES, cutoff=0.5)
    if near:
        hint = "Did you mean " + " or ".join(f"`{by_folded[folded]}`" for folded in near) + "?"
    else:
        hint = f"It has {_listing(models)}."
    return f"No node of this mesh has a model named `{shown}`. {hint}"
