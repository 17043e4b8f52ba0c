"""Checkpoints that DeepSpeed wrote, imported without it."""

import argparse
import importlib.util
import logging
import os
import random
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from support import fork
from support_deepspeed import NUM_FURTHER_STEPS, NUM_STEPS, Net, loss_of, make_optimizer, rewrite, train_and_save, zero

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError, DamagedError
from shardwright.checkpoint.interop.deepspeed import import_from_deepspeed
from shardwright.checkpoint.interop.deepspeed_files import load

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
QUICK = {"one": zero(1), "two": zero(2, bf16=True), "three": zero(3, bf16=True, options={"sub_group_size": 20})}
MORE = {
    "fp32_2": zero(2),
    "fp32_3": zero(3),
    "bf16_1": zero(1, bf16=True),
    "bf16_3": zero(3, bf16=True),
    "accumulated_in_fp32": zero(1, bf16=True, data_types={"grad_accum_dtype": "fp32"}),
    "aligned": zero(2, bf16=True, options={"parameter_alignment": True}),
    "elastic": zero(1, options={"elastic_checkpoint": True}),
    "offloaded": zero(3, options={"offload_optimizer": {"device": "cpu"}}, zero_force_ds_cpu_optimizer=False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the quick runs, and for each what every rank said: name -> [(truth, further losses)]."""
    folder = tmp_path_factory.mktemp("deepspeed")
    ranks = fork(2, train_and_save, folder, QUICK)
    return folder, {name: [rank[name] for rank in ranks] for name in QUICK}


@pytest.fixture
def copy_of(made, tmp_path):
    """Returns a copy of a run's checkpoint, to be damaged: the folder of its tag."""

    def copy(name):
        return shutil.copytree(made[0] / name, tmp_path / name) / "step3"

    return copy


def assert_holds(path, truth):
    archive = checkpoint.open(path)
    assert archive.tensors.keys() == truth.keys()
    for name, tensor in truth.items():
        held = archive.read(name)
        assert held.dtype == tensor.dtype and torch.equal(held, tensor), name
    return archive


def assert_refused(source, target, match, error=CheckpointError):
    with pytest.raises(error, match=match) as info:
        import_from_deepspeed(source, target)
    assert "; " in str(info.value)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.open(target)


@pytest.mark.parametrize("name", QUICK)
def test_all_is_imported_bit_for_bit(made, tmp_path, name, caplog):
    folder, said = made
    with caplog.at_level(logging.WARNING):
        import_from_deepspeed(folder / name, tmp_path / "c")
    archive = assert_holds(tmp_path / "c", said[name][0][0])
    values = archive.values
    assert values["optimizer.num_updates"] == values["deepspeed.global_steps"] == NUM_STEPS
    assert values["client.epoch"] == 3 and values["client.note"] == {"a": [1, None, 0.5]}
    assert values["client.pair"] == [1, 2] and values["deepspeed.global_samples"] == 12
    assert "client.seen" in caplog.text and not any("seen" in key for key in values)
    decayed, other, small = values["optimizer.groups"]
    assert decayed["weight_decay"] == 0.1 and decayed["betas"] == [0.9, 0.999] and "up.weight" in decayed["params"]
    assert other["weight_decay"] == 0 and other["params"] == ["up.bias", "down.bias"]
    assert small["lr"] == 1e-3 and small["params"] == ["scale"]
    assert not any(module.partition(".")[0] == "deepspeed" for module in sys.modules)


def test_flat_partitions_become_boxes(made, tmp_path):
    import_from_deepspeed(made[0] / "one", tmp_path / "c")
    manifest = checkpoint.open(tmp_path / "c").manifest
    boxes = [manifest.boxes.box(row, 2) for row in manifest.rows("model.embedding.weight")]
    assert len(boxes) > 2 and sum(box.numel for box in boxes) == 77


def test_a_torch_program_trains_on(made, tmp_path):
    import_from_deepspeed(made[0] / "one", tmp_path / "c")
    model = Net()
    optimizer = make_optimizer(model)
    optimizer.param_groups[0]["lr"] = 1.0  # the checkpoint knows better
    checkpoint.load(tmp_path / "c", {"model": model, "optimizer": optimizer})
    for further in range(NUM_FURTHER_STEPS):
        losses = [loss_of(model, NUM_STEPS + further, rank) for rank in range(2)]
        for loss, (_, theirs) in zip(losses, made[1]["one"], strict=True):
            assert loss.item() == pytest.approx(theirs[further], rel=1e-6)
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()


def test_a_tag_and_what_latest_may_say(made, copy_of, tmp_path):
    import_from_deepspeed(made[0] / "one" / "step3", tmp_path / "c")
    assert_holds(tmp_path / "c", made[1]["one"][0][0])
    latest = copy_of("one").parent / "latest"
    for tag in ["../one/step3", str(made[0] / "one" / "step3"), "..", "", "a\nb", "step4"]:
        latest.write_text(tag)
        assert_refused(latest.parent, tmp_path / "d", "latest says")
    assert_refused(made[0], tmp_path / "d", "is no DeepSpeed checkpoint")


@pytest.mark.parametrize(
    ("name", "file", "match"),
    [
        ("one", MODEL, "is no DeepSpeed checkpoint"),
        ("one", OPTIMIZER.format(0), "lacks the file of rank 0"),
        ("one", OPTIMIZER.format(1), "one of 2 partitions"),
        ("three", "zero_pp_rank_0_mp_rank_00_model_states.pt", "lacks the file of rank 0"),
        ("three", "zero_pp_rank_1_mp_rank_00_model_states.pt", r"1 files \*_model_states.pt for 2 partitions"),
        ("three", "bf16_" + OPTIMIZER.format(1), "one of 2 partitions"),
    ],
)
def test_a_missing_file_is_named(copy_of, tmp_path, name, file, match):
    folder = copy_of(name)
    (folder / file).unlink()
    assert_refused(folder, tmp_path / "c", match)


def test_without_optimizer_files(copy_of, tmp_path):
    folder = copy_of("one")
    for rank in range(2):
        (folder / OPTIMIZER.format(rank)).unlink()
    assert_refused(folder, tmp_path / "c", "copy those of its 2 ranks")
    edit(folder / MODEL, put(optimizer={"state": {}}))
    assert_refused(folder, tmp_path / "c", "ZeRO stage 0")


def test_truncated_files_are_refused(copy_of, tmp_path):
    for name in ("one", "three"):
        folder = copy_of(name)
        for path in sorted(folder.iterdir()):
            whole = path.read_bytes()
            for size in (0, 1, len(whole) // 2, len(whole) - 1):
                path.write_bytes(whole[:size])
                assert_refused(folder, tmp_path / "c", f"{path.name} is not whole", DamagedError)
            path.write_bytes(whole)


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER.format(1)])
def test_hostile_pickles_run_nothing(copy_of, tmp_path, file):
    folder, touched = copy_of("one"), tmp_path / "touched"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {touched}",)

    content = torch.load(folder / file, weights_only=True) if file == MODEL else {}
    for position in ("module", "note", "optimizer_state_dict"):
        torch.save({**content, position: Hostile()}, folder / file)
        assert_refused(folder, tmp_path / "c", f"{file} is refused: it names '(posix|nt) system'")
    for pickled in (
        b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",  # would take 64 GiB
        b"\x8c\x05posix\x8c\x06system\x93.",
        b"(Vtrue\niposix\nsystem\n.",
    ):
        rewrite(folder / file, lambda name, data, new=pickled: b"\x80\x02" + new if name.endswith(".pkl") else data)
        assert_refused(folder, tmp_path / "c", "it names")
    assert not touched.exists()


def test_bombs_are_refused(copy_of, tmp_path):
    path = copy_of("one") / MODEL
    edit(path, lambda content: content["module"].update(mean=torch.zeros(1).expand(2**40)))
    assert_refused(path.parent, tmp_path / "c", "mean is no plain tensor of the size")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("x/data.pkl", b"\0" * 10**6)
    assert_refused(path.parent, tmp_path / "c", "is compressed", DamagedError)


def test_values_of_any_depth_and_size(copy_of, tmp_path, caplog):
    deep, wide = [], [0]
    for _ in range(1500):
        deep = [deep]
    for _ in range(60):
        wide = [wide, wide]
    path = copy_of("one") / MODEL
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)  # to write it
    odd = {"deep": deep, "wide": wide, "tensor": torch.ones(3), "args": argparse.Namespace(lr=1.0)}
    odd |= {"numpy": np.float64(1), "generator": np.random.RandomState(0).get_state()}
    edit(path, put(**odd, inf=float("inf")))
    sys.setrecursionlimit(limit)
    import_from_deepspeed(path.parent, tmp_path / "c")
    for key in odd:
        assert f"client.{key}" in caplog.text and f"client.{key}" not in checkpoint.open(tmp_path / "c").values
    assert checkpoint.open(tmp_path / "c").values["client.inf"] == {"$float": "inf"}


def edit(path, change):
    """Change what a file holds. The objects of DeepSpeed's classes in it are lost; nobody needs them."""
    content = load(path)
    content.pop("seen", None)
    inner = content.get("optimizer_state_dict")
    for key in ("loss_scaler", "zero_stage", "param_slice_mappings"):
        (inner or {}).pop(key, None)
    change(content if inner is None else inner)
    path.unlink()  # its old bytes stay mapped
    torch.save(content, path)


def swap_names(content):
    shapes = content["param_shapes"][0]
    up, down = shapes["up.weight"], shapes["down.weight"]
    content["param_shapes"][0] = {**shapes, "up.weight": down, "down.weight": up}
    content["module"] |= {key: content["module"][key].T for key in ("up.weight", "down.weight")}


def reorder(content):
    shapes = content["param_shapes"][1]
    content["param_shapes"][1] = dict(reversed(shapes.items()))


def set_shape(name, shape):
    def change(content):
        group = next(shapes for shapes in content["param_shapes"] if name in shapes)
        group[name] = shape

    return change


def put(**entries):
    return lambda content: content.update(entries)


def put_empty(content):
    """Parameters without elements seem shared to DeepSpeed: they have the same address."""
    content["module"] |= {"empty": torch.zeros(0, 3), "other": torch.zeros(2, 0)}
    content["frozen_param_shapes"] |= {"empty": (0, 3), "other": (2, 0)}
    content["shared_params"] |= {"other": "empty"}


def test_parameters_without_elements(copy_of, tmp_path):
    path = copy_of("two") / MODEL
    edit(path, put_empty)
    import_from_deepspeed(path.parent, tmp_path / "c")
    tensors = checkpoint.open(tmp_path / "c").tensors
    assert tensors["model.empty"].shape == (0, 3) and tensors["model.other"].shape == (2, 0)
    folder = copy_of("three")
    for path in folder.glob("*model_states.pt"):
        edit(path, lambda content: content["frozen_param_shapes"].update(empty=(0, 3)))
        edit(path, lambda content: content["frozen_param_fragments"].update(empty=torch.zeros(0)))
    import_from_deepspeed(folder, tmp_path / "d")
    assert checkpoint.open(tmp_path / "d").read("model.empty").shape == (0, 3)


def put_state(index, **entries):
    def change(content):
        optimizer = content["base_optimizer_state" if "base_optimizer_state" in content else "optimizer_state_dict"]
        optimizer["state"][index].update(entries)

    return change


def put_weights(index, weights):
    return lambda content: content["single_partition_of_fp32_groups"].__setitem__(index, weights)


EDITS = {
    MODEL: [
        (put(mp_world_size=2), "2 model-parallel ranks"),
        (put(dp_world_size=4), "4 ranks. does not belong"),
        (put(global_steps=-1), "malformed.*global_steps"),
        (put(module=3), "malformed.*module"),
        (put(param_shapes=None), "other groups"),
        (put(param_shapes=[{3: (1,)}]), "malformed.*param_shapes"),
        (put(shared_params={"head.weight": 3}), "malformed.*shared_params"),
        (put(shared_params={"scale": "up.bias"}), "parameter twice"),
        (set_shape("scale", (-1,)), "malformed.*param_shapes"),
        (set_shape("scale", (2**70,)), "malformed.*param_shapes"),
        (set_shape("scale", (2**50,)), "do not add up"),
        (set_shape("scale", (2,)), "do not add up"),
        (set_shape("embedding.weight", (7, 11)), "master weights of embedding.weight"),
        (lambda content: content["param_shapes"][2].update({"up.bias": (5,)}), "parameter twice"),
        (lambda content: content["module"].pop("up.bias"), "up.bias is no plain tensor"),
        (lambda content: content["module"].update(mean=torch.ones(2, device="meta")), "names .*_rebuild_meta_tensor"),
        (lambda content: content["module"]["up.bias"].add_(1), "master weights of up.bias"),
        (reorder, "master weights of"),
        (swap_names, "master weights of"),
    ],
    OPTIMIZER.format(1): [
        (put(partition_count=[3, 3, 3]), "one of 3 partitions"),
        (put(partition_count="2"), "malformed.*partition_count"),
        (put(group_paddings=[0, 0, 0]), "elements of exp_avg"),
        (put(group_paddings=[9, 9, 9]), "elements of exp_avg"),
        (put(group_paddings=[1]), "must be as many"),
        (put(group_paddings=[-1, 0, 0]), "malformed.*group_paddings"),
        (put(param_alignment_paddings=[[0]] * 3), "other groups"),
        (put(base_optimizer_state=[]), "must be as many"),
        (put(base_optimizer_state={"state": {}, "param_groups": [{"params": [1, 0, 2]}]}), "out of order"),
        (put(single_partition_of_fp32_groups=None), "must be as many"),
        (put_weights(0, torch.zeros(20, 5)), "not a run of numbers"),
        (put_weights(0, torch.zeros(20, dtype=torch.long)), "not a run of numbers"),
        (put_weights(0, torch.zeros(200)[::2]), "not a run of numbers"),
        (put_weights(0, torch.zeros(20).to_sparse()), "refused|no plain tensor"),
        (put_weights(0, torch.zeros(20)), "elements of exp_avg for 20 weights"),
        (put_state(0, step=torch.tensor(4.0)), "of updates .3, 4."),
        (put_state(0, step=torch.tensor(float("nan"))), "step=nan is no number of updates"),
        (put_state(0, step="4"), "step=4 is no number of updates"),
        (put_state(0, exp_avg=torch.zeros(3)), "3 elements of exp_avg"),
        (put_state(0, exp_avg=torch.zeros(())), "other groups or optimizer states"),
    ],
}


@pytest.mark.parametrize("file", EDITS)
def test_what_does_not_fit_is_refused(copy_of, tmp_path, file):
    path = copy_of("one") / file
    whole = path.read_bytes()
    for change, match in EDITS[file]:
        edit(path, change)
        assert_refused(path.parent, tmp_path / "c", match)
        path.write_bytes(whole)


def test_what_does_not_fit_at_stage_3(copy_of, tmp_path):
    folder = copy_of("three")
    path = folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    whole = path.read_bytes()
    for change, match in [
        (put(global_steps=4), "step 4 on 2 ranks. does not belong"),
        (put(frozen_param_fragments=None), "frozen.weight is no plain tensor"),
        (lambda content: content["frozen_param_fragments"].update({"frozen.bias": torch.zeros(9)}), "9 elements of"),
    ]:
        edit(path, change)
        assert_refused(folder, tmp_path / "c", match)
        path.write_bytes(whole)
    for rank in range(2):  # saved with exclude_frozen_parameters, but then placeholders are not saved either
        without = put(frozen_param_shapes=None, frozen_param_fragments=None)
        edit(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", without)
    assert_refused(folder, tmp_path / "c", "no data of frozen.weight")


def test_files_of_other_kinds_are_refused(copy_of, tmp_path):
    folder = copy_of("one")
    for file, match in [
        ("layer_00-model_states.pt", "of a kind that is not imported"),
        ("mp_rank_01_model_states.pt", "of a model-parallel rank"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "mixes ZeRO stages"),
        ("bf16_" + OPTIMIZER.format(0), "are of the same rank"),
    ]:
        (folder / file).touch()
        assert_refused(folder, tmp_path / "c", match)
        (folder / file).unlink()
    for rank, other in [(0, 9), (1, 0), (9, 1)]:
        (folder / OPTIMIZER.format(rank)).rename(folder / OPTIMIZER.format(other))
    assert_refused(folder, tmp_path / "c", "do not add up")


def test_mutated_files_raise_nothing_else(copy_of, tmp_path):
    rng = random.Random(0)

    def mutate(name, data):
        data = bytearray(data)
        if name.endswith(".pkl"):
            for _ in range(rng.choice([1, 1, 4])):
                place = rng.randrange(len(data))
                data[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        return bytes(data)

    folder, refused = copy_of("one"), 0
    for path in [folder / MODEL, folder / OPTIMIZER.format(0)]:
        whole = path.read_bytes()
        for number in range(60):
            rewrite(path, mutate)
            try:
                import_from_deepspeed(folder, tmp_path / f"{path.name}-{number}")
            except CheckpointError:
                refused += 1
            path.unlink()
            path.write_bytes(whole)
    assert refused > 60


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_kind_of_run(tmp_path, num_ranks):
    runs = {**MORE, **(QUICK if num_ranks == 3 else {})}
    said = fork(num_ranks, train_and_save, tmp_path, runs)[0]
    for name in runs:
        import_from_deepspeed(tmp_path / name, tmp_path / f"{name}-imported")
        assert_holds(tmp_path / f"{name}-imported", said[name][0])


@pytest.mark.slow
def test_round_robin(tmp_path):
    runs = {"plain": zero(2), "round_robin": zero(2, options={"round_robin_gradients": True})}
    said = fork(2, train_and_save, tmp_path, runs)[0]
    import_from_deepspeed(tmp_path / "round_robin", tmp_path / "c")
    assert_holds(tmp_path / "c", said["plain"][0])  # of what it says itself, parts are at the places of others
