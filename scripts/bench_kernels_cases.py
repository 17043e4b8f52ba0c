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
from shardwright.kernels.op import Op, Situation

Implementation = Callable[..., torch.Tensor]
COPY, PRODUCT = "copy GB/s", "product TFLOP/s"


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op at a shape.

    Attributes:
        label: what it is called.
        op: whose implementations are measured.
        inputs: makes the arguments on a device.
        work: direction -> bytes that have to be read and written, or floating-point operations.
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
    yield from _loss(shrink)
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


def _loss(shrink: int) -> Iterator[Case]:
    tokens, hidden, vocab = 8192 // shrink, 4096 // shrink, 128256 // shrink

    def inputs(device: torch.device) -> list[Any]:
        labels = torch.randint(vocab, (1, tokens), device=device)
        return [_leaf(device, 1, tokens, hidden), _leaf(device, vocab, hidden), labels]

    product = 2 * tokens * hidden * vocab
    yield Case(
        label=f"linear_cross_entropy {tokens} x {hidden} x {vocab}",
        op=linear_cross_entropy.OP,
        inputs=inputs,
        work={"forward": product, "backward": 2 * product},
        unit=PRODUCT,
        peers={"liger": _liger_linear_cross_entropy},
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


def _liger_linear_cross_entropy() -> Implementation:
    module: Any = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction

    def loss(hidden_BTC: torch.Tensor, weight_VC: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        arguments = (None, None, -100, 0.0, 0.0, "sum")  # bias, class weights, ignored label, z-loss, smoothing, sum
        out = function.apply(hidden_BTC.flatten(0, 1), weight_VC, labels_BT.flatten(), *arguments)
        return out[0] if isinstance(out, tuple) else out

    return loss
