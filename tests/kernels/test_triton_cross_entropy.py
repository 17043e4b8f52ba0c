"""Cross entropy kernels against the reference and float64, split over shards, in place, fused with the projection."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import fork

from shardwright.kernels import linear_cross_entropy as op
from shardwright.kernels import vocabulary_statistics
from shardwright.kernels.linear_cross_entropy import IGNORED
from shardwright.kernels.op import Situation
from shardwright.kernels.triton import cross_entropy as ce
from shardwright.kernels.triton import linear_cross_entropy as linear
from shardwright.parallel.products import Unsplit
from shardwright.parallel.vocabulary import VocabularyCrossEntropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def make(rows, columns, dtype, scale=4.0):
    generator = torch.Generator().manual_seed(rows + columns)
    logits = (torch.randn(rows, columns, generator=generator) * scale).to(DEVICE, dtype)
    labels = torch.randint(0, columns, (rows,), generator=generator).to(DEVICE)
    labels[::3] = IGNORED
    grad = torch.rand(rows, generator=generator).to(DEVICE)
    return logits, labels, grad


def plain(logits, labels, grad, wide):
    """Losses, log-sum-exps and gradient of the logits, computed in `wide`, of logits as they are."""
    logits = logits.detach().requires_grad_()
    losses = F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORED, reduction="none")
    losses.backward(grad.to(wide))
    return losses.detach(), logits.detach().to(wide).logsumexp(-1), logits.grad


def exact(logits, labels, grad):
    return plain(logits.double(), labels, grad, torch.float64)


def assert_twice(ours, theirs, truth, tiny=1e-6):
    """Error against float64 at most twice that of the same-dtype reference."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error, allowed = ((x.double() - truth.double()).norm() for x in (ours, theirs))
    assert error <= 2 * allowed + tiny * truth.double().norm(), (error, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1), (3, 123), (4, 8192), (2, 16400)])
def test_losses_and_gradients(shape, dtype):
    logits, labels, grad = make(*shape, dtype)
    logits.requires_grad_()
    losses, lse = ce.cross_entropy(logits, labels)
    losses.backward(grad)
    assert not lse.requires_grad
    theirs, truth = plain(logits, labels, grad, torch.float32), exact(logits, labels, grad)
    for ours in zip((losses, lse, logits.grad), theirs, truth, strict=True):
        assert_twice(*ours)
    assert (losses[::3] == 0).all() and (logits.grad[::3] == 0).all()


@pytest.mark.parametrize("config", ce.CONFIGS)
def test_every_config(config):
    blocks = config.blocks["BLOCK"]
    logits, labels, _ = make(3, blocks + 7, torch.float16)
    ones = torch.ones(3, device=DEVICE)
    theirs, truth = plain(logits, labels, ones, torch.float32), exact(logits, labels, ones)
    lse, wanted = ce.launch_shard(logits, labels, 0, config)
    assert wanted[0] == 0 and torch.equal(wanted[1:], logits.float()[[1, 2], labels[1:]])
    assert_twice(lse, theirs[1], truth[1])
    losses, lse = ce.launch_losses(logits, labels, in_place=True, config=config)
    for ours in zip((losses, lse, logits), theirs, truth, strict=True):
        assert_twice(*ours)


@pytest.mark.parametrize("config", ce.GRADIENT_CONFIGS)
def test_every_config_of_the_gradient(config):
    logits, labels, grad = make(4, config.blocks["BLOCK"] + 7, torch.float16)
    theirs, truth = plain(logits, labels, grad, torch.float32), exact(logits, labels, grad)
    out, scale = torch.empty_like(logits), grad.masked_fill(labels == IGNORED, 0)
    for grads in ((grad, None), (scale, -scale)):
        ce.launch_gradient(logits, labels, truth[1].float(), *grads, out, 0, config)
        assert_twice(out, theirs[2], truth[2])
    ce.launch_gradient(logits, labels, truth[1].float(), scale, -scale, logits, 0, config)
    assert torch.equal(logits, out)


@pytest.mark.parametrize("statistics", [vocabulary_statistics.reference, vocabulary_statistics.fused])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [2, 4])
def test_a_split_vocabulary_merges_to_the_whole(parts, dtype, statistics):
    logits, labels, grad = make(7, 4 * 61, dtype)
    shards = [shard.contiguous().requires_grad_() for shard in logits.chunk(parts, -1)]
    width = shards[0].shape[1]
    found = [statistics(shard * 1, labels, i * width) for i, shard in enumerate(shards)]
    lse, wanted = torch.stack([f[0] for f in found]).logsumexp(0), torch.stack([f[1] for f in found]).sum(0)
    losses = (lse - wanted).masked_fill(labels == IGNORED, 0)
    losses.backward(grad)
    ours = losses.detach(), lse.detach(), torch.cat([shard.grad for shard in shards], -1)
    for three in zip(ours, plain(logits, labels, grad, torch.float32), exact(logits, labels, grad), strict=True):
        assert_twice(*three)


def in_a_tensor_group(statistics):
    """Loss and gradient of this process's logits, the vocabulary split over two processes."""
    dist.init_process_group("gloo")
    logits, labels, _ = make(5, 2 * 70, torch.float32)
    overlap = Unsplit(dist.group.WORLD)
    leaf = logits.cpu().chunk(2, -1)[overlap.rank].clone().requires_grad_()
    found = statistics(leaf * 1, labels.cpu(), 70 * overlap.rank)
    loss = VocabularyCrossEntropy.apply(*found, labels.cpu(), overlap)
    (loss * 0.25).backward()
    dist.destroy_process_group()
    return loss.item(), leaf.grad.numpy()


@pytest.mark.skipif(DEVICE == "cuda", reason="needs kernels that are interpreted")
@pytest.mark.parametrize("statistics", [vocabulary_statistics.reference, vocabulary_statistics.fused])
def test_a_tensor_group_has_the_loss_of_the_whole(statistics):
    logits, labels, _ = make(5, 2 * 70, torch.float32)
    losses, _, gradient = exact(logits, labels, torch.full((5,), 0.25))
    (first, left), (second, right) = fork(2, in_a_tensor_group, statistics)
    assert first == second == pytest.approx(losses.sum().item(), rel=1e-6)
    whole = torch.cat([torch.from_numpy(left), torch.from_numpy(right)], -1)
    torch.testing.assert_close(whole.double(), gradient, atol=1e-7, rtol=1e-5)


def test_both_statistics_of_a_shard_have_gradients():
    """Also where a shard has hardly any share in the probability, or the gradient is of one of them alone."""
    logits, labels, grad = make(6, 130, torch.float32)
    labels[:] = torch.tensor([10, 139, 140, 50, IGNORED, 9], device=DEVICE)  # of the part from 10 to 139
    for by_lse, by_wanted in ((grad, grad), (grad * 0, grad), (grad, grad * 0)):
        gradients = []
        for statistics in (vocabulary_statistics.reference, vocabulary_statistics.fused):
            leaf = logits.clone().requires_grad_()
            lse, wanted = statistics(leaf * 1, labels, 10)
            torch.autograd.backward((lse, wanted), (by_lse, by_wanted))
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)


def test_the_gradient_of_a_shard_takes_the_place_of_its_logits():
    logits, labels, grad = make(3, 90, torch.float32)
    leaf = logits.requires_grad_()
    made = leaf * 1
    lse, _ = vocabulary_statistics.fused(made, labels, 0)
    lse.backward(grad, retain_graph=True)
    assert torch.equal(made, leaf.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lse.backward(grad)
    before = leaf.detach().clone()
    vocabulary_statistics.fused(leaf, labels, 0)[0].backward(grad)
    assert torch.equal(leaf, before), "a leaf is left as it is"


def test_what_is_not_finite_stays_in_its_row():
    logits, labels, _ = make(6, 200, torch.float32)
    clean = logits.clone()
    logits[0], logits[3, 5] = float("nan"), float("inf")  # both ignored
    logits[1, :100] = clean[1, :100] = -float("inf")
    labels[1] = 150
    logits[2] = -float("inf")
    labels[4] = 200  # outside
    losses, lse = ce.launch_losses(logits, labels, in_place=True)
    assert losses[[0, 3]].tolist() == [0, 0] and (logits[[0, 3]] == 0).all()
    assert losses[[2, 4]].isnan().all() and lse[4].isfinite()
    ones = torch.ones(6, device=DEVICE)
    labels[4] = IGNORED
    for ours, truth in zip((losses, lse, logits), exact(clean, labels, ones), strict=True):
        torch.testing.assert_close(ours[[1, 5]].double(), truth[[1, 5]].double(), atol=1e-6, rtol=1e-6)
    assert (logits[1, :100] == 0).all()


def test_rows_and_labels_need_not_be_dense():
    logits, labels, grad = make(6, 300, torch.float32)
    wide, rows = torch.zeros(6, 640, device=DEVICE), torch.zeros(300, 6, device=DEVICE).T
    wide[:, :300], rows[:] = logits, logits
    spread = torch.stack((labels, labels), 1)[:, 0]
    expected = ce.cross_entropy(logits, labels)
    for view in (wide[:, :300], rows):
        assert all(torch.equal(a, b) for a, b in zip(ce.cross_entropy(view, spread), expected, strict=True))
        gradients = [
            torch.autograd.grad(ce.cross_entropy(x.requires_grad_(), y)[0], x, g)[0]
            for x, y, g in ((view, spread, grad[:1].expand(6)), (logits.detach(), labels, grad[:1].repeat(6)))
        ]
        assert torch.equal(*gradients)


def run_linear(function, inputs, labels, factor=3.7):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*inputs, labels)
    (loss * factor).backward()
    return [loss.detach(), *(x.grad for x in inputs)]


def make_linear(batch, tokens, width, vocab, dtype):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(batch, tokens, width, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(vocab, width, generator=generator).to(DEVICE, dtype)
    labels = torch.randint(0, vocab, (batch, tokens), generator=generator).to(DEVICE)
    labels[:, -1] = IGNORED
    return hidden, weight, labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", ["float32", "own"])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_linear_cross_entropy(dtype, weight_dtype, chunk):
    hidden, weight, labels = make_linear(2, 5, 20, 333, dtype)
    limits = {"logits_bytes": chunk * 333 * dtype.itemsize, "weight_dtype": torch.float32}
    if weight_dtype == "own":
        limits["weight_dtype"] = dtype
    ours = run_linear(lambda *x: linear.linear_cross_entropy(*x, **limits), (hidden, weight), labels)
    theirs = run_linear(op.reference, (hidden, weight), labels)
    flat = hidden.double().flatten(0, 1).requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(flat[0] @ flat[1].T, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    (loss * 3.7).backward()
    truth = loss.detach(), flat[0].grad.view_as(hidden), flat[1].grad
    for three in zip(ours, theirs, truth, strict=True):
        assert_twice(*three)
    assert (ours[1][:, -1] == 0).all()


@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True)])
def test_only_wanted_gradients_are_made(needs):
    hidden, weight, labels = make_linear(1, 9, 16, 50, torch.float32)
    whole = run_linear(linear.linear_cross_entropy, (hidden, weight), labels, 1.0)
    inputs = [x.requires_grad_(need) for x, need in zip((hidden, weight), needs, strict=True)]
    loss = linear.linear_cross_entropy(*inputs, labels)
    assert torch.equal(loss.detach(), whole[0])
    if any(needs):
        loss.backward()
    for x, need, expected in zip(inputs, needs, whole[1:], strict=True):
        assert torch.equal(x.grad, expected) if need else x.grad is None
    with torch.no_grad():
        assert not linear.linear_cross_entropy(*inputs, labels).requires_grad


def test_backward_cannot_run_twice():
    hidden, weight, labels = make_linear(1, 4, 8, 30, torch.float32)
    loss = linear.linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_tokens_and_none_with_a_label():
    hidden, weight, labels = make_linear(1, 5, 8, 30, torch.float32)
    for tokens in (0, 5):
        parts = run_linear(linear.linear_cross_entropy, (hidden[:, :tokens], weight), labels.fill_(IGNORED)[:, :tokens])
        assert all((part == 0).all() for part in parts)


@pytest.mark.parametrize(
    ("num_tokens", "limit", "chunk"),
    [(8192, 2092, 2048), (8192, 8192, 8192), (8193, 8192, 4224), (100, 7, 7), (100, 64, 50), (3, 0, 1), (0, 64, 1)],
)
def test_chunks_are_even_and_of_whole_tiles(num_tokens, limit, chunk):
    assert linear.chunk_tokens(num_tokens, 2, 2 * limit + 1) == chunk


def test_the_candidate_is_chosen_on_a_gpu():
    assert op.OP.choose("auto", Situation(device="cuda", dtype=torch.bfloat16)) is op.fused
    assert op.OP.choose("auto", Situation(device="cpu", dtype=torch.bfloat16)) is op.reference
    refuses = op.OP.candidates[0].unsupported
    assert refuses(Situation(device="cpu", dtype=torch.bfloat16)) == "needs a CUDA device"
    assert refuses(Situation(device="cuda", dtype=torch.float64)) == "needs bf16, fp16 or fp32"
    statistics = vocabulary_statistics.OP
    assert statistics.choose("auto", Situation(device="cuda", dtype=torch.bfloat16)) is vocabulary_statistics.fused
    assert statistics.choose("auto", Situation(device="cpu", dtype=torch.bfloat16)) is vocabulary_statistics.reference
    hidden, weight, labels = make_linear(1, 4, 8, 30, torch.float32)
    torch.testing.assert_close(op.fused(hidden, weight, labels), op.reference(hidden, weight, labels))


def test_operators_keep_the_rules_of_torch():
    logits, labels, grad = make(4, 65, torch.float32)
    lse = logits.logsumexp(-1)
    ops = torch.ops.shardwright
    torch.library.opcheck(ops.cross_entropy, (logits.clone().requires_grad_(), labels))
    torch.library.opcheck(ops.cross_entropy_shard, (logits.clone().requires_grad_(), labels, 3))
    for grad_wanted in (None, grad):
        torch.library.opcheck(ops.cross_entropy_gradient, (logits, labels, lse, grad, grad_wanted, 0))
    hidden, weight, labels = make_linear(1, 6, 8, 30, torch.float32)
    inputs = hidden[0].requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(ops.linear_cross_entropy, (*inputs, labels[0], [True, True], 1 << 20, torch.float32))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compilers_see_no_break(backend):
    hidden, weight, labels = make_linear(2, 6, 16, 100, torch.float16)

    def step(hidden, weight, labels):
        losses, _ = ce.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
        lse, wanted = ce.shard_statistics((hidden @ weight.T).flatten(0, 1), labels.flatten(), 5)
        return linear.linear_cross_entropy(hidden, weight, labels) * 0.5 + losses.sum() + (lse - wanted).sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for ours, theirs in zip(
        run_linear(compiled, (hidden, weight), labels), run_linear(step, (hidden, weight), labels), strict=True
    ):
        assert torch.equal(ours, theirs)
