"""The interface between a base model and the rest of the engine.

Engine, training pass, sampler and checkpoints use a base model only through `BaseModel`. It has two
implementations: `fast_path`, for Llama-like families (packed sequences, a hand-written backward
pass), and `generic`, for every other causal language model (transformers' modules, autograd).

Notation in comments: N tokens, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinkex.engine.cpu_parallel import Workers
from tinkex.engine.finished_lora import Finished
from tinkex.engine.linears import Linear, Linears

Ints = npt.NDArray[np.int64]


class TrainingBatch(Protocol):
    """Forward and backward pass of some sequences, without the head."""

    def forward(self, tokens: Tensor, *, save: bool) -> Tensor:
        """(N,) token ids of all sequences -> (N, d) hidden states; *save* for `backward`."""

    def backward(self, dhidden: Tensor) -> None:
        """Accumulate the adapter's gradients of all layers from dhidden (N, d). Call it once."""


@attrs.frozen(eq=False)
class Prompt:
    """A prompt to compute.

    Attributes:
        tokens: (T,) int32.
        adapter: None for the bare base model.
        rows: numbers of the sequences that continue it, in groups that may share its keys and
            values. Empty if only its next token is wanted.
        share: the share that its samples count towards; different shares take turns.
    """

    tokens: npt.NDArray[np.int32]
    adapter: Finished | None
    rows: Sequence[Sequence[int]] = ()
    share: Hashable = None


#: (numbers of prompts, hidden states (T, d) of each)
OnHidden = Callable[[Sequence[int], Sequence[Tensor]], None]


class PromptReader(Protocol):
    """A long prompt that is computed in pieces, so that other samples need not wait for all of it.

    If a method fails, the reader and its `SamplingState` must not be used again.
    """

    def read(self, count: int) -> Tensor:
        """Compute the next *count* tokens -> (count, d) hidden states."""

    def finish(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """After the last token: add its sequences, in groups as in `Prompt`, to the running ones.

        Returns:
            (V,) float32 logits of the token after the prompt.
        """


class PromptState(Protocol):
    """The state of the sequences being sampled, such as keys and values: how prompts fill it.

    If a method fails, the state must not be used again; the sampler makes a new one.
    """

    def bytes_needed(self, prompt: int, samples: int, limit: int) -> int:
        """Most memory that *samples* sequences of one prompt of *prompt* tokens may take, with up
        to *limit* tokens each."""

    def begin(self, prompts: Sequence[Prompt], on_hidden: OnHidden | None) -> Tensor:
        """Compute prompts -> (prompts, V) float32 logits of the token after each.

        Args:
            on_hidden: called with a few prompts at a time until all are covered; or None.
        """

    def operations(self, start: int, stop: int) -> float:
        """Approximate floating-point operations to compute tokens start..stop of a prompt."""

    @property
    def reads_in_pieces(self) -> bool:
        """False if a prompt, however long, can only be computed whole, by `begin`."""

    def read(self, prompt: Prompt) -> PromptReader:
        """A reader that computes a prompt in pieces; its sequences are given only to `finish`."""

    def remove(self, row: int) -> None:
        """Drop a sequence; nothing happens if it is not there."""

    def head(self, adapter: Finished | None, rows: int) -> Linears:
        """The matrix "head" with an adapter, for about *rows* rows at a time."""


class SamplingState(PromptState, Protocol):
    """A `PromptState` that gives the logits of one more token at a time."""

    def advance(
        self, tokens: Ints, positions: Ints, shares: Mapping[int, Hashable], *, in_turn: bool
    ) -> tuple[Ints, Tensor]:
        """Read one more token of every sequence -> (n,) sequence numbers, (n, V) float32 logits.

        If *in_turn* and a step over all would take long, only some sequences advance, in turn.

        Args:
            tokens, positions: indexed by the number of the sequence.
            shares: the share of each sequence; different shares take turns.
        """


class BaseModel(Protocol):
    """A frozen causal language model."""

    @property
    def vocab(self) -> int:
        """Token ids are below it."""

    @property
    def context(self) -> int:
        """Longest text, in tokens."""

    @property
    def width(self) -> int:
        """d, of what the head reads."""

    @property
    def eos_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of base weights and activations."""

    @property
    def logit_cap(self) -> float:
        """Soft cap of the logits, at +- this; 0 is no cap."""

    @property
    def linears(self) -> Mapping[str, Linear]:
        """The matrices that an adapter can change, by key. "head" gives logits (N, V),
        before the cap."""

    @property
    def has_tied_head(self) -> bool:
        """True if the head's matrix is the embedding."""

    @property
    def activation_bytes(self) -> int:
        """Bytes that all layers keep of one token for the backward pass."""

    @property
    def is_shared(self) -> bool:
        """True if several threads may compute batches at the same time."""

    def training_batch(
        self, linears: Linears, lengths: Sequence[int], *, recompute: bool
    ) -> TrainingBatch:
        """A batch of sequences of *lengths* tokens.

        Args:
            linears: the matrices, with the adapter that is trained.
            recompute: keep only each layer's input, and compute the layer again in the backward
                pass (for sequences too long to keep everything).
        """

    def sampling_state(self, workers: Workers) -> SamplingState:
        """A new, empty sampling state."""
