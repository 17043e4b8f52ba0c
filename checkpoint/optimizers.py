"""The state of torch's optimizers by the names of parameters, never by their order.

So it fits any wrapper and any grouping, and the optimizers of `trainer/optim.py`:

    <part>.moments.<parameter>.exp_avg   whatever the optimizer keeps for a parameter, `step` apart
    <part>.num_updates                   its `step`, where all parameters agree; else <part>.steps.<parameter>
    <part>.groups                        its hyperparameters: [{"lr": ..., "params": [names]}]
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwright.checkpoint.errors import CheckpointError
from shardwright.checkpoint.leaves import State, as_typed, from_json, is_tensor, local_part, visit

logger = logging.getLogger(__name__)

_STEP = "step"
# What says how a group is computed, here and now, rather than what it does.
_NO_HYPERPARAMETERS = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}


class OptimizerPart:
    """An optimizer among the parts.

    Args:
        part: what it is called.
        optimizer: any of torch's kind.
        owners: parameter -> (part, name in the plain model).

    Raises:
        CheckpointError: it updates a parameter that has no owner.
    """

    def __init__(self, part: str, optimizer: Optimizer, owners: Mapping[nn.Parameter, tuple[str, str]]) -> None:
        self.part, self.optimizer = part, optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        strange = [p for p in parameters if p not in owners]
        if strange:
            raise CheckpointError(
                f"{part} updates {len(strange)} parameters (one of shape {list(strange[0].shape)}) that no module "
                "among the parts has; state is stored under the names of parameters; hand in the module too, and make "
                "the optimizer from the parameters that it has now, after fully_shard and parallelize_module"
            )
        several = len({owners[p][0] for p in parameters}) > 1
        self._names = {p: ".".join(owners[p]) if several else owners[p][1] for p in parameters}

    def collect(self, state: State, stored: Collection[str] | None) -> None:
        """Add moments, counts and hyperparameters.

        Args:
            state: added to.
            stored: names of the tensors to be loaded; the optimizer creates what it lacks of these, and no others are
                added. None to save.

        Raises:
            CheckpointError: what it keeps cannot be stored, or is not what the checkpoint has.
        """
        held = set(self._names.values()) if stored is None else self._match(stored)
        steps = {}
        for parameter, name in self._names.items():
            kept = self.optimizer.state.get(parameter, {}) if name in held else {}
            for key, value in kept.items():
                if key == _STEP:
                    steps[name] = value
                else:
                    visit(self._moment(name, key), value, state.put)
        for name, count in self._counts(steps).items():
            state.put(name, count)
        state.put(f"{self.part}.groups", [self._describe(group) for group in self.optimizer.param_groups])

    def restore(self, state: State) -> None:
        """Take counts and hyperparameters; drop what is kept for parameters that had no state in the checkpoint.

        Raises:
            CheckpointError: the checkpoint is of other parts, or its groups do not fit.
        """
        if not any(name.startswith(f"{self.part}.") for name in itertools.chain(state.values, state.tensors)):
            raise CheckpointError(f"the checkpoint has no state of {self.part}; load the other parts without it")
        groups = from_json(state.values.get(f"{self.part}.groups", []))
        group_of = {name: index for index, group in enumerate(groups) for name in group["params"]}
        strange = []
        for parameter, name in self._names.items():
            tensors = self._tensors(parameter)
            if tensors and all(tensor in state.tensors for tensor in tensors):
                self._fill(parameter, name, state)
            elif name in group_of:
                self.optimizer.state.pop(parameter, None)
            else:
                strange.append(name)
        if strange:
            logger.warning(f"{self.part}: the checkpoint has nothing of {len(strange)} parameters, {strange[0]} first")
        for index, group in enumerate(self.optimizer.param_groups):
            used = {group_of[name] for p in group["params"] if (name := self._names[p]) in group_of}
            self._take_hyperparameters(index, group, [groups[i] for i in sorted(used)])

    def _moment(self, name: str, key: str) -> str:
        return f"{self.part}.moments.{name}.{key}"

    def _tensors(self, parameter: nn.Parameter) -> set[str]:
        """Return the names of the tensors that are kept for a parameter."""
        found: set[str] = set()
        for key, value in self.optimizer.state.get(parameter, {}).items():
            if key != _STEP:
                name = self._moment(self._names[parameter], key)
                visit(name, value, lambda inner, leaf: found.add(inner) if is_tensor(leaf) else None)
        return found

    def _match(self, stored: Collection[str]) -> set[str]:
        """Return the parameters that stored tensors belong to, after creating the state that these have."""
        wanted = self._assign(stored)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names[parameter]
                if name not in wanted:
                    continue
                if not self.optimizer.state.get(parameter):
                    self._create_state(group, parameter)
                if (tensors := self._tensors(parameter)) != wanted[name]:
                    raise CheckpointError(
                        f"{self.part}: {type(self.optimizer).__name__} keeps {sorted(tensors)}, the checkpoint has "
                        f"{sorted(wanted[name])}; they must agree; use the optimizer and options that wrote it"
                    )
        return set(wanted)

    def _assign(self, stored: Collection[str]) -> dict[str, set[str]]:
        """Return name of a parameter -> names of the stored tensors that were kept for it."""
        own, prefix = set(self._names.values()), f"{self.part}.moments."
        assigned: dict[str, set[str]] = {}
        for tensor in stored:
            name = tensor.removeprefix(prefix) if tensor.startswith(prefix) else ""
            while name and name not in own:
                name = name.rpartition(".")[0]
            if name:
                assigned.setdefault(name, set()).add(tensor)
        return assigned

    @torch.no_grad()
    def _create_state(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        """Let a twin of the optimizer, which shares the state of parameters alone, step on a gradient of zeros.

        One parameter at a time needs little memory. The twin has no hooks, nor what a scheduler put around `step`.
        """
        kind = type(self.optimizer)
        options = copy.deepcopy({key: value for key, value in group.items() if key != "params"})
        own = {"param_groups": [{**options, "params": [parameter]}]}
        twin = object.__new__(kind)
        vars(twin).update(vars(self.optimizer), **own, _optimizer_step_pre_hooks={}, _optimizer_step_post_hooks={})
        vars(twin).pop("step", None)
        weights, gradient = parameter.detach().clone(), parameter.grad
        try:
            parameter.grad = torch.zeros_like(parameter)
            twin.step()
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"{self.part}: {kind.__name__} cannot create its state without a true step ({error}); take one first"
            ) from error
        finally:
            parameter.grad = gradient
            parameter.copy_(weights)

    def _counts(self, steps: dict[str, Any]) -> dict[str, int]:
        """Return the one count that all parameters share, or one each (one read per device)."""
        tensors = {name: local_part(torch.as_tensor(step)).reshape(()) for name, step in steps.items()}
        counts: dict[str, int] = {}
        for device in {tensor.device for tensor in tensors.values()}:
            here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
            counts |= zip(here, map(int, torch.stack(list(here.values())).tolist()), strict=True)
        if len(set(counts.values())) == 1:
            return {f"{self.part}.num_updates": next(iter(counts.values()))}
        return {f"{self.part}.steps.{name}": count for name, count in counts.items()}

    def _fill(self, parameter: nn.Parameter, name: str, state: State) -> None:
        """Take what is kept for a parameter."""
        kept = self.optimizer.state[parameter]
        for key, value in kept.items():
            if key == _STEP:
                own = f"{self.part}.steps.{name}"
                count = state.value(own if own in state.values else f"{self.part}.num_updates")
                kept[key] = as_typed(count, value)
            else:
                kept[key] = visit(self._moment(name, key), value, state.take)

    def _describe(self, group: dict[str, Any]) -> dict[str, Any]:
        hyperparameters = {key: value for key, value in group.items() if key not in _NO_HYPERPARAMETERS}
        return {**hyperparameters, "params": [self._names[p] for p in group["params"]]}

    def _take_hyperparameters(self, index: int, group: dict[str, Any], saved: list[dict[str, Any]]) -> None:
        """Set those of a group from the saved groups that its parameters were in."""
        for key in {key: None for other in saved for key in other if key not in _NO_HYPERPARAMETERS}:
            values = [other.get(key) for other in saved]
            if any(value != values[0] for value in values):
                raise CheckpointError(
                    f"{self.part}: group {index} joins parameters that were saved with {key}={values}; a group has "
                    "one; group the parameters as the checkpoint does"
                )
            group[key] = as_typed(values[0], group.get(key))
