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


def compare_losses(metrics: Path, other: Path, window: int) -> float:
    """Return the largest relative difference of two runs' training losses, each the mean of so many logged steps.

    Raises:
        ValueError: the runs have not logged the same steps, or fewer than the window has.
    """
    runs = [{r["step"]: r["loss"] for r in read_metrics(path) if "loss" in r} for path in (metrics, other)]
    if runs[0].keys() != runs[1].keys() or len(runs[0]) < window:
        raise ValueError(
            f"{metrics} and {other} have {len(runs[0])} and {len(runs[1])} steps with a loss; both must have the same, "
            f"{window} at least"
        )
    losses = [list(run.values()) for run in runs]
    means = [[sum(run[i : i + window]) / window for i in range(len(run) - window + 1)] for run in losses]
    return max(abs(a - b) / abs(b) for a, b in zip(*means, strict=True))


def draw_loss_curve(metrics: Path, picture: Path, title: str, other: Path | None = None) -> None:
    """Draw training and held-out loss over tokens into a PNG, and if wanted another run's training loss beside it."""
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
    if other is not None:
        beside = [r for r in read_metrics(other) if "loss" in r]
        tokens, losses = [r["tokens"] / 1e6 for r in beside], [r["loss"] for r in beside]
        axes.plot(tokens, losses, label=f"training, {other.parent.name}", lw=1, color="#6acc65")
    axes.set(xlabel="tokens (millions)", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=130)
    plt.close(figure)
