"""Draw the loss curve of a run, and compare it with another's: report.py RUN_FOLDER [--beside OTHER] [--out PNG]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shardwright.observe.curve import compare_losses, draw_loss_curve

WINDOW = 10  # logged steps that are averaged to compare losses


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Draw training and held-out loss of a run from its metrics.jsonl.")
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("--beside", type=Path, help="folder of a run with the same steps, to draw and compare")
    parser.add_argument("--out", type=Path, help="picture to write (default: loss.png in the run folder)")
    args = parser.parse_args()
    metrics, *others = (folder / "metrics.jsonl" for folder in (args.folder, args.beside) if folder is not None)
    for path in (metrics, *others):
        if not path.is_file() or not path.stat().st_size:
            sys.exit(f"{path} holds no metrics; give the folder of a run that has logged a step")
    picture = args.out or args.folder / "loss.png"
    draw_loss_curve(metrics, picture, args.folder.name, *others)
    print(picture)
    for other in others:
        try:
            gaps = [compare_losses(metrics, other, window) for window in (1, WINDOW)]
        except ValueError as error:
            sys.exit(str(error))
        print(f"training losses differ by {gaps[0]:.3%} at most, means of {WINDOW} logged steps by {gaps[1]:.3%}")


if __name__ == "__main__":
    main()
