"""The main job in minutes: train on 2 processes, die halfway, go on with 1, and look at the result."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from shardwright.observe.curve import draw_loss_curve, read_metrics

FOLDER = Path("runs/demo")
SCRIPTS = Path(__file__).parent


def command(num_processes: int, overrides: list[str]) -> list[str]:
    """Return the command line of a training run."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return [*launcher, str(SCRIPTS / "train.py"), "+experiment=demo", *overrides]


def say(text: str) -> None:
    """Print a line of the story."""
    print(f"\n=== {text}", flush=True)


def last_step() -> int:
    """Return the last step in the run's metrics."""
    path = FOLDER / "metrics.jsonl"
    return max((int(r["step"]) for r in read_metrics(path)), default=0) if path.exists() else 0


def train_and_kill(num_processes: int, num_steps: int, overrides: list[str]) -> None:
    """Start the run and kill all its processes once half of the steps are done."""
    line = command(num_processes, overrides)
    print(f"$ {' '.join(line)}", flush=True)
    process = subprocess.Popen(line, start_new_session=True)
    while last_step() < num_steps // 2:
        if process.poll() is not None:
            sys.exit(f"training ended early with status {process.returncode}")
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    """Run the story; overrides on the command line are handed on."""
    overrides = sys.argv[1:]
    num_processes = 1 if torch.cuda.device_count() == 1 else 2  # each process needs a GPU where there are any
    num_steps = next((int(o.split("=")[1]) for o in overrides if o.startswith("train.num_steps=")), 320)
    shutil.rmtree(FOLDER, ignore_errors=True)

    say(f"Training a small Llama on Python's standard library, processes: {num_processes}")
    train_and_kill(num_processes, num_steps, overrides)
    say(f"Killed with SIGKILL after step {last_step()}; the same command goes on, now with 1 process")
    line = command(1, overrides)
    print(f"$ {' '.join(line)}", flush=True)
    subprocess.run(line, check=True)

    say("What it writes now")
    subprocess.run([sys.executable, str(SCRIPTS / "generate.py"), str(FOLDER), "--prompt", "def "], check=True)
    draw_loss_curve(FOLDER / "metrics.jsonl", FOLDER / "loss.png", title="demo")
    held_out = [r["eval_loss"] for r in read_metrics(FOLDER / "metrics.jsonl") if "eval_loss" in r][-1]
    say(f"Held-out loss {held_out:.3f} nats per byte. It all lies here:")
    wandb_runs = ", ".join(str(path) for path in sorted(FOLDER.glob("wandb/offline-run-*")))
    print(f"""  metrics      {FOLDER}/metrics.jsonl
  loss curve   {FOLDER}/loss.png
  config       {FOLDER}/config.yaml
  checkpoints  {FOLDER}/checkpoints/
  wandb        {wandb_runs or "online, see its page above"}

Next:
  train longer      torchrun --nproc-per-node 2 scripts/train.py +experiment=demo train.num_steps={num_steps * 2}
  your own text     torchrun --nproc-per-node 2 scripts/train.py data=files 'data.path=my/*.txt'
  every setting     python scripts/train.py --help
  upload to wandb   wandb sync {FOLDER}/wandb/offline-run-*""")


if __name__ == "__main__":
    main()
