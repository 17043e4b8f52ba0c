"""The gradient of an embedding against torch's and float64: tokens of one row in runs and beside them, unused rows."""

import pytest
import torch

from shardwright.kernels import embedding as op
from shardwright.kernels.op import Situation
from shardwright.kernels.triton import embedding as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
RUN = fused.RUN


def make(ids, rows, columns, dtype):
    generator = torch.Generator().manual_seed(rows)
    ids = torch.as_tensor(ids).to(DEVICE)
    weight = torch.randn(rows, columns, generator=generator).to(DEVICE, dtype)
    return ids, weight, torch.randn(*ids.shape, columns, generator=generator).to(DEVICE, dtype)


def gradient(function, ids, weight, grad):
    weight = weight.detach().clone().requires_grad_()
    out = function(ids, weight)
    out.backward(grad)
    return out.detach(), weight.grad


def exact(ids, weight, grad):
    table = torch.zeros(weight.shape, dtype=torch.float64, device=DEVICE)
    return table.index_add_(0, ids.flatten(), grad.double().flatten(0, -2))


def assert_twice(ours, theirs, truth):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error, allowed = ((x.double() - truth).norm() for x in (ours, theirs))
    assert error <= 2 * allowed + 1e-7 * truth.norm(), (error, allowed)


def mixed(*counts):
    """Ids 0, 1, ... so many times each, in a random order."""
    ids = torch.cat([torch.full((count,), row) for row, count in enumerate(counts)])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))]


IDS = {
    "one token": [[3]],
    "each in its place": torch.arange(9).view(3, 3),
    "none of some rows": [[7, 0, 7, 2], [2, 2, 8, 0]],
    "one row alone": torch.full((2, 5 * RUN // 2 + 1), 4),
    "a run exactly": mixed(RUN, 2 * RUN, RUN),
    "a run that is not": mixed(1, RUN, 1),
    "runs in the middle": mixed(3, 2 * RUN + 5, 1, RUN - 3, RUN + 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", IDS)
def test_the_gradient_is_the_sum_over_tokens(ids, dtype):
    ids, weight, grad = make(IDS[ids], 9, 37, dtype)
    ours, theirs = (gradient(function, ids, weight, grad) for function in (op.triton, op.reference))
    assert torch.equal(ours[0], theirs[0])
    assert_twice(ours[1], theirs[1], exact(ids, weight, grad))
    unused = torch.ones(9, dtype=torch.bool, device=DEVICE).index_fill_(0, ids.flatten(), False)
    assert (ours[1][unused] == 0).all()


@pytest.mark.parametrize("config", fused.CONFIGS)
def test_every_config(config):
    columns = config.blocks["BLOCK"] + 24
    ids, weight, grad = make(mixed(1, RUN + 30, 0, 5), 5, columns, torch.float16)
    ours = fused.launch_gradient(grad, ids, 5, config)
    assert_twice(ours, gradient(op.reference, ids, weight, grad)[1], exact(ids, weight, grad))
    assert torch.equal(ours, fused.launch_gradient(grad, ids, 5, config))


def test_gradients_need_not_be_dense():
    ids, _, grad = make([[1, 2, 2], [0, 2, 1]], 3, 20, torch.float32)
    wide = torch.zeros(2, 3, 50, device=DEVICE)
    wide[..., :20] = grad
    flipped = grad.transpose(0, 2).contiguous().transpose(0, 2)
    expected = fused.launch_gradient(grad, ids, 3)
    for view in (wide[..., :20], flipped):
        assert torch.equal(fused.launch_gradient(view, ids, 3), expected)
    ones = fused.launch_gradient(torch.ones((), device=DEVICE).expand(2, 3, 20), ids.T.contiguous().T, 3)
    assert torch.equal(ones, torch.tensor([1.0, 2.0, 3.0], device=DEVICE)[:, None].expand(3, 20))


def test_no_tokens():
    ids, _, grad = make(torch.zeros(1, 0, dtype=torch.int64), 4, 8, torch.float32)
    assert (fused.launch_gradient(grad, ids, 4) == 0).all()


def test_the_candidate_is_chosen_on_a_gpu():
    assert op.OP.choose("auto", Situation(device="cuda", dtype=torch.bfloat16)) is op.triton
    assert op.OP.choose("auto", Situation(device="cpu", dtype=torch.bfloat16)) is op.reference


def test_operators_keep_the_rules_of_torch():
    ids, weight, grad = make([[1, 2], [2, 0]], 4, 10, torch.float32)
    torch.library.opcheck(torch.ops.shardwright.embedding, (ids, weight.requires_grad_()))
    torch.library.opcheck(torch.ops.shardwright.embedding_gradient, (grad, ids, 4))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compilers_see_no_break(backend):
    ids, weight, grad = make([[1, 2], [2, 0]], 4, 10, torch.float16)

    def step(ids, weight):
        return op.triton(ids, weight) * 2.0

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for ours, theirs in zip(gradient(compiled, ids, weight, grad), gradient(step, ids, weight, grad), strict=True):
        assert torch.equal(ours, theirs)
