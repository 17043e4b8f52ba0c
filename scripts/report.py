"""Draw the loss curve of a run: report.py RUN_FOLDER [--out PNG]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shardwright.observe.curve import draw_loss_curve


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Draw training and held-out loss of a run from its metrics.jsonl.")
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="picture to write (default: loss.png in the run folder)")
    args = parser.parse_args()
    metrics = args.folder / "metrics.jsonl"
    if not metrics.is_file() or not metrics.stat().st_size:
        sys.exit(f"{metrics} holds no metrics; give the folder of a run that has logged a step")
    picture = args.out or args.folder / "loss.png"
    draw_loss_curve(metrics, picture, title=args.folder.name)
    print(picture)


if __name__ == "__main__":
    main()
