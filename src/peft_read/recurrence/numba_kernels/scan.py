"""The scans of RNN and GRU in compiled loops for the CPU: eight sequences of the batch at a time, one in every lane.

Every sixteen tokens, the inputs of the eight sequences are turned round, so that a step works on whole vectors, and
the outputs are turned back. Sums and activations are float64, states are rounded to float32 after every step, so that
going on from a state equals going through. Tensors are named as in `arguments.py` and given by their addresses, see
`memory.py`; `valid` is the mask.
"""

# mypy: allow-untyped-defs
import numpy as np

from .memory import bytes_at, compiled_loop, copied, floats_at, inlined, turned
from .simd import LANES, lanes_at, number_at, put_lanes, sigmoid, tanh, turn_tile, turn_tile_back, where

__all__ = ["gradients_of_gates", "scan_backward", "scan_forward"]

STEPS = 16  # tokens between two turns: their lanes stay in the nearest cache


@compiled_loop
def turn(rows, lanes, first, count, start, steps, length, width):
    """lanes[(step, i), lane] = rows[first + lane, start + step, i]; lanes without a sequence copy the last."""
    place, stride, size, done = (first * length + start) * width, length * width, steps * width, 0
    while done + LANES <= size:
        turn_tile(rows, place + done, stride, count - 1, lanes, done * LANES)
        done += LANES
    while done < size:
        for lane in range(LANES):
            lanes[done * LANES + lane] = rows[place + done + min(lane, count - 1) * stride]
        done += 1


@compiled_loop
def turn_back(lanes, after, rows, first, count, start, steps, length, width):
    """rows[first + lane, start + step, i] = lanes[after + (step, i), lane]."""
    place, stride, size, done = (first * length + start) * width, length * width, steps * width, 0
    while done + LANES <= size:
        turn_tile_back(lanes, (after + done) * LANES, rows, place + done, stride, count - 1)
        done += LANES
    while done < size:
        for lane in range(count):
            rows[place + done + lane * stride] = lanes[(after + done) * LANES + lane]
        done += 1


@inlined
def turn_marks(marks, mask, first, count, start, steps, length):
    """mask[step, lane] = 1 for a real token, 0 for padding; lanes without a sequence copy the last."""
    for lane in range(LANES):
        for step in range(steps):
            mask[step * LANES + lane] = marks[(first + min(lane, count - 1)) * length + start + step]


@inlined
def product(weight, row, width, vectors, start):
    """The row of a weight matrix times the vectors in the lanes."""
    total = lanes_at(vectors, start) * number_at(weight, row * width)
    for j in range(1, width):
        total = total + lanes_at(vectors, start + j * LANES) * number_at(weight, row * width + j)
    return total


@inlined
def four_products(weight, row, width, vectors, start):
    """The same of four rows, so that four sums run side by side."""
    a, b, c, d = row * width, (row + 1) * width, (row + 2) * width, (row + 3) * width
    vector = lanes_at(vectors, start)
    first, second = vector * number_at(weight, a), vector * number_at(weight, b)
    third, fourth = vector * number_at(weight, c), vector * number_at(weight, d)
    for j in range(1, width):
        vector = lanes_at(vectors, start + j * LANES)
        first = first + vector * number_at(weight, a + j)
        second = second + vector * number_at(weight, b + j)
        third = third + vector * number_at(weight, c + j)
        fourth = fourth + vector * number_at(weight, d + j)
    return first, second, third, fourth


@inlined
def add_to(totals, place, vector):
    """Add a vector to eight numbers of an array."""
    put_lanes(totals, place, lanes_at(totals, place) + vector)


@compiled_loop
def add_products(weight, height, width, vectors, start, totals, target):
    """Add a weight matrix times the vectors in the lanes to the totals."""
    row = 0
    while row + 4 <= height:
        place = target + row * LANES
        first, second, third, fourth = four_products(weight, row, width, vectors, start)
        add_to(totals, place, first)
        add_to(totals, place + LANES, second)
        add_to(totals, place + 2 * LANES, third)
        add_to(totals, place + 3 * LANES, fourth)
        row += 4
    while row < height:
        add_to(totals, target + row * LANES, product(weight, row, width, vectors, start))
        row += 1


@compiled_loop
def scan_forward(x, weight_ih, weight_hh, bias_ih, bias_hh, state, valid, outputs, batch, length, inputs, k, gates):
    """An RNN (gates = k) or a GRU (gates = 3 k); without `weight_ih`, x is W_ih x + b_ih, (B, T, gates)."""
    rows, targets, befores = floats_at(x, 0), floats_at(outputs, 0), floats_at(state, 0)
    marks, by_state, shift = bytes_at(valid, 0), copied(weight_hh, gates * k), copied(bias_hh, gates)
    by_input, bias = copied(weight_ih, gates * inputs), copied(bias_ih, gates)
    vectors, inner = np.zeros(STEPS * inputs * LANES), np.zeros(STEPS * gates * LANES)
    hidden = np.empty((STEPS + 1) * k * LANES)  # the state before, and after every step
    outer, mask = np.empty(gates * LANES), np.ones(STEPS * LANES)
    for first in range(0, batch, LANES):
        count = min(LANES, batch - first)
        hidden[: k * LANES] = 0
        if state:
            turn(befores, hidden, first, count, 0, 1, 1, k)
        for start in range(0, length, STEPS):
            steps = min(STEPS, length - start)
            if valid:
                turn_marks(marks, mask, first, count, start, steps, length)
            if weight_ih:
                turn(rows, vectors, first, count, start, steps, length, inputs)
                for step in range(steps):
                    for i in range(gates):
                        total = product(by_input, i, inputs, vectors, step * inputs * LANES) + bias[i]
                        put_lanes(inner, (step * gates + i) * LANES, total)
            else:
                turn(rows, inner, first, count, start, steps, length, gates)
            if gates == 3 * k:
                advance_gru(inner, by_state, shift, mask, hidden, outer, steps, k)
            elif k == 4:  # loops of known length are unrolled
                advance_rnn(inner, by_state, shift, mask, hidden, steps, 4)
            else:
                advance_rnn(inner, by_state, shift, mask, hidden, steps, k)
            turn_back(hidden, k, targets, first, count, start, steps, length, k)
            hidden[: k * LANES] = hidden[steps * k * LANES : (steps + 1) * k * LANES]


@inlined
def advance_rnn(inner, by_state, shift, mask, hidden, steps, k):
    """h_t = tanh(inner_t + W_hh h_{t-1} + b_hh)."""
    for step in range(steps):
        before, now, condition = step * k * LANES, (step + 1) * k * LANES, lanes_at(mask, step * LANES)
        add_products(by_state, k, k, hidden, before, inner, before)
        for i in range(k):
            new = tanh(lanes_at(inner, before + i * LANES) + shift[i])
            put_lanes(hidden, now + i * LANES, where(condition, new, lanes_at(hidden, before + i * LANES)))


@inlined
def advance_gru(inner, by_state, shift, mask, hidden, outer, steps, k):
    """h_t = n + z (h_{t-1} - n), with n = tanh(inner_n + r (W_hn h_{t-1} + b_hn)); the gates are r, z, n."""
    for step in range(steps):
        before, now, condition = step * k * LANES, (step + 1) * k * LANES, lanes_at(mask, step * LANES)
        for i in range(3 * k):
            put_lanes(outer, i * LANES, condition * 0.0 + shift[i])
        add_products(by_state, 3 * k, k, hidden, before, outer, 0)
        for i in range(k):
            r, z, n, old = i * LANES, (k + i) * LANES, (2 * k + i) * LANES, lanes_at(hidden, before + i * LANES)
            reset = sigmoid(lanes_at(inner, 3 * before + r) + lanes_at(outer, r))
            update = sigmoid(lanes_at(inner, 3 * before + z) + lanes_at(outer, z))
            new = tanh(lanes_at(inner, 3 * before + n) + reset * lanes_at(outer, n))
            put_lanes(hidden, now + i * LANES, where(condition, new + update * (old - new), old))


@compiled_loop
def scan_backward(grad, outputs, valid, slopes, kept, weight_hh, grad_gates, grad_state, batch, length, k, gates):
    """Sets slopes_t d_t of every token, where d_t = grad_t + kept_{t+1} d_{t+1} + W_hhᵀ (slopes_{t+1} d_{t+1}).

    Whatever the cell is, its backward pass is this linear recurrence: d_t is the whole gradient of h_t, `slopes` says
    how h_t follows what W_hh h_{t-1} gives to each gate, and `kept` how it follows h_{t-1} otherwise. Those of a GRU
    are given, (B, T, 4 k), the last k without a part in W_hh; those of an RNN, 1 - h_t² and 0, or 0 and 1 at padding,
    follow from `outputs` and `valid`. Sets the gradient of the state before the first token too.
    """
    grads, tangents, keeps, marks = floats_at(grad, 0), floats_at(slopes, 0), floats_at(kept, 0), bytes_at(valid, 0)
    states, targets, by_gate = floats_at(outputs, 0), floats_at(grad_gates, 0), turned(weight_hh, gates, k)
    width = 4 * k if slopes else k
    whole, inner, keep = np.empty(STEPS * k * LANES), np.empty(STEPS * width * LANES), np.zeros(STEPS * k * LANES)
    carried, mask = np.empty(k * LANES), np.ones(STEPS * LANES)
    for first in range(0, batch, LANES):
        count = min(LANES, batch - first)
        carried[:] = 0
        for start in range((length - 1) // STEPS * STEPS, -1, -STEPS):
            steps = min(STEPS, length - start)
            turn(grads, whole, first, count, start, steps, length, k)
            if slopes:
                turn(tangents, inner, first, count, start, steps, length, width)
                turn(keeps, keep, first, count, start, steps, length, k)
            else:
                turn(states, inner, first, count, start, steps, length, k)
                if valid:
                    turn_marks(marks, mask, first, count, start, steps, length)
                slopes_of_rnn(inner, keep, mask, steps, k)
            if k == 4 and gates == 4:  # loops of known length are unrolled
                retreat(by_gate, whole, inner, keep, carried, steps, 4, 4, 4)
            else:
                retreat(by_gate, whole, inner, keep, carried, steps, k, gates, width)
            turn_back(inner, 0, targets, first, count, start, steps, length, width)
        turn_back(carried, 0, floats_at(grad_state, 0), first, count, 0, 1, 1, k)


@inlined
def slopes_of_rnn(inner, keep, mask, steps, k):
    """In place of the states of some steps their slopes, and what is kept of the states before."""
    for step in range(steps):
        condition = lanes_at(mask, step * LANES)
        for place in range(step * k * LANES, (step + 1) * k * LANES, LANES):
            state = lanes_at(inner, place)
            put_lanes(inner, place, condition * (1.0 - state * state))
            put_lanes(keep, place, 1.0 - condition)


@inlined
def retreat(by_gate, whole, inner, keep, carried, steps, k, gates, width):
    """In place of the slopes of some steps the gradients of the gates, and that of the state before them."""
    for step in range(steps - 1, -1, -1):
        place, gate = step * k * LANES, step * width * LANES
        for i in range(0, k * LANES, LANES):
            d = lanes_at(whole, place + i) + lanes_at(carried, i)
            put_lanes(carried, i, d * lanes_at(keep, place + i))
            for block in range(gate + i, gate + width * LANES, k * LANES):
                put_lanes(inner, block, lanes_at(inner, block) * d)
        add_products(by_gate, k, gates, inner, gate, carried, 0)


@compiled_loop
def gradients_of_gates(
    inner, outer, x, weight_ih, state, outputs, grad_x, grad_ih, grad_hh, bias_ih, bias_hh, batch, length, inputs, k,
    gates,
):  # fmt: skip
    """Sets all gradients that follow from those of the gates: sums over all tokens in float64, for narrow cells.

    BLAS sums a thin column in one long chain of float32, which is too wrong for a long sequence.
    """
    shape, rows = (batch, length), floats_at(x, (batch, length, inputs))
    inner, outer = floats_at(inner, (*shape, gates)), floats_at(outer, (*shape, gates))
    weight, below = copied(weight_ih, gates * inputs), floats_at(grad_x, (*shape, inputs))
    states, start = floats_at(outputs, (*shape, k)), floats_at(state, (batch, k))
    sums, before = np.zeros((gates, inputs + k + 2)), np.zeros((1, k))
    for b in range(batch):
        before[0] = 0
        if state:
            before[0] = start[b]
        for t in range(length):
            if gates == 4 and inputs == 4 and k == 4:  # loops of known length are unrolled
                add_token(inner[b, t], outer[b, t], rows[b, t], before[0], weight, sums, below[b, t], 4, 4, 4)
            else:
                add_token(inner[b, t], outer[b, t], rows[b, t], before[0], weight, sums, below[b, t], inputs, k, gates)
            before[0] = states[b, t]
    for i in range(gates):
        for j in range(inputs):
            floats_at(grad_ih, (gates, inputs))[i, j] = sums[i, j]
        for j in range(k):
            floats_at(grad_hh, (gates, k))[i, j] = sums[i, inputs + j]
        floats_at(bias_ih, gates)[i] = sums[i, inputs + k]
        floats_at(bias_hh, gates)[i] = sums[i, inputs + k + 1]


@inlined
def add_token(inner, outer, row, before, weight, sums, below, inputs, k, gates):
    """Add the products of one token to the sums, and set the gradient of its input."""
    for j in range(inputs):
        total = 0.0
        for i in range(gates):
            total += weight[i * inputs + j] * inner[i]
        below[j] = total
    for i in range(gates):
        d, e = np.float64(inner[i]), np.float64(outer[i])
        for j in range(inputs):
            sums[i, j] += d * row[j]
        for j in range(k):
            sums[i, inputs + j] += e * before[j]
        sums[i, inputs + k] += d
        sums[i, inputs + k + 1] += e
