"""The gated recurrences in compiled loops for the CPU: forward and backward scans of GRU and LSTM.

The same update rules as in `naive.py`, with the input's part of the gates computed beforehand. A step works on all
sequences of the batch, so that their activation functions fill the vector units; sums and activations are float64,
states are rounded to float32 after every step, so that going on from a state equals going through. Tensors are given
by the addresses of contiguous float32, absent ones by 0. Optional: needs numba (`pip install "peft-read[fast]"`).
"""

# mypy: allow-untyped-defs
import numpy as np

from .simd import bytes_at, compiled_loop, floats_at, inlined, tanh_ratio

__all__ = ["gru_backward", "gru_forward", "lstm_backward", "lstm_forward", "tanh"]


@inlined
def tanh(x):
    """The hyperbolic tangent to 1e-9. Comparisons with what is not a number are false, so that it stays that."""
    x = 9.0 if x > 9.0 else x  # 1 - tanh(9) = 3e-8 is below the rounding of float32
    x = -9.0 if x < -9.0 else x
    return tanh_ratio(x)


@inlined
def sigmoid(x):
    """The logistic function."""
    return 0.5 + 0.5 * tanh(0.5 * x)


@inlined
def add_product(target, b, weight, vector, width, k):
    """target[b, :width] += weight.T @ vector[b], four of the k terms at a time."""
    j = 0
    while j + 4 <= k:
        first, second, third, fourth = vector[b, j], vector[b, j + 1], vector[b, j + 2], vector[b, j + 3]
        for i in range(width):
            target[b, i] += (weight[j, i] * first + weight[j + 1, i] * second) + (
                weight[j + 2, i] * third + weight[j + 3, i] * fourth
            )
        j += 4
    while j < k:
        first = vector[b, j]
        for i in range(width):
            target[b, i] += weight[j, i] * first
        j += 1


@inlined
def turned(address, rows, columns):
    """A matrix the other way round, (columns, rows), in float64."""
    grad_states, matrix = np.empty((columns, rows)), floats_at(address, (rows, columns))
    for i in range(rows):
        for j in range(columns):
            grad_states[j, i] = matrix[i, j]
    return grad_states


@inlined
def in_float64(address, batch, width):
    """A matrix (batch, width) in float64, zero if absent."""
    grad_states, given = np.zeros((batch, width)), floats_at(address, (batch, width))
    if address:
        for b in range(batch):
            for i in range(width):
                grad_states[b, i] = given[b, i]
    return grad_states


@compiled_loop
def gru_forward(inner, weight_hh, bias_hh, state, valid, outputs, gates, batch, length, k):
    """h_t = (1 - z) n + z h_{t-1}, with n = tanh(inner_n + r (W_hn h_{t-1} + b_hn)); gates are r, z, n, W_hn h + b_hn.

    `inner` is W_ih x + b_ih, (B, T, 3 k).
    """
    by_input = turned(weight_hh, 3 * k, k)
    hidden, bias, masked = in_float64(state, batch, k), in_float64(bias_hh, 1, 3 * k), valid != 0
    inner, valid = floats_at(inner, (batch, length, 3 * k)), bytes_at(valid, (batch, length))
    outputs, gates = floats_at(outputs, (batch, length, k)), floats_at(gates, (batch, length, 4 * k))
    outer = np.empty((batch, 3 * k))
    for t in range(length):
        for b in range(batch):
            for i in range(3 * k):
                outer[b, i] = bias[0, i]
            add_product(outer, b, by_input, hidden, 3 * k, k)
            for i in range(2 * k):
                outer[b, i] = sigmoid(outer[b, i] + inner[b, t, i])
            for i in range(k):
                reset, update, new = outer[b, i], outer[b, k + i], outer[b, 2 * k + i]
                gates[b, t, i] = reset
                gates[b, t, k + i] = update
                gates[b, t, 3 * k + i] = new
                new = tanh(inner[b, t, 2 * k + i] + reset * new)
                gates[b, t, 2 * k + i] = new
                outer[b, i] = np.float32(new + update * (hidden[b, i] - new))
            if not masked or valid[b, t]:
                for i in range(k):
                    hidden[b, i] = outer[b, i]
            for i in range(k):
                outputs[b, t, i] = hidden[b, i]


@compiled_loop
def gru_backward(
    grad_outputs, weight_hh, state, valid, outputs, gates, grad_inner, grad_outer, grad_state, batch, length, k
):  # fmt: skip
    """Sets the gradients of `inner`, of W_hh h + b_hh (both zero at padding), and of the first state."""
    weight, states, masked = (
        in_float64(weight_hh, 3 * k, k),
        in_float64(state, batch, k),
        valid != 0,
    )
    grad_outputs, outputs = floats_at(grad_outputs, (batch, length, k)), floats_at(outputs, (batch, length, k))
    valid, gates = bytes_at(valid, (batch, length)), floats_at(gates, (batch, length, 4 * k))
    grad_inner = floats_at(grad_inner, (batch, length, 3 * k))
    grad_outer = floats_at(grad_outer, (batch, length, 3 * k))
    carried = np.zeros((batch, k))
    step = np.empty(k)
    for t in range(length - 1, -1, -1):
        for b in range(batch):
            for i in range(k):
                carried[b, i] += grad_outputs[b, t, i]
            if masked and not valid[b, t]:
                for i in range(3 * k):
                    grad_inner[b, t, i] = 0
                    grad_outer[b, t, i] = 0
                continue
            for i in range(k):
                reset, update = np.float64(gates[b, t, i]), np.float64(gates[b, t, k + i])
                new, below = np.float64(gates[b, t, 2 * k + i]), np.float64(gates[b, t, 3 * k + i])
                before = np.float64(outputs[b, t - 1, i] if t > 0 else states[b, i])
                d = carried[b, i]
                d_new = d * (1 - update) * (1 - new * new)
                d_update = d * (before - new) * update * (1 - update)
                d_reset = d_new * below * reset * (1 - reset)
                grad_inner[b, t, i] = d_reset
                grad_inner[b, t, k + i] = d_update
                grad_inner[b, t, 2 * k + i] = d_new
                grad_outer[b, t, i] = d_reset
                grad_outer[b, t, k + i] = d_update
                grad_outer[b, t, 2 * k + i] = d_new * reset
                step[i] = d * update
            for i in range(3 * k):
                d = np.float64(grad_outer[b, t, i])
                for j in range(k):
                    step[j] += weight[i, j] * d
            for i in range(k):
                carried[b, i] = step[i]
    grad_states = floats_at(grad_state, (batch, k))
    for b in range(batch):
        for i in range(k):
            grad_states[b, i] = carried[b, i]


@compiled_loop
def lstm_forward(inner, weight_hh, state, valid, outputs, cell_states, gates, batch, length, k):
    """c_t = f c_{t-1} + i g and h_t = o tanh(c_t); gates are i, f, g, o; `inner` is W_ih x + both biases."""
    by_input, states, masked = turned(weight_hh, 4 * k, k), in_float64(state, batch, 2 * k), valid != 0
    hidden, cell_state = np.empty((batch, k)), np.empty((batch, k))
    for b in range(batch):
        for i in range(k):
            hidden[b, i], cell_state[b, i] = states[b, i], states[b, k + i]
    inner, valid = floats_at(inner, (batch, length, 4 * k)), bytes_at(valid, (batch, length))
    outputs, cell_states = floats_at(outputs, (batch, length, k)), floats_at(cell_states, (batch, length, k))
    gates = floats_at(gates, (batch, length, 4 * k))
    sums = np.empty((batch, 4 * k))
    for t in range(length):
        for b in range(batch):
            if masked and not valid[b, t]:
                for i in range(k):
                    outputs[b, t, i] = hidden[b, i]
                    cell_states[b, t, i] = cell_state[b, i]
                continue
            for i in range(4 * k):
                sums[b, i] = inner[b, t, i]
            add_product(sums, b, by_input, hidden, 4 * k, k)
            step = sums[b]
            for i in range(2 * k):
                step[i] = sigmoid(step[i])
            for i in range(2 * k, 3 * k):
                step[i] = tanh(step[i])
            for i in range(3 * k, 4 * k):
                step[i] = sigmoid(step[i])
            for i in range(4 * k):
                gates[b, t, i] = step[i]
            for i in range(k):
                cell_state[b, i] = np.float32(step[k + i] * cell_state[b, i] + step[i] * step[2 * k + i])
                hidden[b, i] = np.float32(step[3 * k + i] * tanh(cell_state[b, i]))
                outputs[b, t, i] = hidden[b, i]
                cell_states[b, t, i] = cell_state[b, i]


@compiled_loop
def lstm_backward(
    grad_outputs, grad_cell_states, weight_hh, state, valid, cell_states, gates, grad_inner, grad_state, batch,
    length, k,
):  # fmt: skip
    """Sets the gradients of `inner` (zero at padding) and of the first state; `grad_cell_states` may be absent."""
    weight, states = in_float64(weight_hh, 4 * k, k), in_float64(state, batch, 2 * k)
    masked, outputs_only = valid != 0, grad_cell_states == 0
    shape = (batch, length, k)
    grad_outputs, grad_cell_states = floats_at(grad_outputs, shape), floats_at(grad_cell_states, shape)
    valid, cell_states = bytes_at(valid, (batch, length)), floats_at(cell_states, shape)
    gates, grad_inner = floats_at(gates, (batch, length, 4 * k)), floats_at(grad_inner, (batch, length, 4 * k))
    carried = np.zeros((batch, k))
    carried_cell = np.zeros((batch, k))
    for t in range(length - 1, -1, -1):
        for b in range(batch):
            for i in range(k):
                carried[b, i] += grad_outputs[b, t, i]
            if not outputs_only:
                for i in range(k):
                    carried_cell[b, i] += grad_cell_states[b, t, i]
            if masked and not valid[b, t]:
                for i in range(4 * k):
                    grad_inner[b, t, i] = 0
                continue
            for i in range(k):
                input_gate, forget_gate = np.float64(gates[b, t, i]), np.float64(gates[b, t, k + i])
                candidate, output_gate = np.float64(gates[b, t, 2 * k + i]), np.float64(gates[b, t, 3 * k + i])
                before = np.float64(cell_states[b, t - 1, i] if t > 0 else states[b, k + i])
                tanh_cell = tanh(np.float64(cell_states[b, t, i]))
                d = carried[b, i]
                d_cell = carried_cell[b, i] + d * output_gate * (1 - tanh_cell * tanh_cell)
                grad_inner[b, t, i] = d_cell * candidate * input_gate * (1 - input_gate)
                grad_inner[b, t, k + i] = d_cell * before * forget_gate * (1 - forget_gate)
                grad_inner[b, t, 2 * k + i] = d_cell * input_gate * (1 - candidate * candidate)
                grad_inner[b, t, 3 * k + i] = d * tanh_cell * output_gate * (1 - output_gate)
                carried_cell[b, i] = d_cell * forget_gate
                carried[b, i] = 0
            for i in range(4 * k):
                d = np.float64(grad_inner[b, t, i])
                for j in range(k):
                    carried[b, j] += weight[i, j] * d
    grad_states = floats_at(grad_state, (batch, 2 * k))
    for b in range(batch):
        for i in range(k):
            grad_states[b, i], grad_states[b, k + i] = carried[b, i], carried_cell[b, i]
