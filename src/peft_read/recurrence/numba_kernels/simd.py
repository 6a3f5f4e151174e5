"""Several numbers at a time inside compiled loops: a numba type for vectors, and tensors by their address.

Whether a compiler turns a loop into vector instructions is for it to decide; a value of this type always is a vector:
eight float64 or sixteen float32, which fill an AVX-512 register. On other processors LLVM splits them. Tensors come
as addresses, because a whole number costs a compiled function a tenth of what an array does, and because storage that
numpy has seen could never be resized again, which is how FSDP frees gathered weights. Optional: needs numba.
"""

# mypy: allow-untyped-defs, disable-error-code="misc"
import operator
from typing import Any

from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from ... import backends

__all__ = [
    "LANES",
    "WIDE",
    "at",
    "bytes_at",
    "compiled_loop",
    "filled",
    "floats_at",
    "inlined",
    "lanes_at",
    "limited",
    "put_at",
    "put_lanes",
    "rounded",
    "tanh_ratio",
    "total_of",
    "turn_tile",
    "turn_tile_back",
    "where",
]

LANES = 8
WIDE = 16
# Sums may be reordered and contracted; infinities and not-a-number keep their meaning.
compiled_loop: Any = backends.compiled_loop(fastmath={"reassoc", "contract", "nsz"})
inlined: Any = njit(forceinline=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
VECTOR = ir.VectorType(ir.DoubleType(), LANES)


class Lanes(types.Type):
    """The numba type of several numbers.

    Args:
        element: the type of one of them.
        count: how many.
    """

    def __init__(self, element: Any, count: int) -> None:
        super().__init__(name=f"lanes_{element}_{count}")
        self.element, self.count = element, count


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """A vector register."""

    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.element).get_value_type(), fe_type.count))


lanes = Lanes(types.float64, LANES)
wide = Lanes(types.float32, WIDE)


def spread(builder, value, count):
    """One number in all lanes."""
    nothing = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    one = builder.insert_element(nothing, value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count))


def define_operators():
    """`+`, `-`, `*` and `/` of lanes with lanes and with numbers."""
    pairs = [pair for kind in (lanes, wide) for pair in ((kind, kind), (kind, kind.element), (kind.element, kind))]
    for function, instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"),
                                  (operator.truediv, "fdiv")):  # fmt: skip

        class Template(ConcreteTemplate):
            cases = [signature(pair[0] if isinstance(pair[0], Lanes) else pair[1], *pair) for pair in pairs]

        infer_global(function)(Template)
        for pair in pairs:

            def lower(context, builder, sig, arguments, instruction=instruction):
                values = [
                    value if kind is sig.return_type else spread(builder, value, sig.return_type.count)
                    for kind, value in zip(sig.args, arguments, strict=True)
                ]
                return getattr(builder, instruction)(*values)

            lower_builtin(function, *pair)(lower)


define_operators()


def place(context, builder, kind, array, index, count):
    """The address of some numbers in an array, from an index on."""
    data = context.make_array(kind)(context, builder, array).data
    element = context.get_value_type(kind.dtype)
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(element, count).as_pointer())


def get(context, builder, kind, array, index, count):
    instruction = builder.load(place(context, builder, kind, array, index, count))
    instruction.align = kind.dtype.bitwidth // 8
    return instruction


def put(context, builder, kind, array, index, value):
    instruction = builder.store(value, place(context, builder, kind, array, index, value.type.count))
    instruction.align = kind.dtype.bitwidth // 8


@intrinsic
def at(typingctx, array, index, width):
    """array[index : index + 16] of a flat float32 array, or array[index] of any if `width` is None."""
    if isinstance(width, types.NoneType):
        return types.float32(
            array, types.intp, width
        ), lambda context, builder, sig, arguments: builder.extract_element(
            get(context, builder, sig.args[0], *arguments[:2], 1), ir.IntType(32)(0)
        )
    return wide(array, types.intp, width), lambda context, builder, sig, arguments: get(
        context, builder, sig.args[0], *arguments[:2], WIDE
    )


@intrinsic
def put_at(typingctx, array, index, value):
    """array[index : index + 16] = value, or array[index] = value for a single number."""

    def generate(context, builder, sig, arguments):
        array, index, value = arguments
        if sig.args[2] is not wide:
            value = spread(builder, value, 1)
        put(context, builder, sig.args[0], array, index, value)
        return context.get_dummy_value()

    return types.void(array, types.intp, wide if value is wide else types.float32), generate


@intrinsic
def filled(typingctx, value):
    """A float32 sixteen times."""
    return wide(types.float32), lambda context, builder, sig, arguments: spread(builder, arguments[0], WIDE)


@intrinsic
def total_of(typingctx, value):
    """The sum of sixteen numbers, by halves."""

    def generate(context, builder, sig, arguments):
        (value,) = arguments
        count = WIDE
        while count > 1:
            count //= 2
            halves = [
                ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(start, start + count)))
                for start in (0, count)
            ]
            value = builder.fadd(*(builder.shuffle_vector(value, value, half) for half in halves))
        return builder.extract_element(value, ir.IntType(32)(0))

    return types.float32(wide), generate


@intrinsic
def lanes_at(typingctx, array, index):
    """array[index : index + 8] of a one-dimensional, contiguous float64 array."""

    def generate(context, builder, sig, arguments):
        return get(context, builder, sig.args[0], *arguments, LANES)

    return lanes(array, types.intp), generate


@intrinsic
def put_lanes(typingctx, array, index, value):
    """array[index : index + 8] = value."""

    def generate(context, builder, sig, arguments):
        put(context, builder, sig.args[0], *arguments)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), generate


@intrinsic
def limited(typingctx, value, bound):
    """Lanes between -bound and bound; what is not a number stays that, because comparisons with it are false."""

    def generate(context, builder, sig, arguments):
        value, bound = arguments[0], spread(builder, arguments[1], LANES)
        value = builder.select(builder.fcmp_ordered(">", value, bound), bound, value)
        below = spread(builder, builder.fneg(arguments[1]), LANES)
        return builder.select(builder.fcmp_ordered("<", value, below), below, value)

    return lanes(lanes, types.float64), generate


@intrinsic
def where(typingctx, condition, value, otherwise):
    """Value in the lanes where the condition is not zero, `otherwise` in the others."""

    def generate(context, builder, sig, arguments):
        condition = builder.fcmp_ordered("!=", arguments[0], ir.Constant(VECTOR, [0.0] * LANES))
        return builder.select(condition, arguments[1], arguments[2])

    return lanes(lanes, lanes, lanes), generate


@intrinsic
def rounded(typingctx, value):
    """Lanes as float32 would hold them."""

    def generate(context, builder, sig, arguments):
        narrow = builder.fptrunc(arguments[0], ir.VectorType(ir.FloatType(), LANES))
        return builder.fpext(narrow, VECTOR)

    return lanes(lanes), generate


def turned(builder, rows):
    """Eight vectors of eight as the columns of what they were the rows of."""
    halves = [[half + i // 2 + LANES * (i % 2) for i in range(LANES)] for half in (0, LANES // 2)]
    orders = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), half) for half in halves]
    for _ in range(3):
        pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
        rows = [builder.shuffle_vector(one, other, order) for one, other in pairs for order in orders]
    return rows


@intrinsic
def turn_tile(typingctx, rows, places, array, index):
    """Set array[index + 8 i + lane] = rows[places[lane] + i] for eight i: float32 rows, a float64 array."""

    def generate(context, builder, sig, arguments):
        rows, places, array, index = arguments
        sources = cgutils.unpack_tuple(builder, places, LANES)
        loaded = [get(context, builder, sig.args[0], rows, source, LANES) for source in sources]
        for i, column in enumerate(turned(builder, loaded)):
            target = builder.add(index, ir.Constant(index.type, LANES * i))
            put(context, builder, sig.args[2], array, target, builder.fpext(column, VECTOR))
        return context.get_dummy_value()

    return types.void(rows, places, array, types.intp), generate


@intrinsic
def turn_tile_back(typingctx, array, index, rows, places):
    """Set rows[places[lane] + i] = array[index + 8 i + lane] for eight i, the last lane first."""

    def generate(context, builder, sig, arguments):
        array, index, rows, places = arguments
        loaded = []
        for i in range(LANES):
            source = builder.add(index, ir.Constant(index.type, LANES * i))
            loaded.append(get(context, builder, sig.args[0], array, source, LANES))
        loaded = [builder.fptrunc(one, ir.VectorType(ir.FloatType(), LANES)) for one in loaded]
        targets = cgutils.unpack_tuple(builder, places, LANES)
        for target, row in reversed(list(zip(targets, turned(builder, loaded), strict=True))):
            put(context, builder, sig.args[2], rows, target, row)
        return context.get_dummy_value()

    return types.void(array, types.intp, rows, places), generate


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
    """The contiguous float32 tensor at an address; nothing may be read from it if the address is 0."""
    return carray(float_pointer(address), shape)


@inlined
def bytes_at(address, shape):
    """The contiguous boolean tensor at an address, as whole numbers."""
    return carray(byte_pointer(address), shape)


@inlined
def tanh_ratio(x):
    """tanh(x) to 1e-9 for |x| <= 9, as x P(x²) / Q(x²)."""
    s = x * x
    t = s * s  # halves of the polynomials run side by side: a step of the recurrence waits for them
    over = (s * 0.1378632610983273 + 0.9999999990746035) + t * (
        (s * 3.161581273037254e-05 + 0.004009736066679887) + t * 5.085660236345205e-08
    )
    under = (s * 0.47119658535608844 + 1.0) + t * (
        (s * 0.00042096284728284576 + 0.027741946000058647) + t * (s * 7.393481490187737e-10 + 1.619563201722467e-06)
    )
    return x * over / under
