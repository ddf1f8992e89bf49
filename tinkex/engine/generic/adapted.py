"""LoRA in the modules of a transformers model: which matrices are adapted, and how they apply.

All linear layers of attention and MLP are adapted: torch's Linear and its subclasses, GPT-2's
Conv1D, and experts stacked in one parameter (experts, out, in). Routers are not. The adapted
modules call the `Linears` in use, in the forward and the backward pass; autograd does the rest.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinkex.engine.finished_lora import MixedLinears
from tinkex.engine.linears import Linear, Part
from tinkex.engine.lora import TrainedLinears

HEAD = "head"

#: Names of routers: modules beside experts that choose among them.
_ROUTER = re.compile(r"(?:^|_)(?:gate|router|wg)$")
_ATTENTION = re.compile(r"attn|attention|mixer", re.IGNORECASE)
_EXPERTS = re.compile(r"expert", re.IGNORECASE)

#: The matrices of the running pass.
InUse = TrainedLinears | MixedLinears


class Adapted:
    """A model whose linear layers can be adapted. Changes the modules of *model* permanently.

    Args:
        model: a causal language model of transformers, its parameters frozen.

    Attributes:
        model: the same model.
        linears: the matrices by key, including the head's.
        takes_positions: True if its forward takes position_ids.

    Raises:
        ValueError: If it has no layers or no head, or a layer that cannot be adapted.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._linears: InUse | None = None
        self._recompute = False
        self._hidden: Tensor | None = None
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)
        self.linears: dict[str, Linear] = {}
        for module, found in adaptable(model):
            self.linears |= found
            if any(linear.parameter for linear in found.values()):
                module.forward = self._with_experts(module, list(found))
            else:
                module.forward = self._apply_to(*found)
        self._take_head(*head_of(model))
        for _, layer in _layers(model):
            self._let_recompute(layer)

    def _apply_to(self, key: str) -> Callable[[Tensor], Tensor]:
        linear = self.linears[key]

        def forward(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            if self._linears is None:
                y = F.linear(rows, linear.weight, linear.bias)
            elif torch.is_grad_enabled():
                y = _Apply.apply(rows, self._anchor, self._linears, key)
            else:
                y = self._linears.forward(key, rows)
            return y.view(*x.shape[:-1], y.shape[-1])

        return forward

    def _with_experts(self, module: Any, keys: list[str]) -> Callable[..., Any]:
        """The forward of *module*, which reads its stacked parameters as attributes."""
        original = module.forward
        is_transposed = getattr(module, "is_transposed", False)
        own = {name: getattr(module, name) for name in (key.rpartition(".")[2] for key in keys)}
        for name, parameter in own.items():
            delattr(module, name)
            module.__dict__[name] = parameter

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._linears is None:
                return original(*args, **kwargs)
            for key, name in zip(keys, own):
                if torch.is_grad_enabled():
                    weight = _Stacked.apply(self._anchor, self._linears, key)
                else:
                    weight = self._linears.stacked(key)
                module.__dict__[name] = weight.transpose(1, 2) if is_transposed else weight
            try:
                return original(*args, **kwargs)
            finally:
                module.__dict__.update(own)

        return forward

    def _take_head(self, name: str, head: nn.Linear) -> None:
        """Replace the head's forward: store its input instead of computing logits."""
        self.linears[HEAD] = head_linear(name, head)

        def forward(x: Tensor) -> Tensor:
            if self._linears is None:
                return F.linear(x, head.weight, head.bias)
            self._hidden = x
            return x[..., :1]

        head.forward = forward

    def _let_recompute(self, layer: Any) -> None:
        original = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._recompute and torch.is_grad_enabled():
                return checkpoint(original, *args, use_reentrant=False, **kwargs)
            return original(*args, **kwargs)

        layer.forward = forward

    @contextmanager
    def using(self, linears: InUse, *, recompute: bool = False) -> Iterator[None]:
        """Compute with these matrices; *recompute* layers in the backward pass."""
        self._linears, self._recompute = linears, recompute
        try:
            yield
        finally:
            self._linears, self._recompute, self._hidden = None, False, None

    def take_hidden(self) -> Tensor:
        """(B, T, d) input of the head, stored since `using` began."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise RuntimeError("the model did not call the module of its head.")
        return hidden


class _Apply(torch.autograd.Function):
    """y = W x + scale B A x of one module; the adapter's gradients go to the `Linears`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, linears: TrainedLinears, key: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linears, ctx.key = linears, key
        return linears.forward(key, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = ctx.linears.backward(ctx.key, grads[0], x, wants_dx=ctx.needs_input_grad[0])
        return dx, None, None, None


class _Stacked(torch.autograd.Function):
    """W + scale B A of stacked experts (experts, out, in)."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, linears: TrainedLinears, key: str) -> Tensor:
        ctx.linears, ctx.key = linears, key
        return linears.stacked(key).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.linears.stacked_backward(ctx.key, grads[0])
        return None, None, None


def adaptable(model: Any) -> Iterator[tuple[Any, dict[str, Linear]]]:
    """The modules that can be adapted, each with its matrices by key: views of its parameters.

    Raises:
        ValueError: If there are none, or one computes something that cannot be adapted.
    """
    seen: set[int] = set()  # layers may share modules
    is_any = False
    for prefix, layer in _layers(model):
        for name, module in layer.named_modules():
            if id(module) in seen or _is_router(layer, name):
                continue
            seen.add(id(module))
            found = _matrices(f"{prefix}.{name}", name, module)
            is_any |= bool(found)
            if found:
                yield module, found
    if not is_any:
        raise ValueError("has no linear layers that could be adapted")


def _matrices(full: str, name: str, module: Any) -> dict[str, Linear]:
    """The matrices of a module, *name* in its layer and *full* in the model."""
    group = "attn" if _ATTENTION.search(name) else "mlp"
    is_conv1d = type(module).__name__ == "Conv1D"
    if isinstance(module, nn.Linear) or is_conv1d:
        weight = module.weight.T if is_conv1d else module.weight
        _check_plain(full, module, weight)
        return {full: Linear(weight, module.bias, (Part(full, 0, len(weight)),), group)}
    if not _EXPERTS.search(f"{name} {type(module).__name__}"):
        return {}
    found = {}
    stacked = [(n, p) for n, p in module.named_parameters(recurse=False) if p.dim() == 3]
    for i, (parameter, value) in enumerate(stacked):
        # PEFT wraps the module once for each parameter, the last one outermost.
        part = full + ".base_layer" * (len(stacked) - 1 - i)
        weight = value.transpose(1, 2) if getattr(module, "is_transposed", False) else value
        parts, key = (Part(part, 0, weight.shape[1]),), f"{full}.{parameter}"
        found[key] = Linear(weight, None, parts, group, parameter=key)
    return found


def head_of(model: Any) -> tuple[str, nn.Linear]:
    """Name and module of the head, which computes the logits.

    Raises:
        ValueError: If that is not a linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError("has no linear layer that computes its logits")
    return next(name for name, module in model.named_modules() if module is head), head


def head_linear(name: str, head: nn.Linear) -> Linear:
    """The matrix of the head."""
    return Linear(head.weight, head.bias, (Part(name, 0, len(head.weight)),), "unembed")


def _layers(model: Any) -> list[tuple[str, Any]]:
    """Names and modules of the model's layers: those of its longest list of modules."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError("has no list of layers")
    outermost = [
        (name, found)
        for name, found in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    return [(f"{name}.{i}", layer) for name, found in outermost for i, layer in enumerate(found)]


def _is_router(layer: Any, name: str) -> bool:
    """True if the module is a router, or part of one."""
    path = name.split(".")
    for i, part in enumerate(path):
        if _ROUTER.search(part):
            beside = layer.get_submodule(".".join(path[:i])).named_children()
            if any(_EXPERTS.search(child) for child, _ in beside):
                return True
    return False


def _check_plain(name: str, module: Any, weight: Tensor) -> None:
    """Check that a module computes W x + b and no more.

    Raises:
        ValueError: If a subclass computes something else.
    """
    if type(module).forward is nn.Linear.forward or weight.device.type == "meta":
        return
    x = torch.linspace(-1, 1, weight.shape[1], device=weight.device, dtype=weight.dtype)[None]
    with torch.no_grad():
        if not torch.allclose(module(x), F.linear(x, weight, module.bias), rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"has the module {name!r} of type {type(module).__name__}, which computes "
                "something else than a linear layer"
            )
