"""What a Llama is called on the Hugging Face hub, what cannot be one there or here, and how folders are written."""

import functools
import json
import re
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardwright.checkpoint import CheckpointError, DamagedError
from shardwright.checkpoint.interop.hub import INDEX, HubTensor, LazyTensor, read_tensors, write_folder
from shardwright.conf import ConfigError
from shardwright.conf.load import load_config
from shardwright.conf.schema import LlamaConfig
from shardwright.kernels import Kernels
from shardwright.models.llama import convert
from shardwright.models.registry import FAMILIES


@functools.cache
def llama(*overrides):
    config = load_config(["model.hidden_size=32", "model.num_heads=4", *overrides]).model
    assert isinstance(config, LlamaConfig)
    return config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.parallel_block=true",
            "model.parallel_block=true: in LlamaForCausalLM attention and feed-forward follow",
        ),
        ("model.sliding_window=64", "model.sliding_window=64: LlamaForCausalLM attends to the whole context"),
        ("model.hidden_size=34", "model.num_heads=4 does not divide model.hidden_size=34"),
    ],
)
def test_what_their_llama_cannot_be_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        convert.to_hub(llama(override), 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral'; the llama family has 'llama' only"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": [8]}, "they must be an object"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"hidden_size": None}, "hidden_size=None must be a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a positive integer"),
    ],
)
def test_what_our_llama_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        convert.from_hub({**convert.to_hub(llama(), 128), **changes})


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
EXPECTED = {k if k != "original_max_position_embeddings" else "original_context_tokens": v for k, v in LLAMA3.items()}


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 5e5, EXPECTED),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}, 5e5, EXPECTED),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, 5e5, EXPECTED),
    ],
)
def test_every_form_of_rotary_settings_is_read_as_transformers_does(given, theta, scaling):
    raw = {**convert.to_hub(llama(), 131072)}
    raw = {key: value for key, value in raw.items() if not key.startswith("rope")} | given
    from transformers import LlamaConfig as TheirConfig

    theirs = TheirConfig.from_dict(json.loads(json.dumps(raw))).rope_parameters
    assert theirs["rope_theta"] == theta and theirs.get("factor") == (scaling or {}).get("factor")
    fields, context = convert.from_hub(raw)
    assert (fields["rope_theta"], fields["rope_scaling"], context) == (theta, scaling, 131072)


@pytest.mark.parametrize("name", ["llama3_1b", "llama3_8b", "llama3_70b", "llama3_405b", "llama_160m"])
def test_published_sizes_round_trip(name):
    config = load_config([f"model={name}"]).model
    fields, context = convert.from_hub(json.loads(json.dumps(convert.to_hub(config, 131072))))
    assert LlamaConfig(**(fields | {"name": name, "rope_scaling": config.rope_scaling})) == config and context == 131072
    assert (fields["rope_scaling"] is None) == (config.rope_scaling is None)
    mapped = [part for holds in convert.tensors(config).values() if not holds.copy for part in holds.parts]
    with torch.device("meta"):
        assert sorted(mapped) == sorted(FAMILIES["llama"].build(config, Kernels()).state_dict())


@pytest.mark.parametrize("transposed", [True, False])
def test_joined_and_transposed_tensors_come_apart_as_they_were(transposed):
    parts = {"q": torch.randn(4, 3), "k": torch.randn(2, 3), "v": torch.randn(2, 3)}
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    holds = HubTensor(tuple(parts), transposed=transposed)
    joined = holds.join(list(parts.values()))
    assert tuple(joined.shape) == holds.shape(shapes) == ((3, 8) if transposed else (8, 3))
    apart = holds.split(joined, shapes)
    assert list(apart) == list(parts)
    assert all(torch.equal(apart[name], parts[name]) and apart[name].is_contiguous() for name in parts)


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    alive, most = set(), []

    def load(i):
        tensor = torch.full((1000,), float(i))
        alive.add(i)
        weakref.finalize(tensor.untyped_storage(), alive.discard, i)
        most.append(len(alive))
        return tensor

    tensors = {f"t{i}": LazyTensor(torch.float32, (1000,), lambda i=i: load(i)) for i in range(20)}
    write_folder(tmp_path / "hub", tensors, {}, max_shard_bytes=12_000)
    assert max(most) == 3 and len(list((tmp_path / "hub").glob("*.safetensors"))) == 7
    found = read_tensors(tmp_path / "hub")
    assert list(found) and all(found[f"t{i}"].load().eq(i).all() for i in range(20))


@pytest.fixture
def sharded(tmp_path):
    """A folder of three shards, and what it holds."""
    weights = {f"t{i}": torch.full((1000,), float(i)) for i in range(6)}
    lazy = {name: LazyTensor(t.dtype, tuple(t.shape), lambda t=t: t) for name, t in weights.items()}
    write_folder(tmp_path / "hub", lazy, {"config.json": {}}, max_shard_bytes=8000)
    assert len(list((tmp_path / "hub").iterdir())) == 3 + 2
    assert all(torch.equal(tensor.load(), weights[name]) for name, tensor in read_tensors(tmp_path / "hub").items())
    return tmp_path / "hub"


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../b.safetensors", "..", "", "x.safetensors\n"]
)
def test_an_index_cannot_lead_out_of_the_folder(sharded, file):
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "secret.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["t1"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(DamagedError, match=re.escape(f"names a file {file!r} outside the folder")):
        read_tensors(sharded)


def damage_index(folder):
    (folder / INDEX).write_text('{"weight_map": [1, 2]}')


def truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-64])


def remove(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def forget(folder):
    path = next(path for path in folder.glob("*.safetensors") if len(load_file(path)) > 1)
    save_file(dict(list(load_file(path).items())[1:]), path)


def no_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_index, "has no weight_map of names to files"),
        (truncate, "model-00002-of-00003.safetensors is damaged"),
        (remove, "model-00002-of-00003.safetensors is missing"),
        (forget, "which model.safetensors.index.json places there"),
        (no_weights, "has neither model.safetensors nor model.safetensors.index.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_refused(sharded, damage, message):
    damage(sharded)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(sharded)
