"""The scan of the RNN as Triton kernels: one program per sequence, the state and W_hh in its registers.

The width k is filled up with zeros to a power of two. Sums and states are float32. A step of the loops is eight tokens
and loads the next eight meanwhile. They are moved at its end, which waits for them: steps of four waited a third of
their time, and with Triton's pipelining loads go through shared memory and wait at barriers. k is a constant of the
compiled kernel, so that rows of W_hh are loaded as vectors: the fewer threads share a row, the fewer exchange sums.

A product with W_hh turns a state that lies along one axis of the matrix into one along the other, and threads would
have to exchange it before the next product. So tokens are taken in pairs: the first by W_hh, the second by its
transpose, whose product turns the state back. What padding repeats goes through the product too, with the identity in
place of the matrix.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

__all__ = ["rnn_backward", "rnn_forward", "square"]


@triton.jit
def tanh(x):
    """The hyperbolic tangent to some roundings of float32, as x P(x²) / Q(x²).

    The quotient is by the square of 1 / √Q, one instruction, where a division is eight. Comparisons are false for a
    not-a-number, which therefore stays one.
    """
    s = x * x
    s = tl.where(s > 81.0, 81.0, s)  # 1 - tanh(9) = 3e-8 is below the rounding of float32
    x = tl.where(x > 9.0, 9.0, x)
    x = tl.where(x < -9.0, -9.0, x)
    t = s * s  # halves of the polynomials run side by side: a step of the recurrence waits for them
    over = (s * 0.1378632610983273 + 0.9999999990746035) + t * (
        (s * 3.161581273037254e-05 + 0.004009736066679887) + t * 5.085660236345205e-08
    )
    under = (s * 0.47119658535608844 + 1.0) + t * (
        (s * 0.00042096284728284576 + 0.027741946000058647) + t * (s * 7.393481490187737e-10 + 1.619563201722467e-06)
    )
    root = tl.rsqrt(under)
    return x * over * (root * root)


@triton.jit
def square(weight, k, K: tl.constexpr, TURNED: tl.constexpr = False):
    """A matrix (k, k), or its transpose, with zeros to (K, K)."""
    i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    return tl.load(weight + (j * k + i if TURNED else i * k + j), (i < k) & (j < k), 0.0)


@triton.jit
def reaches(inside, left, n: tl.constexpr):
    """A mask of row n, of which `left` are there."""
    return (inside & (left > n)) != 0  # no change but in the interpreter, which would give whole numbers


@triton.jit
def eight_rows(rows, inside, left, k: tl.constexpr):
    """Rows of k numbers from an address on, zero from the row `left` on."""
    return (
        tl.load(rows, reaches(inside, left, 0), 0.0), tl.load(rows + k, reaches(inside, left, 1), 0.0),
        tl.load(rows + 2 * k, reaches(inside, left, 2), 0.0), tl.load(rows + 3 * k, reaches(inside, left, 3), 0.0),
        tl.load(rows + 4 * k, reaches(inside, left, 4), 0.0), tl.load(rows + 5 * k, reaches(inside, left, 5), 0.0),
        tl.load(rows + 6 * k, reaches(inside, left, 6), 0.0), tl.load(rows + 7 * k, reaches(inside, left, 7), 0.0),
    )  # fmt: skip


@triton.jit
def eight_marks(marks, left, MASKED: tl.constexpr):
    """Whether each of eight tokens is real."""
    if MASKED:
        return (
            tl.load(marks, left > 0, 0) != 0, tl.load(marks + 1, left > 1, 0) != 0,
            tl.load(marks + 2, left > 2, 0) != 0, tl.load(marks + 3, left > 3, 0) != 0,
            tl.load(marks + 4, left > 4, 0) != 0, tl.load(marks + 5, left > 5, 0) != 0,
            tl.load(marks + 6, left > 6, 0) != 0, tl.load(marks + 7, left > 7, 0) != 0,
        )  # fmt: skip
    return left > 0, left > 1, left > 2, left > 3, left > 4, left > 5, left > 6, left > 7


@triton.jit
def product(matrix, vector, real, AXIS: tl.constexpr, MASKED: tl.constexpr):
    """The sum over an axis of a matrix (K, K) times a vector that lies along it; the vector if a token is padding."""
    if MASKED:
        i = tl.arange(0, matrix.shape[0])
        matrix = tl.where(real, matrix, (i[:, None] == i[None, :]).to(tl.float32))
    return tl.sum(matrix * tl.expand_dims(vector, 1 - AXIS), AXIS)


@triton.jit
def advance(matrix, hidden, x, real, target, inside, left, n: tl.constexpr, k: tl.constexpr, MASKED: tl.constexpr):
    """Sets h of token n of a step, which at padding is the one before, and returns it."""
    moved = product(matrix, hidden, real, 1 - n % 2, MASKED)
    new = tanh(x + moved)
    if MASKED:
        new = tl.where(real, new, moved)
    tl.store(target + n * k, new, reaches(inside, left, n))
    return new


@triton.jit
def retreat(
    matrix, carried, grad, h, real, target, inside, left, n: tl.constexpr, k: tl.constexpr, MASKED: tl.constexpr
):
    """Sets token n's gradient of what is inside tanh, zero at padding, and returns that of h of the token before."""
    total = carried + grad
    inner = total * (1 - h * h)
    tl.store(target + n * k, tl.where(real, inner, 0.0), reaches(inside, left, n))
    if MASKED:
        inner = tl.where(real, inner, total)
    return product(matrix, inner, real, 1 - n % 2, MASKED)


@triton.jit
def rnn_forward(
    inner, weight_hh, state, valid, outputs, length, k: tl.constexpr,
    CONTINUED: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """h_t = tanh(inner_t + W_hh h_{t-1}); padding repeats the state before it."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = i < k
    source, target, marks = inner + b * length * k + i, outputs + b * length * k + i, valid + b * length
    weight, turned = square(weight_hh, k, K), square(weight_hh, k, K, True)
    hidden = tl.zeros([K], tl.float32)
    if CONTINUED:
        hidden = tl.load(state + b * k + i, inside, 0.0)
    x0, x1, x2, x3, x4, x5, x6, x7 = eight_rows(source, inside, length, k)
    r0, r1, r2, r3, r4, r5, r6, r7 = eight_marks(marks, length, MASKED)
    for t in tl.range(0, length, 8, num_stages=1):
        left = length - t
        source += 8 * k
        marks += 8
        y0, y1, y2, y3, y4, y5, y6, y7 = eight_rows(source, inside, left - 8, k)
        s0, s1, s2, s3, s4, s5, s6, s7 = eight_marks(marks, left - 8, MASKED)
        hidden = advance(weight, hidden, x0, r0, target, inside, left, 0, k, MASKED)
        hidden = advance(turned, hidden, x1, r1, target, inside, left, 1, k, MASKED)
        hidden = advance(weight, hidden, x2, r2, target, inside, left, 2, k, MASKED)
        hidden = advance(turned, hidden, x3, r3, target, inside, left, 3, k, MASKED)
        hidden = advance(weight, hidden, x4, r4, target, inside, left, 4, k, MASKED)
        hidden = advance(turned, hidden, x5, r5, target, inside, left, 5, k, MASKED)
        hidden = advance(weight, hidden, x6, r6, target, inside, left, 6, k, MASKED)
        hidden = advance(turned, hidden, x7, r7, target, inside, left, 7, k, MASKED)
        x0, x1, x2, x3, x4, x5, x6, x7 = y0, y1, y2, y3, y4, y5, y6, y7
        r0, r1, r2, r3, r4, r5, r6, r7 = s0, s1, s2, s3, s4, s5, s6, s7
        target += 8 * k


@triton.jit
def rnn_backward(
    grads, weight_hh, valid, outputs, grad_inner, grad_state, length, k: tl.constexpr,
    MASKED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The gradients of `inner`, zero at padding, and of the state before the first token.

    Tokens that are missing to the last eight come first and have no gradient, so that nothing is carried on from them.
    """
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = i < k
    last = (length - 1) // 8 * 8
    place = (b * length + last) * k + i
    source, states, target, marks = grads + place, outputs + place, grad_inner + place, valid + b * length + last
    weight, turned = square(weight_hh, k, K), square(weight_hh, k, K, True)
    carried = tl.zeros([K], tl.float32)
    g0, g1, g2, g3, g4, g5, g6, g7 = eight_rows(source, inside, length - last, k)
    h0, h1, h2, h3, h4, h5, h6, h7 = eight_rows(states, inside, length - last, k)
    r0, r1, r2, r3, r4, r5, r6, r7 = eight_marks(marks, length - last, MASKED)
    for back in tl.range(0, last + 1, 8, num_stages=1):
        t = last - back
        source -= 8 * k
        states -= 8 * k
        marks -= 8
        d0, d1, d2, d3, d4, d5, d6, d7 = eight_rows(source, inside, t, k)
        y0, y1, y2, y3, y4, y5, y6, y7 = eight_rows(states, inside, t, k)
        s0, s1, s2, s3, s4, s5, s6, s7 = eight_marks(marks, t, MASKED)
        carried = retreat(weight, carried, g7, h7, r7, target, inside, length - t, 7, k, MASKED)
        carried = retreat(turned, carried, g6, h6, r6, target, inside, length - t, 6, k, MASKED)
        carried = retreat(weight, carried, g5, h5, r5, target, inside, length - t, 5, k, MASKED)
        carried = retreat(turned, carried, g4, h4, r4, target, inside, length - t, 4, k, MASKED)
        carried = retreat(weight, carried, g3, h3, r3, target, inside, length - t, 3, k, MASKED)
        carried = retreat(turned, carried, g2, h2, r2, target, inside, length - t, 2, k, MASKED)
        carried = retreat(weight, carried, g1, h1, r1, target, inside, length - t, 1, k, MASKED)
        carried = retreat(turned, carried, g0, h0, r0, target, inside, length - t, 0, k, MASKED)
        g0, g1, g2, g3, g4, g5, g6, g7 = d0, d1, d2, d3, d4, d5, d6, d7
        h0, h1, h2, h3, h4, h5, h6, h7 = y0, y1, y2, y3, y4, y5, y6, y7
        r0, r1, r2, r3, r4, r5, r6, r7 = s0, s1, s2, s3, s4, s5, s6, s7
        target -= 8 * k
    tl.store(grad_state + b * k + i, carried, inside)
