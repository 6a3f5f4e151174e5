"""Tensors inside compiled loops: by their address, and small ones copied.

A whole number costs a compiled function a tenth of what an array does, and storage that numpy has seen could never be
resized again, which is how FSDP frees gathered weights. Tensors are contiguous float32, masks one byte per token; what
is absent has the address 0. Optional: needs numba (the extra `fast`).
"""

# mypy: allow-untyped-defs
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from ... import backends

__all__ = ["bytes_at", "compiled_loop", "copied", "floats_at", "inlined"]

# Sums may be reordered and contracted; infinities and not-a-number keep their meaning.
compiled_loop: Any = backends.compiled_loop(fastmath={"reassoc", "contract", "nsz"})
inlined: Any = njit(forceinline=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def pointer_to(element):
    """A function from an address to a pointer."""

    @intrinsic
    def pointer(typingctx, address):
        def generate(context, builder, sig, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(sig.return_type))

        return types.CPointer(element)(types.intp), generate

    return pointer


float_pointer, byte_pointer = pointer_to(types.float32), pointer_to(types.uint8)


@inlined
def floats_at(address, shape):
    """The tensor at an address; nothing may be read from it if the address is 0."""
    return carray(float_pointer(address), shape)


@inlined
def bytes_at(address, shape):
    """The mask at an address, as whole numbers."""
    return carray(byte_pointer(address), shape)


@inlined
def copied(address, rows, columns=1):
    """A float64 copy of a matrix the other way round, or of a vector, flat; zero if absent."""
    found, given = np.zeros(columns * rows), floats_at(address, 0)
    if address:
        for i in range(rows):
            for j in range(columns):
                found[j * rows + i] = given[i * columns + j]
    return found
