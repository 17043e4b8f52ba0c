"""Makes real DeepSpeed checkpoints, in forked processes: nothing of DeepSpeed is imported where tests run."""

import os
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

NUM_STEPS, NUM_FURTHER_STEPS = 3, 2


class Net(nn.Module):
    """Odd sizes, so that partitions end anywhere and are padded; tied and frozen parameters; buffers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.up, self.down = nn.Linear(7, 5), nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.kernel = nn.Parameter(torch.randn(3, 2, 7, 1) / 10)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.arange(3))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("hidden", torch.ones(1), persistent=False)

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.frozen(self.down(self.up(x).tanh()) * self.kernel.sum((0, 1, 3)))
        return self.head(x * self.scale)


def make_optimizer(model):
    """AdamW on groups with and without weight decay, and one so small that ranks have nothing of it."""
    trained = [p for p in model.parameters() if p.requires_grad and p is not model.scale]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [model.scale], "lr": 1e-3},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


def loss_of(model, step, rank):
    """The loss on the batch of a step and rank."""
    ids = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(100 * step + rank))
    return nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())


def zero(stage, bf16=False, options=None, **config):
    """The config of a run."""
    persistence = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **persistence, **(options or {})},
        **({"bf16": {"enabled": True}} if bf16 else {}),
        **config,
    }


def train_and_save(folder, runs):
    """Be a rank: make a checkpoint of every run (name -> config), and train on.

    Return name -> (what the live engine says that it holds: name -> tensor, losses of the further steps).
    """
    deepspeed = _start()
    return {name: _train_and_save(deepspeed, Path(folder) / name, config) for name, config in runs.items()}


def save_filled(folder, stage, shapes, fill):
    """Be a rank: save parameters and moments that hold what `fill(name, tensor)` writes, and no step has changed."""
    deepspeed = _start()
    model = Holder(shapes)
    for name, parameter in model.named_parameters():
        fill(f"model.{name}", parameter.data)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero(stage))
    engine.backward(engine(torch.zeros(1)))
    engine.step()
    _link_states(engine)
    for name, parameter in engine.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            value = torch.empty(shapes[name])
            fill(f"optimizer.moments.{name}.{key}", value)
            if stage < 3:
                parameter.set_full_hp_param(value, key)
                continue
            part = parameter._z3_optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )[0]
            own = value.flatten()[dist.get_rank() * part.numel() :][: part.numel()]
            part[: own.numel()].copy_(own)
    engine.save_checkpoint(str(folder), tag="step1")


class Holder(nn.Module):
    """Parameters with given names and shapes, whose gradients are zero."""

    def __init__(self, shapes):
        super().__init__()
        children = {}
        for name, shape in shapes.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = shape
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        for name, held in children.items():
            self.add_module(name, Holder(held))

    def forward(self, x):
        for parameter in self.parameters(recurse=False):
            x = x + 0 * parameter.sum()
        for child in self.children():
            x = x + child(x)
        return x.sum()


def _start():
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled
    deepspeed.init_distributed("gloo")
    return deepspeed


def _train_and_save(deepspeed, folder, config):
    torch.manual_seed(0)
    model = Net()
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
    losses = []
    for step in range(NUM_STEPS + NUM_FURTHER_STEPS):
        if step == NUM_STEPS:
            client = {"epoch": 3, "note": {"a": [1, None, 0.5]}, "pair": (1, 2), "seen": {1, 2}}
            engine.save_checkpoint(str(folder), tag="step3", client_state=client)
            truth = _truth(deepspeed, engine)
        loss = loss_of(engine, step, dist.get_rank())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return truth, losses[NUM_STEPS:]


def _truth(deepspeed, engine):
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link_states(engine)
    truth = {f"model.{name}": buffer for name, buffer in engine.module.named_buffers() if name != "hidden"}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            truth[f"model.{name}"] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                truth[f"optimizer.moments.{name}.{key}"] = safe_get_full_optimizer_state(parameter, key)
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                truth[f"model.{name}"] = parameter.detach().clone()
    return {name: tensor.detach().clone() for name, tensor in truth.items()}


def _link_states(engine):
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):  # DeepSpeed links those of the first group only
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def rewrite(path, change):
    """Change the members of a file of torch.save: `change(name, data)` returns the new data."""
    with zipfile.ZipFile(path) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, data in members.items():
            target.writestr(name, change(name, data))
