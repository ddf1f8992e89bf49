"""The compiled decoding step of a base model: one call for all layers of one more token.

With PyTorch alone, a token of a model with 30 layers takes about 1,500 small operations, which take
longer than reading the weights. Knows the layout of `cpu_kernels.c`; does not know about requests.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tinkex.engine import cpu_kernels, int8
from tinkex.engine.attention import soft_cap_
from tinkex.engine.cpu_kernels import ACTIVATIONS, LAYER, MATRIX, STEP, THIN, TYPES, Array, Kernel
from tinkex.engine.finished_lora import Finished, MixedLinears, Stack
from tinkex.engine.kv_cache import SinglePool
from tinkex.engine.linears import Linear, Part
from tinkex.engine.lora import Factors
from tinkex.engine.model import Base, Forward, Norms, Rope
from tinkex.engine.spec import Spec

Ints = npt.NDArray[np.int64]

#: The fused matrices of a layer.
MATRICES = ("qkv", "o", "gate_up", "down")

#: Largest relative difference of a step from torch's, by the type of activations.
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05}

#: Floats in a cache line; rows of logits are an odd number of lines apart.
LINE = 16

#: Most norms of queries and keys in a layer.
HEAD_NORMS = 2


def step_of(base: Base) -> CompiledStep | None:
    """The compiled step of *base*; None if this machine or this model does not support it."""
    weights = [linear.weight for linear in base.linears.values()]
    is_simple = (
        base.device.type == "cpu"
        and len({weight.dtype for weight in weights}) == 1
        and weights[0].dtype in TYPES
        and base.dtype in TYPES
        and all(weight.is_contiguous() for weight in weights)
        and base.spec.activation in ACTIVATIONS
        and all(len(norms.heads) <= HEAD_NORMS for norms in base.norms)
    )
    kernel = cpu_kernels.load() if is_simple else None
    if kernel is None or not agrees_with_torch(kernel, weights[0].dtype, base.dtype):
        return None
    return CompiledStep(base, kernel)


@functools.cache
def agrees_with_torch(kernel: Kernel, weights: torch.dtype, dtype: torch.dtype) -> bool:
    """True if a step of a small random model agrees with torch.

    Guards against faulty compilers and emulated processors, because wrong tokens would go
    unnoticed.
    """
    base = _small_model(dtype)
    if weights == torch.int8:
        base = attrs.evolve(base, linears=int8.quantized(base.linears))
    pools = [SinglePool(base.spec, base.device, dtype) for _ in range(2)]
    lengths = [3, 40, 1, 17, 300]
    for pool in pools:
        generator = torch.Generator().manual_seed(2)
        for row, length in enumerate(lengths):
            pool.add(row, length)
            for layer in range(base.spec.layers):
                k, v = torch.randn(2, length, 2, base.spec.head_dim, generator=generator).to(dtype)
                pool.fill(layer, row, k, v)
        pool.begin_step()
    positions, numbers = torch.tensor(lengths), np.zeros(len(lengths), np.int64)
    x = base.embed(torch.arange(len(lengths)))
    actual = CompiledStep(base, kernel).logits(x, positions, pools[0].spans(), [None], numbers)
    expected = _by_torch(base, x, positions, pools[1])
    error = float((actual - expected).norm() / expected.norm())
    return cpu_kernels.is_close_enough("The compiled decoding step is", error, LARGEST_ERROR[dtype])


def _small_model(dtype: torch.dtype) -> Base:
    """Two layers of random numbers, of sizes that fill no vector."""
    spec = Spec(2, 40, 6, 2, 20, 36, 50, 512, 1e-5, windows=(0, 30))
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    linears = {}
    width, heads = spec.width, spec.heads * spec.head_dim
    for i in range(spec.layers):
        for name, rows, columns in (
            ("qkv", spec.qkv, width), ("o", width, heads),
            ("gate_up", 2 * spec.mlp, width), ("down", width, spec.mlp),
        ):  # fmt: skip
            part = Part(name, 0, rows)
            linears[f"{i}.{name}"] = Linear(random(rows, columns), None, (part,), "mlp")
    head = Part("head", 0, spec.vocab)
    linears["head"] = Linear(random(spec.vocab, width), None, (head,), "unembed")
    norms = tuple(Norms(1 + random(width), 1 + random(width)) for _ in range(spec.layers))
    ropes = (Rope(torch.tensor([1.0, 0.1, 0.01])),) * spec.layers
    return Base(spec, random(spec.vocab, width), norms, 1 + random(width), linears, ropes)


def _by_torch(base: Base, x: Tensor, positions: Tensor, pool: SinglePool) -> Tensor:
    """Logits (N, V) of one step of the bare model."""
    spec = base.spec
    linears = MixedLinears(base.linears, Stack([None]), np.zeros(len(x), np.int64))

    def attend(layer: int, qkv: Tensor) -> tuple[Tensor, object]:
        split = [spec.heads, spec.kv_heads, spec.kv_heads]
        q, k, v = qkv.view(len(qkv), -1, spec.head_dim).split(split, dim=1)
        return pool.attend(layer, q, k, v), None

    forward = Forward(base, linears, positions, int(positions.max()) + 1, attend)
    for i in range(spec.layers):
        x, _ = forward.layer(i, x)
    return linears.forward("head", base.finish(x)[0]).float()


class CompiledStep:
    """One more token of many sequences, each with its own adapter or none.

    Args:
        kernel: computes a step.
    """

    def __init__(self, base: Base, kernel: Kernel) -> None:
        self._base = base
        self._kernel = kernel
        self._kept: list[Tensor | Array | npt.NDArray[np.int64]] = []  # targets of pointers
        self._layers = np.zeros(base.spec.layers, LAYER)
        self._step = np.zeros(1, STEP)
        self._adapters: tuple[Finished | None, ...] = ()
        self._thin = np.zeros((0, 0), THIN)
        self._padded: weakref.WeakKeyDictionary[Finished, dict[str, Factors]]
        self._padded = weakref.WeakKeyDictionary()
        self._fill_sizes()
        for i, norms in enumerate(base.norms):
            self._fill_norms(self._layers[i], norms)
            self._layers[i]["window"] = base.spec.window(i)
            for name in MATRICES:
                self._layers[i][name] = self._matrix(base.linears[f"{i}.{name}"])
        self._step["head"] = self._matrix(base.linears["head"])
        self._step["final_norm"] = self._pointer(base.final_norm)

    def _fill_sizes(self) -> None:
        spec, step = self._base.spec, self._step
        step["layers"] = self._layers.ctypes.data
        for name in ("width", "heads", "kv_heads", "head_dim", "mlp", "scale", "interleaved"):
            step[name] = getattr(spec, name)
        step["depth"], step["eps"], step["cap"] = spec.layers, spec.norm_eps, spec.attention_cap
        step["residual"] = spec.residual_scale
        step["activation"] = ACTIVATIONS[spec.activation]
        step["weights"] = TYPES[self._base.linears["head"].weight.dtype]
        step["cache"] = TYPES[self._base.dtype]

    def _pointer(self, values: Tensor | None) -> int:
        """The address of float32 copies; 0 for None."""
        if values is None:
            return 0
        copy = values.detach().float().contiguous()
        self._kept.append(copy)
        return copy.data_ptr()

    def _fill_norms(self, layer: np.void, norms: Norms) -> None:
        for name in ("before_attention", "before_mlp", "after_attention", "after_mlp"):
            layer[name] = self._pointer(getattr(norms, name))
        for target, norm in zip(layer["heads"], norms.heads):
            size = norm.weight.shape[1]
            target["weight"], target["size"] = self._pointer(norm.weight), size
            target["start"], target["stop"] = norm.start, norm.stop

    def _matrix(self, linear: Linear) -> np.void:
        matrix: np.void = np.zeros(1, MATRIX)[0]
        ends = np.array([part.stop for part in linear.parts], np.int64)
        self._kept.append(ends)
        matrix["weight"] = linear.weight.data_ptr()
        matrix["scales"] = self._pointer(linear.scales)
        matrix["bias"] = self._pointer(linear.bias)
        matrix["ends"], matrix["parts"] = ends.ctypes.data, len(ends)
        matrix["rows"], matrix["columns"] = linear.weight.shape
        return matrix

    def logits(
        self,
        x: Tensor,
        positions: Tensor,
        spans: npt.NDArray[np.void],
        adapters: Sequence[Finished | None],
        numbers: Ints,
        wanted: Ints | None = None,
    ) -> Tensor:
        """Logits (M, V) float32 of the token after each sequence's last.

        The tokens of a prompt are sequences that share their keys and values, and differ in length.

        Args:
            x: (N, d) embedded last tokens.
            positions: (N,) of these tokens.
            spans: (N, 2) of `cpu_kernels.SPAN`: keys and values of a shared prompt, and the
                sequence's own including the last token, which are written.
            numbers: (N,) which of the *adapters* each sequence has; ascending.
            wanted: (M,) the sequences whose logits are wanted, ascending; None is all.
        """
        base, step = self._base, self._step
        wanted = np.arange(len(x)) if wanted is None else np.ascontiguousarray(wanted)
        x = x.float().clone(memory_format=torch.contiguous_format)
        vocab = len(base.linears["head"].weight)
        logits = torch.empty(len(wanted), (-(-vocab // LINE) | 1) * LINE)[:, :vocab]
        if tuple(adapters) != self._adapters:
            self._point_to(tuple(adapters))
        bounds, wanted_bounds = (
            np.searchsorted(own, np.arange(len(adapters) + 1)).astype(np.int64)
            for own in (numbers, numbers[wanted])
        )
        angles = self._turn(positions)
        spans = np.ascontiguousarray(spans)
        step["sequences"], step["adapters"] = spans.ctypes.data, bounds.ctypes.data
        step["wanted"], step["wanted_adapters"] = wanted.ctypes.data, wanted_bounds.ctypes.data
        step["x"], step["logits"] = x.data_ptr(), logits.data_ptr()
        step["ld_logits"] = logits.stride(0)
        step["count"], step["adapter_count"] = len(x), len(adapters)
        step["wanted_count"] = len(wanted)
        step["threads"] = torch.get_num_threads()
        self._kernel(step)
        del angles  # has been read
        return soft_cap_(logits, base.spec.logit_cap) if base.spec.logit_cap else logits

    def _turn(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Set the cosines and sines of each layer; return the tensors."""
        longest = int(positions.max()) + 1
        found: dict[Rope, tuple[Tensor, Tensor]] = {}
        for rope in self._base.ropes:
            if rope is not None and rope not in found:
                found[rope] = rope.at(positions, longest)
        for name, which in (("cosines", 0), ("sines", 1)):
            self._layers[name] = [
                0 if rope is None else found[rope][which].data_ptr() for rope in self._base.ropes
            ]
        self._layers["half"] = [
            0 if rope is None else found[rope][0].shape[-1] for rope in self._base.ropes
        ]
        return list(found.values())

    def _point_to(self, adapters: tuple[Finished | None, ...]) -> None:
        """Set *adapters*, whose indices are the sequences' numbers."""
        depth = self._base.spec.layers
        keys = [f"{i}.{name}" for i in range(depth) for name in MATRICES] + ["head"]
        thin = np.zeros((len(keys), len(adapters)), THIN)
        for row, key in zip(thin, keys):
            for target, adapter in zip(row, adapters):
                factors = None if adapter is None else self._whole_lines(adapter).get(key)
                if factors is not None:
                    target["a"], target["b"] = factors.a.data_ptr(), factors.b[0].data_ptr()
                    target["rank"] = factors.b[0].shape[1]
        starts = thin.ctypes.data + np.arange(len(keys), dtype=np.uintp) * thin.strides[0]
        for i, name in enumerate(MATRICES):
            self._layers[name]["thin"] = starts[i : -1 : len(MATRICES)]
        self._step["head"]["thin"] = starts[-1]
        self._adapters, self._thin = adapters, thin

    def _whole_lines(self, adapter: Finished) -> dict[str, Factors]:
        """The matrices of an adapter, with ranks zero-padded to whole cache lines: partial vectors
        are slower than whole ones."""
        more = -adapter.rank % LINE
        if not more:
            return adapter.thin
        if adapter not in self._padded:
            padded = {}
            for key, factors in adapter.thin.items():
                b = F.pad(torch.cat(factors.b), (0, more)).split([len(part) for part in factors.b])
                a = factors.a.view(len(b), adapter.rank, -1)
                padded[key] = Factors(F.pad(a, (0, 0, 0, more)).flatten(0, 1), b)
            self._padded[adapter] = padded
        return self._padded[adapter]
