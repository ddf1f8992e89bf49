"""The interface between a base model and the rest of the engine.

Engine, training pass, sampler and checkpoints know a base model by `BaseModel` alone. It is
implemented twice: by `fast_path`, for Llama-like families (packed sequences, a backward pass of our
own), and by `generic`, for every other causal language model (transformers' modules, autograd).

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
        """(N,) token ids of all sequences -> (N, d) what the head reads; *save* for `backward`."""

    def backward(self, dhidden: Tensor) -> None:
        """Take the adapter's gradients of all layers from dhidden (N, d); only once."""


@attrs.frozen(eq=False)
class Prompt:
    """A prompt to begin with.

    Attributes:
        tokens: (T,) int32.
        adapter: None for the bare base model.
        rows: numbers of the sequences that continue it, in groups that may share its keys and
            values. Empty if its next token is all that is wanted.
        share: whose samples they are; those of different shares take turns.
    """

    tokens: npt.NDArray[np.int32]
    adapter: Finished | None
    rows: Sequence[Sequence[int]] = ()
    share: Hashable = None


#: (numbers of prompts, what the head reads (T, d) at each of their tokens)
OnHidden = Callable[[Sequence[int], Sequence[Tensor]], None]


class PromptReader(Protocol):
    """A long prompt that is computed a piece at a time, so that others need not wait for all of it.

    If a method fails, neither it nor its `SamplingState` is used any more.
    """

    def read(self, count: int) -> Tensor:
        """The next *count* tokens -> (count, d) what the head reads at each."""

    def finish(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """After the last token: its sequences, in groups as in `Prompt`, join those that run.

        Returns:
            (V,) float32 logits of the token after the prompt.
        """


class PromptState(Protocol):
    """What is kept of the sequences that are being sampled, such as their keys and values: how it
    is filled by prompts.

    If a method fails, the state is used no more; the sampler makes another one.
    """

    def bytes_needed(self, prompt: int, samples: int, limit: int) -> int:
        """Memory that samples of one prompt may come to; all three in tokens or sequences."""

    def begin(self, prompts: Sequence[Prompt], on_hidden: OnHidden | None) -> Tensor:
        """Compute prompts -> (prompts, V) float32 logits of the token after each.

        Args:
            on_hidden: called for some prompts at a time, of all; None if it is not wanted.
        """

    def operations(self, start: int, stop: int) -> float:
        """Floating-point operations, about, to compute tokens start..stop of a prompt."""

    @property
    def reads_in_pieces(self) -> bool:
        """False if a prompt, however long, can only be computed whole, by `begin`."""

    def read(self, prompt: Prompt) -> PromptReader:
        """What computes a prompt in pieces; its sequences are named at the end only."""

    def remove(self, row: int) -> None:
        """Forget a sequence, if it is there."""

    def head(self, adapter: Finished | None, rows: int) -> Linears:
        """The matrix "head" with an adapter, for about so many rows at a time."""


class SamplingState(PromptState, Protocol):
    """A `PromptState` that gives the logits of one more token at a time."""

    def advance(
        self, tokens: Ints, positions: Ints, shares: Mapping[int, Hashable], *, in_turn: bool
    ) -> tuple[Ints, Tensor]:
        """Read one more token of every sequence -> (n,) its numbers, (n, V) float32 logits.

        *in_turn*, where that would take long, of those sequences only whose turn it is.

        Args:
            tokens, positions: by number of the sequence.
            shares: of each sequence; those of different shares take turns.
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
        """Of base weights and activations."""

    @property
    def logit_cap(self) -> float:
        """Logits are capped softly at +- this; 0 is no cap."""

    @property
    def linears(self) -> Mapping[str, Linear]:
        """The matrices that an adapter can change, by key. "head" turns (N, d) into logits, before
        the cap."""

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
        """An empty one."""
