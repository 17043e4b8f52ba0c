"""Train a transformer: torchrun --nproc-per-node N scripts/train.py [KEY=VALUE ...]. See --help for every setting."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from shardwright.conf import ConfigError
from shardwright.conf.load import COMPOSITION_ERRORS, decode, explain, to_dict
from shardwright.conf.schema import TrainConfig

REFUSED = 2  # exit status of a run that was refused, not one that failed


@hydra.main(version_base="1.3", config_path="pkg://shardwright.conf", config_name="train")
def run(tree: DictConfig) -> None:
    """Decode the composed config and train."""
    try:
        start(decode(tree))
    except Exception as error:
        if type(error).__module__.startswith("shardwright."):
            refuse(error)
        raise


def start(config: TrainConfig) -> None:
    """Train as the config says."""
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if num_processes > 1:
            raise ConfigError("-m sweeps over runs of one process; start it without torchrun")
        config = move_folder(config, HydraConfig.get().runtime.output_dir)
    elif HydraConfig.get().run.dir != ".":
        raise ConfigError(f"hydra.run.dir={HydraConfig.get().run.dir} is not used; files go to run.folder; set that")
    from shardwright.observe.log import configure_logging  # torch is not loaded for a config that is refused
    from shardwright.trainer.build import build
    from shardwright.trainer.loop import train

    configure_logging(int(os.environ.get("RANK", 0)), num_processes)
    started = build(config, to_dict(config))
    with started.cleanup:
        train(started)


def move_folder(config: TrainConfig, folder: str) -> TrainConfig:
    """Give a run of a sweep a folder of its own, and its checkpoints too where they were to lie in the old one."""
    checkpoints = config.checkpoint.folder.replace(config.run.folder, folder, 1)
    return replace(
        config,
        run=replace(config.run, folder=folder),
        checkpoint=replace(config.checkpoint, folder=checkpoints),
    )


def main() -> None:
    """Run the command; what cannot be run ends with status 2 and one message."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to the line below instead of being printed
    try:
        run()
    except COMPOSITION_ERRORS as error:
        refuse(explain(error))


def refuse(error: Exception) -> NoReturn:
    """Print the message once, on rank 0; another rank speaks only if rank 0 has nothing to say."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(3)  # torchrun ends this process as soon as rank 0 has ended
    place = f"[rank {rank}] " if rank else ""
    print(f"{place}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.exit(REFUSED)


if __name__ == "__main__":
    main()
