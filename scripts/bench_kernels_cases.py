"""What the kernel benchmark measures: ops at the shapes of an 8B model, and who else implements them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardwright.kernels import attention, linear_cross_entropy, rms_norm, rope, swiglu
from shardwright.kernels.op import Candidate, Op, Situation, lacks_triton

Implementation = Callable[..., torch.Tensor]
COPY, PRODUCT = "copy GB/s", "product TFLOP/s"


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op at a shape.

    Attributes:
        label: what it is called.
        op: whose implementations are measured.
        inputs: makes the arguments on a device.
        work: direction (`forward`, `backward`, `both`) -> bytes that have to be read and written, or floating-point
            operations.
        unit: of the ceiling that the work is held against.
        peers: implementations of other packages by name, each loaded when it is needed.
        sizes: as `Situation` has them.
    """

    label: str
    op: Op
    inputs: Callable[[torch.device], list[Any]]
    work: Mapping[str, float]
    unit: str = COPY
    peers: Mapping[str, Callable[[], Implementation]] = field(default_factory=dict)
    sizes: Mapping[str, int | None] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16

    def implementations(self, situation: Situation) -> Iterator[tuple[str, Implementation, str | None]]:
        """Yield name, function and why it cannot run, if so."""
        yield "reference", self.op.reference, None
        for candidate in self.op.candidates:
            yield candidate.name, candidate.function, candidate.unsupported(situation)
        for name, load in self.peers.items():
            try:
                yield name, load(), None
            except (ImportError, AttributeError) as error:
                yield name, self.op.reference, f"not installed: {error}"

    def rate(self, direction: str, milliseconds: float) -> dict[str, Any]:
        """Return the rate in the unit of the ceiling."""
        scale = 1e9 if self.unit == COPY else 1e12
        return {"unit": self.unit, "rate": self.work[direction] / (milliseconds / 1e3) / scale}


def cases(*, small: bool) -> Iterator[Case]:
    """Yield all cases; `small` ones only show that everything runs."""
    shrink = 64 if small else 1
    yield from _pointwise(shrink)
    yield _adamw(2**28 // shrink)
    yield _cross_entropy(8192 // shrink, 128256 // shrink)
    yield _linear_cross_entropy(8192 // shrink, 4096 // shrink, 128256 // shrink)
    for head_dim in (128, 64):
        for tokens in (2048, 4096, 8192, 16384):
            yield _attention(16384 // shrink, tokens // shrink, head_dim, documents=1)
    yield _attention(16384 // shrink, 16384 // shrink, 128, documents=1, window=1024 // shrink)
    yield _attention(16384 // shrink, 16384 // shrink, 128, documents=8)


def _pointwise(shrink: int) -> Iterator[Case]:
    tokens, hidden, wide = 16384 // shrink, 4096 // shrink, 14336 // shrink
    numel = 2 * tokens * hidden
    yield Case(
        label=f"rms_norm {tokens} x {hidden}",
        op=rms_norm.OP,
        inputs=lambda device: [_leaf(device, tokens, hidden), _leaf(device, hidden), 1e-5],
        work={"forward": 2 * numel, "backward": 3 * numel},
        peers={"liger": _liger_rms_norm},
    )
    numel = 2 * tokens * 32 * 128 // shrink
    yield Case(
        label=f"rope {tokens} x {32 * 128 // shrink}",
        op=rope.OP,
        inputs=lambda device: [_leaf(device, 1, tokens, max(32 // shrink, 1), 128), *_angles(device, tokens)],
        work={"forward": 2 * numel, "backward": 2 * numel},
    )
    numel = 2 * tokens * wide
    yield Case(
        label=f"swiglu {tokens} x {wide}",
        op=swiglu.OP,
        inputs=lambda device: [_leaf(device, tokens, wide), _leaf(device, tokens, wide)],
        work={"forward": 3 * numel, "backward": 5 * numel},
        peers={"liger": _liger_swiglu},
    )


def _adamw(count: int) -> Case:
    """One flat float32 shard; torch's fused step beside it."""

    def inputs(device: torch.device) -> list[Any]:
        return [torch.rand(count, device=device) for _ in range(4)]

    def reference(param, exp_avg, exp_avg_sq, grad):
        now = torch.ones((), device=param.device)
        options: dict[str, Any] = dict(
            amsgrad=False, maximize=False, lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8
        )
        torch._fused_adamw_([param], [grad], [exp_avg], [exp_avg_sq], [], [now], **options)
        return param

    def fused(param, exp_avg, exp_avg_sq, grad):
        from shardwright.kernels.triton.optimizer import Hyper, Scalars, Shard, adamw_

        now = torch.ones((), device=param.device)
        scalars = Scalars(lr=now, step=now, multiplier=now, skip=torch.zeros_like(now, dtype=torch.bool))
        shard = Shard(param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        adamw_(shard, grad, scalars, Hyper(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1))
        return param

    return Case(
        label=f"adamw {count}",
        op=Op(
            name="adamw",
            reference=reference,
            candidates=(Candidate(name="triton", function=fused, unsupported=lacks_triton),),
        ),
        inputs=inputs,
        work={"forward": 28 * count},
        dtype=torch.float32,
    )


def _cross_entropy(tokens: int, vocab: int) -> Case:
    def inputs(device: torch.device) -> list[Any]:
        return [_leaf(device, tokens, vocab), torch.randint(vocab, (tokens,), device=device)]

    def fused(logits_NV, labels_N):
        from shardwright.kernels.triton.cross_entropy import cross_entropy

        return cross_entropy(logits_NV, labels_N)[0].sum()

    return Case(
        label=f"cross_entropy {tokens} x {vocab}",
        op=Op(
            name="cross_entropy",
            reference=lambda logits_NV, labels_N: F.cross_entropy(logits_NV, labels_N, reduction="sum"),
            candidates=(Candidate(name="triton", function=fused, unsupported=lacks_triton),),
        ),
        inputs=inputs,
        work={"forward": 2 * tokens * vocab, "both": 6 * tokens * vocab},
        peers={"liger": _liger_cross_entropy},
    )


def _linear_cross_entropy(tokens: int, hidden: int, vocab: int) -> Case:
    def inputs(device: torch.device) -> list[Any]:
        labels = torch.randint(vocab, (1, tokens), device=device)
        return [_leaf(device, 1, tokens, hidden), _leaf(device, vocab, hidden), labels]

    return Case(
        label=f"linear_cross_entropy {tokens} x {hidden} x {vocab}",
        op=linear_cross_entropy.OP,
        inputs=inputs,
        work={"both": 6 * tokens * hidden * vocab},
        unit=PRODUCT,
        peers={"products alone": lambda: _products, "liger": _liger_linear_cross_entropy},
    )


def _attention(total: int, tokens: int, head_dim: int, *, documents: int, window: int | None = None) -> Case:
    """Causal attention over `total` tokens in sequences of `tokens`, each packed with some documents; 2048 wide."""
    heads, batch, length = 2048 // head_dim, total // tokens, tokens // documents

    def inputs(device: torch.device) -> list[Any]:
        positions = torch.arange(length, device=device).repeat(documents).expand(batch, -1).contiguous()
        bounds = torch.arange(0, total + 1, length, dtype=torch.int32, device=device)
        return [*(_leaf(device, batch, tokens, heads, head_dim) for _ in range(3)), positions, bounds, length]

    seen = length * (length + 1) / 2
    if window is not None and window < length:
        seen -= (length - window) * (length - window + 1) / 2
    product = 4 * (total // length) * seen * heads * head_dim
    whole = documents == 1 and window is None
    label = f"attention d{head_dim} {batch} x {tokens}" + (f" documents={documents}" if documents > 1 else "")
    return Case(
        label=label + (f" window={window}" if window else ""),
        op=Op(
            name="attention",
            reference=partial(attention.sdpa, window=window),
            candidates=tuple(
                type(c)(name=c.name, function=partial(c.function, window=window), unsupported=c.unsupported)
                for c in attention.OP.candidates
            ),
        ),
        inputs=inputs,
        work={"forward": product, "backward": 2.5 * product},
        unit=PRODUCT,
        peers={"cudnn": lambda: _cudnn, "fa4": _fa4} if whole else {},
        sizes={"head_dim": head_dim},
    )


def _leaf(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()


def _angles(device: torch.device, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(1, tokens, 64, device=device).repeat(1, 1, 2) * 2 * math.pi
    return angles.cos(), angles.sin()


def _cudnn(q_BTHD: torch.Tensor, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor, *_: object) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _fa4() -> Implementation:
    function: Any = importlib.import_module("flash_attn.cute.interface").flash_attn_func

    def attend(q_BTHD: torch.Tensor, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor, *_: object) -> torch.Tensor:
        out = function(q_BTHD, k_BTHD, v_BTHD, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _liger_rms_norm() -> Implementation:
    function: Any = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return lambda x, weight, eps: function.apply(x, weight, eps, 0.0, "llama", False)


def _liger_swiglu() -> Implementation:
    return importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply


class _Products(torch.autograd.Function):
    """The products of a linear layer, and nothing else: the floor of what is fused with them."""

    @staticmethod
    def forward(ctx: Any, hidden_BTC: torch.Tensor, weight_VC: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_BTC, weight_VC)
        return hidden_BTC @ weight_VC.T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # pyright: ignore
        hidden_BTC, weight_VC = ctx.saved_tensors
        return grad @ weight_VC, grad.flatten(0, 1).T @ hidden_BTC.flatten(0, 1)


def _products(hidden_BTC: torch.Tensor, weight_VC: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    return _Products.apply(hidden_BTC, weight_VC)  # pyright: ignore[reportReturnType]


def _liger_cross_entropy() -> Implementation:
    module: Any = importlib.import_module("liger_kernel.ops.cross_entropy")
    function = module.LigerCrossEntropyFunction

    def loss(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        return function.apply(logits_NV, labels_N, None, -100, 0.0, 0.0, "sum")[0]

    return loss


def _liger_linear_cross_entropy() -> Implementation:
    module: Any = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction

    def loss(hidden_BTC: torch.Tensor, weight_VC: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        arguments = (None, None, -100, 0.0, 0.0, "sum")  # bias, class weights, ignored label, z-loss, smoothing, sum
        out = function.apply(hidden_BTC.flatten(0, 1), weight_VC, labels_BT.flatten(), *arguments)
        return out[0] if isinstance(out, tuple) else out

    return loss
