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
def real_or(matrix, valid, token, K: tl.constexpr, MASKED: tl.constexpr):
    """A matrix, or the identity where the token is padding."""
    if MASKED:
        same = (tl.arange(0, K)[:, None] == tl.arange(0, K)[None, :]).to(tl.float32)
        matrix = tl.where(tl.load(valid + token) != 0, matrix, same)
    return matrix


@triton.jit
def new_state(moved, inner, valid, outputs, token, k, K: tl.constexpr, MASKED: tl.constexpr):
    """Sets h of a token, which at padding is what was moved, and returns it."""
    place, inside = token * k + tl.arange(0, K), tl.arange(0, K) < k
    new = tanh(tl.load(inner + place, inside, 0.0) + moved)
    if MASKED:
        new = tl.where(tl.load(valid + token) != 0, new, moved)
    tl.store(outputs + place, new, inside)
    return new


@triton.jit
def inner_gradient(carried, grads, valid, outputs, grad_inner, token, k, K: tl.constexpr, MASKED: tl.constexpr):
    """Sets the gradient of what is inside tanh, and returns it; at padding it sets zero and returns that of h."""
    place, inside = token * k + tl.arange(0, K), tl.arange(0, K) < k
    h = tl.load(outputs + place, inside, 0.0)
    total = carried + tl.load(grads + place, inside, 0.0)
    inner = total * (1 - h * h)
    if MASKED:
        is_real = tl.load(valid + token) != 0
        tl.store(grad_inner + place, tl.where(is_real, inner, 0.0), inside)
        inner = tl.where(is_real, inner, total)
    else:
        tl.store(grad_inner + place, inner, inside)
    return inner


@triton.jit
def rnn_forward(
    inner, weight_hh, state, valid, outputs, length, k,
    CONTINUED: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """h_t = tanh(inner_t + W_hh h_{t-1}); padding repeats the state before it."""
    b = tl.program_id(0).to(tl.int64)
    weight, turned = square(weight_hh, k, K), transposed(weight_hh, k, K)
    hidden = tl.zeros([K], tl.float32)
    if CONTINUED:
        hidden = tl.load(state + b * k + tl.arange(0, K), tl.arange(0, K) < k, 0.0)
    if length % 2 == 1:
        moved = tl.sum(real_or(weight, valid, b * length, K, MASKED) * hidden[None, :], 1)
        hidden = new_state(moved, inner, valid, outputs, b * length, k, K, MASKED)
    for t in tl.range(length % 2, length, 2, num_stages=STAGES_FORWARD):
        token = b * length + t
        moved = tl.sum(real_or(weight, valid, token, K, MASKED) * hidden[None, :], 1)
        first = new_state(moved, inner, valid, outputs, token, k, K, MASKED)
        moved = tl.sum(real_or(turned, valid, token + 1, K, MASKED) * first[:, None], 0)
        hidden = new_state(moved, inner, valid, outputs, token + 1, k, K, MASKED)


@triton.jit
def rnn_backward(
    grads, weight_hh, valid, outputs, grad_inner, grad_state, length, k, MASKED: tl.constexpr, K: tl.constexpr
):
    """The gradients of `inner`, zero at padding, and of the state before the first token."""
    b = tl.program_id(0).to(tl.int64)
    weight, turned = square(weight_hh, k, K), transposed(weight_hh, k, K)
    carried = tl.zeros([K], tl.float32)
    if length % 2 == 1:
        token = b * length + length - 1
        last = inner_gradient(carried, grads, valid, outputs, grad_inner, token, k, K, MASKED)
        carried = tl.sum(real_or(weight, valid, token, K, MASKED) * last[:, None], 0)
    for back in tl.range(length % 2, length, 2, num_stages=STAGES_BACKWARD):
        token = b * length + length - 1 - back
        last = inner_gradient(carried, grads, valid, outputs, grad_inner, token, k, K, MASKED)
        between = tl.sum(real_or(weight, valid, token, K, MASKED) * last[:, None], 0)
        last = inner_gradient(between, grads, valid, outputs, grad_inner, token - 1, k, K, MASKED)
        carried = tl.sum(real_or(turned, valid, token - 1, K, MASKED) * last[None, :], 1)
    tl.store(grad_state + b * k + tl.arange(0, K), carried, tl.arange(0, K) < k)
