"""The recurrences in compiled loops for the CPU: forward and backward scans of RNN, GRU and LSTM.

The same update rules as in `naive.py`, with the input's part of the gates computed beforehand. A step works on all
sequences of the batch, so that their activation functions fill the vector units; sums and activations are float64,
states are rounded to float32 after every step, so that going on from a state equals going through. Optional: needs
numba (`pip install "peft-read[fast]"`).
"""

# mypy: allow-untyped-defs
from typing import Any

import numpy as np
from numba import njit

__all__ = ["gru_backward", "gru_forward", "lstm_backward", "lstm_forward", "rnn_backward", "rnn_forward"]

# Sums may be reordered and contracted; infinities and not-a-number keep their meaning.
compiled_loop: Any = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
inlined: Any = njit(inline="always", error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


@inlined
def tanh(x):
    """The hyperbolic tangent to 1e-9, as x P(x²) / Q(x²): vectors of it fit the units, which calls of libm do not.

    Written with comparisons that are false for a not-a-number, which therefore stays one.
    """
    x = 9.0 if x > 9.0 else x  # 1 - tanh(9) = 3e-8 is below the rounding of float32
    x = -9.0 if x < -9.0 else x
    s = x * x
    over = (((5.085660236345205e-08 * s + 3.161581273037254e-05) * s + 0.004009736066679887) * s
            + 0.1378632610983273) * s + 0.9999999990746035  # fmt: skip
    under = ((((7.393481490187737e-10 * s + 1.619563201722467e-06) * s + 0.00042096284728284576) * s
              + 0.027741946000058647) * s + 0.47119658535608844) * s + 1.0  # fmt: skip
    return x * over / under


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


@compiled_loop
def rnn_forward(inner, weight_hh, state, real, outputs):
    """h_t = tanh(inner_t + W_hh h_{t-1}).

    Args:
        inner: W_ih x + both biases, (B, T, k).
        weight_hh: (k, k).
        state: the state before the first token, (B, k).
        real: (B, T), or (0, 0) if every token is real.
        outputs: (B, T, k), written.
    """
    batch, length, k = inner.shape
    by_input = np.ascontiguousarray(weight_hh.T).astype(np.float64)
    hidden = state.astype(np.float64)
    gates = np.empty((batch, k))
    for t in range(length):
        if k == 4:  # loops of known length are unrolled
            _rnn_step(inner, by_input, real, outputs, hidden, gates, t, 4)
        elif k == 8:
            _rnn_step(inner, by_input, real, outputs, hidden, gates, t, 8)
        else:
            _rnn_step(inner, by_input, real, outputs, hidden, gates, t, k)


@inlined
def _rnn_step(inner, by_input, real, outputs, hidden, gates, t, k):
    batch = hidden.shape[0]
    for b in range(batch):
        for i in range(k):
            gates[b, i] = inner[b, t, i]
        add_product(gates, b, by_input, hidden, k, k)
    flat = gates.reshape(-1)
    for i in range(batch * k):
        flat[i] = np.float32(tanh(flat[i]))
    if real.size > 0:
        for b in range(batch):
            if not real[b, t]:
                for i in range(k):
                    gates[b, i] = hidden[b, i]
    for b in range(batch):
        for i in range(k):
            hidden[b, i] = gates[b, i]
            outputs[b, t, i] = gates[b, i]


@compiled_loop
def rnn_backward(grad_outputs, weight_hh, real, outputs, grad_inner, grad_state):
    """Sets the gradients of `inner` (zero at padding) and of the first state."""
    batch, length, k = outputs.shape
    weight = weight_hh.astype(np.float64)
    carried = np.zeros((batch, k))
    for t in range(length - 1, -1, -1):
        for b in range(batch):
            for i in range(k):
                carried[b, i] += grad_outputs[b, t, i]
            if real.size > 0 and not real[b, t]:
                for i in range(k):
                    grad_inner[b, t, i] = 0
                continue
            for i in range(k):
                h = np.float64(outputs[b, t, i])
                grad_inner[b, t, i] = carried[b, i] * (1 - h * h)
                carried[b, i] = 0
            for i in range(k):
                d = np.float64(grad_inner[b, t, i])
                for j in range(k):
                    carried[b, j] += weight[i, j] * d
    grad_state[:] = carried


@compiled_loop
def gru_forward(inner, weight_hh, bias_hh, state, real, outputs, gates):
    """h_t = (1 - z) n + z h_{t-1}, with n = tanh(inner_n + r (W_hn h_{t-1} + b_hn)).

    Args:
        inner: W_ih x + b_ih, (B, T, 3k).
        weight_hh: (3k, k).
        bias_hh: (3k,).
        state: the state before the first token, (B, k).
        real: (B, T), or (0, 0) if every token is real.
        outputs: (B, T, k), written.
        gates: (B, T, 4k), written for the backward pass: r, z, n, and W_hn h + b_hn.
    """
    batch, length, k = outputs.shape
    by_input = np.ascontiguousarray(weight_hh.T).astype(np.float64)
    hidden = state.astype(np.float64)
    outer = np.empty((batch, 3 * k))
    masked = real.size > 0
    for t in range(length):
        for b in range(batch):
            for i in range(3 * k):
                outer[b, i] = bias_hh[i]
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
            if not masked or real[b, t]:
                for i in range(k):
                    hidden[b, i] = outer[b, i]
            for i in range(k):
                outputs[b, t, i] = hidden[b, i]


@compiled_loop
def gru_backward(grad_outputs, weight_hh, state, real, outputs, gates, grad_inner, grad_outer, grad_state):
    """Sets the gradients of `inner`, of W_hh h + b_hh (both zero at padding), and of the first state."""
    batch, length, k = outputs.shape
    weight = weight_hh.astype(np.float64)
    carried = np.zeros((batch, k))
    step = np.empty(k)
    for t in range(length - 1, -1, -1):
        for b in range(batch):
            for i in range(k):
                carried[b, i] += grad_outputs[b, t, i]
            if real.size > 0 and not real[b, t]:
                for i in range(3 * k):
                    grad_inner[b, t, i] = 0
                    grad_outer[b, t, i] = 0
                continue
            for i in range(k):
                reset, update = np.float64(gates[b, t, i]), np.float64(gates[b, t, k + i])
                new, below = np.float64(gates[b, t, 2 * k + i]), np.float64(gates[b, t, 3 * k + i])
                before = np.float64(outputs[b, t - 1, i] if t > 0 else state[b, i])
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
    grad_state[:] = carried


@compiled_loop
def lstm_forward(inner, weight_hh, state, real, outputs, memories, gates):
    """c_t = f c_{t-1} + i g and h_t = o tanh(c_t).

    Args:
        inner: W_ih x + both biases, (B, T, 4k).
        weight_hh: (4k, k).
        state: h and c before the first token, (B, 2k).
        real: (B, T), or (0, 0) if every token is real.
        outputs: h_t, (B, T, k), written.
        memories: c_t, (B, T, k), written.
        gates: (B, T, 4k), written for the backward pass: i, f, g, o.
    """
    batch, length, k = outputs.shape
    by_input = np.ascontiguousarray(weight_hh.T).astype(np.float64)
    hidden = state[:, :k].astype(np.float64)
    memory = state[:, k:].astype(np.float64)
    sums = np.empty((batch, 4 * k))
    masked = real.size > 0
    for t in range(length):
        for b in range(batch):
            if masked and not real[b, t]:
                for i in range(k):
                    outputs[b, t, i] = hidden[b, i]
                    memories[b, t, i] = memory[b, i]
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
                memory[b, i] = np.float32(step[k + i] * memory[b, i] + step[i] * step[2 * k + i])
                hidden[b, i] = np.float32(step[3 * k + i] * tanh(memory[b, i]))
                outputs[b, t, i] = hidden[b, i]
                memories[b, t, i] = memory[b, i]


@compiled_loop
def lstm_backward(grad_outputs, grad_memories, weight_hh, state, real, memories, gates, grad_inner, grad_state):
    """Sets the gradients of `inner` (zero at padding) and of the first state; `grad_memories` may be (0, 0, 0)."""
    batch, length, k = memories.shape
    weight = weight_hh.astype(np.float64)
    carried = np.zeros((batch, k))
    carried_memory = np.zeros((batch, k))
    for t in range(length - 1, -1, -1):
        for b in range(batch):
            for i in range(k):
                carried[b, i] += grad_outputs[b, t, i]
            if grad_memories.size > 0:
                for i in range(k):
                    carried_memory[b, i] += grad_memories[b, t, i]
            if real.size > 0 and not real[b, t]:
                for i in range(4 * k):
                    grad_inner[b, t, i] = 0
                continue
            for i in range(k):
                add, keep = np.float64(gates[b, t, i]), np.float64(gates[b, t, k + i])
                new, show = np.float64(gates[b, t, 2 * k + i]), np.float64(gates[b, t, 3 * k + i])
                before = np.float64(memories[b, t - 1, i] if t > 0 else state[b, k + i])
                shown = tanh(np.float64(memories[b, t, i]))
                d = carried[b, i]
                d_memory = carried_memory[b, i] + d * show * (1 - shown * shown)
                grad_inner[b, t, i] = d_memory * new * add * (1 - add)
                grad_inner[b, t, k + i] = d_memory * before * keep * (1 - keep)
                grad_inner[b, t, 2 * k + i] = d_memory * add * (1 - new * new)
                grad_inner[b, t, 3 * k + i] = d * shown * show * (1 - show)
                carried_memory[b, i] = d_memory * keep
                carried[b, i] = 0
            for i in range(4 * k):
                d = np.float64(grad_inner[b, t, i])
                for j in range(k):
                    carried[b, j] += weight[i, j] * d
    grad_state[:, :k] = carried
    grad_state[:, k:] = carried_memory
