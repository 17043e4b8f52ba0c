"""Attention inside packed documents over listed blocks of keys.

Shapes: B sequences, T tokens, P = B * T, H query heads, K key/value heads (H a multiple of K), D head size; M blocks of
queries, N blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardwright.kernels import attention
from shardwright.kernels.attention import softmax_dtype, widen
from shardwright.kernels.op import Candidate, KernelError, Op

_SMALLEST = 64  # the largest tile that a kernel has for every head size


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockLists:
    """Which blocks of keys the queries of a block see, and the reverse; on the device, where the host never reads it.

    Blocks are counted from the start of a document, and so the same lists serve all documents of a batch.

    Attributes:
        block: tokens of a block.
        keys: int32 [H or 1, M, 1 + N], for each block of queries: how many blocks of keys it sees, then which they are,
            ascending; what follows means nothing. One head stands for all.
        queries: int32 [H or 1, N, 1 + M], for each block of keys: the blocks of queries that see it, written alike.

    Source: arXiv 2205.14135, algorithm 5.
    """

    block: int
    keys: torch.Tensor
    queries: torch.Tensor

    @classmethod
    def from_mask(cls, mask_HMN: torch.Tensor, block: int) -> BlockLists:
        """Return the lists of a mask, made on its device.

        Args:
            mask_HMN: bool [H or 1, M, N], whether a block of queries sees a block of keys.
            block: tokens of a block, a multiple of 64; with 128, larger tiles fit.

        Raises:
            KernelError: another mask or block.
        """
        if mask_HMN.dtype != torch.bool or mask_HMN.dim() != 3:
            raise KernelError(
                f"a mask of {str(mask_HMN.dtype)[6:]} {list(mask_HMN.shape)}: it must be bool, and "
                f"[heads or 1, query blocks, key blocks]; use mask.bool() or mask[None]"
            )
        if block < 1 or block % _SMALLEST:
            raise KernelError(f"block={block}: tiles must fit into it; use a multiple of {_SMALLEST}")
        return cls(block=block, keys=_listed(mask_HMN), queries=_listed(mask_HMN.transpose(1, 2)))

    def check(self, q_BTHD: torch.Tensor, longest: int) -> None:
        """Raise KernelError unless the lists are for such queries, in documents of up to so many tokens."""
        (list_heads, rows, _), columns, heads = self.keys.shape, self.queries.shape[1], q_BTHD.shape[2]
        covered = self.block * min(rows, columns)
        if longest > covered:
            raise KernelError(
                f"longest={longest}: a mask of {rows} x {columns} blocks of {self.block} tokens is for documents of "
                f"up to {covered}; make it larger"
            )
        if list_heads not in (1, heads):
            raise KernelError(f"a mask for {list_heads} heads, queries of {heads}: make it for 1 or {heads}")
        if self.keys.device != q_BTHD.device:
            raise KernelError(f"lists on {self.keys.device}, queries on {q_BTHD.device}: make them from a mask there")

    def mask(self) -> torch.Tensor:
        """Return the mask [H or 1, M, N] that the lists were made from."""
        count, index = self.keys[..., :1], self.keys[..., 1:]
        listed = torch.arange(index.shape[-1], device=index.device) < count
        return torch.zeros_like(listed).scatter(-1, index.long(), listed)


def _listed(mask_HMN: torch.Tensor) -> torch.Tensor:
    order = mask_HMN.to(torch.int8).sort(stable=True, dim=-1, descending=True).indices
    return torch.cat([mask_HMN.sum(-1, keepdim=True), order], -1).int()


def reference(  # noqa: PLR0913
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    lists: BlockLists,
    *,
    window: int | None = None,
    causal: bool = True,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend inside each document to the keys of listed blocks, with a mask of P * P booleans.

    Args:
        q_BTHD: queries.
        k_BTKD: keys; query head h reads key head h // (H / K).
        v_BTKD: values.
        bounds: int32 [documents + 1], first token of each document in the flattened batch, and P.
        longest: tokens of the longest document, or more; at most what the lists cover.
        lists: the blocks that may be seen; what follows holds inside them.
        window: a token sees itself and the `window - 1` before it; None: all before it.
        causal: False: a token sees all of its document.
        softcap: scores become softcap * tanh(scores / softcap); None: they stay.
        scale: of the products of queries and keys; None: 1 / sqrt(D).

    Returns:
        The attended values [B, T, H, D] in the dtype of the queries, and [B, T, H], the natural logarithm of the sum of
        exponentiated scores. A query that sees no key has zeros and -inf, and gives and gets no gradient.

    Raises:
        KernelError: lists that are too short for the documents, made for other heads, or on another device.
    """
    lists.check(q_BTHD, longest)
    groups = q_BTHD.shape[2] // k_BTKD.shape[2]
    q_HPD, k_KPD, v_KPD = (widen(x).flatten(0, 1).transpose(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD))
    k_HPD, v_HPD = (x.repeat_interleave(groups, dim=0) for x in (k_KPD, v_KPD))
    scores = (q_HPD @ k_HPD.transpose(1, 2)).to(softmax_dtype(q_HPD)) * (scale or q_BTHD.shape[-1] ** -0.5)
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    scores = scores.masked_fill(~_token_mask(bounds, q_HPD.shape[1], lists, window, causal), -torch.inf)
    lse_HP = scores.logsumexp(-1)
    weights = (scores - lse_HP.masked_fill(lse_HP == -torch.inf, 0)[..., None]).exp()
    out_HPD = weights.to(v_HPD.dtype) @ v_HPD
    lse_BTH = lse_HP.T.reshape(q_BTHD.shape[:3]).to(softmax_dtype(q_BTHD))
    return out_HPD.transpose(0, 1).reshape(q_BTHD.shape).to(q_BTHD.dtype), lse_BTH


def _token_mask(bounds: torch.Tensor, tokens: int, lists: BlockLists, window: int | None, causal: bool) -> torch.Tensor:
    token = torch.arange(tokens, device=bounds.device, dtype=bounds.dtype)
    document = torch.searchsorted(bounds, token, right=True) - 1
    block = (token - bounds[document]) // lists.block
    distance = token[:, None] - token
    seen = document[:, None] == document
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    return lists.mask()[:, block][:, :, block] & seen


def triton(q_BTHD, k_BTKD, v_BTKD, bounds, longest, lists, **options):
    """As `reference`, through this project's FlashAttention in Triton: work only for what is listed.

    Raises:
        KernelError: as `reference`, and for what the kernel cannot do.
    """
    from shardwright.kernels.triton.attention import attention  # needs triton, which may not be installed

    return attention(q_BTHD, k_BTKD, v_BTKD, bounds, longest, lists=lists, **options)


_DENSE = {candidate.name: candidate for candidate in attention.OP.candidates}

OP = Op(
    name="block_sparse_attention",
    reference=reference,
    candidates=(Candidate(name="triton", function=triton, unsupported=_DENSE["triton"].unsupported),),
)
