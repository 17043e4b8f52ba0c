"""Parts of any PyTorch program to named tensors and values, and back."""

import json
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import fork, started_world
from support_state import Part, as_text, assert_same, load, make, snapshot
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DataParallel, DistributedDataParallel

from shardwright.checkpoint.box import FlatSlice
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.leaves import from_json, to_json
from shardwright.checkpoint.state import State, collect, restore

# ---- values


VALUES = [
    None,
    True,
    3,
    2**80,
    0.1,
    -0.0,
    float("inf"),
    float("-inf"),
    "x",
    [],
    {},
    [1, [2.5, None]],
    {"a": {"b": []}},
    {30: 1, 80: {"x": 2}},
    {None: 1, 2.5: 3, float("inf"): 4, True: 5},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_round_trip_through_strict_json(value):
    back = from_json(json.loads(as_text(to_json("v", value))))
    assert back == value and repr(back) == repr(value)


def test_nan_and_numpy_scalars_are_numbers():
    back = from_json(json.loads(as_text(to_json("v", [float("nan"), np.float32(0.1), np.int64(3), np.bool_(True)]))))
    assert np.isnan(back[0]) and back[1:] == [float(np.float32(0.1)), 3, True]
    assert [type(x) for x in back] == [float, float, int, bool]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [1, b"x"]}, r"^v\.a\.1 is a bytes"),
        ({"a": {"f": len}}, r"^v\.a\.f is a builtin_function"),
        ({1, 2}, "^v is a set"),
        (1j, "^v is a complex"),
        (np.zeros(2), "^v is a ndarray"),
        ({(1, 2): 3}, "^v is a dict"),
        ({"$float": "x"}, "^v is a dict"),
        (torch.finfo(torch.float32), "^v is a finfo"),
    ],
)
def test_what_is_no_value_is_refused_by_name(value, words):
    with pytest.raises(CheckpointError, match=words):
        to_json("v", value)


def test_loaded_values_take_the_types_that_their_place_has():
    part = Part(a=(1, (2, [3])), b=Counter({1: 1}), c=OrderedDict(x=(0,)), d=[], e=None)
    load({"p": part}, snapshot({"p": Part(a=(4, (5, [6])), b=Counter({30: 2}), c={"x": (7,)}, d=[(1,)], e=(1,))}))
    assert part.state == {"a": (4, (5, [6])), "b": Counter({30: 2}), "c": OrderedDict(x=(7,)), "d": [[1]], "e": [1]}
    assert type(part.state["b"]) is Counter and type(part.state["c"]) is OrderedDict


# ---- parts of one's own


def test_nested_dicts_and_lists_by_dotted_name():
    w, v, u = torch.zeros(2), torch.ones(3), torch.ones(())
    part = Part(w=w, moments={"a.b": {"m": v}, "n": 1}, shadow=[u, (torch.ones(1), 2)], config={"x": {"y": 1}}, step=3)
    state = collect({"p": part})
    assert list(state.tensors) == ["p.w", "p.moments.a.b.m", "p.shadow.0", "p.shadow.1.0"]
    assert state.tensors["p.w"] is w
    assert state.values == {"p.moments.n": 1, "p.shadow.1.1": 2, "p.config": {"x": {"y": 1}}, "p.step": 3}
    w += 1
    state.values |= {"p.step": 4, "p.config": {"z": []}}
    before = part.state
    restore({"p": part}, state)
    assert part.state["step"] == 4 and part.state["config"] == {"z": []} and part.state["moments"]["a.b"]["m"] is v
    assert part.state["shadow"] == [u, (torch.ones(1), 2)] and before["step"] == 3


def test_values_are_copies():
    config = {"a": [1]}
    state = collect({"p": Part(config=config)})
    config["a"].append(2)
    assert state.values == {"p.config": {"a": [1]}}


def test_flat_slices_are_tensors():
    flat = FlatSlice((3, 4), 5, torch.zeros(4))
    part = Part(moments={"w": {"exp_avg": flat}})
    state = collect({"p": part})
    assert state.tensors == {"p.moments.w.exp_avg": flat} and not state.values
    restore({"p": part}, state)
    assert part.state["moments"]["w"]["exp_avg"] is flat


class Quantised(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b.c": torch.zeros(1), "b": {"c": 1, "d": torch.zeros(1)}}}, r"^p\.a\.b\.c names two things"),
        ({"w": torch.zeros(2, 2).to_sparse()}, r"^p\.w is a Tensor of layout torch.sparse_coo"),
        ({"w": torch.zeros(2, device="meta")}, r"^p\.w .* on meta; .* to_empty"),
        ({"w": torch.zeros(2).as_subclass(Quantised)}, r"^p\.w is a Quantised"),
        ({"w": {"x": torch.zeros(2), "f": len}}, r"^p\.w\.f is a builtin_function"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(state, words):
    with pytest.raises(CheckpointError, match=words):
        collect({"p": Part(**state)})


def test_a_missing_value_is_refused_by_name():
    part = Part(n=1)
    with pytest.raises(CheckpointError, match=r"no value p\.n"):
        restore({"p": part}, State())


# ---- modules


NAMES = ["embed.weight", *(f"module.{i}.{n}" for i in (0, 2) for n in ("weight", "bias"))]
NAMES += [f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
NAMES = [f"model.{name}" for name in NAMES]


def compiled_inside(model):
    model.module = torch.compile(checkpoint_wrapper(model.module))
    return model


WRAPPERS = {
    "plain": lambda m: m,
    "compiled": torch.compile,
    "checkpointed": checkpoint_wrapper,
    "data parallel": DataParallel,
    "several": lambda m: DataParallel(torch.compile(compiled_inside(m))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_modules_have_plain_names_whatever_wraps_them(wrapper):
    wrapped = WRAPPERS[wrapper](make())
    optimizer = torch.optim.AdamW(wrapped.parameters())
    for p in wrapped.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    parts = {"model": wrapped, "optimizer": optimizer}
    saved = snapshot(parts)
    assert [name for name in saved.tensors if name.startswith("model.")] == NAMES
    assert "optimizer.moments.module.2.bias.exp_avg_sq" in saved.tensors
    plain = make(seed=1)
    others = {"model": plain, "optimizer": torch.optim.AdamW(plain.parameters())}
    load(others, saved)
    assert_same(snapshot(others), saved)
    assert plain.head.weight is plain.embed.weight
    again = WRAPPERS[wrapper](make(seed=2))
    load({"model": again}, snapshot({"model": plain}))
    assert_same(snapshot({"model": again}), snapshot({"model": plain}))


def test_tensors_of_a_module_share_its_memory():
    model = make()
    for name, tensor in collect({"model": model}).tensors.items():
        assert tensor.data_ptr() == model.state_dict()[name.removeprefix("model.")].data_ptr()


class Extra(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_extra_state_of_a_module():
    tensor = torch.arange(3.0)
    model = nn.Sequential(Extra({"scale": (1, float("inf"))}), Extra(tensor))
    state = snapshot({"model": model})
    assert list(state.values) == ["model.0._extra_state"] and list(state.tensors) == ["model.1._extra_state"]
    other = nn.Sequential(Extra({"scale": (0, 0)}), Extra(torch.zeros(3)))
    load({"model": other}, state)
    assert other[0].extra == {"scale": (1, float("inf"))} and torch.equal(other[1].extra, tensor)
    with pytest.raises(CheckpointError, match=r"^model\.0\._extra_state is a bytes"):
        collect({"model": nn.Sequential(Extra(b"pickle"))})


def test_a_module_that_gives_copies_is_loaded_through_its_own_hooks():
    class Transposed(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[prefix + "weight_t"] = self.weight.detach().T.contiguous()

        def _load_from_state_dict(self, state_dict, prefix, *args):
            self.weight.data.copy_(state_dict[prefix + "weight_t"].T)

    a, b = make(lambda: Transposed(3, 2, bias=False)), make(lambda: Transposed(3, 2, bias=False), seed=1)
    load({"model": b}, snapshot({"model": a}))
    assert torch.equal(a.weight, b.weight)


# ---- several processes


class Block(nn.Module):
    """Sizes that two processes cannot split evenly."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(7, 10), nn.Linear(10, 7, bias=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.ones(7))

    def forward(self, x):
        return x + self.scale * self.down(torch.tanh(self.up(x))) + self.offset


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def ddp(model):
    return DistributedDataParallel(model)


def compiled_ddp(model):
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    return torch.compile(DistributedDataParallel(model), backend="eager")


def fsdp(model, mesh=None):
    whole = {block.scale for block in model.blocks}  # scalars, which it cannot shard
    fully_shard(model.blocks[0], mesh=mesh, ignored_params=whole)
    return fully_shard(model, mesh=mesh, ignored_params=whole)


def tensor_parallel(model, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def fsdp_and_tensor_parallel(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return fsdp(tensor_parallel(model, mesh["tensor"]), mesh["data"])


def hybrid(model):
    return fsdp(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


LAYOUTS = {2: [ddp, compiled_ddp, fsdp, tensor_parallel], 4: [fsdp_and_tensor_parallel, hybrid]}
CHOICES = {
    "AdamW": dict(fused=False, weight_decay=0.1),
    "AdamW fused": dict(fused=True, weight_decay=0.1),
    "SGD": dict(momentum=0.9, dampening=0.5),
}


SHARDED = [f"blocks.{i}.{name}" for i in range(2) for name in ("up.weight", "up.bias", "down.weight")]


def laid_out(layout, kind, seed):
    model = layout(make(Stack, seed))
    return {
        "model": model,
        "optimizer": getattr(torch.optim, kind.split()[0])(model.parameters(), 0.1, **CHOICES[kind]),
    }


def train_stack(parts, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        parts["optimizer"].zero_grad()
        parts["model"](torch.randn(4, 7)).square().mean().backward()
        parts["optimizer"].step()


def save_and_go_on(processes):
    started_world()
    for layout in LAYOUTS[processes]:
        for kind in CHOICES if processes == 2 else ["AdamW"]:
            save_and_load(layout, kind)
    dist.destroy_process_group()


def save_and_load(layout, kind):
    ours = laid_out(layout, kind, 0)
    train_stack(ours, 2)
    ours["model"](torch.randn(4, 7))  # FSDP2 leaves the weights of the root unsharded after this
    saved = snapshot(ours)
    theirs = laid_out(layout, kind, 1)
    load(theirs, saved)
    assert_same(snapshot(theirs), saved)
    train_stack(ours, 1, first=2)
    train_stack(theirs, 1, first=2)
    assert_same(snapshot(theirs), snapshot(ours))

    plain = laid_out(lambda model: model, kind, 2)
    load(plain, saved)
    assert_same(snapshot(plain), saved)
    load(theirs, snapshot(plain))
    assert_same(snapshot(theirs), saved)
    sharded = {name for name, tensor in saved.tensors.items() if isinstance(tensor, DTensor)}
    assert len(sharded) == (0 if layout in (ddp, compiled_ddp) else len(SHARDED) * {"SGD": 2}.get(kind, 3))


@pytest.mark.parametrize("processes", LAYOUTS)
def test_layouts(processes):
    fork(processes, save_and_go_on, processes)


def refuse_fsdp1():
    started_world()
    with pytest.raises(CheckpointError, match=r"model is sharded by .*FSDP1.*fully_shard"):
        collect({"model": FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))})
    late = make(Stack)
    optimizer = torch.optim.AdamW(late.parameters())
    with pytest.raises(CheckpointError, match="make the optimizer from the parameters that it has now"):
        collect({"model": fully_shard(late, ignored_params={b.scale for b in late.blocks}), "optimizer": optimizer})
    dist.destroy_process_group()


def test_what_cannot_be_told_apart_is_refused():
    fork(1, refuse_fsdp1)
