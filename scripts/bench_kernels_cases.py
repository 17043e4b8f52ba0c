"""What the kernel benchmark measures: ops at the shapes of an 8B model, and who else implements them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardwright.kernels import (
    attention,
    embedding,
    linear,
    linear_cross_entropy,
    optimizer,
    rms_norm,
    rope,
    swiglu,
    vocabulary_statistics,
)
from shardwright.kernels.op import Candidate, Op, Situation, lacks_triton
from shardwright.kernels.optimizer import Hyper, Now, Part

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
    yield _embedding(16384 // shrink, 4096 // shrink, 128256 // shrink)
    yield from (_optimizer(kind, 10, shrink) for kind in ("adamw", "lamb"))
    yield _cross_entropy(8192 // shrink, 128256 // shrink)
    yield _vocabulary_statistics(8192 // shrink, 16032 // shrink)
    yield _linear(16384 // shrink, 4096 // shrink, 14336 // shrink)
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


def _embedding(tokens: int, hidden: int, vocab: int) -> Case:
    """Ids as in text: the n-th most frequent is 1 / n as frequent as the first."""

    def inputs(device: torch.device) -> list[Any]:
        frequencies = 1 / torch.arange(1, vocab + 1, device=device)
        ids = torch.multinomial(frequencies, tokens, replacement=True)
        return [torch.randperm(vocab, device=device)[ids][None], _leaf(device, vocab, hidden)]

    row = 2 * hidden
    return Case(
        label=f"embedding {tokens} x {hidden} of {vocab}",
        op=embedding.OP,
        inputs=inputs,
        work={"forward": 2 * tokens * row, "backward": (tokens + vocab) * row},
    )


def _optimizer(kind: str, layers: int, shrink: int) -> Case:
    """What one of eight processes holds of so many layers of an 8B model; torch's fused kernel beside it."""
    matrices = [(rows // shrink, 4096) for rows in (512, 128, 128, 512, 1792, 1792, 1792)]
    shapes = layers * [*matrices, (512,), (512,)]

    def inputs(device: torch.device) -> list[Any]:
        names = ("param", "grad", "exp_avg", "exp_avg_sq")
        parts = [Part(**{name: torch.rand(shape, device=device) for name in names}) for shape in shapes]
        one = torch.ones((), device=device)
        now = Now(lr=1e-4, step=one, grad_scale=one, skip=one < 0)
        hyper = Hyper(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        return [parts, now, hyper, None if kind == "adamw" else lambda squares: squares]

    count = sum(math.prod(shape) for shape in shapes)
    return Case(
        label=f"{kind} {count} in {len(shapes)}",
        op=optimizer.OP,
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


def _vocabulary_statistics(tokens: int, vocab: int) -> Case:
    """An eighth of a vocabulary; the loss of the labels in it stands for what other processes add."""

    def wrap(statistics: Callable[..., Any]) -> Implementation:
        return lambda logits_Nv, labels_N: torch.sub(*statistics(logits_Nv, labels_N, 0)).sum()

    return Case(
        label=f"vocabulary_statistics {tokens} x {vocab}",
        op=_wrapped(vocabulary_statistics.OP, wrap),
        inputs=lambda device: [_leaf(device, tokens, vocab), torch.randint(8 * vocab, (tokens,), device=device)],
        work={"forward": 2 * tokens * vocab, "both": 6 * tokens * vocab},
    )


def _linear(tokens: int, depth: int, width: int) -> Case:
    return Case(
        label=f"linear {tokens} x {depth} x {width}",
        op=linear.OP,
        inputs=lambda device: [_leaf(device, tokens, depth), _leaf(device, width, depth)],
        work={"forward": 2 * tokens * depth * width, "backward": 4 * tokens * depth * width},
        unit=PRODUCT,
        sizes={"hidden_size": depth, "intermediate_size": width},
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
        op=_wrapped(replace(attention.OP, reference=attention.sdpa), lambda function: partial(function, window=window)),
        inputs=inputs,
        work={"forward": product, "backward": 2.5 * product},
        unit=PRODUCT,
        peers={"cudnn": lambda: _cudnn, "fa4": _fa4} if whole else {},
        sizes={"head_dim": head_dim},
    )


def _wrapped(op: Op, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Op:
    candidates = tuple(replace(candidate, function=wrap(candidate.function)) for candidate in op.candidates)
    return replace(op, reference=wrap(op.reference), candidates=candidates)


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
