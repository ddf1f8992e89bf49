"""A base model computed by the modules of transformers, as the rest of the engine sees it.

Sequences are computed in batches of similar length, padded on the right: in a causal model, no
token sees later ones, so padding changes nothing and needs no mask. Auxiliary router losses are not
trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from tinkex.engine.attention import Packing
from tinkex.engine.base_model import SamplingState
from tinkex.engine.cpu_parallel import Workers
from tinkex.engine.generic.adapted import HEAD, Adapted
from tinkex.engine.generic.sampling import GenericSampling, Recomputing
from tinkex.engine.linears import Linear
from tinkex.engine.lora import TrainedLinears


@attrs.frozen(eq=False)
class GenericModel:
    """A causal language model of transformers. Implements `base_model.BaseModel`.

    Attributes:
        adapted: the modules, which compute with the adapter in use.
        vocab, context, eos_tokens, logit_cap: as in `BaseModel`.
        logit_scale: factor on the head's input.
        activation_bytes: measured.
        position_bytes: bytes of one token in the cache; None if the model has no cache that
            sequences can join and leave, so that every token is computed from the whole text.
        sequence_bytes: bytes of a sequence in the cache besides those of its tokens.
        needs_equal_lengths: True if padding would change the cache.
        reads_in_pieces: True if a prompt can be computed in pieces.
    """

    adapted: Adapted
    vocab: int
    context: int
    eos_tokens: tuple[int, ...]
    logit_cap: float = 0.0
    logit_scale: float = 1.0
    activation_bytes: int = 1
    position_bytes: int | None = None
    sequence_bytes: int = 0
    needs_equal_lengths: bool = False
    reads_in_pieces: bool = False

    @property
    def width(self) -> int:
        return self.linears[HEAD].weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.linears[HEAD].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.linears[HEAD].weight.dtype

    @property
    def linears(self) -> Mapping[str, Linear]:
        return self.adapted.linears

    @property
    def has_tied_head(self) -> bool:
        embedding = self.adapted.model.get_input_embeddings().weight
        return bool(embedding is self.linears[HEAD].weight)

    @property
    def is_shared(self) -> bool:
        return False

    def training_batch(
        self, linears: Any, lengths: Sequence[int], *, recompute: bool
    ) -> GenericBatch:
        return GenericBatch(self, linears, lengths, recompute)

    def sampling_state(self, workers: Workers) -> SamplingState:
        if self.position_bytes is None:
            return Recomputing(self)
        return GenericSampling(self)

    def hidden(self, ids: Tensor, **inputs: Any) -> Tensor:
        """(B, T) token ids -> (B, T, d) hidden states. Call within `Adapted.using`."""
        self.adapted.model(input_ids=ids, return_dict=True, **inputs)
        hidden = self.adapted.take_hidden()
        return hidden if self.logit_scale == 1 else hidden * self.logit_scale

    def hidden_rows(self, tokens: Tensor, packing: Packing) -> Tensor:
        """(N,) token ids of packed sequences -> (N, d), in padded batches of similar length."""
        padded = packing.pad(tokens.long()[:, None]).squeeze(1)
        found = []
        for first, count, longest in packing.buckets:
            ids = padded[first : first + count * longest].view(count, longest)
            found.append(self.hidden(ids, use_cache=False).reshape(count * longest, -1))
        return packing.unpad(found[0] if len(found) == 1 else torch.cat(found))


class GenericBatch:
    """Forward and backward of a batch of training sequences. Implements `TrainingBatch`."""

    def __init__(
        self, base: GenericModel, linears: TrainedLinears, lengths: Sequence[int], recompute: bool
    ) -> None:
        self._base = base
        self._linears = linears
        self._packing = Packing(lengths, base.device)
        self._recompute = recompute
        self._graph: Tensor | None = None

    def forward(self, tokens: Tensor, *, save: bool) -> Tensor:
        with torch.set_grad_enabled(save), self._using():
            hidden = self._base.hidden_rows(tokens, self._packing)
        self._graph = hidden if save else None
        return hidden.detach()

    def backward(self, dhidden: Tensor) -> None:
        if self._graph is None:
            raise RuntimeError("backward() needs forward(save=True) before it.")
        graph, self._graph = self._graph, None
        if graph.requires_grad:
            with self._using():  # for recomputed layers
                torch.autograd.backward(graph, dhidden)

    def _using(self) -> Any:
        return self._base.adapted.using(self._linears, recompute=self._recompute)
