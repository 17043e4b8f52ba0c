"""Log lines: one voice at INFO, every process from WARNING on with its place in front."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

CONSOLE = Console(stderr=True, highlight=False, soft_wrap=True)


def configure_logging(rank: int, num_processes: int) -> None:
    """Send this package's log to standard error. Rank 0 speaks from INFO on, the others from WARNING on."""
    level = logging.INFO if rank == 0 else logging.WARNING
    place = f"[rank {rank}/{num_processes}] " if num_processes > 1 and rank else ""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=CONSOLE, show_path=False, show_level=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter(f"{place}%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"%(asctime)s {place}%(message)s", "%H:%M:%S"))
    logger = logging.getLogger("shardwright")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
