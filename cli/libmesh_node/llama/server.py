"""The command line of a llama-server that serves one model on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from libmesh_node.llama.cache import F16, CacheType, choose_cache
from libmesh_node.llama.engine import Binary
from libmesh_node.llama.gguf import GgufHeader
from libmesh_node.models.reference import ModelFile

DEFAULT_SLOTS = 4
"""Requests answered at once; llama-server's own default."""

MAX_CONTEXT = 65_536
"""Tokens in the cache, all slots together. The first mesh's largest; more only costs memory that few requests use."""

MIN_CONTEXT = 4096
"""Fewer make no useful server, so as many are asked for even if memory seems short."""

DEMO_TOKENS = 256
"""Length of the demo model's answers where the request sets no limit: it never stops by itself."""

_CONTEXT_STEP = 256  # llama.cpp pads its cache to multiples of this
_COMPUTE_BYTES = (
    512 << 20
)  # for compute buffers, whose size depends on the model; with batches of 512 usually 0.1 to 0.5 GB
_PROMPT_CACHE_MIB = 8192  # llama-server's own default, for machines that have it to spare


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """How a model is spread over rpc-servers.

    Attributes:
        ports: at 127.0.0.1, one for each worker, in the order of a token's way.
        layers: for each device in that order how many layers, the output as one more; own devices last.
        own_devices: names of this machine's own devices that take part, as llama-server lists them.
        home_layers: the first layers, which stay with the processor.
        logits_home: the output is computed by the processor.
    """

    ports: tuple[int, ...]
    layers: tuple[int, ...]
    own_devices: tuple[str, ...] = ()
    home_layers: int = 0
    logits_home: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """A small model that guesses ahead: it runs on the host only. `tokens`: guesses at once."""

    path: Path
    tokens: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """How to serve a model.

    Attributes:
        context: tokens in the attention cache, shared by all slots; any one may use all of it, up to what the model
            was trained for.
        slots: requests at once.
        cache: of what the attention cache is made.
        device: as llama-server's `--device` takes it; `None` for all it finds; `cpu` for none.
        prompt_cache_mib: main memory for the caches of earlier conversations.
        split: the workers, if there are any.
        draft: speculative decoding.
    """

    model: ModelFile
    context: int
    slots: int = DEFAULT_SLOTS
    cache: CacheType = F16
    device: str | None = None
    threads: int | None = None
    prompt_cache_mib: int = 512
    split: SplitPlan | None = None
    draft: DraftPlan | None = None

    @property
    def alias(self) -> str:
        """The model's name as llama-server gets it. It takes a comma for the start of another name."""
        return self.model.name.replace(",", "_")

    @property
    def memory_bytes(self) -> int:
        """What it takes of the memory that its context was chosen for: weights, cache and compute buffers.

        The caches of earlier conversations lie in main memory, in the part that is not for models.
        """
        per_token = self.model.header.kv_bytes_per_token(self.cache.block_bytes)
        return self.model.size_bytes + self.context * per_token + _COMPUTE_BYTES


def plan_server(
    model: ModelFile, *, memory_bytes: int, slots: int = DEFAULT_SLOTS, device: str | None = None
) -> ServerPlan:
    """Choose the context for `model` on a machine with `memory_bytes` for models."""
    left = max(0, memory_bytes - model.size_bytes)
    cache = choose_cache(model.header, model.size_bytes)
    return ServerPlan(
        model=model,
        context=choose_context(model.header, left, slots, cache),
        slots=slots,
        cache=cache,
        device=device,
        prompt_cache_mib=min(_PROMPT_CACHE_MIB, left // 16 >> 20),
    )


def choose_context(header: GgufHeader, memory_bytes: int, slots: int, cache: CacheType = F16) -> int:
    """Tokens of cache that fit into `memory_bytes`, which are what the weights leave free.

    Never more than each slot could use, nor than `MAX_CONTEXT`; never less than `MIN_CONTEXT`, or what one slot could
    use if that is less. A header that does not say what the model was trained for counts as `MIN_CONTEXT`.
    """
    trained = header.context_length or MIN_CONTEXT
    most = min(trained * slots, MAX_CONTEXT)
    least = min(trained, MIN_CONTEXT)
    per_token = header.kv_bytes_per_token(cache.block_bytes)
    fitting = (memory_bytes - _COMPUTE_BYTES) // per_token if per_token else most
    chosen = max(least, min(most, fitting))
    return max(_CONTEXT_STEP, chosen // _CONTEXT_STEP * _CONTEXT_STEP)


def server_args(binary: Binary, plan: ServerPlan, port: int) -> list[str]:
    """The whole command line, program included, to serve `plan` on loopback at `port`.

    Every option was looked up in llama-server's own `--help`: those that a build does not know are left out if the
    server does its main work without them. Both chat and embeddings are on: `--embeddings` claims to restrict a server
    to embeddings, but since it switches the model per batch, chat works as before and costs the same (seen with 0.5.0).
    """
    model = plan.model
    arguments = [str(binary.path)]
    if plan.split is not None:  # --rpc makes the devices that --device then names, so it comes first
        arguments += ["--rpc", ",".join(f"127.0.0.1:{port}" for port in plan.split.ports)]
    arguments += ["--model", str(model.path), "--alias", plan.alias]
    arguments += ["--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--ctx-size", str(plan.context), "--parallel", str(plan.slots)]
    if plan.split is not None:
        arguments += _split_args(plan.split, model.header.n_layers)
    else:
        if plan.device is not None:
            arguments += ["--device", "none" if plan.device.lower() == "cpu" else plan.device]
        arguments += ["--n-gpu-layers", "99"]
    if plan.cache is not F16:  # demands flash attention, which llama.cpp then turns on by itself
        arguments += ["--cache-type-k", plan.cache.name, "--cache-type-v", plan.cache.name]
    if plan.draft is not None:
        arguments += _draft_args(binary, plan.draft)
    if plan.threads is not None:
        arguments += ["--threads", str(plan.threads)]
    if model.is_demo:
        arguments += ["--n-predict", str(DEMO_TOKENS)]
    optional: Sequence[Sequence[str]] = (
        ("--kv-unified",),
        ("--metrics",),
        ("--no-webui",),
        ("--jinja",),
        ("--offline",),
        ("--embeddings",),
        # Models made for embeddings bring their own pooling; for the others the mean is the usual choice.
        () if model.header.is_embedding_model else ("--pooling", "mean"),
        # Over RPC each switch of conversations would fetch and return the whole cache.
        ("--cache-ram", "0" if plan.split is not None else str(plan.prompt_cache_mib)),
        # Otherwise any web page that the user visits may read the answers: the default origin is `*`.
        ("--cors-origins", "localhost"),
    )
    for option in optional:
        if option and option[0] in binary.flags:
            arguments += option
    return arguments


def _split_args(split: SplitPlan, layers: int) -> list[str]:
    workers = len(split.layers) - len(split.own_devices)
    devices = [*(f"RPC{number}" for number in range(workers)), *split.own_devices]
    arguments = ["--device", ",".join(devices), "--n-gpu-layers", str(layers + 1 - split.home_layers)]
    arguments += ["--split-mode", "layer", "--fit", "off"]
    if len(split.layers) > 1:
        arguments += ["--tensor-split", ",".join(map(str, split.layers))]
    if split.logits_home:  # tied embeddings are loaded a second time, as the output, under their own name
        arguments += ["--override-tensor", "^(output|token_embd)\\.weight=CPU"]
    return arguments


def _draft_args(binary: Binary, draft: DraftPlan) -> list[str]:
    """Names of these options changed in 2026; each build is spoken to in its own. The draft stays off the workers."""
    flags = binary.flags
    arguments = ["--model-draft", str(draft.path)]
    if "--spec-type" in flags:
        arguments += ["--spec-type", "draft-simple"]
    count = next((flag for flag in ("--spec-draft-n-max", "--draft-max") if flag in flags), None)
    if count is not None:
        arguments += [count, str(draft.tokens)]
    device = next(
        (flag for flag in ("--device-draft", "--spec-draft-device", "-devd") if flag in flags), None
    )
    return arguments if device is None else [*arguments, device, "none"]


def child_environment(parent: Mapping[str, str]) -> dict[str, str]:
    """The environment for a llama.cpp program.

    Without `LLAMA_ARG_…` and `LLAMA_API_KEY`, which would change what the command line says, or lock the node out of
    its own server. Without a backtrace by gdb on abort, which delays the end by up to a second.
    """
    kept = {
        name: value for name, value in parent.items() if not name.startswith(("LLAMA_ARG_", "LLAMA_API_KEY"))
    }
    return {**kept, "GGML_NO_BACKTRACE": "1"}
