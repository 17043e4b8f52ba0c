"""Continue a text with a trained model: generate.py RUN_OR_CHECKPOINT [--prompt TEXT] [--tokens N]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from shardwright import checkpoint
from shardwright.checkpoint import CheckpointError
from shardwright.conf.load import from_dict
from shardwright.conf.schema import TrainConfig
from shardwright.data import DataError
from shardwright.data.tokenize import load_tokenizer
from shardwright.kernels import Kernels
from shardwright.models.registry import FAMILIES


def load_model(path: Path) -> tuple[TrainConfig, nn.Module]:
    """Load the plain model of a checkpoint on the CPU, with the config that trained it.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    newest = next(iter([*checkpoint.find_complete(path / "checkpoints"), *checkpoint.find_complete(path)]), path)
    config = from_dict(checkpoint.read_values(newest)["progress.config"])
    model = FAMILIES[config.model.kind].build(config.model, Kernels())
    checkpoint.load(newest, {"model": model})
    return config, model


@torch.no_grad()
def continue_text(
    model: nn.Module, ids: list[int], num_tokens: int, *, context: int, temperature: float, generator: torch.Generator
) -> list[int]:
    """Sample `num_tokens` tokens after `ids`, each from a full pass over the last `context` tokens.

    A temperature of 0 takes the likeliest token.
    """
    sampled: list[int] = []
    for _ in range(num_tokens):
        window = torch.tensor([(ids + sampled)[-context:]])
        length = window.shape[1]
        bounds = torch.tensor([0, length], dtype=torch.int32)
        logits = model(window, torch.arange(length)[None], bounds, length)[0, -1].float()
        if temperature == 0:
            sampled.append(int(logits.argmax()))
        else:
            sampled.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
    return sampled


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Continue a text with a trained model, on the CPU.")
    parser.add_argument("path", type=Path, help="run folder (its newest checkpoint) or a checkpoint")
    parser.add_argument("--prompt", default="def ", help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        config, model = load_model(args.path)
        tokenizer = load_tokenizer(config.data.tokenizer)
    except (CheckpointError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    ids = [int(i) for i in tokenizer.encode(args.prompt)] or [tokenizer.end_id]
    generator = torch.Generator().manual_seed(args.seed)
    context = config.train.sequence_length
    sampled = continue_text(model, ids, args.tokens, context=context, temperature=args.temperature, generator=generator)
    print(args.prompt + tokenizer.decode(sampled))


if __name__ == "__main__":
    main()
