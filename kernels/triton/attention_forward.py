"""FlashAttention forward over packed documents, and what its backward shares with it.

Every program has one tile of one document: nothing is padded, and no mask of tokens by tokens exists anywhere. The
scores that a tile needs are a range of tokens, or of places along a list of blocks; only the tiles at the range's edges
are masked.

Shapes: P packed tokens (of all sequences), H query heads, K key/value heads (H a multiple of K), G = H / K, D head
size, N documents, M tiles.

Source: arXiv 2205.14135, 2307.08691.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from shardwright.kernels.block_sparse import BlockLists
from shardwright.kernels.triton.block_sparse import along, list_arguments, list_of, token_at
from shardwright.kernels.triton.config import Config, pick
from shardwright.kernels.triton.launch import cdiv, launch_kernel, next_power_of_2

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
NOTHING = tl.constexpr(torch.finfo(torch.float32).min)  # log-sum-exp of no keys: as good as -inf, and no NaN

CONFIGS = (
    Config(blocks={"BLOCK_M": 128, "BLOCK_N": 128}, num_warps=8, num_stages=2),
    Config(blocks={"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    Config(blocks={"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    Config(blocks={"BLOCK_M": 128, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    Config(blocks={"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2),
    Config(blocks={"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2),
)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Where the documents of a packed batch lie.

    Attributes:
        bounds: int32 [N + 1], first token of each document, and P. Documents may be empty.
        longest: tokens of the longest document, or more.
        tokens: P.
    """

    bounds: torch.Tensor
    longest: int
    tokens: int

    def tiles(self, block: int) -> torch.Tensor:
        """Return int32 [M, 3]: first token of every tile, first token of its document, and the token after that.

        M is what the host knows to be enough; what is left over lies after the last token.
        """
        documents = self.bounds.numel() - 1
        tiles = min(self.tokens // block + documents, documents * cdiv(self.longest, block))
        table = torch.empty((tiles, 3), dtype=torch.int32, device=self.bounds.device)
        launch_kernel(_tiles_kernel, (documents + 1,), self.bounds, table, documents, tiles, BLOCK=block, CHUNK=128)
        return table


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How scores are made, and which of them count.

    Attributes:
        scale: of the products of queries and keys, above 0.
        softcap: None, or the bound to which tanh draws the scaled products.
        causal: a token sees no later ones.
        window: a token sees itself and the `window - 1` before it; None: all. Only if causal.
        lists: the blocks of keys that a block of queries may see; None: all.
    """

    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    lists: BlockLists | None = None

    @property
    def block(self) -> int:
        """Tokens of a listed block, 0 without lists."""
        return 0 if self.lists is None else self.lists.block

    def arguments(self, dim: int) -> dict[str, Any]:
        """Return the arguments of a kernel that say so, for a head size."""
        cap = self.softcap
        return {
            "inner": 1.0 if cap is None else self.scale / cap,
            "factor": math.log2(math.e) * (self.scale if cap is None else cap),
            "window": self.window or 0,
            "DIM": dim,
            "WIDTH": width(dim),
            "CAUSAL": self.causal,
            "WINDOWED": self.window is not None,
            "CAPPED": cap is not None,
            "LISTED": self.block,
        }

    def key(self, dim: int) -> str:
        """Return the situation that a choice of a configuration is measured in, for a head size."""
        return f"head_dim={dim}" + (f" block={self.block}" if self.lists else "")


def width(dim: int) -> int:
    """Return to how many columns a head is padded inside a kernel."""
    return next_power_of_2(dim)


def adjacent_heads(x_PHD: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a kernel reads it: the heads of a token lie side by side, tokens a stride apart."""
    dim = x_PHD.shape[-1]
    return x_PHD if x_PHD.stride(2) == 1 and x_PHD.stride(1) == dim else x_PHD.contiguous()


@dataclass(frozen=True)
class Need:
    """What a configuration asks of a GPU: bytes of shared memory, and float32 accumulators of a thread."""

    shared_bytes: int
    accumulators: int


_MOST_ACCUMULATORS = 192  # of a thread's 255 registers
_RESERVE_BYTES = 2048  # of shared memory, for reductions between warps
_AMPERE_BYTES = 163 * 1024  # as much as a configuration may take on any GPU
ITEM_BYTES = 2  # of bfloat16 and float16


def fitting(
    configs: Sequence[Config], need: Callable[[Config], Need], shared_bytes: int = _AMPERE_BYTES, block: int = 0
) -> list[Config]:
    """Return the configurations that fit into registers and shared memory of a GPU, and into a listed block."""
    needs = [(c, need(c)) for c in configs if not any(block % tile for tile in c.blocks.values())]
    limit = min(shared_bytes, _AMPERE_BYTES) - _RESERVE_BYTES
    return [c for c, n in needs if n.shared_bytes <= limit and n.accumulators <= _MOST_ACCUMULATORS]


@cache
def shared_bytes(device: torch.device) -> int:
    """Return how much shared memory a program can have on a device."""
    if device.type != "cuda":
        return _AMPERE_BYTES
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]  # pyright: ignore[reportAttributeAccessIssue]


def need(config: Config, dim: int) -> Need:
    """Return what the forward asks: queries, every stage of keys and values; output and scores."""
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    rows = block_m + 2 * config.num_stages * block_n
    return Need(rows * width(dim) * ITEM_BYTES, block_m * (width(dim) + block_n) // (32 * config.num_warps))


def _config(dim: int, scores: Scores, device: torch.device) -> Config:
    def configs() -> list[Config]:
        return fitting(CONFIGS, lambda config: need(config, dim), shared_bytes(device), scores.block)

    return pick("attention_forward", scores.key(dim), configs, device)


def forward(
    q_PHD: torch.Tensor,
    k_PKD: torch.Tensor,
    v_PKD: torch.Tensor,
    documents: Documents,
    scores: Scores,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attended values [P, H, D], and float32 [H, P], the natural logarithm of the sum of exp(scores)."""
    tokens, heads, dim = q_PHD.shape
    config = config or _config(dim, scores, q_PHD.device)
    q, k, v = (adjacent_heads(x) for x in (q_PHD, k_PKD, v_PKD))
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    tiles = documents.tiles(config.blocks["BLOCK_M"])
    strides = (x.stride(0) for x in (q, k, v))
    launch_kernel(
        _forward_kernel,
        (len(tiles), heads),
        *(q, k, v, out, lse, tiles, *strides, tokens, heads // k.shape[1]),
        *list_arguments(scores.lists and scores.lists.keys),
        **scores.arguments(dim),
        **config.arguments,
    )
    return out, lse


@triton.jit
def _tiles_kernel(bounds, tiles, num_documents, num_tiles, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Write the tiles of one document, or, as the program after the last one, those that are left over."""
    document = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    first = 0
    for at in range(0, document, CHUNK):
        before = at + lanes < document
        start = tl.load(bounds + at + lanes, mask=before, other=0)
        end = tl.load(bounds + at + lanes + 1, mask=before, other=0)
        first += tl.sum(tl.cdiv(end - start, BLOCK), 0)
    start = tl.load(bounds + document)
    if document < num_documents:
        end = tl.load(bounds + document + 1)
        count = tl.cdiv(end - start, BLOCK)
    else:
        end = start
        count = num_tiles - first
    for at in range(0, count, CHUNK):
        index = at + lanes
        row = tiles + (first + index) * 3
        tl.store(row, start + index * BLOCK, mask=index < count)
        tl.store(row + 1, start, mask=index < count)
        tl.store(row + 2, end, mask=index < count)


@triton.jit
def read_tile(tiles, index):
    """Return the first token of a tile, the first of its document, and the token after that."""
    return tl.load(tiles + index * 3), tl.load(tiles + index * 3 + 1), tl.load(tiles + index * 3 + 2)


@triton.jit
def peel(first, last, bare_first, bare_last, BLOCK: tl.constexpr):
    """Return which of the blocks from `first` to `last` need no mask: those within the bare range, as a range."""
    begin = tl.minimum(first + tl.cdiv(tl.maximum(bare_first - first, 0), BLOCK) * BLOCK, last)
    end = tl.minimum(first + tl.maximum(bare_last - first, 0) // BLOCK * BLOCK, last)
    return begin, tl.maximum(begin, end)


@triton.jit
def key_range(begin, start, end, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the keys that a tile of queries sees, as a range, and the range that all of its queries see."""
    stop = tl.minimum(begin + BLOCK_M, end)
    first, last = start, end
    if CAUSAL:
        last = stop
    bare_first, bare_last = first, last
    if CAUSAL:
        bare_last = begin + 1
    if WINDOWED:
        first = tl.maximum(start, begin + 1 - window)
        bare_first = stop - window
    return first, last, bare_first, bare_last


@triton.jit
def seen(query, key, end, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Return which keys the queries of a document see; what lies after the document's end sees anything."""
    if CAUSAL:
        distance = query - key
        allowed = distance >= 0
        if WINDOWED:
            allowed = allowed & (distance < window)
    else:
        allowed = key < end
    return allowed


@triton.jit
def load_tile(  # noqa: PLR0913
    pointer,
    first,
    end,
    stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    CLIPPED: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):
    """Return the rows from `first`, [ROWS, WIDTH] or the transpose; zeros after DIM, and if clipped from `end` on."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    if TRANSPOSED:
        rows, columns = rows[None, :], columns[:, None]
    else:
        rows, columns = rows[:, None], columns[None, :]
    at = pointer + tl.cast(first, tl.int64) * stride + (rows * stride + columns)
    if CLIPPED:
        tile = tl.load(at, mask=(first + rows < end) & (columns < DIM), other=0.0)
    elif WIDTH != DIM:
        tile = tl.load(at, mask=columns < DIM, other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_tile(pointer, tile, first, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Write the rows before `end` of a tile, from row `first` on."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at = pointer + tl.cast(first, tl.int64) * stride + (rows * stride + columns)
    tl.store(at, tile.to(pointer.dtype.element_ty), mask=(first + rows < end) & (columns < DIM))


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent, without NaN from large values."""
    return 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1)


@triton.jit
def _attend(  # noqa: PLR0913
    acc,
    total,
    top,
    q,
    k,
    v,
    first,
    last,
    begin,
    start,
    end,
    k_stride,
    v_stride,
    row,
    window,
    factor,
    inner,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the keys from `first` to `last` to the weighted values, to the sum of weights, and to the highest score."""
    if LISTED:
        following = token_at(first, last, row, start, LISTED)
    for place in tl.range(first, last, BLOCK_N):
        at = place
        if LISTED:
            at = following
            following = token_at(place + BLOCK_N, last, row, start, LISTED)
        k_tile = load_tile(k, at, end, k_stride, BLOCK_N, WIDTH, DIM, MASKED, TRANSPOSED=True)
        scores = tl.dot(q, k_tile)
        if CAPPED:
            scores = tanh(scores * inner)
        if MASKED:
            query, key = begin + tl.arange(0, BLOCK_M)[:, None], at + tl.arange(0, BLOCK_N)[None, :]
            scores = tl.where(seen(query, key, end, window, CAUSAL, WINDOWED), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - higher[:, None])
        decay = tl.exp2(top - higher)
        total = total * decay + tl.sum(weights, 1)
        v_tile = load_tile(v, at, end, v_stride, BLOCK_N, WIDTH, DIM, MASKED)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * decay[:, None])
        top = higher
    return acc, total, top


@triton.jit
def _forward_kernel(  # noqa: PLR0913
    q,
    k,
    v,
    out,
    lse,
    tiles,
    q_stride,
    k_stride,
    v_stride,
    tokens,
    group,
    lists,
    list_head,
    list_block,
    window,
    factor,
    inner,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend from one tile of queries of one head; the last tiles of documents first, as they have most to do."""
    head = tl.program_id(1)
    begin, start, end = read_tile(tiles, tl.num_programs(0) - 1 - tl.program_id(0))
    if begin >= end:
        return
    k += head // group * DIM
    v += head // group * DIM
    q_tile = load_tile(q + head * DIM, begin, end, q_stride, BLOCK_M, WIDTH, DIM, True)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], NOTHING, tl.float32)
    first, last, bare_first, bare_last = key_range(begin, start, end, window, CAUSAL, WINDOWED, BLOCK_M)
    row = tiles  # a pointer that is not read
    if LISTED:
        row = list_of(lists, list_head, list_block, head, (begin - start) // LISTED)
        first, last, bare_first, bare_last = along(row, start, first, last, bare_first, bare_last, LISTED, BLOCK_N)
    bare_first, bare_last = peel(first, last, bare_first, bare_last, BLOCK_N)
    if WINDOWED:
        acc, total, top = _attend(
            *(acc, total, top, q_tile, k, v, first, bare_first, begin, start, end, k_stride, v_stride, row),
            *(window, factor, inner, DIM, WIDTH, CAUSAL, WINDOWED, CAPPED, LISTED, BLOCK_M, BLOCK_N, True),
        )
    acc, total, top = _attend(
        *(acc, total, top, q_tile, k, v, bare_first, bare_last, begin, start, end, k_stride, v_stride, row),
        *(window, factor, inner, DIM, WIDTH, CAUSAL, WINDOWED, CAPPED, LISTED, BLOCK_M, BLOCK_N, False),
    )
    acc, total, top = _attend(
        *(acc, total, top, q_tile, k, v, bare_last, last, begin, start, end, k_stride, v_stride, row),
        *(window, factor, inner, DIM, WIDTH, CAUSAL, WINDOWED, CAPPED, LISTED, BLOCK_M, BLOCK_N, True),
    )
    if LISTED:
        top = tl.where(total == 0, float("-inf"), top)
    total = tl.where(total == 0, 1.0, total)  # of rows after the end of the document, or that see no listed key
    rows = begin + tl.arange(0, BLOCK_M)
    tl.store(lse + tl.cast(head, tl.int64) * tokens + rows, (top + tl.log2(total)) * LN2, mask=rows < end)
    acc = acc / total[:, None]
    store_tile(out + head * DIM, acc, begin, end, tl.num_programs(1) * DIM, BLOCK_M, WIDTH, DIM)


_TABLE = torch.empty((4, 4, 5), dtype=torch.int32)
_LISTS = BlockLists(block=128, keys=_TABLE, queries=_TABLE)
VARIANTS = (
    ("causal", Scores(scale=0.1, softcap=None, causal=True, window=None), torch.bfloat16, 128),
    ("causal", Scores(scale=0.1, softcap=None, causal=True, window=None), torch.bfloat16, 64),
    ("causal", Scores(scale=0.1, softcap=None, causal=True, window=None), torch.bfloat16, 96),
    ("causal", Scores(scale=0.1, softcap=None, causal=True, window=None), torch.bfloat16, 256),
    ("causal", Scores(scale=0.1, softcap=None, causal=True, window=None), torch.float16, 128),
    ("full", Scores(scale=0.1, softcap=None, causal=False, window=None), torch.bfloat16, 128),
    ("window", Scores(scale=0.1, softcap=None, causal=True, window=1024), torch.bfloat16, 128),
    ("window softcap", Scores(scale=0.1, softcap=50.0, causal=True, window=1024), torch.bfloat16, 256),
    ("sparse causal", Scores(scale=0.1, softcap=None, causal=True, window=None, lists=_LISTS), torch.bfloat16, 128),
    ("sparse causal", Scores(scale=0.1, softcap=None, causal=True, window=None, lists=_LISTS), torch.bfloat16, 64),
    ("sparse full", Scores(scale=0.1, softcap=None, causal=False, window=None, lists=_LISTS), torch.bfloat16, 128),
    (
        "sparse window softcap",
        Scores(scale=0.1, softcap=50.0, causal=True, window=1024, lists=_LISTS),
        torch.bfloat16,
        256,
    ),
)


def tried(name: str, dtype: torch.dtype, configs: list[Config]) -> list[Config]:
    """Return the configurations to compile a variant in: all of the usual variants, the first of the others."""
    return configs if name in ("causal", "sparse causal") and dtype == torch.bfloat16 else configs[:1]


def compilations() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Yield label, kernel, arguments and keyword arguments of everything that a compiler should be tried on."""
    integers = torch.empty(16, dtype=torch.int32)
    yield "attention tiles", _tiles_kernel, (integers, integers, 16, 16), {"BLOCK": 128, "CHUNK": 128}
    for name, scores, dtype, dim in VARIANTS:
        x, lse = torch.empty(16, dtype=dtype), torch.empty(16)
        for config in tried(name, dtype, fitting(CONFIGS, lambda c, dim=dim: need(c, dim), block=scores.block)):
            label = f"attention forward {name} {str(dtype)[6:]} head_dim={dim} {describe(config)}"
            args = (x, x, x, x, lse, integers, 4096, 1024, 1024, 4096, 4)
            args += list_arguments(scores.lists and scores.lists.keys)
            yield label, _forward_kernel, args, {**scores.arguments(dim), **config.arguments}


def describe(config: Config) -> str:
    """Return a configuration in a few characters."""
    return f"{'x'.join(map(str, config.blocks.values()))} warps={config.num_warps} stages={config.num_stages}"
