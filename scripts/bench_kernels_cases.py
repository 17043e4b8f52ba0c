"""What the kernel benchmark measures: ops at the shapes of an 8B model, and who else implements them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from shardwright.kernels import (
    attention,
    block_sparse,
    embedding,
    linear,
    linear_cross_entropy,
    optimizer,
    rms_norm,
    rope,
    swiglu,
    vocabulary_statistics,
)
from shardwright.kernels.block_sparse import BlockLists
from shardwright.kernels.op import Candidate, KernelError, Op, Situation, lacks_triton
from shardwright.kernels.optimizer import Hyper, Now, Part
from shardwright.scripts import bench_kernels_peers as peers
from shardwright.scripts.bench_kernels_peers import Implementation, Mask

Load = Callable[[], Implementation]
COPY, PRODUCT = "copy GB/s", "product TFLOP/s"


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op at a shape.

    Attributes:
        label: what it is called.
        family: of the cases that are drawn into one picture.
        op: whose implementations are measured; one of the benchmark's own where the program has none.
        inputs: makes the arguments on a device.
        work: direction (`forward`, `backward`, `both`) -> bytes that have to be read and written, or floating-point
            operations.
        unit: of the ceiling that the work is held against.
        peers: implementations of other packages by name, each loaded when it is needed.
        sizes: as `Situation` has them.
        length: tokens of a sequence, in families that are drawn over it.
        reference: whether it is measured too; attention's takes more memory than there is.
    """

    label: str
    family: str = "pointwise"
    op: Op
    inputs: Callable[[torch.device], list[Any]]
    work: Mapping[str, float]
    unit: str = COPY
    peers: Mapping[str, Load] = field(default_factory=dict)
    sizes: Mapping[str, int | None] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    length: int | None = None
    reference: bool = True

    def implementations(self, situation: Situation) -> dict[str, Load]:
        """Return what gives each implementation by name, or raises where it cannot run."""
        own = {candidate.name: partial(_load, candidate, situation) for candidate in self.op.candidates}
        return ({"reference": lambda: self.op.reference} if self.reference else {}) | own | dict(self.peers)

    def rate(self, direction: str, milliseconds: float) -> dict[str, Any]:
        """Return the rate in the unit of the ceiling."""
        scale = 1e9 if self.unit == COPY else 1e12
        return {"unit": self.unit, "rate": self.work[direction] / (milliseconds / 1e3) / scale}


def _load(candidate: Candidate, situation: Situation) -> Implementation:
    if refusal := candidate.unsupported(situation):
        raise KernelError(refusal)
    return candidate.function


def cases(*, small: bool) -> Iterator[Case]:
    """Yield all cases; `small` ones only show that everything runs."""
    shrink = 64 if small else 1
    yield from _norms(16384 // shrink, 4096 // shrink)
    yield _rope(16384 // shrink, max(32 // shrink, 2), max(8 // shrink, 1))
    yield from _gated(16384 // shrink, 14336 // shrink)
    yield _embedding(16384 // shrink, 4096 // shrink, 128256 // shrink)
    yield from (_optimizer(kind, 10, shrink) for kind in ("adamw", "lamb"))
    yield _cross_entropy(8192 // shrink, 128256 // shrink)
    yield _vocabulary_statistics(8192 // shrink, 16032 // shrink)
    yield _linear(16384 // shrink, 4096 // shrink, 14336 // shrink)
    yield _linear_cross_entropy(8192 // shrink, 4096 // shrink, 128256 // shrink)
    yield from _attentions(16384 // shrink, 2048 // min(shrink, 8))
    yield _block_sparse(16384 // min(shrink, 64), 16, 128, 0.25)


def _norms(tokens: int, hidden: int) -> Iterator[Case]:
    """RMSNorm as models have it, and the kernel's other forms."""
    numel = 2 * tokens * hidden
    matrix, vector = (lambda device: _leaf(device, tokens, hidden)), (lambda device: _leaf(device, hidden))
    work = {"forward": 2 * numel, "backward": 3 * numel}
    yield Case(
        label=f"rms_norm {tokens} x {hidden}",
        op=rms_norm.OP,
        inputs=lambda device: [matrix(device), vector(device), 1e-5],
        work=work,
        peers={
            "liger": peers.liger_rms_norm,
            "quack": peers.quack_rms_norm,
            "compiled": partial(peers.compiled, rms_norm.OP.reference),
        },
    )
    layer_norm = _own("layer_norm", _torch_layer_norm, "norm", "layer_norm")
    yield Case(
        label=f"layer_norm {tokens} x {hidden}",
        op=layer_norm,
        inputs=lambda device: [matrix(device), vector(device), vector(device), 1e-5],
        work=work,
        peers={"liger": peers.liger_layer_norm, "compiled": partial(peers.compiled, layer_norm.reference)},
    )
    work = {"forward": 4 * numel, "backward": 4 * numel}
    residual_rms = _own("residual_rms_norm", _plain_residual(rms_norm.native), "norm", "residual_rms_norm")
    yield Case(
        label=f"residual_rms_norm {tokens} x {hidden}",
        op=residual_rms,
        inputs=lambda device: [matrix(device), matrix(device), vector(device), 1e-5],
        work=work,
        peers={
            "liger": peers.liger_residual_rms_norm,
            "quack": peers.quack_residual_rms_norm,
            "compiled": partial(peers.compiled, residual_rms.reference),
        },
    )
    residual_layer = _own("residual_layer_norm", _plain_residual(_torch_layer_norm), "norm", "residual_layer_norm")
    yield Case(
        label=f"residual_layer_norm {tokens} x {hidden}",
        op=residual_layer,
        inputs=lambda device: [matrix(device), matrix(device), vector(device), vector(device), 1e-5],
        work=work,
        peers={"compiled": partial(peers.compiled, residual_layer.reference)},
    )


def _torch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _plain_residual(norm: Implementation) -> Implementation:
    def plain(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return norm(total, *rest), total

    return plain


def _rope(tokens: int, heads: int, kv_heads: int) -> Case:
    counts = heads, kv_heads
    numel = 2 * tokens * sum(counts) * 128
    return Case(
        label=f"rope {tokens} x {sum(counts) * 128}",
        op=rope.OP,
        inputs=lambda device: [*(_leaf(device, 1, tokens, n, 128) for n in counts), *_angles(device, tokens)],
        work={"forward": 2 * numel, "backward": 2 * numel},
        peers={
            "liger": peers.liger_rope,
            "quack": peers.quack_rope,
            "compiled": partial(peers.compiled, rope.OP.reference),
        },
    )


def _gated(tokens: int, wide: int) -> Iterator[Case]:
    geglu = _own(
        "geglu",
        lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        "gated",
        "geglu",
        approximate="tanh",
    )
    numel = 2 * tokens * wide
    for op, liger in ((swiglu.OP, peers.liger_swiglu), (geglu, peers.liger_geglu)):
        yield Case(
            label=f"{op.name} {tokens} x {wide}",
            op=op,
            inputs=lambda device: [_leaf(device, tokens, wide), _leaf(device, tokens, wide)],
            work={"forward": 3 * numel, "backward": 5 * numel},
            peers={"liger": liger, "compiled": partial(peers.compiled, op.reference)},
        )


def _block_sparse(tokens: int, heads: int, head_dim: int, kept: float) -> Case:
    """Causal attention over a part of the blocks of 128 x 128, drawn at random for each head, and the diagonal."""
    blocks = tokens // 128
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand((heads, blocks, blocks), generator=generator) < kept
    mask = (mask | torch.eye(blocks, dtype=torch.bool)).tril()

    def inputs(device: torch.device) -> list[Any]:
        lists = BlockLists.from_mask(mask.to(device), 128)
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        return [*(_leaf(device, 1, tokens, heads, head_dim) for _ in range(3)), bounds, tokens, lists]

    pairs = int(mask.sum()) * 128 * 128 - heads * blocks * 128 * 127 // 2
    product = 4 * pairs * head_dim
    return Case(
        label=f"block-sparse attention d{head_dim} 1 x {tokens} kept={kept:g}",
        family="attention block-sparse",
        op=_wrapped(block_sparse.OP, lambda function: lambda *args: function(*args)[0]),
        inputs=inputs,
        work={"forward": product, "backward": 2.5 * product},
        unit=PRODUCT,
        peers={"flex": peers.flex_blocks, "cudnn (dense)": partial(peers.cudnn, Mask())},
        sizes={"head_dim": head_dim},
        reference=False,
    )


def _own(name: str, reference: Implementation, module: str, function: str, **options: Any) -> Op:
    """Return an op that models do not choose an implementation of: a function of `kernels/triton` and plain torch."""

    def fused(*args: Any) -> Any:
        found = getattr(import_module(f"shardwright.kernels.triton.{module}"), function)  # needs triton
        return found(*args, **options)

    return Op(
        name=name,
        reference=reference,
        candidates=(Candidate(name="triton", function=fused, unsupported=lacks_triton),),
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
        peers={"liger": peers.liger_embedding},
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

    def plain(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_NV, labels_N, reduction="sum")

    op = _own("cross_entropy", plain, "cross_entropy", "cross_entropy")
    op = _wrapped(op, lambda function: lambda *args: function(*args)[0].sum())
    return Case(
        label=f"cross_entropy {tokens} x {vocab}",
        family="loss",
        op=replace(op, reference=plain),
        inputs=inputs,
        work={"forward": 2 * tokens * vocab, "both": 6 * tokens * vocab},
        peers={
            "liger": peers.liger_cross_entropy,
            "quack": peers.quack_cross_entropy,
            "compiled": partial(peers.compiled, plain),
        },
    )


def _vocabulary_statistics(tokens: int, vocab: int) -> Case:
    """An eighth of a vocabulary; the loss of the labels in it stands for what other processes add."""

    def wrap(statistics: Callable[..., Any]) -> Implementation:
        return lambda logits_Nv, labels_N: torch.sub(*statistics(logits_Nv, labels_N, 0)).sum()

    op = _wrapped(vocabulary_statistics.OP, wrap)
    return Case(
        label=f"vocabulary_statistics {tokens} x {vocab}",
        family="loss",
        op=op,
        inputs=lambda device: [_leaf(device, tokens, vocab), torch.randint(8 * vocab, (tokens,), device=device)],
        work={"forward": 2 * tokens * vocab, "both": 6 * tokens * vocab},
        peers={"compiled": partial(peers.compiled, op.reference)},
    )


def _linear(tokens: int, depth: int, width: int) -> Case:
    return Case(
        family="products",
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
        family="products",
        label=f"linear_cross_entropy {tokens} x {hidden} x {vocab}",
        op=linear_cross_entropy.OP,
        inputs=inputs,
        work={"both": 6 * tokens * hidden * vocab},
        unit=PRODUCT,
        peers={
            "products alone": peers.products,
            "liger": peers.liger_linear_cross_entropy,
            "quack": peers.quack_linear_cross_entropy,
        },
    )


def _attentions(total: int, width: int) -> Iterator[Case]:
    for mask in (Mask(), Mask(causal=False)):
        for head_dim in (128, 64):
            for parts in (1, 2, 4, 8):  # what is fastest at the first is kept for all
                yield _attention(total, total // parts, (width // head_dim, head_dim), mask, flex=parts in (4, 1))
    heads = (width // 128, 128)
    for mask in (Mask(window=total // 16), Mask(documents=8)):
        yield _attention(total, total, heads, mask)
    yield _attention(total, total // 2, heads, Mask(), groups=4)


def _attention(
    total: int, tokens: int, head_shape: tuple[int, int], mask: Mask, *, groups: int = 1, flex: bool = True
) -> Case:
    """Attention over `total` tokens in sequences of `tokens`, each packed with some documents.

    FlexAttention is compiled for every case anew, which takes longer than all else that is measured there.
    """
    (heads, head_dim), batch, length = head_shape, total // tokens, tokens // mask.documents
    counts = (heads, max(heads // groups, 1), max(heads // groups, 1))

    def inputs(device: torch.device) -> list[Any]:
        positions = torch.arange(length, device=device).repeat(mask.documents).expand(batch, -1).contiguous()
        bounds = torch.arange(0, total + 1, length, dtype=torch.int32, device=device)
        return [*(_leaf(device, batch, tokens, count, head_dim) for count in counts), positions, bounds, length]

    plain = mask.documents == 1 and mask.window is None
    product = 4 * (total // length) * _pairs(length, mask) * heads * head_dim
    label = f"attention{'' if mask.causal else ' full'} d{head_dim} {batch} x {tokens}"
    extra = {"documents": mask.documents, "window": mask.window, "groups": groups}
    over_length = plain and groups == 1
    return Case(
        label=label + "".join(f" {name}={value}" for name, value in extra.items() if value not in (None, 1)),
        family=("attention causal" if mask.causal else "attention full") if over_length else "attention masks",
        op=_wrapped(attention.OP, lambda function: partial(function, window=mask.window)) if mask.causal else _FULL,
        inputs=inputs,
        work={"forward": product, "backward": 2.5 * product},
        unit=PRODUCT,
        peers={
            **({"cudnn": partial(peers.cudnn, mask), "fa2": partial(peers.fa2, mask)} if plain else {}),
            "fa4": partial(peers.fa4, mask),
            **({"flex": partial(peers.flex, mask)} if flex else {}),
        },
        sizes={"head_dim": head_dim},
        length=tokens if over_length else None,
        reference=False,
    )


def _pairs(length: int, mask: Mask) -> float:
    """Return how many pairs of query and key a document of that length has."""
    if not mask.causal:
        return length**2
    hidden = max(length - (mask.window or length), 0)
    return (length * (length + 1) - hidden * (hidden + 1)) / 2


def _full(*args: Any, backend: str) -> torch.Tensor:
    function = import_module("shardwright.kernels.triton.attention").attention
    return function(*args[:3], *args[4:], causal=False, backend=backend)[0]


_FULL = Op(  # models are causal; the kernels do both
    name="attention_full",
    reference=attention.reference,
    candidates=tuple(
        replace(candidate, function=partial(_full, backend=candidate.name))
        for candidate in attention.OP.candidates
        if candidate.name in ("gluon", "triton")
    ),
)


def _wrapped(op: Op, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Op:
    candidates = tuple(replace(candidate, function=wrap(candidate.function)) for candidate in op.candidates)
    return replace(op, reference=wrap(op.reference), candidates=candidates)


def _leaf(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()


def _angles(device: torch.device, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(1, tokens, 64, device=device).repeat(1, 1, 2) * 2 * math.pi
    return angles.cos(), angles.sin()
