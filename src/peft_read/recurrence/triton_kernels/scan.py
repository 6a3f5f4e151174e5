"""The scan of the RNN as Triton kernels: one program per sequence, the state and W_hh in its registers.

The width k is filled up with zeros to a power of two. Sums and states are float32. A step of the loops is four tokens,
and loads those of the step after next into registers: memory takes longer to answer than a step, and with Triton's
pipelining loads go through shared memory and wait at barriers. k is a constant of the compiled kernel, so that rows of
W_hh are loaded as vectors: the fewer threads share a row, the fewer exchange their sums.

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
def four_rows(rows, inside, left, k: tl.constexpr):
    """Rows of k numbers from an address on, zero from the row `left` on."""
    return (
        tl.load(rows, reaches(inside, left, 0), 0.0), tl.load(rows + k, reaches(inside, left, 1), 0.0),
        tl.load(rows + 2 * k, reaches(inside, left, 2), 0.0), tl.load(rows + 3 * k, reaches(inside, left, 3), 0.0),
    )  # fmt: skip


@triton.jit
def four_marks(marks, left, MASKED: tl.constexpr):
    """Whether each of four tokens is real."""
    if MASKED:
        return (
            tl.load(marks, left > 0, 0) != 0, tl.load(marks + 1, left > 1, 0) != 0,
            tl.load(marks + 2, left > 2, 0) != 0, tl.load(marks + 3, left > 3, 0) != 0,
        )  # fmt: skip
    return left > 0, left > 1, left > 2, left > 3


@triton.jit
def product(matrix, vector, real, AXIS: tl.constexpr, MASKED: tl.constexpr):
    """The sum over an axis of a matrix (K, K) times a vector that lies along it; the vector if a token is padding."""
    if MASKED:
        i = tl.arange(0, matrix.shape[0])
        matrix = tl.where(real, matrix, (i[:, None] == i[None, :]).to(tl.float32))
    return tl.sum(matrix * tl.expand_dims(vector, 1 - AXIS), AXIS)


@triton.jit
def advance(matrix, hidden, x, real, target, inside, AXIS: tl.constexpr, MASKED: tl.constexpr):
    """Sets h of a token, which at padding is the one before, and returns it."""
    moved = product(matrix, hidden, real, AXIS, MASKED)
    new = tanh(x + moved)
    if MASKED:
        new = tl.where(real, new, moved)
    tl.store(target, new, inside)
    return new


@triton.jit
def retreat(matrix, carried, grad, h, real, target, inside, AXIS: tl.constexpr, MASKED: tl.constexpr):
    """Sets the gradient of what is inside tanh, zero at padding, and returns that of h of the token before."""
    total = carried + grad
    inner = total * (1 - h * h)
    if MASKED:
        tl.store(target, tl.where(real, inner, 0.0), inside)
        inner = tl.where(real, inner, total)
    else:
        tl.store(target, inner, inside)
    return product(matrix, inner, real, AXIS, MASKED)


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
    x0, x1, x2, x3 = four_rows(source, inside, length, k)
    y0, y1, y2, y3 = four_rows(source + 4 * k, inside, length - 4, k)
    r0, r1, r2, r3 = four_marks(marks, length, MASKED)
    s0, s1, s2, s3 = four_marks(marks + 4, length - 4, MASKED)
    for t in tl.range(0, length, 4, num_stages=1):
        source += 4 * k
        marks += 4
        next0, next1, next2, next3 = four_rows(source + 4 * k, inside, length - t - 8, k)
        real0, real1, real2, real3 = four_marks(marks + 4, length - t - 8, MASKED)
        hidden = advance(weight, hidden, x0, r0, target, inside, 1, MASKED)
        hidden = advance(turned, hidden, x1, r1, target + k, reaches(inside, length - t, 1), 0, MASKED)
        hidden = advance(weight, hidden, x2, r2, target + 2 * k, reaches(inside, length - t, 2), 1, MASKED)
        hidden = advance(turned, hidden, x3, r3, target + 3 * k, reaches(inside, length - t, 3), 0, MASKED)
        x0, x1, x2, x3, y0, y1, y2, y3 = y0, y1, y2, y3, next0, next1, next2, next3
        r0, r1, r2, r3, s0, s1, s2, s3 = s0, s1, s2, s3, real0, real1, real2, real3
        target += 4 * k


@triton.jit
def rnn_backward(
    grads, weight_hh, valid, outputs, grad_inner, grad_state, length, k: tl.constexpr,
    MASKED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The gradients of `inner`, zero at padding, and of the state before the first token.

    Tokens that are missing to the last four come first and have no gradient, so that nothing is carried on from them.
    """
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = i < k
    last = (length - 1) // 4 * 4
    place = (b * length + last) * k + i
    source, states, target, marks = grads + place, outputs + place, grad_inner + place, valid + b * length + last
    weight, turned = square(weight_hh, k, K), square(weight_hh, k, K, True)
    carried = tl.zeros([K], tl.float32)
    g0, g1, g2, g3 = four_rows(source, inside, length - last, k)
    h0, h1, h2, h3 = four_rows(states, inside, length - last, k)
    r0, r1, r2, r3 = four_marks(marks, length - last, MASKED)
    d0, d1, d2, d3 = four_rows(source - 4 * k, inside, last, k)
    y0, y1, y2, y3 = four_rows(states - 4 * k, inside, last, k)
    s0, s1, s2, s3 = four_marks(marks - 4, last, MASKED)
    for back in tl.range(0, last + 1, 4, num_stages=1):
        t = last - back
        source -= 4 * k
        states -= 4 * k
        marks -= 4
        grad0, grad1, grad2, grad3 = four_rows(source - 4 * k, inside, t - 4, k)
        state0, state1, state2, state3 = four_rows(states - 4 * k, inside, t - 4, k)
        real0, real1, real2, real3 = four_marks(marks - 4, t - 4, MASKED)
        carried = retreat(weight, carried, g3, h3, r3, target + 3 * k, reaches(inside, length - t, 3), 0, MASKED)
        carried = retreat(turned, carried, g2, h2, r2, target + 2 * k, reaches(inside, length - t, 2), 1, MASKED)
        carried = retreat(weight, carried, g1, h1, r1, target + k, reaches(inside, length - t, 1), 0, MASKED)
        carried = retreat(turned, carried, g0, h0, r0, target, inside, 1, MASKED)
        g0, g1, g2, g3, d0, d1, d2, d3 = d0, d1, d2, d3, grad0, grad1, grad2, grad3
        h0, h1, h2, h3, y0, y1, y2, y3 = y0, y1, y2, y3, state0, state1, state2, state3
        r0, r1, r2, r3, s0, s1, s2, s3 = s0, s1, s2, s3, real0, real1, real2, real3
        target -= 4 * k
    tl.store(grad_state + b * k + i, carried, inside)
