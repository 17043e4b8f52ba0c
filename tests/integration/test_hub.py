"""Models to folders of the Hugging Face hub and back: transformers computes the same, and no bit is lost."""

import copy
import json
import logging
import os
import shutil
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from pydantic import dataclasses as checked
from safetensors.torch import load_file, save_file
from support import ROOT, fork, small, spell_out, train
from torch import nn

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, DamagedError
from shardwright.checkpoint.interop import hub
from shardwright.checkpoint.interop.hub import HubTensor
from shardwright.conf import ConfigError
from shardwright.conf.load import from_dict, load_config, to_dict
from shardwright.conf.schema import MODEL_CONFIGS, STRICT, ModelConfig
from shardwright.data import DataError
from shardwright.kernels import Kernels
from shardwright.models.convert import export_to_hub, import_from_hub
from shardwright.models.llama import convert
from shardwright.models.registry import FAMILIES, Family, HubFormat, register

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig

SIZES = [
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_layers=3",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=8",
    "train.sequence_length=128",
]
SCALING = "model.rope_scaling={factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context_tokens: 16}"
VARIANTS = {
    "tied": ["model.tied_embeddings=true"],
    "untied": ["model.tied_embeddings=false", "model.num_kv_heads=1"],
    "scaled": ["model.tied_embeddings=false", SCALING, "model.rope_theta=500000.0"],
    "wide_heads": ["model.head_dim=16", "model.num_kv_heads=4", "model.norm_eps=1e-6"],
}
IDS = torch.randint(0, 300, (2, 96), generator=torch.Generator().manual_seed(5))


def save_model(path, overrides):
    """Save a model with random weights as a run would; return it with its config."""
    config = load_config([*SIZES, *overrides])
    torch.manual_seed(1)
    model = FAMILIES[config.model.kind].build(config.model, Kernels()).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    with checkpoint.create(path) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(f"model.{name}", tensor)
            writer.add(f"optimizer.moments.{name}.exp_avg", tensor * 0)
        writer.values |= {"progress.step": 7, "progress.config": to_dict(config), "optimizer.num_updates": 7}
    return config, model


@pytest.fixture(scope="module", params=VARIANTS)
def saved(request, tmp_path_factory):
    """A checkpoint, its config and model, and the folder that was exported from it."""
    folder = tmp_path_factory.mktemp(request.param)
    config, model = save_model(folder / "checkpoint", VARIANTS[request.param])
    export_to_hub(folder / "checkpoint", folder / "hub")
    return SimpleNamespace(checkpoint=folder / "checkpoint", hub=folder / "hub", config=config, model=model)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "checkpoint"
    return path, *save_model(path, VARIANTS["untied"])


@pytest.fixture
def plain(original, tmp_path):
    """A checkpoint of one variant, not exported."""
    path, config, model = original
    shutil.copytree(path, tmp_path / "checkpoint")
    return SimpleNamespace(checkpoint=tmp_path / "checkpoint", hub=tmp_path / "hub", config=config, model=model)


def our_logits(model, ids):
    batch, length = ids.shape
    positions = torch.arange(length).repeat(batch, 1)
    bounds = torch.arange(0, ids.numel() + 1, length, dtype=torch.int32)
    with torch.no_grad():
        return model(ids, positions, bounds, length)


def their_logits(folder, ids, dtype=torch.float32):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(ids).logits


def assert_same_bits(one, other):
    """Two checkpoints hold the same weights, bit for bit."""
    archives = [checkpoint.open(path) for path in (one, other)]
    names = [{name for name in archive.tensors if name.startswith("model.")} for archive in archives]
    assert names[0] == names[1] != set()
    for name in names[0]:
        a, b = (archive.read(name) for archive in archives)
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused_import(folder, target, kind=CheckpointError, **options):
    """Import what must be refused: no checkpoint appears; return what was said."""
    with pytest.raises(kind) as caught:
        import_from_hub(folder, target, **options)
    assert not list(target.glob("*"))
    return str(caught.value)


def test_transformers_computes_the_same_logits(saved):
    ours, theirs = our_logits(saved.model, IDS), their_logits(saved.hub, IDS)
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_every_weight_of_transformers_comes_from_the_folder(saved):
    _, report = LlamaForCausalLM.from_pretrained(saved.hub, output_loading_info=True)
    assert not any(report.values()), report
    assert GenerationConfig.from_pretrained(saved.hub).eos_token_id == 256


def test_import_of_an_export_has_the_same_bits_and_config(saved, tmp_path):
    import_from_hub(saved.hub, tmp_path / "back", name=saved.config.model.name)
    assert_same_bits(saved.checkpoint, tmp_path / "back")
    values = checkpoint.open(tmp_path / "back").values
    config = from_dict(values["progress.config"])
    assert config.model == saved.config.model
    assert (config.train.sequence_length, config.data.tokenizer) == (128, "bytes")
    assert values["progress.step"] == 0 and "optimizer.num_updates" not in values
    export_to_hub(tmp_path / "back", tmp_path / "again")
    for path in saved.hub.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in saved.hub.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [None, "llama3"])
def test_a_folder_that_transformers_wrote_is_imported(tmp_path, tied, rope):
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    rope = {"rope_type": rope, **scaling} if rope else {"rope_type": "default"}
    theirs = TheirConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        rope_parameters={**rope, "rope_theta": 20000.0},
        tie_word_embeddings=tied,
    )
    torch.manual_seed(2)
    model = LlamaForCausalLM(theirs).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    import_from_hub(tmp_path / "theirs", tmp_path / "ours")
    config = from_dict(checkpoint.open(tmp_path / "ours").values["progress.config"])
    assert (config.model.name, config.model.rope_theta, config.train.sequence_length) == ("theirs", 20000.0, 512)
    ours = FAMILIES["llama"].build(config.model, Kernels())
    ours.load_state_dict({name: checkpoint.open(tmp_path / "ours").read(f"model.{name}") for name in ours.state_dict()})
    torch.testing.assert_close(our_logits(ours, IDS), model(IDS).logits.detach(), rtol=1e-5, atol=1e-5)
    export_to_hub(tmp_path / "ours", tmp_path / "back")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    differing = {k for k, v in theirs.to_dict().items() if back.config.to_dict()[k] != v}
    assert differing <= {
        "_name_or_path",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "dtype",
        "transformers_version",
    }


def test_an_imported_model_writes_text(saved, tmp_path):
    from shardwright.scripts.generate import load_model

    import_from_hub(saved.hub, tmp_path / "imported")
    _, model = load_model(tmp_path / "imported")
    assert torch.equal(our_logits(model, IDS), our_logits(saved.model, IDS))


def test_bf16_rounds_once(plain, tmp_path):
    export_to_hub(plain.checkpoint, plain.hub, dtype=torch.bfloat16)
    raw = json.loads((plain.hub / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16"
    exported = load_file(plain.hub / "model.safetensors")
    for name, holds in convert.tensors(plain.config.model).items():
        assert torch.equal(exported[name], plain.model.state_dict()[holds.parts[0]].bfloat16()), name
    assert AutoModelForCausalLM.from_pretrained(plain.hub, dtype="auto").dtype == torch.bfloat16
    rounded = copy.deepcopy(plain.model).bfloat16().float()
    torch.testing.assert_close(their_logits(plain.hub, IDS), our_logits(rounded, IDS), rtol=1e-5, atol=1e-5)
    import_from_hub(plain.hub, tmp_path / "back")
    back = checkpoint.open(tmp_path / "back")
    for name, tensor in rounded.state_dict().items():
        held = back.read(f"model.{name}")
        assert held.dtype == torch.bfloat16 and torch.equal(held.float(), tensor), name
    loaded = FAMILIES["llama"].build(plain.config.model, Kernels())
    checkpoint.load(tmp_path / "back", {"model": loaded})
    assert torch.equal(our_logits(loaded, IDS), our_logits(rounded, IDS))
    export_to_hub(tmp_path / "back", tmp_path / "again", tokenizer="bytes")
    assert (tmp_path / "again" / hub.SINGLE).read_bytes() == (plain.hub / hub.SINGLE).read_bytes()
    with pytest.raises(ConfigError, match=r"dtype=torch.float16: weights are exported as float32 or bfloat16"):
        export_to_hub(plain.checkpoint, tmp_path / "half", dtype=torch.float16)


def test_shards_are_no_larger_than_asked_for(saved, tmp_path):
    export_to_hub(saved.checkpoint, tmp_path / "hub", max_shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "hub").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    total = 0
    for file in files:
        held = load_file(tmp_path / "hub" / file)
        assert set(held) == {name for name, other in index["weight_map"].items() if other == file}
        sizes = [tensor.nbytes for tensor in held.values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
        total += sum(sizes)
    assert len(files) > 3 and index["metadata"]["total_size"] == total
    assert torch.equal(their_logits(tmp_path / "hub", IDS), their_logits(saved.hub, IDS))
    import_from_hub(tmp_path / "hub", tmp_path / "back")
    assert_same_bits(saved.checkpoint, tmp_path / "back")


def test_a_folder_appears_complete_or_not_at_all(plain, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(hub, "_write_file", fail)  # the last files to be written
        with pytest.raises(CheckpointError, match=r"hub cannot be written: no space left on device; free or repair"):
            export_to_hub(plain.checkpoint, plain.hub)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    export_to_hub(plain.checkpoint, plain.hub)
    with pytest.raises(CheckpointError, match="hub exists; a folder for the hub is written anew; choose another"):
        export_to_hub(plain.checkpoint, plain.hub)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hub"]


def test_weights_that_are_not_those_of_the_config_are_refused(plain, tmp_path):
    export_to_hub(plain.checkpoint, plain.hub)
    config, weights = plain.hub / "config.json", load_file(plain.hub / "model.safetensors")

    def refused(changed):
        save_file(changed, plain.hub / "model.safetensors", metadata={"format": "pt"})
        return refused_import(plain.hub, tmp_path / "to")

    name = "model.layers.1.mlp.up_proj.weight"
    assert f"{name} is [48, 16], config.json makes it [48, 32]" in refused(
        weights | {name: weights[name][:, :16].contiguous()}
    )
    assert f"{name} is float64, a run has it as float32" in refused(weights | {name: weights[name].double()})
    assert f"{name} is int8" in refused(weights | {name: weights[name].to(torch.int8)})
    assert f"has {name.replace('weight', 'bias')}" in refused(
        weights | {name.replace("weight", "bias"): torch.zeros(48)}
    )
    assert f"lacks {name}" in refused({other: tensor for other, tensor in weights.items() if other != name})
    edit(config, num_hidden_layers=4)
    assert "lacks model.layers.3" in refused(weights)
    edit(config, num_hidden_layers=3, num_key_value_heads=3)
    assert "model.num_kv_heads=3 does not divide model.num_heads=4" in refused_import(
        plain.hub, tmp_path / "to", ConfigError
    )


def test_a_copy_of_tied_embeddings_must_be_one(tmp_path):
    save_model(tmp_path / "checkpoint", VARIANTS["tied"])
    export_to_hub(tmp_path / "checkpoint", tmp_path / "hub")
    weights = load_file(tmp_path / "hub" / "model.safetensors")
    assert "lm_head.weight" not in weights
    head = weights["model.embed_tokens.weight"].clone()
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | frequencies | {"lm_head.weight": head}, tmp_path / "hub" / "model.safetensors")
    import_from_hub(tmp_path / "hub", tmp_path / "back")
    assert_same_bits(tmp_path / "checkpoint", tmp_path / "back")
    head[0, 0] += 1
    save_file(weights | {"lm_head.weight": head}, tmp_path / "hub" / "model.safetensors")
    message = refused_import(tmp_path / "hub", tmp_path / "to")
    assert "lm_head.weight and model.embed_tokens.weight differ, and config.json ties them" in message


def test_a_checkpoint_is_not_imported_over(plain):
    export_to_hub(plain.checkpoint, plain.hub)
    with pytest.raises(CheckpointError, match="holds a checkpoint; an import is written anew"):
        import_from_hub(plain.hub, plain.checkpoint)
    assert checkpoint.open(plain.checkpoint).values["progress.step"] == 7


def test_a_config_that_cannot_be_read_is_refused(plain, tmp_path):
    export_to_hub(plain.checkpoint, plain.hub)
    for text in ("{", "[]"):
        (plain.hub / "config.json").write_text(text)
        assert "config.json " in refused_import(plain.hub, tmp_path / "to", DamagedError)


def test_an_unknown_architecture_is_refused(plain, tmp_path):
    export_to_hub(plain.checkpoint, plain.hub)
    for named in (["Qwen3ForCausalLM"], None, "LlamaForCausalLM"):
        edit(plain.hub / "config.json", architectures=named)
        assert "is of no family; known: LlamaForCausalLM" in refused_import(plain.hub, tmp_path / "to", ConfigError)


def make_tokenizer(folder, *, settings):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<begin>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "README.md").write_text("not for export")
    return backend


def test_the_tokenizer_goes_along(tmp_path):
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<begin>"},
        "eos_token": "<end>",
    }
    backend = make_tokenizer(tmp_path / "tokenizer", settings=settings)
    save_model(tmp_path / "checkpoint", [f"data.tokenizer={tmp_path}/tokenizer"])
    export_to_hub(tmp_path / "checkpoint", tmp_path / "hub")
    raw = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (0, 1)
    text = "def main(): return 'größer'"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert theirs(text)["input_ids"] == backend.encode(text).ids and theirs.eos_token_id == 1
    assert not (tmp_path / "hub" / "README.md").exists()
    import_from_hub(tmp_path / "hub", tmp_path / "back")
    saved = checkpoint.open(tmp_path / "back").values["progress.config"]
    assert saved["data"]["tokenizer"] == str(tmp_path / "hub")
    export_to_hub(tmp_path / "back", tmp_path / "none", tokenizer="bytes")
    assert not (tmp_path / "none" / "tokenizer.json").exists()


def test_bytes_have_no_tokenizer_on_the_hub(plain, caplog):
    with caplog.at_level(logging.INFO, "shardwright.models"):
        export_to_hub(plain.checkpoint, plain.hub)
    assert "data.tokenizer=bytes has no form on the hub; the folder has no tokenizer" in caplog.text
    raw = json.loads((plain.hub / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (None, 256)


def test_a_tokenizer_that_does_not_fit_is_refused(plain, tmp_path, monkeypatch):
    make_tokenizer(tmp_path / "tokenizer", settings={"eos_token": "<end>"})
    save_model(tmp_path / "small", ["model.vocab_size=260"])
    with pytest.raises(ConfigError, match=r"has 290 tokens, model.vocab_size=260"):
        export_to_hub(tmp_path / "small", plain.hub, tokenizer=str(tmp_path / "tokenizer"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data.tokenizer=no/such: it is no folder here, and the hub does not give it"):
        export_to_hub(plain.checkpoint, plain.hub, tokenizer="no/such")
    assert not plain.hub.exists()


def test_a_checkpoint_that_does_not_say_its_model_is_refused(tmp_path):
    with checkpoint.create(tmp_path / "bare") as writer:
        writer.add("model.embedding.weight", torch.zeros(4, 4))
    with pytest.raises(CheckpointError, match=r"bare does not hold the config of its run as progress.config"):
        export_to_hub(tmp_path / "bare", tmp_path / "hub")
    with checkpoint.create(tmp_path / "other") as writer:
        writer.add("model.embedding.weight", torch.zeros(4, 4))
        writer.values["progress.config"] = to_dict(load_config(SIZES))
    with pytest.raises(CheckpointError, match=r"embedding.weight is \(4, 4\) in the checkpoint, its config makes it"):
        export_to_hub(tmp_path / "other", tmp_path / "hub")


@checked.dataclass(frozen=True, kw_only=True, config=STRICT)
class FusedConfig(ModelConfig):
    kind: Literal["fused"]
    width: int


class Fused(nn.Module):
    def __init__(self, config, kernels):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.q = nn.Linear(config.width, config.width)
        self.k = nn.Linear(config.width, 3, bias=False)


def fused_tensors(config):
    return {
        "wte.weight": HubTensor(("embedding.weight",), transposed=True),
        "attn.weight": HubTensor(("q.weight", "k.weight"), transposed=True),
        "attn.bias": HubTensor(("q.bias",)),
    }


@pytest.fixture
def fused():
    """A family whose tensors are fused and transposed on the hub."""
    hub_format = HubFormat(
        architecture="FusedForCausalLM",
        to_hub=lambda config, context: {"width": config.width, "vocab": config.vocab_size, "context": context},
        from_hub=lambda raw: ({"kind": "fused", "width": raw["width"], "vocab_size": raw["vocab"]}, raw["context"]),
        tensors=fused_tensors,
    )
    family = Family(build=Fused, plan=lambda config: None, flops_per_token=lambda *args: 0.0, hub=hub_format)
    register("fused", FusedConfig, family)
    yield family
    del FAMILIES["fused"], MODEL_CONFIGS["fused"]


def test_a_family_of_ones_own_brings_its_format(fused, tmp_path):
    config = to_dict(load_config())
    config["model"] = {"kind": "fused", "name": "mine", "vocab_size": 300, "width": 5}
    torch.manual_seed(3)
    model = Fused(FusedConfig(**config["model"]), None)
    with checkpoint.create(tmp_path / "checkpoint") as writer:
        for name, tensor in model.state_dict().items():
            writer.add(f"model.{name}", tensor)
        writer.values["progress.config"] = config
    export_to_hub(tmp_path / "checkpoint", tmp_path / "hub")
    exported = load_file(tmp_path / "hub" / "model.safetensors")
    assert {name: list(t.shape) for name, t in exported.items()} == {
        "wte.weight": [5, 300],
        "attn.weight": [5, 8],
        "attn.bias": [5],
    }
    assert torch.equal(exported["attn.weight"], torch.cat([model.q.weight, model.k.weight]).T)
    import_from_hub(tmp_path / "hub", tmp_path / "back", name="mine")
    assert_same_bits(tmp_path / "checkpoint", tmp_path / "back")
    assert checkpoint.open(tmp_path / "back").values["progress.config"]["model"] == config["model"]


def test_a_family_without_a_format_is_not_exported(tmp_path, fused, monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", Family(**(vars(FAMILIES["llama"]) | {"hub": None})))
    save_model(tmp_path / "checkpoint", [])
    with pytest.raises(
        ConfigError, match=r"model.kind=llama has no form on the hub; register its family with a HubFormat"
    ):
        export_to_hub(tmp_path / "checkpoint", tmp_path / "hub")


def test_a_run_on_four_processes_is_exported(corpus, tmp_path):
    from shardwright.scripts.generate import load_model

    layout = spell_out("tensor=2 pipeline=2 tied=false")
    lines = small(corpus, tmp_path / "run", "train.num_steps=2", "schedule.warmup_steps=0", *layout)
    assert fork(4, train, lines) == [True] * 4
    saved = tmp_path / "run" / "checkpoints" / "step_00000002"
    export_to_hub(saved, tmp_path / "hub")
    _, model = load_model(saved)
    ids = IDS[:, :64] % 272
    torch.testing.assert_close(their_logits(tmp_path / "hub", ids), our_logits(model, ids), rtol=1e-5, atol=1e-5)
    import_from_hub(tmp_path / "hub", tmp_path / "back")
    assert_same_bits(saved, tmp_path / "back")
