"""A model family of one's own: registered by a file, configured by its own YAML, trained by the same command."""

import builtins
import json
import subprocess
import sys

import pytest
from support import ROOT, command, records, small

from shardwright.conf import ConfigError
from shardwright.conf.load import from_dict, load_config, to_dict
from shardwright.conf.schema import MODEL_CONFIGS, LlamaConfig
from shardwright.models.registry import FAMILIES, Family, register

FAMILY = '''
"""Every token is predicted from itself alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

from shardwright.conf.schema import STRICT, ModelConfig, TrainConfig
from shardwright.models.registry import Family, register
from shardwright.parallel.plan import Normal, ParallelPlan


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BigramConfig(ModelConfig):
    kind: Literal["bigram"]
    width: PositiveInt

    def find_conflicts(self, config: TrainConfig) -> Iterator[str]:
        if config.parallel.tensor > 1:
            yield f"parallel.tensor={config.parallel.tensor} splits nothing in a bigram; use 1"


class Bigram(nn.Module):
    def __init__(self, config, kernels):
        super().__init__()
        self.kernels = kernels
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList([nn.Linear(config.width, config.width)])
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, ids, positions, bounds, longest, labels=None):
        x = self.layers[0](self.embedding(ids)).relu()
        return self.head(x) if labels is None else self.kernels.linear_cross_entropy(x, self.head.weight, labels)


def plan(config):
    return ParallelPlan(blocks=("layers.*",), initial_values={"*": Normal(0.02)})


def flops_per_token(config, sequence_length, attention):
    return 6 * config.width * (config.width + config.vocab_size)


register("bigram", BigramConfig, Family(build=Bigram, plan=plan, flops_per_token=flops_per_token))
'''
YAML = "kind: bigram\nname: my_bigram\nvocab_size: 272\nwidth: 16\n"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder as a user has it: the family, and its settings in `model/`."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "bigram.py").write_text(FAMILY)
    (folder / "model").mkdir()
    (folder / "model" / "bigram.yaml").write_text(YAML)
    return folder


def selected(own):
    return [f"hydra.searchpath=[file://{own}]", f"plugins=[{own}/bigram.py]", "model=bigram"]


def run_overrides(own, corpus, folder):
    """What `small` sets, without the sizes of a Llama."""
    return [o for o in small(corpus, folder, "train.num_steps=3") if not o.startswith("model.")] + selected(own)[1:]


@pytest.fixture(autouse=True)
def forgotten():
    """What a test registers is gone after it."""
    configs, families, modules = dict(MODEL_CONFIGS), dict(FAMILIES), set(sys.modules)
    yield
    for registry, before in ((MODEL_CONFIGS, configs), (FAMILIES, families)):
        registry.clear()
        registry.update(before)
    for name in [name for name in sys.modules if name.startswith("plugin_") and name not in modules]:
        del sys.modules[name]


def refused(overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return str(caught.value)


def test_it_is_decoded_as_its_own_class_and_round_trips(own):
    config = load_config([*selected(own), "model.width=24"])
    assert type(config.model).__name__ == "BigramConfig"
    assert (config.model.kind, config.model.name, config.model.width) == ("bigram", "my_bigram", 24)
    assert to_dict(config)["model"] == {"kind": "bigram", "name": "my_bigram", "vocab_size": 272, "width": 24}
    assert to_dict(config)["plugins"] == [f"{own}/bigram.py"]
    assert from_dict(to_dict(config)) == config == load_config([*selected(own), "model.width=24"])
    assert isinstance(load_config().model, LlamaConfig)


@pytest.mark.slow
def test_a_checkpoint_names_the_plugins_that_it_needs(own):
    """A process that only has the saved config decodes it."""
    code = "import json, sys; from shardwright.conf.load import from_dict; print(from_dict(json.load(sys.stdin)).model)"
    saved = json.dumps(to_dict(load_config(selected(own))))
    done = subprocess.run([sys.executable, "-c", code], input=saved, capture_output=True, text=True, cwd=ROOT)
    assert "BigramConfig(kind='bigram', name='my_bigram', vocab_size=272, width=16)" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=0", "model.width=0 must be greater than 0"),
        ("model.width=wide", "model.width=wide must be an integer"),
        ("+model.widht=3", "model.widht is not a setting; only known keys are accepted; did you mean model.width?"),
        ("model.num_layers=3", "model.num_layers has no meaning here; it belongs to another choice of model"),
        ("~model.name", "model.name is not set"),
        ("parallel.tensor=2", "parallel.tensor=2 splits nothing in a bigram; use 1"),
        ("model.kind=foo", "model.kind=foo is not registered; known: llama, bigram; add the module that registers it"),
        ("~model.kind", "model.kind is not set; it is required; add model.kind=VALUE, known: llama, bigram"),
        ("plugins=x.py", "plugins=x.py must be a list"),
        ("plugins=[3]", "plugins: 3 cannot be imported"),
    ],
)
def test_what_is_wrong_with_it_is_said(own, override, message):
    overrides = selected(own)
    load_config(overrides)
    assert message in refused([*overrides, *(["run.name=x"] if override == "~model.name" else []), override])


def test_its_keys_are_known_before_it_is_imported(own):
    message = refused([*selected(own), "model.widht=3"])
    assert message == "model.widht is not a setting; only known keys are accepted; did you mean model.width?"


def test_without_the_plugin_its_kind_is_unknown(own):
    message = refused([selected(own)[0], "model=bigram"])
    assert message == "model.kind=bigram is not registered; known: llama; add the module that registers it to plugins"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "FileNotFoundError"),
        ("x = (", "SyntaxError"),
        ("\nimport no_such_module", "ModuleNotFoundError: No module named 'no_such_module' ({path}:2)"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named_with_the_reason(tmp_path, text, reason):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    message = refused([f"plugins=[{path}]"])
    assert message.startswith(f"plugins: {path} cannot be imported: {reason.format(path=path)}")
    assert "No module named 'no_such_plugin'" in refused(["plugins=[no_such_plugin]"])


def test_modules_are_imported_by_name_and_each_once(tmp_path, monkeypatch):
    (tmp_path / "counted_plugin.py").write_text("import builtins\nbuiltins.imported_times += 1\n")
    monkeypatch.setattr("builtins.imported_times", 0, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for plugin, times in (("counted_plugin", 1), ("counted_plugin.py", 2), (f"{tmp_path}/counted_plugin.py", 2)):
        load_config([f"plugins=[{plugin}]"])
        assert builtins.imported_times == times
    del sys.modules["counted_plugin"]


def test_a_kind_is_one_family(own):
    load_config(selected(own))
    other = type("Other", (LlamaConfig,), {})
    family = Family(**vars(FAMILIES["llama"]))
    with pytest.raises(ConfigError, match=r"model.kind=bigram is registered by plugin_bigram_\w+, and again"):
        register("bigram", other, family)
    with pytest.raises(ConfigError, match=r"model.kind=new: dict is no ModelConfig"):
        register("new", dict, family)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "searchpath", ["--config-dir={own}", pytest.param("hydra.searchpath=[file://{own}]", marks=pytest.mark.slow)]
)
def test_it_trains_as_a_user_starts_it(own, corpus, tmp_path, searchpath):
    done = command(searchpath.format(own=own), *run_overrides(own, corpus, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    losses = [record["loss"] for _, record in sorted(records(tmp_path / "run").items())]
    assert len(losses) == 3 and losses[0] > losses[-1]
    assert "my_bigram, 8,976 parameters" in done.stdout + done.stderr


def test_it_is_refused_as_a_user_starts_it(own):
    done = command(f"--config-dir={own}", "model=bigram", "plugins=[nowhere.py]")
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: plugins: nowhere.py cannot be imported: FileNotFound")
