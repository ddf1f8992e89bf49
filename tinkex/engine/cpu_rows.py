"""Operations on the rows of a batch in compiled code, on a CPU.

torch reads and writes all rows for each multiplication, of which a gated activation and its
derivative have ten. Knows the layout of `cpu_rows.c`; does not know about models.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from tinkex.engine import cpu_kernels
from tinkex.engine.cpu_kernels import (
    ACTIVATIONS,
    BLOCK_SUMS,
    GATE,
    NORM,
    ROTATION,
    WIDEST,
    Kernel,
)
from tinkex.engine.row_operations import TORCH_ROWS, RowOperations, TorchRows

#: Largest relative difference from torch's results in float32, by type.
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def rows_for(device: torch.device, dtype: torch.dtype) -> RowOperations:
    """Compiled operations, or torch's where they cannot be used.

    Compiles them if needed, which takes a second.
    """
    if device.type != "cpu" or dtype not in LARGEST_ERROR:
        return TORCH_ROWS
    load = cpu_kernels.load_rows
    gate, norm, rotate, sums = load("gate"), load("norm"), load("rotate"), load("block_sums")
    if gate is None or norm is None or rotate is None or sums is None:
        return TORCH_ROWS
    found = CompiledRows(gate, norm, rotate, sums)
    return found if agrees_with_torch(found, dtype) else TORCH_ROWS


class CompiledRows(TorchRows):
    """By compiled code; by torch what that does not support, such as rows with gaps."""

    def __init__(self, gate: Kernel, norm: Kernel, rotate: Kernel, block_sums: Kernel) -> None:
        self._gate, self._norm, self._rotate = gate, norm, rotate
        self._block_sums = block_sums

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not _is_simple(x, weight):
            return super().norm(x, weight, eps)
        out, rstd = torch.empty_like(x), torch.empty(len(x), 1)
        self._norm(_of_norm(x, weight, out, rstd, eps))
        return out, rstd

    def norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        if not _is_simple(x, weight):
            return super().norm_backward(dy, x, weight, rstd, plus)
        out, dy = torch.empty_like(x), dy.contiguous()
        arguments = _of_norm(x, weight, out, rstd, 0.0)
        arguments["dy"] = dy.data_ptr()
        if plus is not None:
            plus = plus.contiguous()
            arguments["plus"] = plus.data_ptr()
        self._norm(arguments)
        return out

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        if not _is_simple(gate_up, out):
            return super().gate(gate_up, activation)
        self._gate(_of_gate(gate_up, out, activation))
        return out

    def gate_backward(self, dact: Tensor, gate_up: Tensor, activation: str) -> Tensor:
        if not _is_simple(gate_up, dact):
            return super().gate_backward(dact, gate_up, activation)
        out, dact = torch.empty_like(gate_up), dact.contiguous()
        arguments = _of_gate(gate_up, out, activation)
        arguments["dact"] = dact.data_ptr()
        self._gate(arguments)
        return out

    def rotate_(
        self, heads: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, back: bool
    ) -> None:
        if not heads.is_cpu or heads.stride(2) != 1 or heads.stride(1) != heads.shape[2]:
            super().rotate_(heads, cos, sin, interleaved=interleaved, back=back)
            return
        cos, sin = cos.contiguous(), sin.contiguous()
        arguments = np.zeros(1, ROTATION)
        arguments["rows"] = heads.data_ptr()
        arguments["cosines"], arguments["sines"] = cos.data_ptr(), sin.data_ptr()
        arguments["count"], arguments["heads"], arguments["size"] = heads.shape
        arguments["ld"], arguments["half"] = heads.stride(0), cos.shape[-1]
        arguments["is_half"] = heads.dtype == torch.bfloat16
        arguments["interleaved"], arguments["back"] = interleaved, back
        arguments["threads"] = torch.get_num_threads()
        self._rotate(arguments)

    def block_sums(self, logits: Tensor, temperatures: Tensor, block: int) -> tuple[Tensor, Tensor]:
        if logits.stride(1) != 1:
            return super().block_sums(logits, temperatures, block)
        rows, columns = logits.shape
        temperatures = temperatures.contiguous()
        largest, sums = logits.new_empty(rows, 1), logits.new_empty(rows, -(-columns // block))
        arguments = np.zeros(1, BLOCK_SUMS)
        arguments["logits"], arguments["temperatures"] = logits.data_ptr(), temperatures.data_ptr()
        arguments["largest"], arguments["sums"] = largest.data_ptr(), sums.data_ptr()
        arguments["rows"], arguments["columns"] = rows, columns
        arguments["ld"], arguments["block"] = logits.stride(0), block
        arguments["threads"] = torch.get_num_threads()
        self._block_sums(arguments)
        return largest, sums


def _is_simple(x: Tensor, other: Tensor) -> bool:
    """True for the contiguous rows of a matrix, if vectors fill the last dimension of *other*."""
    return x.is_cpu and x.dim() == 2 and x.is_contiguous() and other.shape[-1] % WIDEST == 0


def _of_norm(x: Tensor, weight: Tensor, out: Tensor, rstd: Tensor, eps: float) -> cpu_kernels.Array:
    arguments = np.zeros(1, NORM)
    arguments["x"], arguments["weight"] = x.data_ptr(), weight.data_ptr()
    arguments["out"], arguments["rstd"] = out.data_ptr(), rstd.data_ptr()
    arguments["rows"], arguments["columns"] = x.shape
    arguments["is_half"] = x.dtype == torch.bfloat16
    arguments["weight_is_half"] = weight.dtype == torch.bfloat16
    arguments["threads"], arguments["eps"] = torch.get_num_threads(), eps
    return arguments


def _of_gate(gate_up: Tensor, out: Tensor, activation: str) -> cpu_kernels.Array:
    arguments = np.zeros(1, GATE)
    arguments["gate_up"], arguments["out"] = gate_up.data_ptr(), out.data_ptr()
    arguments["rows"], arguments["columns"] = len(gate_up), gate_up.shape[1] // 2
    arguments["is_half"] = gate_up.dtype == torch.bfloat16
    arguments["activation"] = ACTIVATIONS[activation]
    arguments["threads"] = torch.get_num_threads()
    return arguments


@functools.cache
def agrees_with_torch(rows: RowOperations, dtype: torch.dtype) -> bool:
    """True if the results for random inputs agree with torch's in float32.

    Guards against faulty compilers and emulated processors, because wrong numbers would go
    unnoticed.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = (7, 96), (7, 48), (7, 48), (48,), (7, 1, 8), (7, 1, 8)
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    pairs = zip(results(rows, drawn), results(TORCH_ROWS, [x.float() for x in drawn]))
    error = max(float((ours - exact).norm() / exact.norm()) for ours, exact in pairs)
    return cpu_kernels.is_close_enough(
        "Compiled operations on rows are", error, LARGEST_ERROR[dtype]
    )


def results(rows: RowOperations, drawn: list[Tensor]) -> list[Tensor]:
    """What every operation gives for wide (N, 2 M), dy, x (N, M), weight (M,), cos and sin."""
    wide, dy, x, weight, cos, sin = drawn
    normed, rstd = rows.norm(x, weight, 1e-5)
    found = [normed, rstd, rows.norm_backward(dy, x, weight, rstd, x)]
    for activation in ACTIVATIONS:
        found += [
            rows.gate(wide, activation), rows.gate_backward(dy.clone(), wide, activation)
        ]  # fmt: skip
    for interleaved in (False, True):
        for back in (False, True):
            heads = x.clone().view(len(x), -1, 24)
            rows.rotate_(heads, cos, sin, interleaved=interleaved, back=back)
            found.append(heads)
    return [*found, *rows.block_sums(x.float(), 1 + rstd.square(), 10)]
