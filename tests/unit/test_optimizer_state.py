"""Optimizers and learning-rate schedulers of torch to named tensors and values, and back."""

import copy
from collections import Counter

import pytest
import torch
from support_state import assert_same, load, make, snapshot, train
from torch import nn
from torch.optim import lr_scheduler

from shardwright import checkpoint
from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.state import collect
from shardwright.conf.load import load_config
from shardwright.trainer.optim import Optimizer

OPTIMIZERS = {
    "AdamW": dict(weight_decay=0.1),
    "AdamW amsgrad": dict(amsgrad=True, foreach=False),
    "AdamW fused": dict(fused=True, weight_decay=0.1),
    "AdamW foreach": dict(foreach=True),
    "AdamW tensor": dict(lr=lambda: torch.tensor(0.01)),
    "Adam eps": dict(eps=0.0, weight_decay=0.1),
    "SGD": dict(),
    "SGD momentum": dict(momentum=0.9, nesterov=True),
    "SGD dampened": dict(momentum=0.9, dampening=0.5),
    "SGD fused": dict(momentum=0.9, fused=True),
    "RMSprop": dict(centered=True, momentum=0.9),
    "Adagrad": dict(),
    "Adadelta": dict(),
    "Adamax": dict(),
    "NAdam": dict(),
    "RAdam": dict(),
    "ASGD": dict(),
    "Rprop": dict(),
    "Adafactor": dict(),
}


def make_torch(kind, model, seed_lr=0.01):
    options = {key: value() if callable(value) else value for key, value in OPTIMIZERS[kind].items()}
    return getattr(torch.optim, kind.split()[0])(model.parameters(), **{"lr": seed_lr, **options})


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_step_is_that_of_the_uninterrupted_run(kind):
    model = make()
    optimizer = make_torch(kind, model)
    train(model, optimizer, 3)
    saved = snapshot({"model": model, "optimizer": optimizer})
    other = make(seed=1)
    parts = {"model": other, "optimizer": make_torch(kind, other, seed_lr=0.02)}
    load(parts, saved)
    assert_same(snapshot(parts), saved)
    assert train(other, parts["optimizer"], 2, first=3) == train(model, optimizer, 2, first=3)
    assert_same(snapshot(parts), snapshot({"model": model, "optimizer": optimizer}))
    assert [p.grad is None for p in other.parameters()] == [p.grad is None for p in model.parameters()]
    for ours, theirs in zip(parts["optimizer"].param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    assert {k: type(v) for k, v in ours.items()} == {k: type(v) for k, v in theirs.items()}


def test_names_of_an_optimizer():
    model = make()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "lr": torch.tensor(0.5), "foreach": False},
        ],
        lr=0.25,
    )
    train(model, optimizer, 2)
    state = snapshot({"optimizer": optimizer, "model": model})
    names = [name for name, _ in model.named_parameters()]
    moments = {f"optimizer.moments.{name}.{moment}" for name in names for moment in ("exp_avg", "exp_avg_sq")}
    assert {name for name in state.tensors if name.startswith("optimizer")} == moments
    assert state.values["optimizer.num_updates"] == 2
    matrices, rest = state.values["optimizer.groups"]
    assert matrices["params"] == ["embed.weight", "module.0.weight", "module.2.weight"]
    assert (matrices["lr"], matrices["weight_decay"], matrices["betas"]) == (0.25, 0.1, [0.9, 0.999])
    assert rest["lr"] == 0.5 and "foreach" not in rest and "fused" not in rest


class Counting(torch.optim.AdamW):
    calls = 0

    def step(self):
        self.calls += 1
        for group in self.param_groups:
            group["count"] += 1
        super().step()


def test_creating_an_optimizers_state_changes_nothing_else():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=0.0)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, 1)
    scheduler.step()
    saved = snapshot({"model": model, "optimizer": optimizer})
    other = make(seed=1)
    other.embed.weight.data[0, 0] = -0.0
    fresh = Counting([{"params": other.parameters(), "count": torch.zeros(())}], lr=0.1, eps=0.0)
    calls = []
    fresh.register_step_pre_hook(lambda *_: calls.append("before"))
    fresh.register_step_post_hook(lambda *_: calls.append("after"))
    lr_scheduler.StepLR(fresh, 1)
    gradient = torch.ones(6)
    other.norm.weight.grad = gradient
    before, attributes = snapshot({"model": other}), set(fresh.__dict__)
    groups = copy.deepcopy(fresh.state_dict()["param_groups"])
    collect({"model": other, "optimizer": fresh}, saved.tensors.keys())
    assert len(fresh.state) == len(list(other.parameters()))
    assert_same(snapshot({"model": other}), before)
    assert (
        calls == []
        and fresh.calls == 0
        and fresh.__dict__.keys() == attributes
        and fresh.state_dict()["param_groups"] == groups
    )
    assert other.norm.weight.grad is gradient and other.norm.bias.grad is None


def test_a_parameter_without_state_has_none_after_loading():
    """One that got no gradient before the save; the optimizer that loads may have stepped it since."""
    model, other = make(), make(seed=1)
    model.norm.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    train(model, optimizer, 2)
    saved = snapshot({"model": model, "optimizer": optimizer})
    model.norm.requires_grad_(True)
    parts = {"model": other, "optimizer": torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, dampening=0.5)}
    train(other, parts["optimizer"], 1)
    load(parts, saved)
    assert not parts["optimizer"].state.get(other.norm.weight)
    assert train(other, parts["optimizer"], 2) == train(model, optimizer, 2)
    assert_same(snapshot(parts), snapshot({"model": model, "optimizer": optimizer}))


def test_parameters_that_were_updated_less_often_keep_their_own_count():
    model, other = make(), make(seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    model.norm.requires_grad_(False)
    train(model, optimizer, 2)
    model.norm.requires_grad_(True)
    train(model, optimizer, 1)
    saved = snapshot({"model": model, "optimizer": optimizer})
    assert "optimizer.num_updates" not in saved.values
    assert saved.values["optimizer.steps.norm.weight"] == 1 and saved.values["optimizer.steps.embed.weight"] == 3
    parts = {"model": other, "optimizer": torch.optim.AdamW(other.parameters())}
    load(parts, saved)
    assert train(other, parts["optimizer"], 1) == train(model, optimizer, 1)
    assert_same(snapshot(parts), snapshot({"model": model, "optimizer": optimizer}))


def test_order_and_grouping_of_parameters_may_differ():
    model, other = make(), make(seed=1)
    first = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": first[:3], "weight_decay": 0.1}, {"params": first[3:]}], lr=0.3)
    train(model, optimizer, 2)
    saved = snapshot({"model": model, "optimizer": optimizer})
    second = list(other.parameters())
    groups = [{"params": [p]} for p in reversed(second)]
    parts = {"model": other, "optimizer": torch.optim.AdamW(groups, lr=0.1)}
    load(parts, saved)
    assert [g["weight_decay"] for g in reversed(parts["optimizer"].param_groups)] == [0.1] * 3 + [0.01] * 4
    assert train(other, parts["optimizer"], 2) == train(model, optimizer, 2)
    joined = {"model": other, "optimizer": torch.optim.AdamW(other.parameters())}
    with pytest.raises(CheckpointError, match=r"group 0 joins .* with weight_decay=\[0\.1, 0\.01\]"):
        load(joined, saved)


def test_an_optimizer_over_several_modules_tells_them_apart():
    def parts(seed):
        a, b = make(lambda: nn.Linear(2, 2), seed), make(lambda: nn.Linear(2, 2), seed + 1)
        return {"a": a, "b": b, "both": torch.optim.AdamW([*a.parameters(), *b.parameters()])}

    ours, theirs = parts(0), parts(5)
    (ours["a"](torch.ones(2)).sum() - ours["b"](torch.ones(2)).prod()).backward()
    ours["both"].step()
    saved = snapshot(ours)
    assert "both.moments.b.weight.exp_avg" in saved.tensors
    load(theirs, saved)
    assert_same(snapshot(theirs), saved)


def saved_by(make_optimizer):
    model = make()
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer, 1)
    return snapshot({"model": model, "optimizer": optimizer})


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (lambda p: torch.optim.SGD(p, momentum=0.9), "SGD keeps .*momentum_buffer.*, the checkpoint has .*exp_avg"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "AdamW keeps .*max_exp_avg_sq"),
    ],
)
def test_an_optimizer_of_another_kind_is_refused(loader, words):
    model = make(seed=1)
    with pytest.raises(CheckpointError, match=words):
        load({"model": model, "optimizer": loader(model.parameters())}, saved_by(torch.optim.AdamW))


def test_an_optimizer_that_needs_a_true_step_says_so():
    def sparse(seed):
        model = make(lambda: nn.Embedding(5, 2, sparse=True), seed)
        return {"model": model, "optimizer": torch.optim.SparseAdam(model.parameters())}

    def step(parts):
        parts["optimizer"].zero_grad()
        parts["model"](torch.tensor([1, 3])).square().sum().backward()
        parts["optimizer"].step()

    ours, theirs = sparse(0), sparse(1)
    step(ours)
    with pytest.raises(CheckpointError, match=r"SparseAdam cannot create its state .* take one first"):
        load(theirs, snapshot(ours))
    step(theirs)
    load(theirs, snapshot(ours))
    step(ours)
    step(theirs)
    assert_same(snapshot(ours), snapshot(theirs))


def test_an_optimizer_needs_its_module_and_a_checkpoint_that_has_it():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match=r"optimizer updates 7 parameters .* hand in the module too"):
        collect({"optimizer": optimizer})
    with pytest.raises(CheckpointError, match="no state of optimizer; load the other parts without it"):
        load({"model": model, "optimizer": optimizer}, snapshot({"model": model}))
    saved = saved_by(torch.optim.AdamW)
    del saved.values["optimizer.num_updates"]
    with pytest.raises(CheckpointError, match=r"no value optimizer\.num_updates"):
        load({"model": model, "optimizer": optimizer}, saved)


def test_parameters_that_the_checkpoint_does_not_know_start_afresh(caplog):
    model = make()
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=0.5)
    train(model, optimizer, 2)
    saved = snapshot({"model": model, "optimizer": optimizer})
    groups = [{"params": model.embed.parameters(), "lr": 0.1}, {"params": model.module.parameters(), "lr": 0.1}]
    more = torch.optim.AdamW(groups)
    load({"model": model, "optimizer": more}, saved)
    assert [group["lr"] for group in more.param_groups] == [0.1, 0.5]
    assert not more.state.get(model.embed.weight) and more.state[model.module[0].weight]["step"] == 2
    assert "optimizer: the checkpoint has nothing of 1 parameters, embed.weight first" in caplog.text


def test_adamw_state_moves_between_our_trainer_and_torch():
    config = load_config(["optim=adamw", "optim.weight_decay=0"]).optim
    options = dict(lr=0.01, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0, fused=True)

    def trainers(seed):
        model = make(seed=seed)
        return {"model": model, "optimizer": Optimizer(config, model)}

    def programs(seed):
        model = make(seed=seed)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), **options)}

    class Step:
        """Our optimizer, called as torch's is."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def zero_grad(self):
            pass

        def step(self):
            self.optimizer.step(lr=0.01, grad_scale=torch.ones(()), skip=torch.tensor(False))

    ours = trainers(0)
    train(ours["model"], Step(ours["optimizer"]), 3)
    theirs = programs(1)
    load(theirs, snapshot(ours))
    back = trainers(2)
    load(back, snapshot(theirs))
    assert theirs["optimizer"].param_groups[0]["lr"] == 0.01
    for parts in (ours, back):
        train(parts["model"], Step(parts["optimizer"]), 2, first=3)
    train(theirs["model"], theirs["optimizer"], 2, first=3)
    assert_same(snapshot(back), snapshot(ours))
    theirs = snapshot(theirs)
    del theirs.values["optimizer.groups"]
    assert_same(theirs, snapshot(ours))


# ---- learning-rate schedulers


def sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, 5)]
    return lr_scheduler.SequentialLR(optimizer, parts, [3])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 5, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
}


def scheduled(kind, seed, lr):
    model = make(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, foreach=False)
    return {"model": model, "optimizer": optimizer, "scheduler": SCHEDULERS[kind](optimizer)}


def rates(parts, steps):
    """Learning rates of further steps."""
    found = []
    for _ in range(steps):
        train(parts["model"], parts["optimizer"], 1)
        metric = [1.0] if isinstance(parts["scheduler"], lr_scheduler.ReduceLROnPlateau) else []
        parts["scheduler"].step(*metric)
        found.append(float(parts["optimizer"].param_groups[0]["lr"]))
    return found


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("in_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("steps", [0, 4])
def test_schedules_go_on(kind, in_tensor, steps):
    rate = torch.tensor if in_tensor else float
    ours = scheduled(kind, 0, rate(0.1))
    rates(ours, steps)
    saved = snapshot(ours)
    theirs = scheduled(kind, 1, rate(0.3))
    load(theirs, saved)
    assert rates(theirs, 5) == rates(ours, 5)
    assert_same(snapshot(theirs), snapshot(ours))
    if kind == "MultiStepLR":
        assert type(theirs["scheduler"].milestones) is Counter


def test_a_scheduler_that_keeps_a_function_is_refused_by_name():
    class Mine(lr_scheduler.LRScheduler):
        def __init__(self, optimizer):
            self.shape = lambda step: 1.0
            super().__init__(optimizer)

        def get_lr(self):
            return [self.shape(self.last_epoch)]

    with pytest.raises(CheckpointError, match=r"^scheduler\.shape is a function"):
        collect({"scheduler": Mine(torch.optim.SGD(make().parameters()))})


def test_a_checkpoint_file_carries_what_each_kind_of_program_needs(tmp_path):
    """Whatever values the loading program has itself: torch's has groups, ours has none, and counts may differ in kind."""
    config = load_config(["optim=adamw"]).optim
    model, other, back = make(), make(seed=1), make(seed=2)
    ours = {"model": model, "optimizer": Optimizer(config, model)}
    checkpoint.save(tmp_path / "a", ours)
    theirs = {"model": other, "optimizer": torch.optim.AdamW(other.parameters())}
    checkpoint.load(tmp_path / "a", theirs)
    other.norm.requires_grad_(False)
    train(other, theirs["optimizer"], 2)
    checkpoint.save(tmp_path / "b", theirs)
    again = {"model": back, "optimizer": torch.optim.AdamW(back.parameters(), lr=0.5)}
    checkpoint.load(tmp_path / "b", again)
    assert_same(snapshot(again), snapshot(theirs))
    assert again["optimizer"].state[back.norm.bias]["step"] == 0 and again["optimizer"].param_groups[0]["lr"] == 1e-3
