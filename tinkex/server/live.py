"""What operations work on: live models, live samplers, and one operation with its request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from tinkex import types, wire


@attrs.define(eq=False)
class LiveModel:
    """A model in the engine.

    Attributes:
        adapter: a PEFT adapter directory that it starts from, or None.
        broken: why it could not be created, or None.
        spoilt: why the accumulated gradients must not be stepped with, or None.
        done_seq: the last operation done.
        seconds, size: computing time and bodies since the last snapshot.
        snapshot: folder of the last snapshot; snapshot_seconds: how long that took.
    """

    model_id: str
    session_id: str
    owner: str
    base_model: str
    lora: types.LoraConfig
    user_metadata: dict[str, Any] | None = None
    created: bool = False
    broken: str | None = None
    spoilt: str | None = None
    done_seq: int = -1
    seconds: float = 0.0
    size: int = 0
    snapshot: Path | None = None
    snapshot_seconds: float = 0.0

    @property
    def info(self) -> str:
        """What a restart must know of it, in JSON."""
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
    """What a sampling session samples from: a base model, or a checkpoint's or its own folder."""

    sampler_id: str
    session_id: str
    owner: str
    base_model: str
    model_path: str | None
    directory: Path | None

    @property
    def engine_id(self) -> str:
        """Samplers of the same weights share them."""
        return f"base:{self.base_model}" if self.directory is None else str(self.directory)


@attrs.frozen
class Work:
    """One operation on a model.

    Attributes:
        name: as in wire's table; request: decoded; None if only its place must be filled.
        seed: drawn for it at acceptance, where the request names none.
        ended: whether it ended before a restart; failure: with what sentence, if it failed.
        size: bytes of its body.
    """

    name: str
    model: LiveModel
    seq: int
    request: Any
    seed: int = 0
    ended: bool = False
    failure: str | None = None
    size: int = 0

    @property
    def title(self) -> str:
        """Its name in a sentence."""
        return f"{self.name} (operation {self.seq})"

    @property
    def origin(self) -> str:
        """Its name among everything that is saved."""
        return f"{self.model.model_id}:{self.seq}"


@attrs.frozen
class Refused:
    """In the place of a request that was refused: it fails in its turn, with the same sentence."""

    model_id: str
    seq_id: int
    sentence: str


#: Operations that must run again after a restart to make a model what it was.
CHANGES_MODEL = frozenset({"CreateModel", "ForwardBackward", "OptimStep", "LoadWeights"})
