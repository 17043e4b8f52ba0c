import json
import os
import random

os.environ["OMP_NUM_THREADS"] = "1"  # one intra-op thread per process, and none before a fork
os.environ.setdefault("WANDB_SILENT", "true")
if not os.path.exists("/dev/nvidiactl"):  # no GPU: Triton interprets kernels, if it is told before its import
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep the caches of the datasets library out of the user's home."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A jsonl file of 400 documents of 20 to 700 bytes, each unlike any other."""
    path = tmp_path_factory.mktemp("corpus") / "words.jsonl"
    rng = random.Random(7)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(300)]
    with path.open("w") as file:
        for number in range(400):
            text = f"{number}: " + " ".join(rng.choices(words, k=rng.randint(3, 100)))
            file.write(json.dumps({"text": text}) + "\n")
    return path
