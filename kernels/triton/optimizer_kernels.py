"""Kernels of AdamW, LAMB and square sums, over tables of tensors; everything that varies is read from the device."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations are those of a kernel's inside; pyright takes them for those of its callers.)

from __future__ import annotations

import triton
import triton.language as tl

from shardwright.kernels.triton.optimizer_tables import pointer_at, tile_at


@triton.jit
def _applies(multiplier, skip):
    factor = tl.load(multiplier)
    return (tl.abs(factor) < float("inf")) & (tl.load(skip) == 0)


@triton.jit
def _row(shards, tensor, start, COPY: tl.constexpr, ALIGNED: tl.constexpr):
    """Return pointers to parameter, moments and copy of one tile; without copies, again to the parameter."""
    row = shards + tensor * (3 if COPY is None else 4)
    param = pointer_at(row, start, tl.float32, ALIGNED)
    exp_avg = pointer_at(row + 1, start, tl.float32, ALIGNED)
    exp_avg_sq = pointer_at(row + 2, start, tl.float32, ALIGNED)
    return param, exp_avg, exp_avg_sq, param if COPY is None else pointer_at(row + 3, start, COPY, ALIGNED)


@triton.jit
def _advance(exp_avg, exp_avg_sq, grad, at, inside, multiplier, take1, take2):
    """Update both moments in place and return them."""
    g = tl.load(grad + at, inside, other=0.0).to(tl.float32) * tl.load(multiplier)
    m = tl.load(exp_avg + at, inside, other=0.0)
    v = tl.load(exp_avg_sq + at, inside, other=0.0)
    # A step towards the new value: a factor 1 - take, rounded to float32, would shift the mean of many steps.
    m += take1 * (g - m)
    v += take2 * (g * g - v)
    tl.store(exp_avg + at, m, inside)
    tl.store(exp_avg_sq + at, v, inside)
    return m, v


@triton.jit
def _one_minus_exp(x):
    """Return 1 - exp(x) for x < 0, near 0 by its series, where the difference would lose digits."""
    series = 1.0
    for k in tl.static_range(7):
        series = 1.0 + x / (8 - k) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _direction(m, v, step, log_beta1, log_beta2, eps):
    """Return m / (sqrt(v) + eps), both moments freed from their bias towards 0."""
    bias1 = _one_minus_exp(tl.load(step) * log_beta1)
    bias2 = _one_minus_exp(tl.load(step) * log_beta2)
    return tl.div_rn(m, bias1 * (tl.div_rn(tl.sqrt_rn(v), tl.sqrt_rn(bias2)) + eps))


@triton.jit
def _store(param, copy, at, inside, p, COPY: tl.constexpr):
    tl.store(param + at, p, inside)
    if COPY is not None:
        tl.store(copy + at, p.to(COPY), inside)


@triton.jit
def adamw(  # noqa: PLR0913
    shards,
    grads,
    sizes,
    first,
    owner,
    lr,
    step,
    multiplier,
    skip,
    take1,
    log_beta1,
    take2,
    log_beta2,
    eps,
    decay,
    begin,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of one tensor; tables are read before it is known whether anything is to be done, to lose no time."""
    _, tensor, start, left = tile_at(sizes, first, owner, begin, ALIGNED, BLOCK)
    param, exp_avg, exp_avg_sq, copy = _row(shards, tensor, start, COPY, ALIGNED)
    grad = pointer_at(grads + tensor, start, GRAD, ALIGNED)
    if _applies(multiplier, skip):
        at = tl.arange(0, BLOCK)
        inside = at < left
        m, v = _advance(exp_avg, exp_avg_sq, grad, at, inside, multiplier, take1, take2)
        p = tl.load(param + at, inside, other=0.0)
        rate = tl.load(lr)
        p -= rate * (_direction(m, v, step, log_beta1, log_beta2, eps) + decay * p)
        _store(param, copy, at, inside, p, COPY)


@triton.jit
def lamb_moments(  # noqa: PLR0913
    shards,
    grads,
    sizes,
    first,
    owner,
    partials,
    step,
    multiplier,
    skip,
    take1,
    log_beta1,
    take2,
    log_beta2,
    eps,
    decay,
    begin,
    tiles,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile: its moments, and its share of the square norms of parameters and update [2, tiles]."""
    tile, tensor, start, left = tile_at(sizes, first, owner, begin, ALIGNED, BLOCK)
    param, exp_avg, exp_avg_sq, _ = _row(shards, tensor, start, COPY, ALIGNED)
    grad = pointer_at(grads + tensor, start, GRAD, ALIGNED)
    if _applies(multiplier, skip):
        at = tl.arange(0, BLOCK)
        inside = at < left
        m, v = _advance(exp_avg, exp_avg_sq, grad, at, inside, multiplier, take1, take2)
        p = tl.load(param + at, inside, other=0.0)
        u = _direction(m, v, step, log_beta1, log_beta2, eps) + decay * p
        tl.store(partials + tile, tl.sum(p * p, 0))
        tl.store(partials + tiles + tile, tl.sum(u * u, 0))


@triton.jit
def segment_sums(partials, sizes, first, squares, tiles, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the partial sums of one tensor."""
    tensor = tl.program_id(0)
    begin = tl.load(first + tensor)
    end = begin + tl.cdiv(tl.load(sizes + tensor), TILE).to(tl.int32)
    partials += tl.program_id(1) * tiles
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(begin, end, BLOCK):
        at = tile + tl.arange(0, BLOCK)
        total += tl.load(partials + at, at < end, other=0.0)
    tl.store(squares + tl.program_id(1) * tl.num_programs(0) + tensor, tl.sum(total, 0))


@triton.jit
def lamb_apply(  # noqa: PLR0913
    shards,
    sizes,
    first,
    owner,
    squares,
    lr,
    step,
    multiplier,
    skip,
    log_beta1,
    log_beta2,
    eps,
    decay,
    begin,
    tensors,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile: along the direction, which is made again from the moments, since that reads less than keeping it."""
    _, tensor, start, left = tile_at(sizes, first, owner, begin, ALIGNED, BLOCK)
    param, exp_avg, exp_avg_sq, copy = _row(shards, tensor, start, COPY, ALIGNED)
    if _applies(multiplier, skip):
        at = tl.arange(0, BLOCK)
        inside = at < left
        m = tl.load(exp_avg + at, inside, other=0.0)
        v = tl.load(exp_avg_sq + at, inside, other=0.0)
        p = tl.load(param + at, inside, other=0.0)
        u = _direction(m, v, step, log_beta1, log_beta2, eps) + decay * p
        p_norm = tl.sqrt_rn(tl.load(squares + tensor))
        u_norm = tl.sqrt_rn(tl.load(squares + tensors + tensor))
        usable = (p_norm > 0) & (u_norm > 0)
        ratio = tl.where(usable, tl.div_rn(p_norm, tl.where(usable, u_norm, 1.0)), 1.0)
        _store(param, copy, at, inside, p - tl.load(lr) * ratio * u, COPY)


@triton.jit
def square_partials(x, partials, length, BLOCK: tl.constexpr):
    """Square sum of every num_programs-th block."""
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(length, BLOCK), tl.num_programs(0)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, at < length, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))
