"""The command that looks into checkpoints, as a user types it."""

import json
import math
import shutil
import sys
from dataclasses import replace
from subprocess import run as run_process

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import ROOT, command, fork, started_world
from support_checkpoints import data_file, flip_bit, refused, rows

from shardwright import checkpoint
from shardwright.checkpoint import FlatSlice, manifest
from shardwright.scripts import checkpoints, convert

pytest_plugins = ["support_checkpoints"]


def test_help_does_not_wait_for_torch():
    for script in ("checkpoints", "convert"):
        code = (
            f"import sys; from shardwright.scripts import {script} as s\n"
            "try: s.main(['--help'])\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
        )
        done = run_process([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.startswith("usage:") and done.stdout.endswith("\n0 False\n"), done.stdout + done.stderr


def test_list(use, own):
    (own / "checkpoints" / "step_00000006").mkdir()
    (own / "checkpoints" / "step_00000006" / "a.safetensors").write_bytes(b"x" * 1000)
    shutil.copytree(own / "checkpoints" / "step_00000002", own / "checkpoints" / "step_00000010")
    flip_bit(own / "checkpoints" / "step_00000010" / manifest.NAME)
    done = use(checkpoints, "list", own)
    table = rows(done.out)
    assert done.status == 0
    assert list(table)[1:] == ["step_00000002", "step_00000004", "step_00000006", "step_00000010"]
    step, state, size, tensors, parameters, tokens, when, name = table["step_00000004"]
    archive = checkpoint.open(own / "checkpoints" / "step_00000004")
    wanted = sum(math.prod(info.shape) for name, info in archive.tensors.items() if name.startswith("model."))
    assert (step, state, tokens, name) == ("4", "complete", "512", "mine")
    assert (tensors, parameters) == (str(len(archive.tensors)), f"{wanted:,}") and size.endswith("kB")
    assert when[:2] == "20" and when[10] == " " and len(when) == 16
    assert table["step_00000006"][:3] == ["6", "not finished", "1.0 kB"]
    assert table["step_00000010"][:2] == ["10", "damaged"]
    assert f"step_00000010/{manifest.NAME} is damaged" in done.out
    alone = use(checkpoints, "list", own / "checkpoints" / "step_00000004")
    assert rows(alone.out)["step_00000004"] == table["step_00000004"]


def test_tree(use, saved):
    done = use(checkpoints, "tree", saved)
    assert done.status == 0
    for words in (
        "wide  float64 [6, 10, 3], 1.4 kB, boxes: 6, files: 1",
        "none  int16 [0, 4], 0 bytes",
        "num_updates  4",
        'name  "mine"',
    ):
        assert words in done.out
    short = use(checkpoints, "tree", saved, "--depth", 1).out
    assert "odd  tensors: 5" in short and "wide" not in short and "num_updates" not in short
    boxes = use(checkpoints, "tree", saved, "--boxes").out
    assert boxes.count("[0:1, 0:10, 0:3] in ") == 1 and "from byte" in boxes
    assert use(checkpoints, "tree", saved, "--depth", 1, "--json").status == 2


def test_tree_as_json(use, saved):
    archive = checkpoint.open(saved)
    told = json.loads(use(checkpoints, "tree", saved, "--json").out)
    assert told["values"] == archive.values and told["files"] == archive.manifest.files
    assert told["tensors"].keys() == archive.tensors.keys()
    wide = {"dtype": "float64", "shape": [6, 10, 3], "bytes": 1440, "num_boxes": 6}
    assert told["tensors"]["odd.wide"] == wide
    boxes = json.loads(use(checkpoints, "tree", saved, "--json", "--boxes").out)["tensors"]["odd.wide"]["boxes"]
    assert sum(math.prod(box["sizes"]) for box in boxes) == 180
    for box in boxes:
        with safe_open(f"{saved}/{box['file']}", framework="pt") as file:
            assert any(list(file.get_slice(key).get_shape()) == box["sizes"] for key in file.keys())  # noqa: SIM118


def test_names_cannot_steer_the_terminal(use, tmp_path):
    with checkpoint.create(tmp_path / "c") as writer:
        writer.add("model.\x1b[31mred[bold]", torch.zeros(2))
    for name in ("tree", "stats"):
        done = use(checkpoints, name, tmp_path / "c")
        assert "\\x1b[31mred[bold]" in done.out and "\x1b" not in done.out


def test_stats(use, saved):
    done = use(checkpoints, "stats", saved)
    table, archive = rows(done.out), checkpoint.open(saved)
    assert done.status == 0 and table.keys() >= archive.tensors.keys()
    for name in archive.tensors:
        x = archive.read(name).double().flatten()
        finite = x[x.isfinite()]
        _, _, *shown, num_nan, num_inf = table[name]
        assert (int(num_nan or 0), int(num_inf or 0)) == (int(x.isnan().sum()), int(x.isinf().sum()))
        if len(finite):
            std = finite.std() if len(finite) > 1 else torch.zeros(())
            wanted = [finite.min(), finite.max(), finite.mean(), std, finite.norm()]
            assert np.allclose([float(text) for text in shown], [float(x) for x in wanted], rtol=1e-5, atol=1e-9), name
        else:
            assert shown == [""] * 5
    some = rows(use(checkpoints, "stats", saved, "--tensors", "odd.*").out)
    assert {name for name in some if "." in name and not name.endswith(".safetensors")} == {
        name for name in archive.tensors if name.startswith("odd.")
    }
    assert "odd.x*" in refused(use(checkpoints, "stats", saved, "--tensors", "odd.x*"))


def save_slices(path):
    world = started_world()

    class Part:
        def state_dict(self):
            start, end = ((0, 30), (30, 120))[world.rank]
            return {"weight": FlatSlice((12, 10), start, torch.arange(start, end).float())}

        def load_state_dict(self, state):
            raise AssertionError

    checkpoint.save(path, {"model": Part()}, options=checkpoint.SaveOptions(balance=False))


def test_stats_show_the_balance_of_ranks(use, tmp_path):
    fork(2, save_slices, tmp_path / "c")
    table = rows(use(checkpoints, "stats", tmp_path / "c").out)
    assert table["model.weight"][2:6] == ["0", "119", "59.5", f"{torch.arange(120.0).std():.6g}"]
    assert table["rank 0"] == ["1", "120 bytes", "50.0%"] and table["rank 1"] == ["1", "360 bytes", "150.0%"]
    assert use(checkpoints, "verify", tmp_path / "c").status == 0


def test_diff_of_equals(use, saved, tmp_path):
    assert use(convert, "reshard", saved, tmp_path / "c", "--files", 3).status == 0
    done = use(checkpoints, "diff", saved, tmp_path / "c")
    assert done.status == 0 and done.out.count("\n") == 1 and "equal, 0 differ; values: 0 differ" in done.out


def test_diff(use, tmp_path):
    x = torch.tensor([1.0, 2.0, -0.0, math.nan, math.inf])
    tensors = {
        "same": (x, x),
        "far": (x, torch.tensor([1.0, 2.5, 0.0, math.nan, math.inf])),
        "infinite": (x, torch.tensor([1.0, 2.0, -0.0, 7.0, math.inf])),
        "cast": (torch.tensor([1.0, 1 + 2**-9]), torch.tensor([1.0, 1.0], dtype=torch.bfloat16)),
        "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
        "large": (torch.tensor([2**60]), torch.tensor([2**60 + 1])),
        "only_a": (x, None),
        "only_b": (None, x),
    }
    for side, values in enumerate(({"v.x": {"a": 1, "b": 2}, "w": 1}, {"v.x": {"a": 1, "b": 3}, "u": None})):
        with checkpoint.create(tmp_path / "ab"[side]) as writer:
            for name, pair in tensors.items():
                if pair[side] is not None:
                    writer.add(name, pair[side])
            writer.values |= values
    done = use(checkpoints, "diff", tmp_path / "a", tmp_path / "b")
    assert done.status == 1
    table = rows(done.out)
    assert "same" not in table
    assert table["far"] == ["float32 [5]", "float32 [5]", "2", "0.5", "0.2"]  # the sign of a zero is a bit, too
    assert table["infinite"][2:] == ["1", "inf", "inf"]
    assert table["cast"] == ["float32 [2]", "bfloat16 [2]", "1", "0.00195", "0.00195"]
    assert table["shape"] == ["float32 [2, 3]", "float32 [3, 2]", "", "", ""]
    assert table["large"][2] == "1"
    assert table["only_a"][:2] == ["float32 [5]", "none"] and table["only_b"][:2] == ["none", "float32 [5]"]
    assert (table["v.x.b"], table["w"], table["u"]) == (["2", "3"], ["1", "none"], ["none", "null"])
    assert "v.x.a" not in table
    assert "tensors: 1 equal, 7 differ; values: 3 differ" in done.out


def test_verify(use, own, saved):
    done = use(checkpoints, "verify", own, saved)
    assert done.status == 0 and "checkpoints: 3 whole, 0 damaged; " in done.out and "/s\n" in done.out
    (own / "checkpoints" / "step_00000004" / manifest.NAME).unlink()
    done = use(checkpoints, "verify", own)
    assert done.status == 0 and "step_00000004 is not finished\n" in done.out and "1 whole" in done.out


def test_verify_names_the_file_of_a_flipped_bit(own):
    file = flip_bit(data_file(own / "checkpoints" / "step_00000002"))
    done = command("verify", str(own), script=ROOT / "scripts" / "checkpoints.py")
    assert done.returncode == 1 and done.stderr == ""
    damaged, summary = done.stdout.splitlines()
    assert damaged.startswith(f"{file}: ") and "checksum" in damaged
    assert summary.startswith("checkpoints: 1 whole, 1 damaged; ")


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-1])])
def test_verify_names_a_file_that_is_missing_or_short(use, own, damage):
    file = data_file(own / "checkpoints" / "step_00000002")
    damage(file)
    done = use(checkpoints, "verify", own)
    assert done.status == 1 and done.out.startswith(f"{file} ")


def change_header(path, old, new):
    """Change the header of a data file, and make its checksums right again."""
    file = data_file(path)
    data = file.read_bytes()
    assert len(old) == len(new) and data.count(old) == 1
    data = data.replace(old, new)
    file.write_bytes(data)
    held = manifest.decode((path / manifest.NAME).read_bytes(), "")
    assert list(held.files) == [file.name]
    held = replace(held, digests=np.array(manifest.digest_blocks(memoryview(data)), dtype=np.uint64))
    (path / manifest.NAME).write_bytes(manifest.encode(held))
    return file


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"odd.flags"', b'"odd.flaps"', "odd.flaps"),
        (b'"shape": [2, 3]', b'"shape": [3, 2]', "odd.floats as ([3, 2]"),
        (b"", b"", "malformed"),
    ],
)
def test_verify_holds_headers_against_the_manifest(use, own, old, new, words):
    path = own / "checkpoints" / "step_00000002"
    if words == "malformed":
        old = data_file(path).read_bytes()[8:40]
        new = b"[" + old[1:]
    file = change_header(path, old, new)
    assert list(checkpoint.open(path).verify()) == []
    done = use(checkpoints, "verify", path)
    assert done.status == 1 and done.out.startswith(f"{file}: its header ") and words in done.out


@pytest.mark.parametrize("line", ["list", "tree", "stats", "verify", "diff"])
def test_no_checkpoint(use, saved, tmp_path, line):
    (tmp_path / "step_00000001").mkdir()
    for path in ("nothing", "step_00000001"):
        said = refused(use(checkpoints, line, *([saved] if line == "diff" else []), tmp_path / path))
        assert said.startswith(f"CheckpointError: {tmp_path / path} ") and manifest.NAME in said
    assert "give a URL" in refused(use(checkpoints, line, *([saved] if line == "diff" else []), "nonsense://x/y"))


def test_checkpoints_by_url(use, saved):
    assert use(convert, "reshard", saved, "memory://tools/run/checkpoints/step_00000004").status == 0
    url = "memory://tools/run"
    assert rows(use(checkpoints, "list", url).out)["step_00000004"][7] == "mine"
    assert use(checkpoints, "verify", url).status == 0
    assert use(checkpoints, "diff", f"{url}/checkpoints/step_00000004", saved).status == 0
