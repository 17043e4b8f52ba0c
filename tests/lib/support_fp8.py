"""FP8 in Triton's interpreter."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture
def casts_as_on_a_gpu(monkeypatch):
    """On its own, the interpreter truncates to e4m3, and knows no NaN there."""
    plain = interpreter._convert_float

    def convert(data, source, target, rounding):
        if target == tl.float8e4nv:
            return torch.tensor(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if source == tl.float8e4nv:
            return torch.tensor(data).view(torch.float8_e4m3fn).half().numpy().view(np.uint16)
        return plain(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
