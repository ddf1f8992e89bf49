"""The memory and device of this machine, and what a base model would need. Loads no weights.

`python -m tinkex.engine.requirements DEVICE DTYPE [MODEL]` prints it as JSON, for `tinkex doctor`.
"""

from __future__ import annotations

import json
import platform
import sys

import attrs
import torch

from tinkex.engine import cpu_kernels, loading, lora, memory, training_pass
from tinkex.engine.cpu_parallel import available_cores
from tinkex.engine.memory import gigabytes

#: Assumed rank of the adapter: the default of `tinkex train`.
RANK = 32

#: Float32 numbers for each parameter of an adapter: itself, its gradient, two moments of AdamW.
_PER_PARAMETER = 4 * torch.float32.itemsize


@attrs.frozen
class Device:
    """What the engine computes with.

    Attributes:
        name: as torch names it.
        hardware: the processor and its threads, or the accelerator.
        dtype: of base weights.
        total, free: bytes of memory.
    """

    name: str
    hardware: str
    dtype: str
    total: int
    free: int
    decoding: str

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.hardware}), base weights in {self.dtype}; "
            f"{gigabytes(self.free)} of {gigabytes(self.total)} memory are free; {self.decoding}"
        )


@attrs.frozen
class Requirements:
    """What a base model would take on a device. Sizes are in bytes.

    Attributes:
        architecture: its class in transformers.
        path: "fast" (hand-written passes) or "generic" (modules of transformers).
        dtype: of its weights.
        adapter: an adapter of rank `RANK` with gradient and optimizer.
        batch: activations of a micro-batch; None where they can only be measured.
        free: memory that is free now.
    """

    name: str
    architecture: str
    path: str
    dtype: str
    parameters: int
    weights: int
    adapter: int
    batch: int | None
    free: int

    @property
    def needed(self) -> int:
        return self.weights + self.adapter + (self.batch or 0)

    @property
    def advice(self) -> str:
        """What to do if it does not fit."""
        smaller = ""
        if self.dtype == "float32":
            smaller = f"use --dtype bfloat16 (weights of {gigabytes(self.weights // 2)}), or "
        return f"Free memory, {smaller}choose a smaller model."

    def __str__(self) -> str:
        batch = "" if self.batch is None else f", a batch {gigabytes(self.batch)}"
        return (
            f"{self.name}: {self.architecture} on the {self.path} path in {self.dtype}, "
            f"{self.parameters / 1e6:,.0f} million parameters. Weights need "
            f"{gigabytes(self.weights)}, an adapter of rank {RANK} with its optimizer "
            f"{gigabytes(self.adapter)}{batch}: {gigabytes(self.needed)} of the "
            f"{gigabytes(self.free)} that are free"
        )


def device(name: str = "auto", dtype: str = "auto") -> Device:
    """What the engine would compute with.

    Args:
        name, dtype: as `Engine` takes them.

    Raises:
        ValueError: If the device cannot be used or the dtype is unknown.
    """
    found = loading.device_of(name)
    return Device(
        str(found),
        _hardware(found),
        str(loading.dtype_of(dtype, found)).removeprefix("torch."),
        memory.total_memory(found),
        memory.available_memory(found),
        _decoding(found),
    )


def _decoding(device: torch.device) -> str:
    if device.type != "cpu":
        return "tokens are decoded by PyTorch"
    reason = cpu_kernels.why_not()
    return f"PyTorch decodes tokens: {reason}" if reason else "tokens are decoded by compiled code"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = available_cores()
    return f"{platform.machine()}, {cores} thread{'s' if cores != 1 else ''}"


def of(name: str, device_name: str = "auto", dtype_name: str = "auto") -> Requirements:
    """What a base model on this machine would need.

    Args:
        name: as `loading.load` takes it.

    Raises:
        ValueError: If the model is not on this machine or cannot be computed; the message has the
            reason.
    """
    target = loading.device_of(device_name)
    dtype = loading.dtype_of(dtype_name, target)
    outline = loading.outline(name)
    shape = lora.Shape(RANK, train_unembed=not outline.has_tied_head)
    batch = None
    if outline.activations is not None:
        per_token = outline.activations * dtype.itemsize
        tokens = training_pass.tokens_per_batch(target, per_token)
        batch = tokens * per_token
    return Requirements(
        name,
        outline.architecture,
        outline.path,
        str(dtype).removeprefix("torch."),
        outline.parameters,
        outline.parameters * dtype.itemsize,
        lora.Layout(outline.linears, shape).size * _PER_PARAMETER,
        batch,
        memory.available_memory(target),
    )


def main(device_name: str, dtype_name: str, name: str | None = None) -> int:
    """Print {"text", "advice", "details"} of the device, or of the model *name*.

    Returns:
        The exit status: 1 if it cannot be determined; the last line of stderr is the reason.
    """
    try:
        if name is None:
            here = device(device_name, dtype_name)
            answer = {"text": str(here), "advice": "", "details": attrs.asdict(here)}
        else:
            found = of(name, device_name, dtype_name)
            advice = "" if found.needed <= found.free else found.advice
            answer = {"text": str(found), "advice": advice, "details": attrs.asdict(found)}
    except ValueError as exc:
        print(" ".join(str(exc).split()), file=sys.stderr)
        return 1
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
