"""Saving and loading named states in memory, and a small model with all that a module may have."""

import json

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwright.checkpoint.box import Box, pieces_of
from shardwright.checkpoint.state import State, collect, restore


class Part:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = state


def snapshot(parts):
    """What a save would have written."""
    state = collect(parts)
    return State({n: t.detach().clone() for n, t in state.tensors.items()}, json.loads(as_text(state.values)))


def as_text(values):
    return json.dumps(values, allow_nan=False)


@torch.no_grad()
def load(parts, saved):
    """What a load would do."""
    state = collect(parts, saved.tensors.keys())
    for name, tensor in state.tensors.items():
        whole = whole_of(saved.tensors[name])
        for piece in pieces_of(tensor):
            piece.tensor.copy_(whole[piece.box.within(Box((0,) * whole.ndim, piece.shape))])
    state.values = saved.values
    restore(parts, state)


def whole_of(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(a, b):
    """Two snapshots are the same bit for bit."""
    assert a.values == b.values
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        mine, other = whole_of(tensor), whole_of(b.tensors[name])
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        assert torch.equal(mine.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.module(self.embed(ids))))


def make(model=Model, seed=0):
    torch.manual_seed(seed)
    return model()


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        ids = torch.randint(0, 11, (8,))
        loss = nn.functional.cross_entropy(model(ids), (ids + 1) % 11)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()
