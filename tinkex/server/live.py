"""Live models, live samplers, and the operations on them."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import attrs

from tinkex import types, wire
from tinkex.server import tracing


@attrs.define(eq=False)
class LiveModel:
    """A model in the engine.

    Attributes:
        adapter: the PEFT adapter directory that it starts from, or None.
        broken: why it could not be created, or None.
        gradient_failure: why the accumulated gradients are incomplete, or None.
        done_seq: number of the last completed operation.
        seconds, size: compute time and body bytes since the last snapshot.
        snapshot: folder of the last snapshot; snapshot_seq: the last operation in it;
            snapshot_seconds: how long it took.
        in_memory: False while only the snapshot exists.
        busy: True while an operation on it runs.
        used_at: time of its last operation, on the monotonic clock.
    """

    model_id: str
    session_id: str
    owner: str
    base_model: str
    lora: types.LoraConfig
    user_metadata: dict[str, Any] | None = None
    created: bool = False
    broken: str | None = None
    gradient_failure: str | None = None
    done_seq: int = -1
    seconds: float = 0.0
    size: int = 0
    snapshot: Path | None = None
    snapshot_seq: int = -1
    snapshot_seconds: float = 0.0
    in_memory: bool = False
    busy: bool = False
    used_at: float = attrs.field(factory=time.monotonic)

    @property
    def info(self) -> str:
        """The description that a restart needs, in JSON."""
        fields = ("session_id", "owner", "base_model", "user_metadata")
        info = {name: getattr(self, name) for name in fields}
        return wire.dumps(info | {"lora": wire.to_json(self.lora)}).decode()

    @classmethod
    def from_info(cls, model_id: str, info: str) -> LiveModel:
        known = wire.loads(info.encode())
        lora = wire.from_json(types.LoraConfig, known.pop("lora"))
        return cls(model_id=model_id, lora=lora, **known)


@attrs.define(eq=False)
class LiveSampler:
    """The weights of a sampling session: a base model, a checkpoint, or their own snapshot."""

    sampler_id: str
    session_id: str
    owner: str
    base_model: str
    model_path: str | None
    directory: Path | None
    #: The model whose newest `inflight` weights are used; None if the weights are fixed.
    follows: str | None = None

    @property
    def engine_id(self) -> str:
        """The sampler's id in the engine; samplers with the same weights share it."""
        return f"base:{self.base_model}" if self.directory is None else str(self.directory)


class StoredRequest(Protocol):
    """A request on disk."""

    def read(self) -> Future[Any]:
        """Start reading and decoding it."""


@attrs.frozen
class Work:
    """One operation on a model.

    Attributes:
        name: as in the wire table; request: decoded, or None if only its number must be consumed.
        seed: drawn at acceptance for requests without a seed.
        ended: True if it ended before a restart; failure: the error it ended with, or None.
        size: bytes of the request body.
        stored: where the request is kept until it runs, instead of in `request`, or None.
        accepted_at: on the monotonic clock; trace: the client's trace, or None.
    """

    name: str
    model: LiveModel
    seq: int
    request: Any
    seed: int = 0
    ended: bool = False
    failure: str | None = None
    size: int = 0
    stored: StoredRequest | None = None
    accepted_at: float = attrs.field(factory=time.monotonic, eq=False)
    trace: Any = attrs.field(factory=tracing.current, eq=False, repr=False)

    @property
    def title(self) -> str:
        """Its name in error messages."""
        return f"{self.name} (operation {self.seq})"

    @property
    def origin(self) -> str:
        """Its unique name, stored with what it saves."""
        return f"{self.model.model_id}:{self.seq}"


@attrs.frozen
class Refused:
    """Consumes the number of a refused request: fails in its turn with the same message."""

    model_id: str
    seq_id: int
    sentence: str


#: Operations that must be replayed after a restart to rebuild a model.
CHANGES_MODEL = frozenset({"CreateModel", "ForwardBackward", "OptimStep", "LoadWeights"})
