"""The fast path: a `model.Base` as the rest of the engine sees it, and its sampling state.

Prompts are packed and computed by all workers; then the sequences of all adapters decode together.
Does not know about requests.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Protocol

import attrs
import numpy as np
import torch
from torch import Tensor

from tinkex.engine.attention import PackedAttention, Packing, attention
from tinkex.engine.base_model import Ints, OnHidden, Prompt
from tinkex.engine.cpu_decoding import CompiledStep
from tinkex.engine.cpu_kernels import SPAN
from tinkex.engine.cpu_parallel import Workers
from tinkex.engine.finished_lora import Finished, MixedLinears, Stack
from tinkex.engine.kv_cache import Cache
from tinkex.engine.linears import Linears
from tinkex.engine.lm_head import head_logits
from tinkex.engine.lora import Workspace, can_merge
from tinkex.engine.memory import kind_of
from tinkex.engine.model import Attend, Base, Forward, Training
from tinkex.engine.sample_pools import Pool, Pools
from tinkex.engine.sample_turns import STEP_BYTES, matrix_operations

#: An adapter with at least this many rows is merged into copies of the matrices.
MERGE_ROWS = 16

#: Prompts of up to this many tokens together are read by the compiled step, unless the squares of
#: their lengths have a larger sum than `COMPILED_SQUARES`: PyTorch's attention is faster then, and
#: its products of more tokens in float32.
COMPILED_TOKENS = 384
COMPILED_SQUARES = 192**2


@attrs.frozen(eq=False)
class FastModel(Base):
    """A Llama-like model with hand-written passes. Implements `base_model.BaseModel`."""

    @property
    def vocab(self) -> int:
        return self.spec.vocab

    @property
    def context(self) -> int:
        return self.spec.context

    @property
    def width(self) -> int:
        return self.spec.width

    @property
    def eos_tokens(self) -> tuple[int, ...]:
        return self.spec.eos_tokens

    @property
    def logit_cap(self) -> float:
        return self.spec.logit_cap

    @property
    def activation_bytes(self) -> int:
        spec = self.spec
        attention = 2 * spec.qkv + 2 * spec.heads * spec.head_dim
        per_layer = 2 * spec.width + attention + 2 * spec.mlp
        ends = [end for norms in self.norms for end in (norms.after_attention, norms.after_mlp)]
        into_ends = sum(end is not None for end in ends) * spec.width
        return (spec.layers * per_layer + into_ends) * self.dtype.itemsize

    @property
    def is_shared(self) -> bool:
        return True

    def training_batch(
        self, linears: Linears, lengths: Sequence[int], *, recompute: bool
    ) -> Training:
        return Training(self, linears, Packing(lengths, self.device), recompute=recompute)

    def sampling_state(self, workers: Workers) -> FastSampling:
        return FastSampling(self, workers)


class Fillable(Protocol):
    """Keeps keys and values of sequences."""

    def fill(self, layer: int, place: int, k: Tensor, v: Tensor, /) -> None:
        """Write a prompt's keys and values, (T, G, D) each, to a place."""

    def fill_layers(self, place: int, k: Tensor, v: Tensor, /) -> None:
        """The same of all layers, (layers, G, T, D) each."""


class Store(Protocol):
    """Where the keys and values of all sequences are."""

    def add(self, rows: Sequence[int], prompt_length: int) -> tuple[Fillable, int]:
        """Make room for samples of one prompt; return their cache, and the place to fill."""

    def remove(self, row: int) -> None:
        """Drop a sample, if it is there."""


class FastSampling:
    """Keys and values of the running sequences, in pools. Implements `SamplingState`.

    Args:
        store: keeps the keys and values instead of the pools, for callers that do not use
            `advance`.
        compiled: computes the steps of `advance`; None is PyTorch.
    """

    def __init__(
        self,
        base: Base,
        workers: Workers,
        store: Store | None = None,
        compiled: CompiledStep | None = None,
    ) -> None:
        self._base = base
        self._compiled = compiled
        self._workers = workers
        step_bytes = max(STEP_BYTES[kind_of(base.device)], 2 * base.nbytes)
        self._token_operations = matrix_operations(base.linears)
        self._pools = Pools(base.spec, base.device, base.dtype, step_bytes)
        self._store = self._pools if store is None else store
        self._adapter: dict[int, Finished | None] = {}  # of each sequence
        self._stack = Stack([None])
        self._workspace = Workspace() if can_merge(base.linears) else None

    def bytes_needed(self, prompt: int, samples: int, limit: int) -> int:
        spec = self._base.spec
        numbers = 2 * spec.layers * spec.kv_heads * spec.head_dim
        return (prompt + samples * limit) * numbers * self._base.dtype.itemsize

    def head(self, adapter: Finished | None, rows: int) -> MixedLinears:
        room = self._room(adapter, rows >= self._base.spec.width // 2)
        return MixedLinears(self._base.linears, Stack([adapter]), np.zeros(1, np.int64), room)

    # -- prompts -----------------------------------------------------------------------------

    def begin(self, prompts: Sequence[Prompt], on_hidden: OnHidden | None) -> Tensor:
        stack = self._stack_with([prompt.adapter for prompt in prompts])
        number = {adapter: i for i, adapter in enumerate(stack.adapters)}
        # By adapter, so that each is multiplied with once; then by length, for attention.
        keys = [
            (number[prompt.adapter], len(prompt.tokens), prompt.tokens.tobytes())
            for prompt in prompts
        ]
        order = sorted(range(len(prompts)), key=keys.__getitem__)
        ordered = [prompts[i] for i in order]
        adapters = np.array([number[prompt.adapter] for prompt in ordered])
        places = [self._places(prompt) for prompt in ordered]
        sizes = [len(prompt.tokens) for prompt in ordered]
        is_short = sum(sizes) <= COMPILED_TOKENS and np.square(sizes).sum() <= COMPILED_SQUARES
        if self._compiled is not None and on_hidden is None and is_short:
            logits = self._read_compiled(self._compiled, ordered, stack, adapters, places)
            return logits[torch.from_numpy(np.argsort(order))]
        room = None
        if len(stack.adapters) == 1:
            is_worth = sum(sizes) >= self._base.spec.width // 2
            room = self._room(stack.adapters[0], is_worth)
        portions = [list(range(len(ordered)))]
        if len(stack.adapters) == 1 or on_hidden is None:
            # Scores of several adapters use the workspace in turn.
            portions = self._workers.divide(sizes, adjacent=len(stack.adapters) > 1)
        if len(portions) > 1:
            MixedLinears(self._base.linears, stack, adapters, room).prepare()

        def compute(portion: list[int]) -> Tensor:
            packing = Packing([sizes[i] for i in portion], self._base.device)
            own = adapters[portion]
            linears = MixedLinears(self._base.linears, stack, own.repeat(packing.lengths), room)
            tokens = [ordered[i].tokens for i in portion]
            hidden = self._prefill(tokens, packing, [places[i] for i in portion], linears)
            if on_hidden is not None:
                on_hidden([order[i] for i in portion], hidden.split(packing.lengths))
            ends = torch.from_numpy(packing.starts + np.asarray(packing.lengths) - 1)
            head = MixedLinears(self._base.linears, stack, own)
            return head_logits(head, hidden[ends.to(hidden.device)], self._base.spec.logit_cap)

        logits = torch.cat(self._workers.run([partial(compute, portion) for portion in portions]))
        back = np.argsort(np.array(order)[np.concatenate(portions)])
        return logits[torch.from_numpy(back).to(logits.device)]

    def _read_compiled(
        self,
        compiled: CompiledStep,
        prompts: Sequence[Prompt],
        stack: Stack,
        adapters: Ints,
        places: Sequence[Sequence[tuple[Fillable, int]]],
    ) -> Tensor:
        """Logits (prompts, V) after short prompts, with each token as a separate sequence."""
        base, sizes = self._base, np.array([len(prompt.tokens) for prompt in prompts])
        cache = Cache(base.spec, base.device, base.dtype)
        cache.reserve(len(prompts), int(sizes.max()))
        which = np.repeat(np.arange(len(sizes)), sizes)
        ends = np.cumsum(sizes)
        within = np.arange(len(which)) - np.repeat(ends - sizes, sizes)
        spans = np.zeros((len(which), 2), SPAN)
        spans[:, 1] = cache.spans(which, within + 1)
        x = base.embed(torch.from_numpy(np.concatenate([prompt.tokens for prompt in prompts])))
        logits = compiled.logits(
            x, torch.from_numpy(within), spans, stack.adapters, adapters[which], ends - 1
        )
        for i, size in enumerate(sizes.tolist()):
            for pool, place in places[i]:
                pool.fill_layers(place, cache.k[:, i, :, :size], cache.v[:, i, :, :size])
        return logits

    def _stack_with(self, adapters: Sequence[Finished | None]) -> Stack:
        """The stack of the running adapters if it has all of *adapters*; else a new stack of just
        these, kept if no other adapter is running."""
        distinct = dict.fromkeys(adapters)
        if len(distinct) > 1 and distinct.keys() <= set(self._stack.adapters):
            return self._stack
        stack = Stack(list(distinct))
        if not self._adapter:
            self._stack = stack
        return stack

    def _places(self, prompt: Prompt) -> list[tuple[Fillable, int]]:
        """Where the keys and values of a prompt go: a place for each group of its sequences."""
        for rows in prompt.rows:
            self._adapter |= dict.fromkeys(rows, prompt.adapter)
        return [self._store.add(rows, len(prompt.tokens)) for rows in prompt.rows]

    def _prefill(
        self,
        prompts: Sequence[np.ndarray],
        packing: Packing,
        places: Sequence[Sequence[tuple[Fillable, int]]],
        linears: MixedLinears,
    ) -> Tensor:
        """Hidden states (N, d) of prompts; their keys and values go to their places."""
        base = self._base
        packed = PackedAttention(packing, base.spec, base.attention)
        keys = base.spec.heads * base.spec.head_dim
        values = keys + base.spec.kv_heads * base.spec.head_dim

        def attend(layer: int, qkv: Tensor) -> tuple[Tensor, object]:
            for i, start in enumerate(packing.starts):
                own = qkv[start : start + packing.lengths[i]]
                k = own[:, keys:values].view(len(own), -1, base.spec.head_dim)
                v = own[:, values:].view(len(own), -1, base.spec.head_dim)
                for pool, place in places[i]:
                    pool.fill(layer, place, k, v)
            return packed.forward(layer, qkv)

        tokens = torch.from_numpy(np.concatenate(prompts)).to(base.device)
        x = base.embed(tokens)
        forward = Forward(base, linears, packing.positions, packing.longest, attend)
        for i in range(base.spec.layers):
            x, _ = forward.layer(i, x)
        return base.finish(x)[0]

    def operations(self, start: int, stop: int) -> float:
        spec = self._base.spec
        of_products = 2.0 * spec.layers * spec.heads * spec.head_dim * (start + stop)
        return (stop - start) * (self._token_operations + of_products)

    @property
    def reads_in_pieces(self) -> bool:
        return True

    def read(self, prompt: Prompt) -> FastReader:
        return FastReader(self._base, prompt, self._linears_of, self._keep)

    def _linears_of(self, prompt: Prompt, count: int) -> MixedLinears:
        """The matrices for *count* tokens of a prompt that is read in pieces."""
        adapter = prompt.adapter
        # Merging costs as much as some hundreds of tokens, and makes running adapters merge again.
        is_alone = {adapter} == {adapter, *self._adapter.values()}
        is_worth = is_alone and len(prompt.tokens) >= self._base.spec.width // 2
        room = self._room(adapter, is_worth)
        return MixedLinears(self._base.linears, Stack([adapter]), np.zeros(count, np.int64), room)

    def _keep(self, prompt: Prompt, k: Tensor, v: Tensor) -> None:
        """Keys and values (layers, G, T, D) of a prompt go to the places of its sequences."""
        for pool, place in self._places(prompt):
            pool.fill_layers(place, k, v)

    # -- tokens ------------------------------------------------------------------------------

    def advance(
        self, tokens: Ints, positions: Ints, shares: Mapping[int, Hashable], *, in_turn: bool
    ) -> tuple[Ints, Tensor]:
        pools = self._pools.choose(shares, in_turn=in_turn)
        members = [pool.begin_step() for pool in pools]
        bounds = np.cumsum([0, *(len(m) for m in members)])
        rows = np.concatenate([np.array(m, np.int64) for m in members])
        adapters = self._numbers(rows)
        order = None
        if (np.diff(adapters) < 0).any():  # rows of one adapter side by side: one product
            order = np.argsort(adapters, kind="stable")
            rows, adapters = rows[order], adapters[order]
        base = self._base
        at = torch.from_numpy(positions[rows]).to(base.device)
        x = base.embed(torch.from_numpy(tokens[rows]).to(base.device))
        if self._compiled is not None:
            spans = np.concatenate([pool.spans() for pool in pools])
            spans = spans if order is None else spans[order]
            logits = self._compiled.logits(x, at, spans, self._stack.adapters, adapters)
        else:
            attend = self._attend_in(pools, bounds, order)
            logits = self._logits(x, at, int(positions[rows].max()) + 1, adapters, attend)
        for pool in pools:
            pool.end_step()
        return rows, logits

    def _attend_in(self, pools: Sequence[Pool], bounds: Ints, order: Ints | None) -> Attend:
        """Attention of rows, in an *order* that may not be that of the pools.

        Args:
            bounds: (pools + 1,) the first row of each, and their number.
        """
        spec = self._base.spec
        split = [spec.heads, spec.kv_heads, spec.kv_heads]
        to_pools = from_pools = None
        if order is not None:
            to_pools = torch.from_numpy(np.argsort(order)).to(self._base.device)
            from_pools = torch.from_numpy(order).to(self._base.device)

        def attend(layer: int, qkv: Tensor) -> tuple[Tensor, object]:
            own = qkv if to_pools is None else qkv.index_select(0, to_pools)
            heads = own.view(len(qkv), -1, spec.head_dim)
            outs = []
            for pool, start, stop in zip(pools, bounds, bounds[1:]):
                outs.append(pool.attend(layer, *heads[start:stop].split(split, dim=1)))
            out = outs[0] if len(outs) == 1 else torch.cat(outs)
            return (out if from_pools is None else out.index_select(0, from_pools)), None

        return attend

    def _logits(
        self, x: Tensor, positions: Tensor, longest: int, adapters: Ints, attend: Attend
    ) -> Tensor:
        """Logits (N, V) of embedded tokens (N, d)."""
        base = self._base
        single = self._stack.adapters[0] if len(self._stack.adapters) == 1 else None
        room = self._room(single, len(x) >= MERGE_ROWS)
        linears = MixedLinears(base.linears, self._stack, adapters, room)
        forward = Forward(base, linears, positions, longest, attend)
        for i in range(base.spec.layers):
            x, _ = forward.layer(i, x)
        return head_logits(linears, base.finish(x)[0], base.spec.logit_cap)

    def _numbers(self, rows: Ints) -> Ints:
        """Number of each row's adapter in the stack, which is rebuilt when the adapters change.

        Its order is kept as long as the adapters are the same, because stacking copies them all.
        """
        running = dict.fromkeys(self._adapter.values())
        if running.keys() != set(self._stack.adapters):
            self._stack = Stack(list(running))
        number = {adapter: i for i, adapter in enumerate(self._stack.adapters)}
        return np.array([number[self._adapter[row]] for row in rows.tolist()], np.int64)

    def _room(self, adapter: Finished | None, is_worth: bool) -> Workspace | None:
        """Where to merge an adapter, if merging pays or has been done already."""
        room = self._workspace
        return room if room is not None and (is_worth or room.belongs_to(adapter)) else None

    def adapter_of(self, row: int) -> Finished | None:
        """The adapter of a sequence."""
        return self._adapter[row]

    def remove(self, row: int) -> None:
        self._adapter.pop(row, None)
        self._store.remove(row)


class FastReader:
    """A prompt computed in pieces, with its keys and values so far. Implements `PromptReader`.

    Args:
        linears: (the prompt, tokens of a piece) -> the matrices with its adapter.
        keep: takes the prompt with its sequences, and its keys and values (layers, G, T, D).
    """

    def __init__(
        self,
        base: Base,
        prompt: Prompt,
        linears: Callable[[Prompt, int], MixedLinears],
        keep: Callable[[Prompt, Tensor, Tensor], None],
    ) -> None:
        self._base = base
        self._prompt = prompt
        self._linears = linears
        self._keep = keep
        spec, self._done = base.spec, 0
        size = spec.layers, spec.kv_heads, len(prompt.tokens), spec.head_dim
        self._k, self._v = (torch.empty(size, dtype=base.dtype, device=base.device) for _ in "kv")

    def read(self, count: int) -> Tensor:
        base, start = self._base, self._done
        stop = start + count
        ids = torch.from_numpy(self._prompt.tokens[start:stop]).to(base.device)
        positions = torch.arange(start, stop, device=base.device)
        forward = Forward(base, self._linears(self._prompt, count), positions, stop, self._attend)
        x = base.embed(ids)
        for i in range(base.spec.layers):
            x, _ = forward.layer(i, x)
        self._done = stop
        hidden = base.finish(x)[0]
        self._last = hidden[-1:]
        return hidden

    def _attend(self, layer: int, qkv: Tensor) -> tuple[Tensor, object]:
        """Keep the keys and values of a piece, and attend to all so far."""
        spec, own = self._base.spec, slice(self._done, self._done + len(qkv))
        heads = qkv.view(len(qkv), -1, spec.head_dim).transpose(0, 1)
        q, k, v = heads.split([spec.heads, spec.kv_heads, spec.kv_heads])
        self._k[layer, :, own], self._v[layer, :, own] = k, v
        k, v = (kept[layer : layer + 1, :, : own.stop] for kept in (self._k, self._v))
        settings = spec.scale, spec.attention_cap, spec.window(layer)
        out = attention(q.unsqueeze(0), k, v, *settings)
        return out[0].transpose(0, 1).reshape(len(qkv), -1), None

    def finish(self, rows: Sequence[Sequence[int]]) -> Tensor:
        if rows:
            self._keep(attrs.evolve(self._prompt, rows=rows), self._k, self._v)
        stack = Stack([self._prompt.adapter])
        head = MixedLinears(self._base.linears, stack, np.zeros(1, np.int64))
        return head_logits(head, self._last, self._base.spec.logit_cap)[0]
