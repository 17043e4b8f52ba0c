"""Model families by the `kind` of their config, one's own too.

A family of one's own is a Python file that registers it when it is imported:

    @dataclass(frozen=True, kw_only=True, config=STRICT)        # pydantic.dataclasses.dataclass, conf.schema.STRICT
    class MineConfig(ModelConfig):
        kind: Literal["mine"]
        width: PositiveInt

    register("mine", MineConfig, Family(build=Mine, plan=plan, flops_per_token=flops_per_token))

and a YAML of its settings, `FOLDER/model/mine.yaml`, with `kind: mine` and a value for every other field. Then

    torchrun --nproc-per-node 2 scripts/train.py --config-dir FOLDER plugins=[FOLDER/mine.py] model=mine model.width=128

trains it, on any layout that its plan allows. `hydra.searchpath=[file://FOLDER]` does what `--config-dir FOLDER` does,
and is also understood by `load_config`. With `hub=HubFormat(...)` in its family, its checkpoints are exchanged with the
Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from shardwright.checkpoint.interop.hub import HubTensor
from shardwright.conf import ConfigError
from shardwright.conf.schema import MODEL_CONFIGS, LlamaConfig, ModelConfig
from shardwright.kernels import Kernels
from shardwright.models.llama import convert
from shardwright.models.llama.cost import flops_per_token
from shardwright.models.llama.model import Llama
from shardwright.models.llama.plan import plan
from shardwright.parallel.plan import ParallelPlan


@dataclass(frozen=True, kw_only=True)
class HubFormat:
    """How a family's models are kept on the Hugging Face hub: pure functions, for `models.convert` to apply.

    Attributes:
        architecture: what `architectures` of config.json says.
        to_hub: (config, longest context in tokens) -> config.json without dtype, architecture and special tokens.
        from_hub: config.json -> the plain fields of the model's config but its name, and the longest context in tokens.
        tensors: config -> name on the hub -> what that tensor holds; all that the plain module has must be there.
        derived: patterns of further tensors that a folder may have and that follow from the settings.

    Both functions raise ConfigError for a model that the other side cannot express.
    """

    architecture: str
    to_hub: Callable[[Any, int], dict[str, Any]]
    from_hub: Callable[[dict[str, Any]], tuple[dict[str, Any], int]]
    tensors: Callable[[Any], dict[str, HubTensor]]
    derived: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its plain module, its parallel plan, its counted work.

    Attributes:
        build: (config, kernels) -> the module, whose forward takes and returns what that of `Llama` does.
        plan: config -> what `parallel.apply` needs to know of the module.
        flops_per_token: (config, sequence length, "full" or "causal" attention) -> floating-point operations of forward
            and backward per trained token.
        hub: how it is exchanged with the Hugging Face hub; None: it is not.
    """

    build: Callable[[Any, Kernels], nn.Module]
    plan: Callable[[Any], ParallelPlan]
    flops_per_token: Callable[..., float]
    hub: HubFormat | None = None


FAMILIES: dict[str, Family] = {}


def register(kind: str, config_class: type[ModelConfig], family: Family) -> None:
    """Make a family known: `model.kind=KIND` is decoded as its config class and built by it.

    Raises:
        ConfigError: the class is no ModelConfig, or the kind stands for another class.
    """
    if not issubclass(config_class, ModelConfig):
        raise ConfigError(f"model.kind={kind}: {config_class.__name__} is no ModelConfig; derive it from that class")
    known = MODEL_CONFIGS.setdefault(kind, config_class)
    if known is not config_class:
        raise ConfigError(
            f"model.kind={kind} is registered by {known.__module__}, and again by {config_class.__module__}; "
            "a kind is one family; choose another kind"
        )
    FAMILIES[kind] = family


_LLAMA_ON_HUB = HubFormat(
    architecture=convert.ARCHITECTURE,
    to_hub=convert.to_hub,
    from_hub=convert.from_hub,
    tensors=convert.tensors,
    derived=convert.DERIVED,
)
register("llama", LlamaConfig, Family(build=Llama, plan=plan, flops_per_token=flops_per_token, hub=_LLAMA_ON_HUB))
