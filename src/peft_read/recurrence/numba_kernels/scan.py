"""The scans of RNN and GRU in compiled loops for the CPU: one sequence per lane, eight at a time, sixteen of an RNN.

Every sixteen tokens their inputs are turned round, so that a step works on whole vectors, and the outputs back. Sums
and activations are float64, states are rounded to float32 after every step, so that going on from a state equals going
through. Tensors are named as in `arguments.py` and given by addresses, see `memory.py`; `valid` is the mask.
"""

# mypy: allow-untyped-defs
import numpy as np

from .memory import bytes_at, compiled_loop, copied, floats_at, inlined
from .simd import LANES, lanes_at, number_at, put_lanes, sigmoid, tanh, turn_tile, turn_tile_back, where

__all__ = ["gradients_of_gates", "scan_backward", "scan_forward"]

STEPS = 16  # tokens between two turns: their lanes stay in the nearest cache


@compiled_loop
def turn(rows, lanes, first, batch, start, steps, length, width):
    """lanes[(step, i), lane] = rows[first + lane, start + step, i]; lanes without a sequence copy the last."""
    place, stride, size, done = (first * length + start) * width, length * width, steps * width, 0
    while done + LANES <= size:
        turn_tile(rows, place + done, stride, batch - first - 1, lanes, done * LANES)
        done += LANES
    while done < size:
        for lane in range(LANES):
            lanes[done * LANES + lane] = rows[place + done + min(lane, batch - first - 1) * stride]
        done += 1


@compiled_loop
def turn_back(lanes, after, rows, first, batch, start, steps, length, width):
    """rows[first + lane, start + step, i] = lanes[after + (step, i), lane]."""
    place, stride, size, done = (first * length + start) * width, length * width, steps * width, 0
    while done + LANES <= size:
        turn_tile_back(lanes, (after + done) * LANES, rows, place + done, stride, batch - first - 1)
        done += LANES
    while done < size:
        for lane in range(min(LANES, batch - first)):
            rows[place + done + lane * stride] = lanes[(after + done) * LANES + lane]
        done += 1


@inlined
def turn_marks(marks, mask, first, batch, start, steps, length):
    """mask[step, lane] = 1 for a real token, 0 for padding; lanes without a sequence copy the last."""
    for lane in range(LANES):
        for step in range(steps):
            mask[step * LANES + lane] = marks[min(first + lane, batch - 1) * length + start + step]


@compiled_loop
def add_products(weight, height, width, vectors, start, totals, target):
    """Add a weight matrix times the vectors in the lanes to the totals."""
    row = 0
    while row + 4 <= height:  # four sums run side by side
        a, b, c, d = row * width, (row + 1) * width, (row + 2) * width, (row + 3) * width
        place = target + row * LANES
        first, second = lanes_at(totals, place), lanes_at(totals, place + LANES)
        third, fourth = lanes_at(totals, place + 2 * LANES), lanes_at(totals, place + 3 * LANES)
        for j in range(width):
            vector = lanes_at(vectors, start + j * LANES)
            first = first + vector * number_at(weight, a + j)
            second = second + vector * number_at(weight, b + j)
            third = third + vector * number_at(weight, c + j)
            fourth = fourth + vector * number_at(weight, d + j)
        put_lanes(totals, place, first)
        put_lanes(totals, place + LANES, second)
        put_lanes(totals, place + 2 * LANES, third)
        put_lanes(totals, place + 3 * LANES, fourth)
        row += 4
    while row < height:
        place = target + row * LANES
        for j in range(width):
            product = lanes_at(vectors, start + j * LANES) * number_at(weight, row * width + j)
            put_lanes(totals, place, lanes_at(totals, place) + product)
        row += 1


@compiled_loop
def scan_forward(x, weight_ih, weight_hh, bias_ih, bias_hh, state, valid, outputs, batch, length, inputs, k, gates):
    """An RNN (gates = k) or a GRU (gates = 3 k); without `weight_ih`, x is W_ih x + b_ih, of an RNN + b_hh too."""
    rows, targets, befores = floats_at(x, 0), floats_at(outputs, 0), floats_at(state, 0)
    marks, by_state, by_input = bytes_at(valid, 0), copied(weight_hh, gates * k), copied(weight_ih, gates * inputs)
    bias, shift = np.repeat(copied(bias_ih, gates), LANES), np.repeat(copied(bias_hh, gates), LANES)
    most = 2 if gates == k else 1  # groups side by side: a step of an RNN waits longer than it computes
    if gates == k:
        bias += shift
    vectors, inner = np.empty(STEPS * inputs * LANES), np.empty((most, STEPS * gates * LANES))
    hidden = np.empty((most, (STEPS + 1) * k * LANES))  # the state before, and after every step
    outer, mask = np.empty(gates * LANES), np.ones((most, STEPS * LANES))
    for tile in range(0, batch, most * LANES):
        groups = min(most, (batch - tile + LANES - 1) // LANES)
        for group in range(groups):
            hidden[group, : k * LANES] = 0
            if state:
                turn(befores, hidden[group], tile + group * LANES, batch, 0, 1, 1, k)
        for start in range(0, length, STEPS):
            steps = min(STEPS, length - start)
            for group in range(groups):
                first = tile + group * LANES
                if valid:
                    turn_marks(marks, mask[group], first, batch, start, steps, length)
                if not weight_ih:
                    turn(rows, inner[group], first, batch, start, steps, length, gates)
                    continue
                turn(rows, vectors, first, batch, start, steps, length, inputs)
                for step in range(steps):
                    source, target = step * inputs * LANES, step * gates * LANES
                    if inputs == 4 and gates == 4:  # loops of known length are unrolled
                        project(by_input, 4, 4, vectors, source, bias, inner[group], target)
                    else:
                        project(by_input, gates, inputs, vectors, source, bias, inner[group], target)
            if gates == 3 * k:
                advance_gru(inner[0], by_state, shift, mask[0], hidden[0], outer, steps, k)
            elif k == 4:
                advance_rnn(inner, by_state, mask, hidden, steps, groups, 4)
            else:
                advance_rnn(inner, by_state, mask, hidden, steps, groups, k)
            for group in range(groups):
                turn_back(hidden[group], k, targets, tile + group * LANES, batch, start, steps, length, k)
                hidden[group, : k * LANES] = hidden[group, steps * k * LANES : (steps + 1) * k * LANES]


@inlined
def project(weight, height, width, vectors, start, bias, totals, target):
    """Set the totals to a weight matrix times the vectors in the lanes, and a bias."""
    for i in range(0, height * LANES, LANES):
        put_lanes(totals, target + i, lanes_at(bias, i))
    add_products(weight, height, width, vectors, start, totals, target)


@inlined
def advance_rnn(inner, by_state, mask, hidden, steps, groups, k):
    """h_t = tanh(inner_t + W_hh h_{t-1}); inner_t has both biases."""
    for step in range(steps):
        before, now = step * k * LANES, (step + 1) * k * LANES
        for group in range(groups):  # a step waits for the one before it, but not for the other group
            condition = lanes_at(mask[group], step * LANES)
            add_products(by_state, k, k, hidden[group], before, inner[group], before)
            for i in range(0, k * LANES, LANES):
                new = tanh(lanes_at(inner[group], before + i))
                put_lanes(hidden[group], now + i, where(condition, new, lanes_at(hidden[group], before + i)))


@inlined
def advance_gru(inner, by_state, shift, mask, hidden, outer, steps, k):
    """h_t = n + z (h_{t-1} - n), with n = tanh(inner_n + r (W_hn h_{t-1} + b_hn)); the gates are r, z, n."""
    for step in range(steps):
        before, now, condition = step * k * LANES, (step + 1) * k * LANES, lanes_at(mask, step * LANES)
        project(by_state, 3 * k, k, hidden, before, shift, outer, 0)
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
    states, targets, by_gate = floats_at(outputs, 0), floats_at(grad_gates, 0), copied(weight_hh, gates, k)
    width = 4 * k if slopes else k
    whole, inner, keep = np.empty(STEPS * k * LANES), np.empty(STEPS * width * LANES), np.zeros(STEPS * k * LANES)
    carried, mask = np.empty(k * LANES), np.ones(STEPS * LANES)
    for first in range(0, batch, LANES):
        carried[:] = 0
        for start in range((length - 1) // STEPS * STEPS, -1, -STEPS):
            steps = min(STEPS, length - start)
            turn(grads, whole, first, batch, start, steps, length, k)
            if slopes:
                turn(tangents, inner, first, batch, start, steps, length, width)
                turn(keeps, keep, first, batch, start, steps, length, k)
            else:
                turn(states, inner, first, batch, start, steps, length, k)
                if valid:
                    turn_marks(marks, mask, first, batch, start, steps, length)
                slopes_of_rnn(inner, keep, mask, steps, k)
            if k == 4 and gates == 4:  # loops of known length are unrolled
                retreat(by_gate, whole, inner, keep, carried, steps, 4, 4, 4)
            else:
                retreat(by_gate, whole, inner, keep, carried, steps, k, gates, width)
            turn_back(inner, 0, targets, first, batch, start, steps, length, width)
        turn_back(carried, 0, floats_at(grad_state, 0), first, batch, 0, 1, 1, k)


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

    BLAS sums a thin column in one long chain of float32, which is too wrong for a long sequence. Each lane takes an
    eighth of the tokens, whatever sequences they are of; those left over come last, one per lane.
    """
    rows, given, targets, tokens = floats_at(x, 0), floats_at(inner, 0), floats_at(grad_x, 0), batch * length
    before, by_gate = np.zeros((batch, length * k), np.float32), copied(weight_ih, gates, inputs)
    before[:, k:] = floats_at(outputs, (batch, length * k))[:, : (length - 1) * k]
    if state:
        before[:, :k] = floats_at(state, (batch, k))
    vectors, hidden = np.empty(STEPS * inputs * LANES), np.empty(STEPS * k * LANES)
    below, ones, slopes = np.empty_like(vectors), np.ones(STEPS * LANES), np.empty(STEPS * gates * LANES)
    others = slopes if inner == outer else np.empty_like(slopes)
    by_input, by_state = np.zeros(gates * inputs * LANES), np.zeros(gates * k * LANES)
    in_all, out_all = np.zeros(gates * LANES), np.zeros(gates * LANES)
    share = tokens // LANES
    for start in range(0, share + STEPS, STEPS):
        first, end, steps, stride = 0, LANES, min(STEPS, share - start), share
        if start >= share:  # the last round
            first, end, start, steps, stride = share * LANES, tokens, 0, 1, 1
        if first == end:
            break
        turn(rows, vectors, first, end, start, steps, stride, inputs)
        turn(before.ravel(), hidden, first, end, start, steps, stride, k)
        turn(given, slopes, first, end, start, steps, stride, gates)
        turn(floats_at(outer, 0), others, first, end, start, steps, stride, gates)
        for lane in range(end - first, LANES):  # these lanes copy another token: their share must be 0
            slopes[lane : gates * LANES : LANES] = 0
            others[lane : gates * LANES : LANES] = 0
        below[:] = 0
        for step in range(steps):
            add_products(by_gate, inputs, gates, slopes, step * gates * LANES, below, step * inputs * LANES)
        turn_back(below, 0, targets, first, end, start, steps, stride, inputs)
        add_pairs(slopes, gates, vectors, inputs, by_input, steps)
        add_pairs(others, gates, hidden, k, by_state, steps)
        add_pairs(slopes, gates, ones, 1, in_all, steps)
        add_pairs(others, gates, ones, 1, out_all, steps)
    for sums, result in (by_input, grad_ih), (by_state, grad_hh), (in_all, bias_ih), (out_all, bias_hh):
        for i in range(len(sums) // LANES):
            floats_at(result, 0)[i] = sums[i * LANES : (i + 1) * LANES].sum()


@compiled_loop
def add_pairs(left, height, right, width, sums, steps):
    """Add the products of rows of the left with rows of the right, step by step, to the sums (height, width)."""
    for j in range(width):
        row = 0
        while row + 4 <= height:  # four sums run side by side
            a, stride = (row * width + j) * LANES, width * LANES
            first, second = lanes_at(sums, a), lanes_at(sums, a + stride)
            third, fourth = lanes_at(sums, a + 2 * stride), lanes_at(sums, a + 3 * stride)
            for step in range(steps):
                vector, place = lanes_at(right, (step * width + j) * LANES), (step * height + row) * LANES
                first = first + vector * lanes_at(left, place)
                second = second + vector * lanes_at(left, place + LANES)
                third = third + vector * lanes_at(left, place + 2 * LANES)
                fourth = fourth + vector * lanes_at(left, place + 3 * LANES)
            put_lanes(sums, a, first)
            put_lanes(sums, a + stride, second)
            put_lanes(sums, a + 2 * stride, third)
            put_lanes(sums, a + 3 * stride, fourth)
            row += 4
        while row < height:
            place = (row * width + j) * LANES
            for step in range(steps):
                product = lanes_at(right, (step * width + j) * LANES) * lanes_at(left, (step * height + row) * LANES)
                put_lanes(sums, place, lanes_at(sums, place) + product)
            row += 1
