"""The config: every file composes, round trips, and names what is wrong."""

import pytest
from support import ROOT

from shardwright.conf import ConfigError
from shardwright.conf.load import from_dict, load_config, to_dict
from shardwright.models.llama.cost import flops_per_token

GROUPS = sorted(p for p in (ROOT / "conf").iterdir() if p.is_dir() and p.name not in ("hydra", "__pycache__"))
OPTIONS = [(group.name, file.stem) for group in GROUPS for file in sorted(group.glob("*.yaml"))]
REQUIRED = {
    ("data", "files"): ["data.path=x"],
    ("data", "hub"): ["data.name=x"],
    ("recompute", "budget"): ["recompute.gib=1.5"],
}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_yaml_composes_and_round_trips(group, option):
    prefix = "+" if group == "experiment" else ""
    config = load_config([f"{prefix}{group}={option}", *REQUIRED.get((group, option), [])])
    assert from_dict(to_dict(config)) == config


def test_a_config_is_frozen():
    config = load_config()
    with pytest.raises(AttributeError):
        config.train.seed = 1  # type: ignore[misc]


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(["train.num_steps=x", "optim.eps=-1", "train.device=tpu"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(
        line.startswith(start)
        for line, start in zip(lines, ("train.num_steps=x", "train.device=tpu", "optim.eps=-1"), strict=True)
    )


def count(model):
    per_layer = model.hidden_size * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    per_layer += 3 * model.hidden_size * model.intermediate_size + 2 * model.hidden_size
    tables = 1 if model.tied_embeddings else 2
    return model.num_layers * per_layer + tables * model.vocab_size * model.hidden_size + model.hidden_size


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama3_1b", 1_235_814_400), ("llama3_8b", 8_030_261_248), ("llama3_70b", 70_553_706_496)],
)
def test_published_sizes(name, parameters):
    assert count(load_config([f"model={name}"]).model) == parameters


def test_flops_of_8b():
    """Published: 57.9 GFLOP per token at sequence 8192 with attention counted in full, 51.5 causally."""
    model = load_config(["model=llama3_8b"]).model
    assert round(flops_per_token(model, 8192, "full") / 1e9, 1) == 57.9
    assert round(flops_per_token(model, 8192, "causal") / 1e9, 1) == 51.5
