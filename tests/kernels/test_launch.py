"""What was compiled is launched again for arguments of the same kinds, and for no others."""

import pytest
import torch

from shardwright.kernels.triton import launch
from shardwright.kernels.triton.launch import launch_kernel


class Kernel:
    """Stands for a kernel of Triton's: called, it compiles; what it has compiled records its launches."""

    arg_names = ("x", "count", "scale", "BLOCK")

    @staticmethod
    def fn(x, count, scale, BLOCK: "constexpr"):  # noqa: F821
        raise NotImplementedError

    def __init__(self):
        self.num_compiled, self.launched = 0, []

    def __getitem__(self, grid):
        return self._compile

    def _compile(self, *args, **constants):
        self.num_compiled += 1
        launched = self.launched

        class Compiled:
            function = packed_metadata = None

            def run(self, *values):
                launched.append((values[:3], values[9:]))  # after stream, function, what describes it, and hooks

        return Compiled()


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(launch, "_compiled", {})
    return Kernel()


def test_arguments_of_the_same_kinds_are_not_analysed_again(kernel):
    x, y = torch.zeros(64), torch.ones(128)
    launch_kernel(kernel, (7,), x, 32, 0.5, BLOCK=16, num_warps=4)
    launch_kernel(kernel, (5, 2), y, 64, 0.25, BLOCK=16, num_warps=4)
    assert kernel.num_compiled == 1
    ((grid, values),) = kernel.launched
    assert grid == (5, 2, 1) and values[0] is y and values[1:] == (64, 0.25, 16)


@pytest.mark.parametrize(
    ("args", "constants"),
    [
        ((torch.zeros(64, dtype=torch.half), 32, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64)[1:], 32, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((None, 32, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64), 33, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64), 1, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64), 2**40, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64), 32, 0.5), {"BLOCK": 32, "num_warps": 4}),
        ((torch.zeros(64), 32, 0.5), {"BLOCK": 16, "num_warps": 8}),
    ],
)
def test_other_kinds_are_compiled(kernel, args, constants):
    launch_kernel(kernel, (7,), torch.zeros(64), 32, 0.5, BLOCK=16, num_warps=4)
    launch_kernel(kernel, (7,), *args, **constants)
    assert kernel.num_compiled == 2 and not kernel.launched


def test_a_constexpr_by_position_is_refused(kernel):
    with pytest.raises(AssertionError, match="by position"):
        launch_kernel(kernel, (7,), torch.zeros(64), 32, 0.5, 16, num_warps=4)
