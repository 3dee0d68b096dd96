"""Fused LoRA over a frozen linear layer, 4-bit or plain: y = x W^T + bias + s (x A^T) B^T as one autograd function.

PEFT's own forward casts the activations to the adapters' float32, keeps both copies and x A^T for the backward, and clones
the result. This one casts the small adapters to the activations' dtype instead, keeps only x, and dequantises W again in the
backward. The adapters stay PEFT's float32 parameters, so its files and its switches (disable, merge) work as before.
"""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Product = Callable[..., torch.Tensor]


class _FusedLora(torch.autograd.Function):
    """Gradients for the inputs, A and B; W and bias are frozen, and held as a module so that no saved-tensor hook copies them.

    The layer's input x is inputs[0], or product(*inputs): then the inputs are kept and their product is made again in the
    backward pass (a gated MLP's product is a third of what its layer would keep).
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        base: Any,
        scaling: float,
        product: Product | None,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(A, B, *inputs)
        ctx.base, ctx.scaling, ctx.product = base, scaling, product
        x = inputs[0] if product is None else product(*inputs)
        rows = x.reshape(-1, x.shape[-1])  # (T, in)
        weight = _weight(base, x.dtype)  # (out, in)
        y = rows @ weight.t() if base.bias is None else torch.addmm(base.bias.to(x.dtype), rows, weight.t())
        del weight
        y.addmm_(rows @ A.to(x.dtype).t(), B.to(x.dtype).t(), alpha=scaling)
        return y  # (T, out), not in x's shape: torch forbids to change a view made in here in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        A, B, *inputs = ctx.saved_tensors
        needs_A, needs_B, _, _, _, *needs_inputs = ctx.needs_input_grad
        x = inputs[0]
        if ctx.product is not None:
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            with torch.enable_grad():
                x = ctx.product(*inputs)
        grad_x, grad_A, grad_B = _gradients(ctx, x.detach(), grad, A, B, needs=(any(needs_inputs), needs_A, needs_B))
        if ctx.product is None or grad_x is None:
            return grad_A, grad_B, None, None, None, grad_x, *(None for _ in inputs[1:])
        return grad_A, grad_B, None, None, None, *torch.autograd.grad(x, inputs, grad_x)


def _gradients(
    ctx: Any,
    x: torch.Tensor,
    grad: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    *,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, A and B, each only where it is needed."""
    needs_x, needs_A, needs_B = needs
    rows = x.reshape(-1, x.shape[-1])  # (T, in)
    low_A, grad_x, grad_A, grad_B = A.to(x.dtype), None, None, None
    with torch.autocast(x.device.type, enabled=False):
        if needs_B:
            # x A^T again: r / out of the layer's work, and nothing to keep.
            grad_B = (grad.t() @ (rows @ low_A.t())).to(B.dtype).mul_(ctx.scaling)
        if needs_A or needs_x:
            grad_low = grad @ B.to(x.dtype)  # (T, r)
        if needs_A:
            grad_A = (grad_low.t() @ rows).to(A.dtype).mul_(ctx.scaling)
        if needs_x:
            grad_x = grad @ _weight(ctx.base, x.dtype)
            grad_x = grad_x.addmm_(grad_low, low_A, alpha=ctx.scaling).view(x.shape)
    return grad_x, grad_A, grad_B


def fuse_lora(model: torch.nn.Module) -> int:
    """The number of LoRA layers of `model` whose forward is the fused one from now on.

    Served are PEFT's LoRA layers over a frozen bitsandbytes Linear4bit or torch.nn.Linear with one active adapter of plain
    LoRA: no dropout, no bias of its own, no variant (DoRA and others), not merged. All others keep PEFT's forward, and are
    not counted. A fused layer computes in its input's dtype (under autocast in autocast's), whatever dtype bitsandbytes
    was told to compute in; it goes back to PEFT's forward while its adapter is disabled, merged or otherwise not served.

    Args:
        model: a PEFT model; the forwards of its layers are replaced in place.
    """
    from peft.tuners.lora.bnb import Linear4bit
    from peft.tuners.lora.layer import Linear

    num_fused = 0
    for layer in model.modules():
        if type(layer) in (Linear, Linear4bit) and _served_adapter(layer) is not None:
            layer.forward = types.MethodType(_forward, layer)
            num_fused += 1
    return num_fused


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    adapter = None if args or kwargs else _served_adapter(layer)
    if adapter is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    return _apply(layer, adapter, None, x)


def _apply(layer: Any, adapter: str, product: Product | None, *inputs: torch.Tensor) -> Any:
    kind = inputs[0].device.type
    if torch.is_autocast_enabled(kind) and inputs[0].dtype != torch.float64:
        # As torch.amp.custom_fwd(cast_inputs=...) would, which wants the kind of device and the dtype beforehand.
        inputs = tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in inputs)
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    y = _FusedLora.apply(A, B, layer.base_layer, layer.scaling[adapter], product, *inputs)  # type: ignore[no-untyped-call]
    return y.view(*inputs[0].shape[:-1], B.shape[0])


def fuse_gated_mlps(model: torch.nn.Module, product: Product | None = None) -> int:
    """The number of gated MLPs, down(act(gate(x)) * up(x)), that from now on keep gate and up but not their product.

    Args:
        model: whose down projections were served by `fuse_lora`; the forwards of its MLPs are replaced in place.
        product: a kernel for act(gate) * up; the MLP's own activation and a product if None.
    """
    num_fused = 0
    for mlp in model.modules():
        if all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            mlp.forward = types.MethodType(partial(_gated_forward, product=product), mlp)
            num_fused += 1
    return num_fused


def _gated_forward(mlp: Any, x: torch.Tensor, *, product: Product | None) -> Any:
    multiply = product or (lambda gate, up: mlp.act_fn(gate) * up)
    gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
    adapter = _served_adapter(down) if hasattr(down, "lora_A") else None
    return down(multiply(gate, up)) if adapter is None else _apply(down, adapter, multiply, gate, up)


def _served_adapter(layer: Any) -> str | None:
    """The name of the layer's active adapter, None if the fused forward would not compute what PEFT's does.

    Asked in every forward, since PEFT's switches turn at any time; some 10 microseconds.
    """
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or not _is_frozen_linear(layer.base_layer):
        return None
    adapter: str = active[0]
    has_dropout = not isinstance(layer.lora_dropout[adapter], torch.nn.Identity)
    return None if has_dropout or layer.lora_bias[adapter] or adapter in layer.lora_variant else adapter


def _is_frozen_linear(base: Any) -> bool:
    from bitsandbytes.nn import Linear4bit

    if isinstance(base, Linear4bit):
        known = getattr(base.weight, "quant_state", None) is not None
    else:
        known = type(base) is torch.nn.Linear  # other subclasses may hold anything
    # bias="all" trains the base's biases; PEFT's forward has their gradient.
    return known and not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)


def _weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """W of shape (out, in), a temporary copy if the base is quantised; free it as soon as it was used."""
    weight: torch.Tensor = base.weight
    if type(base) is not torch.nn.Linear:
        import bitsandbytes.functional

        weight = bitsandbytes.functional.dequantize_4bit(weight, base.weight.quant_state)
    return weight.to(dtype)
