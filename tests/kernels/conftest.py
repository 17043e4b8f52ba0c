"""Without a GPU the kernels' code is interpreted by Triton, which has to know that before it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401 - reads the variable

    import shardwright.kernels.triton  # noqa: F401
