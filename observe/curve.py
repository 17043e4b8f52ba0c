"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the objects of a metrics.jsonl, in order."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def draw_loss_curve(metrics: Path, picture: Path, title: str) -> None:
    """Draw training and held-out loss over tokens into a PNG."""
    records = read_metrics(metrics)
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "eval_loss" in r]
    tokens_per_step = steps[-1]["tokens"] / steps[-1]["step"]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["tokens"] / 1e6 for r in steps], [r["loss"] for r in steps], label="training", lw=1, color="#4878cf")
    axes.plot(
        [r["step"] * tokens_per_step / 1e6 for r in evaluations],
        [r["eval_loss"] for r in evaluations],
        "o-",
        label="held out",
        color="#d1603d",
    )
    axes.set(xlabel="tokens (millions)", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=130)
    plt.close(figure)
