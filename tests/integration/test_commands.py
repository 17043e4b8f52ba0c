"""The commands as a user types them."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT, TRAIN, assert_close, command, curve, fork, records, small, train


def test_help_and_hydras_own_flags():
    shown = command("--help")
    assert shown.returncode == 0
    for word in ("torchrun --nproc-per-node", "llama_tiny", "stdlib", "num_steps: 1000", "every_steps", "experiment"):
        assert word in shown.stdout, word
    assert "num_steps: 7" in command("--cfg", "job", "train.num_steps=7").stdout
    assert "folder: runs/mine" in command("--cfg", "job", "--resolve", "run.name=mine").stdout
    assert "model/llama_tiny" in command("--info", "defaults").stdout


def test_a_users_own_config_folder(tmp_path, corpus):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    text = (ROOT / "conf" / "model" / "llama_tiny.yaml").read_text()
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(text.replace("name: llama_tiny", "name: mine"))
    done = command("--config-dir", str(tmp_path / "conf"), "model=mine", "--cfg", "job")
    assert "name: mine" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_sweep_gives_each_run_its_folder(tmp_path, corpus):
    overrides = small(corpus, "ignored", "train.num_steps=2")
    overrides = [o for o in overrides if not o.startswith("run.folder")]
    done = command(
        "-m",
        *overrides,
        "optim.peak_lr=1e-3,2e-3",
        f"hydra.sweep.dir={tmp_path}",
        "hydra.sweep.subdir=${hydra:job.num}",
    )
    assert done.returncode == 0, done.stderr
    for number, lr in (("0", 1e-3), ("1", 2e-3)):
        found = records(tmp_path / number)
        assert list(found) == [1, 2] and found[2]["lr"] == pytest.approx(lr * 2 / 3)
        assert (tmp_path / number / "checkpoints" / "step_00000002" / "manifest.safetensors").exists()


def test_torchrun_killed_whole_leaves_no_orphan_and_goes_on(tmp_path, corpus):
    """SIGKILL to torchrun alone; its workers must not train on. The same command goes on, one folder, one log."""
    overrides = small(corpus, tmp_path, "train.num_steps=3000", "checkpoint.every_steps=5", "observe.every_steps=5")
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(TRAIN),
        *overrides,
    ]
    log = tmp_path.with_suffix(".log")
    with log.open("wb") as sink:
        process = subprocess.Popen(line, cwd=ROOT, stderr=sink, start_new_session=True)
    deadline = time.monotonic() + 180
    while not (tmp_path / "checkpoints" / "step_00000010" / "manifest.safetensors").exists():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while alive := subprocess.run(["pgrep", "-af", f"run.folder={tmp_path}"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, f"workers outlive torchrun: {alive}"
        time.sleep(0.1)
    reached = max(records(tmp_path))
    done = command(*overrides, f"train.num_steps={reached + 10}", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("resumed from") == 1
    steps = [
        json.loads(row)["step"] for row in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"loss"' in row
    ]
    assert steps == sorted(set(steps)) and steps[-1] == reached + 10


def test_two_runs_cannot_share_a_folder(tmp_path, corpus):
    from shardwright.trainer.guards import lock_folder

    with lock_folder(tmp_path):
        done = command(*small(corpus, tmp_path, "train.num_steps=1"))
    assert done.returncode == 2
    assert f"run.folder={tmp_path} is in use by process {os.getpid()} on " in done.stderr


@pytest.mark.slow
def test_standard_library_with_the_defaults_learns(tmp_path):
    """The command of the README, shortened: llama_tiny on stdlib, three steps, no network."""
    done = command(
        "model=llama_tiny", "data=stdlib", "train.num_steps=3", "observe.every_steps=1", f"run.folder={tmp_path}",
        "observe.wandb=disabled", env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [r["loss"] for r in records(tmp_path).values()]
    assert 5.5 < losses[0] < 6 and losses[2] < losses[0] - 0.3
    assert "held-out loss" in done.stderr


def test_generate_and_report(tmp_path, corpus):
    fork(1, train, small(corpus, tmp_path, "train.num_steps=3", "evaluate.every_steps=1"))
    said = [
        command(str(tmp_path), "--prompt", "7: ", "--tokens", "20", script=ROOT / "scripts" / "generate.py")
        for _ in range(2)
    ]
    assert said[0].returncode == 0, said[0].stderr
    assert said[0].stdout.startswith("7: ") and said[0].stdout == said[1].stdout
    drawn = command(str(tmp_path), script=ROOT / "scripts" / "report.py")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    nothing = command(str(tmp_path / "none"), script=ROOT / "scripts" / "generate.py")
    assert nothing.returncode == 1 and "no complete checkpoint" in nothing.stderr and "Traceback" not in nothing.stderr


@pytest.mark.slow
def test_from_a_wheel(tmp_path, corpus):
    """A wheel in an environment that sees the dependencies, but not this checkout."""
    wheel = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert wheel.returncode == 0, wheel.stderr
    (built,) = tmp_path.glob("shardwright-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    site = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    python = tmp_path / "env" / "bin" / "python"
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--disable-pip-version-check", str(built)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    import torch

    (site / "dependencies.pth").write_text(os.path.dirname(os.path.dirname(torch.__file__)) + "\n")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)

    def inside(*line):
        return subprocess.run(line, capture_output=True, text=True, env=env, cwd=tmp_path)

    where = inside(python, "-c", "import shardwright, shardwright.kernels; print(shardwright.kernels.__file__)")
    assert where.stdout.startswith(str(site)), where.stdout + where.stderr
    for name in ("kernels", "trainer", "data", "checkpoint", "models", "conf", "scripts"):
        assert "ModuleNotFoundError" in inside(python, "-c", f"import {name}").stderr, name
    overrides = small(corpus, tmp_path / "run", "train.num_steps=2")
    done = inside(python, tmp_path / "env" / "bin" / "shardwright-train", *overrides)
    assert done.returncode == 0, done.stderr
    fork(1, train, small(corpus, tmp_path / "here", "train.num_steps=2"))
    assert_close(curve(tmp_path / "run"), curve(tmp_path / "here"))


def test_import_kernels_never_finds_ours():
    """Neither in a script, whose folder Python puts first on its path, nor under pytest."""
    find = "import sys, importlib.util as u; sys.path[0] = 'scripts'; print([u.find_spec(n) for n in ('kernels', 'trainer')])"
    done = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[None, None]", done.stdout + done.stderr
    assert importlib.util.find_spec("kernels") is None


@pytest.mark.slow
def test_the_demo_in_short(tmp_path):
    """Trains on 2 processes, is killed, goes on with 1, and leaves all that it says."""
    line = [sys.executable, str(ROOT / "scripts" / "demo.py"), "train.num_steps=40", "checkpoint.every_steps=10"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "demo"
    for name in ("metrics.jsonl", "loss.png", "config.yaml", "checkpoints", "wandb"):
        assert (folder / name).exists() and f"runs/demo/{name}" in done.stdout, name
    assert "resumed from runs/demo/checkpoints/step_000000" in done.stderr
    assert [step for step in records(folder)][-1] == 40
