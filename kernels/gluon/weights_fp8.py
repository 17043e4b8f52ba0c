"""Weights of attention in FP8 for Hopper: from scores to an operand of the tensor cores, within each thread."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# (Gluon's annotations are those of a kernel's inside; pyright takes them for those of its launch.)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shardwright.kernels.gluon.attention_parts import ROWS

LIFT = gl.constexpr(8.0)  # weights are at most 2^LIFT, of e4m3's 448


@gluon.jit
def exponentiate(scores, top, factor):
    """Return the weights of scores, 2^LIFT for the highest, and parts of their sums [ROWS, 8]."""
    weights = gl.exp2(scores * factor - gl.expand_dims(gl.expand_dims(top, 1), 1))
    return weights, gl.sum(weights, 1)


@gluon.jit
def highest(scores, factor):
    """Return the base-2 exponents, less LIFT, of the highest scores of rows."""
    return gl.max(gl.max(scores, 1), 1) * factor - LIFT


@gluon.jit
def pack(weights):
    """Return weights in FP8, four to an int32: [ROWS, BLOCK_N / 16, 4], in the order of `key_of`.

    A thread has two keys of each group of 8. As an operand it has four side by side: two of one group and of the next.
    """
    GROUPS: gl.constexpr = weights.shape[1]
    even, odd = gl.split(weights.reshape([ROWS, GROUPS // 2, 2, 4, 2]).permute((0, 1, 3, 2, 4)))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return gl.inline_asm_elementwise(  # as Triton converts, but into the halves of a register instead of bytes
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [first, second, third, fourth],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def operand(packed, LAYOUT: gl.constexpr):
    """Return packed weights as the tensor cores take them, from registers that they already are in.

    Bytes would be carried from one pass of a loop to the next in a register each, so it is words that are.
    """
    words = gl.join(packed, packed)
    words = gl.join(words, words).reshape([ROWS, packed.shape[1] * 16])
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;",
        "=r,r,r,r,r",
        [gl.convert_layout(words, LAYOUT, assert_trivial=True)],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )
