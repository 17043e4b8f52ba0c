"""Save without waiting, and go on after any interruption as if there had been none, in a plain PyTorch program.

python checkpoint_plain.py FOLDER STEPS
"""

import logging
import sys

import torch
from torch import nn

from shardwright import checkpoint

SAVE_EVERY_STEPS = 5


class Progress:
    """How far the run is; anything with these two methods can be saved."""

    step = 0

    def state_dict(self):
        """Return what to save: tensors and JSON values."""
        return {"step": self.step}

    def load_state_dict(self, state):
        """Take it back."""
        self.step = state["step"]


def main(folder: str, num_steps: int) -> float:
    """Train up to a step and return the last loss."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler, progress, pending = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100), Progress(), None
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "progress": progress}
    for newest in checkpoint.find_complete(folder)[:1]:
        checkpoint.load(newest, parts)
        logging.info(f"goes on from {newest}")
    loss = torch.zeros(())
    while progress.step < num_steps:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(progress.step)).to(device)
        loss = (model(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress.step += 1
        if progress.step % SAVE_EVERY_STEPS == 0:  # returns when the state has been copied; the files follow behind
            pending = checkpoint.save(checkpoint.step_folder(folder, progress.step), parts, mode="async")
    if pending is not None:
        pending.wait()  # raises if the checkpoint is not complete on the disk
    return loss.item()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    logging.info(f"loss {main(sys.argv[1], int(sys.argv[2])):.6f}")
