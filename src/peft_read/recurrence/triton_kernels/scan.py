"""The scan of the RNN as Triton kernels: one program per sequence, the state and W_hh in its registers.

The width k is filled up with zeros to a power of two. The loads of later tokens do not depend on the state, so they
are pipelined. Sums and states are float32.

A product with W_hh turns a state that lies along one axis of the matrix into one along the other, and threads would
have to exchange it before the next product. So tokens are taken in pairs: the first by W_hh, the second by its
transpose, whose product turns the state back. What padding repeats goes through the product too, with the identity in
place of the matrix.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

__all__ = ["rnn_backward", "rnn_forward", "square"]

STAGES_FORWARD, STAGES_BACKWARD = tl.constexpr(4), tl.constexpr(6)  # pairs of tokens whose loads are in flight


@triton.jit
def tanh(x):
    """The hyperbolic tangent to the rounding of float32, as x P(x²) / Q(x²).

    Written with comparisons that are false for a not-a-number, which therefore stays one.
    """
    x = tl.where(x > 9.0, 9.0, x)  # 1 - tanh(9) = 3e-8 is below the rounding of float32
    x = tl.where(x < -9.0, -9.0, x)
    s = x * x
    over = (((5.085660236345205e-08 * s + 3.161581273037254e-05) * s + 0.004009736066679887) * s
            + 0.1378632610983273) * s + 0.9999999990746035  # fmt: skip
    under = ((((7.393481490187737e-10 * s + 1.619563201722467e-06) * s + 0.00042096284728284576) * s
              + 0.027741946000058647) * s + 0.47119658535608844) * s + 1.0  # fmt: skip
    return x * over / under


@triton.jit
def square(weight, k, K: tl.constexpr):
    """A matrix (k, k), with zeros to (K, K)."""
    row, column = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    return tl.load(weight + row * k + column, (row < k) & (column < k), 0.0)


@triton.jit
def transposed(weight, k, K: tl.constexpr):
    """The transpose of a matrix (k, k), with zeros to (K, K)."""
    row, column = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    return tl.load(weight + column * k + row, (row < k) & (column < k), 0.0)


@triton.jit
def rnn_forward(
    inner, weight_hh, state, valid, outputs, length, k,
    CONTINUED: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """h_t = tanh(inner_t + W_hh h_{t-1}); padding repeats the state before it."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = i < k
    weight, turned = square(weight_hh, k, K), transposed(weight_hh, k, K)
    same = (i[:, None] == i[None, :]).to(tl.float32)
    hidden = tl.zeros([K], tl.float32)
    if CONTINUED:
        hidden = tl.load(state + b * k + i, inside, 0.0)
    if length % 2 == 1:
        token = b * length
        new = tanh(tl.load(inner + token * k + i, inside, 0.0) + tl.sum(weight * hidden[None, :], 1))
        if MASKED:
            new = tl.where(tl.load(valid + token) != 0, new, hidden)
        tl.store(outputs + token * k + i, new, inside)
        hidden = new
    for t in tl.range(length % 2, length, 2, num_stages=STAGES_FORWARD):
        token = b * length + t
        first_matrix, second_matrix = weight, turned
        if MASKED:
            first_real, second_real = tl.load(valid + token) != 0, tl.load(valid + token + 1) != 0
            first_matrix = tl.where(first_real, weight, same)
            second_matrix = tl.where(second_real, turned, same)
        moved = tl.sum(first_matrix * hidden[None, :], 1)
        first = tanh(tl.load(inner + token * k + i, inside, 0.0) + moved)
        if MASKED:
            first = tl.where(first_real, first, moved)
        tl.store(outputs + token * k + i, first, inside)
        moved = tl.sum(second_matrix * first[:, None], 0)
        hidden = tanh(tl.load(inner + (token + 1) * k + i, inside, 0.0) + moved)
        if MASKED:
            hidden = tl.where(second_real, hidden, moved)
        tl.store(outputs + (token + 1) * k + i, hidden, inside)


@triton.jit
def rnn_backward(
    grad_outputs, weight_hh, valid, outputs, grad_inner, grad_state, length, k, MASKED: tl.constexpr, K: tl.constexpr
):
    """The gradients of `inner`, zero at padding, and of the state before the first token."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = i < k
    weight, turned = square(weight_hh, k, K), transposed(weight_hh, k, K)
    same = (i[:, None] == i[None, :]).to(tl.float32)
    carried = tl.zeros([K], tl.float32)
    if length % 2 == 1:
        token = b * length + length - 1
        h = tl.load(outputs + token * k + i, inside, 0.0)
        last = tl.load(grad_outputs + token * k + i, inside, 0.0)
        d = last * (1 - h * h)
        carried = tl.sum(weight * d[:, None], 0)
        if MASKED:
            is_real = tl.load(valid + token) != 0
            d = tl.where(is_real, d, 0.0)
            carried = tl.where(is_real, carried, last)
        tl.store(grad_inner + token * k + i, d, inside)
    for back in tl.range(length % 2, length, 2, num_stages=STAGES_BACKWARD):
        token = b * length + length - 1 - back
        h = tl.load(outputs + token * k + i, inside, 0.0)
        carried += tl.load(grad_outputs + token * k + i, inside, 0.0)
        d = carried * (1 - h * h)
        if MASKED:
            is_real = tl.load(valid + token) != 0
            tl.store(grad_inner + token * k + i, tl.where(is_real, d, 0.0), inside)
            before = tl.sum(tl.where(is_real, weight, same) * tl.where(is_real, d, carried)[:, None], 0)
        else:
            tl.store(grad_inner + token * k + i, d, inside)
            before = tl.sum(weight * d[:, None], 0)
        token = token - 1
        h = tl.load(outputs + token * k + i, inside, 0.0)
        before += tl.load(grad_outputs + token * k + i, inside, 0.0)
        d = before * (1 - h * h)
        if MASKED:
            is_real = tl.load(valid + token) != 0
            tl.store(grad_inner + token * k + i, tl.where(is_real, d, 0.0), inside)
            carried = tl.sum(tl.where(is_real, turned, same) * tl.where(is_real, d, before)[None, :], 1)
        else:
            tl.store(grad_inner + token * k + i, d, inside)
            carried = tl.sum(turned * d[None, :], 1)
    tl.store(grad_state + b * k + i, carried, inside)
