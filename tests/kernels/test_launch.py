"""What was compiled is launched again for arguments of the same kinds, and for no others; descriptors are kept."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.tools.tensor_descriptor import TensorDescriptor

from shardwright.kernels.triton import launch
from shardwright.kernels.triton.launch import kept, launch_kernel
from shardwright.kernels.triton.operator import operator


class Kernel:
    """Stands for a kernel of Triton's: called, it compiles; what it has compiled records its launches."""

    arg_names = ("x", "count", "scale", "BLOCK")

    @staticmethod
    def fn(x, count, scale, BLOCK: "constexpr"):  # noqa: F821
        raise NotImplementedError

    def __init__(self, run=None):
        self.num_compiled, self.launched, self.run = 0, [], run

    def __getitem__(self, grid):
        return self._compile

    def _compile(self, *args, **constants):
        self.num_compiled += 1
        metas = [SIZES for arg in args if isinstance(arg, TensorDescriptor)]
        metadata = SimpleNamespace(tensordesc_meta=metas)
        run = self.run or self._record
        return SimpleNamespace(run=run, function=7, packed_metadata=(4, 1, 0), metadata=metadata)

    def _record(self, *values):
        self.launched.append((values[:3], values[9:]))  # after stream, function, what describes it, and hooks


SIZES = {"swizzle": 3, "elem_size": 4, "elem_type": 7, "block_size": [16, 16], "fp4_padded": False}


@kept
def tile(base, rows, size):
    return TensorDescriptor(base, [rows, 16], [16, 1], [size, 16])


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    monkeypatch.setattr(launch, "_ready", {})
    return Kernel()


def test_arguments_of_the_same_kinds_are_not_analysed_again(kernel):
    x, y = torch.zeros(64), torch.nn.Parameter(torch.ones(128))
    launch_kernel(kernel, (7,), x, 32, 0.5, BLOCK=16, num_warps=4)
    launch_kernel(kernel, (5, 2), y, 64, 0.25, BLOCK=16, num_warps=4)
    assert kernel.num_compiled == 1
    ((grid, values),) = kernel.launched
    assert grid == (5, 2, 1) and values[0] is y and values[1:] == (64, 0.25, 16)


def test_of_a_tensor_on_a_gpu_the_address_is_taken(kernel, monkeypatch):
    class OnGpu:
        dtype, is_cuda = torch.half, True

        def data_ptr(self):
            return 4096

    monkeypatch.setattr(launch, "Tensor", OnGpu)
    for _ in range(2):
        launch_kernel(kernel, (7,), OnGpu(), 32, 0.5, BLOCK=16)
    assert kernel.launched == [((7, 1, 1), (4096, 32, 0.5, 16))]


@pytest.mark.parametrize(
    ("args", "constants"),
    [
        ((torch.zeros(64, dtype=torch.half), 32, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64)[1:], 32, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((None, 32, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64), 33, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64), 1, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64), 2**40, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64), -(2**40), 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64), True, 0.5), {"BLOCK": 16, "num_warps": 4}),
        ((torch.zeros(64), 32, 0.5), {"BLOCK": 32, "num_warps": 4}),
        ((torch.zeros(64), 32, 0.5), {"BLOCK": 16, "num_warps": 8}),
    ],
)
def test_other_kinds_are_compiled(kernel, args, constants):
    launch_kernel(kernel, (7,), torch.zeros(64), 32, 0.5, BLOCK=16, num_warps=4)
    launch_kernel(kernel, (7,), *args, **constants)
    assert kernel.num_compiled == 2 and not kernel.launched


def test_what_triton_tells_apart_is_of_different_kinds(kernel):
    x = torch.zeros(64, 16)
    values = [1, 2, 3, 16, 0, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**62, 2**63, True, False, 0.5, None]
    values += [x, x[1:], x.view(-1)[1:], x.half(), torch.nn.Parameter(x), torch.zeros(3, dtype=torch.int32)]
    values += [tile(x, 64, 16), tile(x, 64, 32), tile(x[1:], 63, 16), TensorDescriptor(x, [64, 16], [16, 1], [16, 16])]
    tags = {}
    for value in values:
        launch._ready.clear()
        launch_kernel(kernel, (7,), value, 2, None, BLOCK=16)
        (key,) = launch._ready
        tags.setdefault(key, set()).add(str(native_specialize_impl(BaseBackend, value, False, True, True)))
    assert all(len(tag) == 1 for tag in tags.values()), tags
    assert len(tags) < len(values) - 5  # and few others


def test_a_constexpr_by_position_is_refused(kernel):
    with pytest.raises(AssertionError, match="by position"):
        launch_kernel(kernel, (7,), torch.zeros(64), 32, 0.5, 16, num_warps=4)


def test_a_descriptor_is_kept_and_its_tensor_is_not():
    x = torch.zeros(64, 16)
    one = tile(x, 64, 32)
    assert tile(x, 64, 32) is one and tile(x.view(-1)[:16], 64, 32) is one
    others = [tile(x[1:], 64, 32), tile(x.half(), 64, 32), tile(x, 63, 32), tile(x, 64, 16)]
    assert len({id(other) for other in (one, *others)}) == 5
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_only_so_many_descriptors_are_kept(monkeypatch):
    monkeypatch.setattr(launch, "_KEPT", 2)
    few = kept(lambda base, rows: TensorDescriptor(base, [rows, 16], [16, 1], [16, 16]))
    x = torch.zeros(64, 16)
    first, last = [few(x, rows) for rows in (1, 2, 3)][::2]
    assert few(x, 3) is last and few(x, 1) is not first


def test_other_descriptors_are_compiled(kernel):
    x = torch.zeros(64, 16)
    for descriptor in (tile(x, 64, 32), tile(x[16:], 48, 32)):
        launch_kernel(kernel, (7,), descriptor, 32, 0.5, BLOCK=16)
    assert kernel.num_compiled == 1
    for descriptor in (tile(x, 64, 16), tile(x.half(), 64, 32), TensorDescriptor(x, [64, 16], [16, 1], [8, 16])):
        launch_kernel(kernel, (7,), descriptor, 32, 0.5, BLOCK=16)
    assert kernel.num_compiled == 4


class Driver:
    """Stands for Triton's: encodes a descriptor to its own arguments, and notes which."""

    def __init__(self):
        self.utils, self.encoded = self, []

    def fill_tma_descriptor(self, *args):
        self.encoded.append(args)
        return args

    fill_tma_descriptor_tiled = fill_tma_descriptor


@pytest.fixture
def launcher(monkeypatch):
    """Return Triton's launcher of a kernel with two descriptors; what it calls at last, and the driver."""
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    made = object.__new__(CudaLauncher)
    names = ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align")
    vars(made).update(dict.fromkeys((*names, "launch_cooperative_grid", "launch_pdl", "gsan_enabled"), 0))
    vars(made).update(num_ctas=1, arg_annotations=[], kernel_signature=b"")
    called = []
    signature = {"x": "tensordesc<fp32[16, 16]>", "count": "i32", "y": "tensordesc<fp32[16, 16]>", "BLOCK": "constexpr"}
    made.launch = wrap_handle_tensordesc(lambda *args: called.append(args), signature, [SIZES, SIZES])
    return made, called, driver


def flat(args):
    return [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]


def test_the_gpu_is_given_what_triton_gives_it(kernel, launcher):
    run, called, driver = launcher
    kernel.run = run
    x, y = torch.zeros(64, 16), torch.ones(32, 16)
    run(7, 1, 1, 5, 7, (4, 1, 0), None, None, None, tile(x, 64, 16), 32, tile(y, 32, 16), 16)
    assert len(driver.encoded) == 2
    launch_kernel(kernel, (7,), tile(x, 64, 16), 32, tile(y, 32, 16), BLOCK=16)
    for _ in range(3):
        launch_kernel(kernel, (7,), tile(x, 64, 16), 32, tile(y, 32, 16), BLOCK=16)
    expected, *launched = called
    assert len(launched) == 3 and all(flat(args) == flat(expected) for args in launched)
    assert len(driver.encoded) == 4  # once each
    launch_kernel(kernel, (7,), tile(y, 32, 16), 32, TensorDescriptor(x, [64, 16], [16, 1], [16, 16]), BLOCK=16)
    assert flat(called[-1]) != flat(expected) and driver.encoded[-1][0] == x.data_ptr()


def test_without_the_names_that_are_known_triton_encodes_descriptors(kernel):
    x = torch.zeros(64, 16)
    for _ in range(2):
        launch_kernel(kernel, (7,), tile(x, 64, 16), 32, 0.5, BLOCK=16)
    assert kernel.launched == [((7, 1, 1), (tile(x, 64, 16), 32, 0.5, 16))]


def _keep_factor(ctx, inputs, output):
    ctx.factor = inputs[1]


times = operator(
    "test_launch_times(Tensor x, float factor) -> Tensor",
    lambda x, factor: x * factor,
    lambda x, factor: torch.empty_like(x),
    backward=lambda ctx, grad: (grad * ctx.factor, None),
    setup_context=_keep_factor,
)


def test_an_operator_is_differentiated():
    x = torch.ones(3, requires_grad=True)
    times(x, 2.5).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.5] * 3
    with torch.no_grad():
        assert not times(x, 2.5).requires_grad


def test_an_operator_says_that_transforms_cannot_have_its_gradient():
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: times(x, 2.5).sum())(torch.ones(3))
