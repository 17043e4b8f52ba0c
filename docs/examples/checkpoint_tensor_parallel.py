"""As checkpoint_plain.py, with tensor parallelism: each process holds and saves its part of every matrix.

    torchrun --nproc-per-node 2 checkpoint_tensor_parallel.py FOLDER STEPS

Start it again with any number of processes, or go on with one of the other examples: the checkpoint is the same.
"""

import logging
import os
import sys

import torch
import torch.distributed as dist
from checkpoint_plain import SAVE_EVERY_STEPS, Progress
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardwright import checkpoint


def main(folder: str, num_steps: int) -> float:
    """Train up to a step and return the last loss."""
    torch.manual_seed(0)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group()
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler, progress, pending = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100), Progress(), None
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "progress": progress}
    for newest in checkpoint.find_complete(folder)[:1]:
        checkpoint.load(newest, parts)
        logging.info(f"goes on from {newest}")
    loss = torch.zeros((), device=device)
    while progress.step < num_steps:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(progress.step)).to(device)
        loss = (model(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress.step += 1
        if progress.step % SAVE_EVERY_STEPS == 0:  # collective; every process writes its share
            pending = checkpoint.save(checkpoint.step_folder(folder, progress.step), parts, mode="async")
    if pending is not None:
        pending.wait()
    dist.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    logging.info(f"loss {main(sys.argv[1], int(sys.argv[2])):.6f}")
