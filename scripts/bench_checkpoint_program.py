"""What the checkpoint benchmark saves: a transformer's weights and AdamW moments, distributed as programs do."""

from __future__ import annotations

import argparse
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

AXES = ("replicate", "shard", "tensor")
WIDTHS = (4096, 1280, 256)
MIN_LAYERS = 8
VOCAB_PER_WIDTH = 25
BYTES_PER_PARAMETER = 12  # fp32: weight, exp_avg, exp_avg_sq
STAMPED_EVERY = 64
CHUNK_ELEMENTS = 2**20
NUM_UPDATES = 7.0
PLAN = {
    "blocks.*.query": ColwiseParallel(),
    "blocks.*.key": ColwiseParallel(),
    "blocks.*.value": ColwiseParallel(),
    "blocks.*.out": RowwiseParallel(),
    "blocks.*.up": ColwiseParallel(),
    "blocks.*.down": RowwiseParallel(),
    "head": ColwiseParallel(),
}


@dataclass(frozen=True)
class Layout:
    """Degrees of hybrid sharded data parallelism (FSDP2) and tensor parallelism; as text `shard2-tensor2`."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read `axisN-axisN`; an axis that is not named has degree 1.

        Raises:
            argparse.ArgumentTypeError: the text has another form.
        """
        degrees = re.findall(r"(\w+?)(\d+)(?:-|$)", text)
        if "-".join(map("".join, degrees)) != text or not set(dict(degrees)) <= set(AXES):
            raise argparse.ArgumentTypeError(
                f"layout {text!r} is no list of {', '.join(AXES)} with degrees; write e.g. shard2-tensor2"
            )
        return cls(**{axis: int(degree) for axis, degree in degrees})

    @property
    def num_processes(self) -> int:
        """Product of the degrees."""
        return self.replicate * self.shard * self.tensor

    def __str__(self) -> str:
        named = [f"{axis}{getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return "-".join(named) or "one process"


class Block(nn.Module):
    """The parameters of one transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)


class Transformer(nn.Module):
    """The parameters of a transformer, of which `gib` GiB go to weights and AdamW moments in fp32; it never runs."""

    def __init__(self, gib: float) -> None:
        super().__init__()
        parameters = gib * 2**30 / BYTES_PER_PARAMETER
        layers = {width: round(parameters / width**2 / 12 - 2 * VOCAB_PER_WIDTH / 12) for width in WIDTHS}
        width = next((width for width in WIDTHS if layers[width] >= MIN_LAYERS), WIDTHS[-1])
        self.embedding = nn.Embedding(VOCAB_PER_WIDTH * width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(max(1, layers[width])))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCAB_PER_WIDTH * width, bias=False)


class Program:
    """A distributed model and its optimizer, whose every element is a function of name, global index and generation.

    Linear layers are split by tensor parallelism (norms and the embedding are replicated over it), everything by FSDP2.

    Attributes:
        generation: counts the updates; one row in 64 of every tensor changes with each.
    """

    def __init__(self, layout: Layout, gib: float, device: torch.device) -> None:
        self.generation = 0
        degrees = tuple(getattr(layout, axis) for axis in AXES)
        mesh = init_device_mesh(device.type, degrees, mesh_dim_names=AXES)
        with torch.device("meta"):
            self.model = Transformer(gib)
        if layout.tensor > 1:
            parallelize_module(self.model, mesh["tensor"], dict(PLAN))
        if layout.replicate > 1:
            fully_shard(self.model, mesh=mesh["replicate", "shard"])
        elif layout.shard > 1:
            fully_shard(self.model, mesh=mesh["shard"])
        self.model.to_empty(device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        for parameter in self.model.parameters():
            moments = {key: torch.empty_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(NUM_UPDATES), **moments}
        self._write(every=1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return weights and moments by name, DTensors and plain tensors, sharing memory with their owners."""
        tensors: dict[str, torch.Tensor] = {f"model.{n}": t.detach() for n, t in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"optimizer.{name}.{key}"] = self.optimizer.state[parameter][key]
        return tensors

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def advance(self) -> None:
        """Do what a training step does to a checkpoint in the making: change the state in place."""
        self.generation += 1
        self._write(every=STAMPED_EVERY)

    def clear(self) -> None:
        """Set everything to zero, so that only a load can bring it back."""
        for _, local, _, _ in self._pieces():
            local.zero_()
        for state in self.optimizer.state.values():
            state["step"].zero_()

    def differing(self, generation: int) -> list[str]:
        """Return the names of tensors that are not, bit for bit, those of a generation (on this process)."""
        wrong = []
        for name, local, shape, offsets in self._pieces():
            rows = _Rows(name, shape, offsets, local, generation)
            if not all(torch.equal(actual, expected) for actual, expected in rows.compare()):
                wrong.append(name)
        steps: Any = [state["step"] for state in self.optimizer.state.values()]
        return wrong + ["optimizer.step"] * any(float(step) != NUM_UPDATES for step in steps)

    def _write(self, every: int) -> None:
        for name, local, shape, offsets in self._pieces():
            _Rows(name, shape, offsets, local, self.generation).write(every)

    def _pieces(self) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...], tuple[int, ...]]]:
        for name, tensor in self.tensors().items():
            local, shape, offsets = tensor, tuple(tensor.shape), (0,) * tensor.dim()
            if isinstance(tensor, DTensor):
                local = tensor.to_local()
                mesh, placements = tensor.device_mesh, tensor.placements
                offsets = tuple(compute_local_shape_and_global_offset(shape, mesh, placements)[1])
            yield name, local.detach(), shape, offsets


class _Rows:
    """The rows of one local tensor (a vector is one row), and what they are to hold."""

    def __init__(
        self, name: str, shape: tuple[int, ...], offsets: tuple[int, ...], local: torch.Tensor, generation: int
    ) -> None:
        self.first_row, first_column = (0, *offsets) if len(shape) == 1 else offsets
        self.bits_RC = local.view(torch.int32).view(-1, local.shape[-1]) if local.numel() else local.view(0, 0)
        self.width, self.seed, self.generation = shape[-1], zlib.crc32(name.encode()), generation
        self.columns_C = torch.arange(first_column, first_column + self.bits_RC.shape[1], device=local.device)

    def write(self, step: int) -> None:
        """Write the rows whose global index is a multiple of `step`."""
        start = -self.first_row % step
        for rows_RC, expected_RC in self._chunks(start, step):
            rows_RC.copy_(expected_RC)

    def compare(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield actual and expected bits."""
        return self._chunks(0, 1)

    def _chunks(self, start: int, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        num_rows, num_columns = self.bits_RC.shape
        count = step * max(1, CHUNK_ELEMENTS // max(1, num_columns))
        base_C = _wrap(self.columns_C * 2654435761)
        for first in range(start, num_rows, count):
            rows_RC = self.bits_RC[first : min(first + count, num_rows) : step]
            index_R = torch.arange(rows_RC.shape[0], device=rows_RC.device) * step + first + self.first_row
            stamp_R = torch.where(index_R % STAMPED_EVERY == 0, self.generation * 40503, 0)
            row_R = _wrap(index_R * self.width * 2654435761 % 2**32 + stamp_R + self.seed)
            # Sign and mantissa vary, the exponent is that of [0.5, 1): no NaN, no denormal.
            yield rows_RC, (base_C + row_R[:, None]) & -0x7F800001 | 0x3F000000


def _wrap(values: torch.Tensor) -> torch.Tensor:
    """Return 64-bit integers modulo 2**32 as signed 32-bit ones."""
    return ((values + 2**31) % 2**32 - 2**31).to(torch.int32)


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any process (collective)."""
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())
