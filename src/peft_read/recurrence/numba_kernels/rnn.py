"""The RNN in compiled loops for the CPU: eight sequences of the batch at a time, one in every lane of the registers.

Every sixteen tokens, the inputs of the eight sequences are turned round, so that a step works on whole vectors, and
the outputs are turned back. Sums and activations are float64, states are rounded to float32 after every step, so that
going on from a state equals going through. Tensors are named as in `arguments.py` and given by the addresses of
contiguous float32, absent ones by 0; `valid` is the mask, one byte per token.
"""

# mypy: allow-untyped-defs
import numpy as np

from .simd import (
    LANES,
    at,
    bytes_at,
    compiled_loop,
    floats_at,
    inlined,
    lanes_at,
    limited,
    put_lanes,
    rounded,
    tanh_ratio,
    turn_tile,
    turn_tile_back,
    where,
)

__all__ = ["rnn_backward", "rnn_forward"]

STEPS = 16  # tokens between two turns: their lanes stay in the nearest cache


@inlined
def starts(first, count, start, length, width):
    """Where the rows of the eight lanes start; lanes without a sequence share the last one's."""
    last, size = first + count - 1, length * width
    return (
        min(first, last) * size + start * width,
        min(first + 1, last) * size + start * width,
        min(first + 2, last) * size + start * width,
        min(first + 3, last) * size + start * width,
        min(first + 4, last) * size + start * width,
        min(first + 5, last) * size + start * width,
        min(first + 6, last) * size + start * width,
        min(first + 7, last) * size + start * width,
    )


@inlined
def moved(places, more):
    a, b, c, d, e, f, g, h = places
    return a + more, b + more, c + more, d + more, e + more, f + more, g + more, h + more


@compiled_loop
def turn(rows, lanes, after, first, count, start, steps, length, width):
    """lanes[after + (step, i), lane] = rows[first + lane, start + step, i]."""
    places = starts(first, count, start, length, width)
    size, done = steps * width, 0
    while done + LANES <= size:
        turn_tile(rows, moved(places, done), lanes, (after + done) * LANES)
        done += LANES
    while done < size:
        for lane in range(LANES):
            lanes[(after + done) * LANES + lane] = rows[places[lane] + done]
        done += 1


@compiled_loop
def turn_back(lanes, after, rows, first, count, start, steps, length, width):
    """rows[first + lane, start + step, i] = lanes[after + (step, i), lane]; the first of equal rows writes last."""
    places = starts(first, count, start, length, width)
    size, done = steps * width, 0
    while done + LANES <= size:
        turn_tile_back(lanes, (after + done) * LANES, rows, moved(places, done))
        done += LANES
    while done < size:
        for lane in range(count):
            rows[places[lane] + done] = lanes[(after + done) * LANES + lane]
        done += 1


@inlined
def turn_marks(marks, mask, first, count, start, steps, length):
    """mask[step, lane] = 1 for a real token, 0 for padding and in the lanes without a sequence."""
    for lane in range(count):
        for step in range(steps):
            mask[step * LANES + lane] = marks[(first + lane) * length + start + step]


@inlined
def clear(vectors, count):
    """The first vectors are zero."""
    for place in range(count * LANES):
        vectors[place] = 0


@inlined
def fill(mask, count):
    """Every token of the first sequences is real."""
    for place in range(STEPS * LANES):
        mask[place] = 1 if place % LANES < count else 0


@inlined
def product(weight, row, width, vectors, start):
    """The row of a weight matrix times the vectors in the lanes."""
    total = lanes_at(vectors, start) * at(weight, row * width, None)
    for j in range(1, width):
        total = total + lanes_at(vectors, start + j * LANES) * at(weight, row * width + j, None)
    return total


@inlined
def four_products(weight, row, width, vectors, start):
    """The same of four rows, so that four sums run side by side."""
    a, b, c, d = row * width, (row + 1) * width, (row + 2) * width, (row + 3) * width
    vector = lanes_at(vectors, start)
    first, second, third, fourth = (
        vector * at(weight, a, None),
        vector * at(weight, b, None),
        vector * at(weight, c, None),
        vector * at(weight, d, None),
    )
    for j in range(1, width):
        vector = lanes_at(vectors, start + j * LANES)
        first = first + vector * at(weight, a + j, None)
        second = second + vector * at(weight, b + j, None)
        third = third + vector * at(weight, c + j, None)
        fourth = fourth + vector * at(weight, d + j, None)
    return first, second, third, fourth


@compiled_loop
def add_products(weight, height, width, vectors, start, totals, target):
    """Add a weight matrix times the vectors in the lanes to the totals."""
    row = 0
    while row + 4 <= height:
        place = target + row * LANES
        first, second, third, fourth = four_products(weight, row, width, vectors, start)
        put_lanes(totals, place, lanes_at(totals, place) + first)
        put_lanes(totals, place + LANES, lanes_at(totals, place + LANES) + second)
        put_lanes(totals, place + 2 * LANES, lanes_at(totals, place + 2 * LANES) + third)
        put_lanes(totals, place + 3 * LANES, lanes_at(totals, place + 3 * LANES) + fourth)
        row += 4
    while row < height:
        place = target + row * LANES
        put_lanes(totals, place, lanes_at(totals, place) + product(weight, row, width, vectors, start))
        row += 1


@inlined
def copied(address, count):
    """A float32 tensor as a float64 array."""
    found, source = np.empty(count), floats_at(address, count)
    for i in range(count):
        found[i] = source[i]
    return found


@compiled_loop
def rnn_forward(x, weight_ih, weight_hh, bias_ih, bias_hh, state, valid, outputs, batch, length, inputs, k):
    """h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh); without `weight_ih`, x is all but W_hh h, (B, T, k)."""
    rows, targets, befores = floats_at(x, 0), floats_at(outputs, 0), floats_at(state, 0)
    marks, by_state = bytes_at(valid, 0), copied(weight_hh, k * k)
    by_input = copied(weight_ih, k * inputs if weight_ih else 0)
    bias = np.zeros(k)
    for address in (bias_ih, bias_hh):
        if address:
            for i in range(k):
                bias[i] += floats_at(address, k)[i]
    vectors, gates = np.zeros(STEPS * inputs * LANES), np.zeros(STEPS * k * LANES)
    hidden = np.empty((STEPS + 1) * k * LANES)  # the state before, and after every step
    mask = np.empty(STEPS * LANES)
    for first in range(0, batch, LANES):
        count = min(LANES, batch - first)
        fill(mask, count)
        clear(hidden, k)
        if state:
            turn(befores, hidden, 0, first, count, 0, 1, 1, k)
        for start in range(0, length, STEPS):
            steps = min(STEPS, length - start)
            if valid:
                turn_marks(marks, mask, first, count, start, steps, length)
            if weight_ih:
                turn(rows, vectors, 0, first, count, start, steps, length, inputs)
                for step in range(steps):
                    for i in range(k):
                        total = product(by_input, i, inputs, vectors, step * inputs * LANES) + bias[i]
                        put_lanes(gates, (step * k + i) * LANES, total)
            else:
                turn(rows, gates, 0, first, count, start, steps, length, k)
            if k == 4:  # loops of known length are unrolled
                advance_four(gates, by_state, mask, hidden, steps)
            else:
                advance(gates, by_state, mask, hidden, steps, k)
            turn_back(hidden, k, targets, first, count, start, steps, length, k)
            for i in range(k):
                put_lanes(hidden, i * LANES, lanes_at(hidden, (steps * k + i) * LANES))


@inlined
def advance(gates, by_state, mask, hidden, steps, k):
    """The states after every step."""
    for step in range(steps):
        before, now = step * k * LANES, (step + 1) * k * LANES
        condition = lanes_at(mask, step * LANES)
        add_products(by_state, k, k, hidden, before, gates, before)
        for i in range(k):
            new = rounded(
                tanh_ratio(limited(lanes_at(gates, before + i * LANES), 9.0))
            )  # 1 - tanh(9) is below float32's rounding
            put_lanes(hidden, now + i * LANES, where(condition, new, lanes_at(hidden, before + i * LANES)))


@inlined
def advance_four(gates, by_state, mask, hidden, steps):
    """The same for k = 4, with the states in registers."""
    a, b, c, d = (
        lanes_at(hidden, 0),
        lanes_at(hidden, LANES),
        lanes_at(hidden, 2 * LANES),
        lanes_at(hidden, 3 * LANES),
    )
    w = by_state
    for step in range(steps):
        place = 4 * step * LANES
        condition = lanes_at(mask, step * LANES)
        p = (lanes_at(gates, place) + a * w[0] + b * w[1]) + (c * w[2] + d * w[3])
        q = (lanes_at(gates, place + LANES) + a * w[4] + b * w[5]) + (c * w[6] + d * w[7])
        u = (lanes_at(gates, place + 2 * LANES) + a * w[8] + b * w[9]) + (c * w[10] + d * w[11])
        v = (lanes_at(gates, place + 3 * LANES) + a * w[12] + b * w[13]) + (c * w[14] + d * w[15])
        a = where(condition, rounded(tanh_ratio(limited(p, 9.0))), a)
        b = where(condition, rounded(tanh_ratio(limited(q, 9.0))), b)
        c = where(condition, rounded(tanh_ratio(limited(u, 9.0))), c)
        d = where(condition, rounded(tanh_ratio(limited(v, 9.0))), d)
        put_lanes(hidden, place + 4 * LANES, a)
        put_lanes(hidden, place + 5 * LANES, b)
        put_lanes(hidden, place + 6 * LANES, c)
        put_lanes(hidden, place + 7 * LANES, d)


@compiled_loop
def rnn_backward(
    grad, x, weight_ih, weight_hh, state, valid, outputs, grad_x, grad_state, grad_weight_ih, grad_weight_hh,
    grad_bias, batch, length, inputs, k,
):  # fmt: skip
    """Sets the gradients; without `weight_ih` only those of `x` and `state`."""
    grads, rows, states, befores = floats_at(grad, 0), floats_at(x, 0), floats_at(outputs, 0), floats_at(state, 0)
    marks, by_state = bytes_at(valid, 0), copied(weight_hh, k * k)
    turned_state = np.empty(k * k)
    for i in range(k):
        for j in range(k):
            turned_state[j * k + i] = by_state[i * k + j]
    narrow = k * inputs if weight_ih else 0
    by_input, turned_input = copied(weight_ih, narrow), np.empty(narrow)
    if weight_ih:
        for i in range(k):
            for j in range(inputs):
                turned_input[j * k + i] = by_input[i * inputs + j]
    vectors, slopes = np.zeros(STEPS * inputs * LANES), np.zeros(STEPS * k * LANES)
    inner, below = np.empty(STEPS * k * LANES), np.empty(STEPS * inputs * LANES)
    hidden, carried, mask = np.zeros((STEPS + 1) * k * LANES), np.empty(k * LANES), np.empty(STEPS * LANES)
    sums = np.zeros((k * (inputs + k + 1) if weight_ih else 0) * LANES)
    for first in range(0, batch, LANES):
        count = min(LANES, batch - first)
        clear(carried, k)
        fill(mask, count)
        for start in range((length - 1) // STEPS * STEPS, -1, -STEPS):
            steps = min(STEPS, length - start)
            if valid:
                turn_marks(marks, mask, first, count, start, steps, length)
            turn(grads, slopes, 0, first, count, start, steps, length, k)
            if start:
                turn(states, hidden, 0, first, count, start - 1, steps + 1, length, k)
            else:
                clear(hidden, k)
                if state:
                    turn(befores, hidden, 0, first, count, 0, 1, 1, k)
                turn(states, hidden, k, first, count, 0, steps, length, k)
            if k == 4:
                retreat(slopes, turned_state, mask, hidden, inner, carried, steps, 4)
            else:
                retreat(slopes, turned_state, mask, hidden, inner, carried, steps, k)
            if weight_ih:
                turn(rows, vectors, 0, first, count, start, steps, length, inputs)
                add_up(sums, inner, vectors, hidden, steps, inputs, k)
                if grad_x:
                    for step in range(steps):
                        for j in range(inputs):
                            total = product(turned_input, j, k, inner, step * k * LANES)
                            put_lanes(below, (step * inputs + j) * LANES, total)
                    turn_back(below, 0, floats_at(grad_x, 0), first, count, start, steps, length, inputs)
            else:
                turn_back(inner, 0, floats_at(grad_x, 0), first, count, start, steps, length, k)
        turn_back(carried, 0, floats_at(grad_state, 0), first, count, 0, 1, 1, k)
    if weight_ih:
        place = 0
        for i in range(k):
            for j in range(inputs + k + 1):
                total = 0.0
                for lane in range(LANES):
                    total += sums[place + lane]
                place += LANES
                if j < inputs:
                    floats_at(grad_weight_ih, k * inputs)[i * inputs + j] = total
                elif j < inputs + k:
                    floats_at(grad_weight_hh, k * k)[i * k + j - inputs] = total
                else:
                    floats_at(grad_bias, k)[i] = total


@inlined
def retreat(slopes, turned_state, mask, hidden, inner, carried, steps, k):
    """The gradients of the gates of every step, and that of the state before the first of them."""
    for step in range(steps - 1, -1, -1):
        now = step * k * LANES
        condition = lanes_at(mask, step * LANES)
        zero = condition * 0.0
        for i in range(k):
            slope = lanes_at(slopes, now + i * LANES) + lanes_at(carried, i * LANES)
            new = lanes_at(hidden, now + (k + i) * LANES)
            put_lanes(inner, now + i * LANES, where(condition, slope * (1.0 - new * new), zero))
            put_lanes(carried, i * LANES, where(condition, zero, slope))
        add_products(turned_state, k, k, inner, now, carried, 0)


@compiled_loop
def add_up(sums, inner, vectors, hidden, steps, inputs, k):
    """Add the products of the gates' gradients with the inputs, the states before, and 1."""
    place = 0
    for i in range(k):
        for j in range(inputs):
            total = lanes_at(sums, place)
            for step in range(steps):
                total = total + lanes_at(inner, (step * k + i) * LANES) * lanes_at(
                    vectors, (step * inputs + j) * LANES
                )
            put_lanes(sums, place, total)
            place += LANES
        for j in range(k):
            total = lanes_at(sums, place)
            for step in range(steps):
                total = total + lanes_at(inner, (step * k + i) * LANES) * lanes_at(hidden, (step * k + j) * LANES)
            put_lanes(sums, place, total)
            place += LANES
        total = lanes_at(sums, place)
        for step in range(steps):
            total = total + lanes_at(inner, (step * k + i) * LANES)
        put_lanes(sums, place, total)
        place += LANES
