"""Eight sequences at a time inside compiled loops: a numba type for a vector of eight float64.

Whether a compiler turns a loop into vector instructions is for it to decide; a value of this type always is a vector,
an AVX-512 register. On other processors LLVM splits it. Optional: needs numba.
"""

# mypy: allow-untyped-defs, disable-error-code="misc"
import operator

from llvmlite import ir
from numba import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from .memory import inlined

__all__ = ["LANES", "lanes_at", "number_at", "put_lanes", "sigmoid", "tanh", "turn_tile", "turn_tile_back", "where"]

LANES = 8
VECTOR, NARROW_VECTOR = ir.VectorType(ir.DoubleType(), LANES), ir.VectorType(ir.FloatType(), LANES)


class Lanes(types.Type):
    """The numba type of eight float64."""

    def __init__(self) -> None:
        super().__init__(name="lanes")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """A vector register."""

    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, VECTOR)


lanes = Lanes()


def indices(numbers):
    """Whole numbers as LLVM takes them for a shuffle."""
    return ir.Constant(ir.VectorType(ir.IntType(32), len(numbers)), numbers)


def spread(builder, value):
    """One number in all lanes."""
    nothing = ir.Constant(VECTOR, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(nothing, value, ir.IntType(32)(0)), nothing, indices([0] * LANES)
    )


def define_operators():
    """`+`, `-`, `*` and `/` of lanes with lanes and with numbers."""
    pairs = (lanes, lanes), (lanes, types.float64), (types.float64, lanes)
    for function, instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"),
                                  (operator.truediv, "fdiv")):  # fmt: skip

        class Template(ConcreteTemplate):
            cases = [signature(lanes, *pair) for pair in pairs]

        infer_global(function)(Template)
        for pair in pairs:

            def lower(context, builder, sig, arguments, instruction=instruction):
                given = zip(sig.args, arguments, strict=True)
                values = [value if kind is lanes else spread(builder, value) for kind, value in given]
                return getattr(builder, instruction)(*values)

            lower_builtin(function, *pair)(lower)


define_operators()


def element_of(context, builder, kind, array, index):
    """The address of an element of an array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def get(context, builder, kind, array, index):
    """Eight numbers of an array, from an index on."""
    vector = ir.VectorType(context.get_value_type(kind.dtype), LANES)
    found = builder.load(builder.bitcast(element_of(context, builder, kind, array, index), vector.as_pointer()))
    found.align = kind.dtype.bitwidth // 8
    return found


def put(context, builder, kind, array, index, value):
    """Set eight numbers of an array, from an index on."""
    place = builder.bitcast(element_of(context, builder, kind, array, index), value.type.as_pointer())
    builder.store(value, place).align = kind.dtype.bitwidth // 8


@intrinsic
def number_at(typingctx, array, index):
    """array[index]: numba's own indexing also looks for negative numbers."""

    def generate(context, builder, sig, arguments):
        return builder.load(element_of(context, builder, sig.args[0], *arguments))

    return array.dtype(array, types.intp), generate


@intrinsic
def lanes_at(typingctx, array, index):
    """array[index : index + 8] of a flat float64 array."""

    def generate(context, builder, sig, arguments):
        return get(context, builder, sig.args[0], *arguments)

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
        value, bound = arguments[0], spread(builder, arguments[1])
        value = builder.select(builder.fcmp_ordered(">", value, bound), bound, value)
        below = spread(builder, builder.fneg(arguments[1]))
        return builder.select(builder.fcmp_ordered("<", value, below), below, value)

    return lanes(lanes, types.float64), generate


@intrinsic
def where(typingctx, condition, value, otherwise):
    """Value, as float32 would hold it, in the lanes where the condition is not zero, `otherwise` in the others."""

    def generate(context, builder, sig, arguments):
        condition = builder.fcmp_ordered("!=", arguments[0], ir.Constant(VECTOR, [0.0] * LANES))
        rounded = builder.fpext(builder.fptrunc(arguments[1], NARROW_VECTOR), VECTOR)
        return builder.select(condition, rounded, arguments[2])

    return lanes(lanes, lanes, lanes), generate


def columns_of(builder, rows):
    """Eight vectors of eight as the columns of what they were the rows of; what crosses half a register is slow."""
    for distance, low in (
        (1, (0, 8, 1, 9, 4, 12, 5, 13)),
        (2, (0, 1, 8, 9, 4, 5, 12, 13)),
        (4, (0, 1, 2, 3, 8, 9, 10, 11)),
    ):
        orders = indices(low), indices([number + max(2, distance) for number in low])
        pairs = [(rows[i], rows[i + distance]) for i in range(LANES) if not i & distance]
        rows = [builder.shuffle_vector(*pair, order) for pair in pairs for order in orders]
    return rows[::2] + rows[1::2]


def row_places(builder, first, stride, last):
    """Where the rows of the lanes start; those behind the last one share its row."""
    numbers = [ir.Constant(first.type, lane) for lane in range(LANES)]
    rows = [builder.select(builder.icmp_signed("<", number, last), number, last) for number in numbers]
    return [builder.add(first, builder.mul(row, stride)) for row in rows]


@intrinsic
def turn_tile(typingctx, rows, first, stride, last, array, index):
    """Set array[index + 8 i + lane] = rows[first + stride lane + i] for eight i: float32 rows, a float64 array."""

    def generate(context, builder, sig, arguments):
        rows, first, stride, last, array, index = arguments
        places = row_places(builder, first, stride, last)
        loaded = [get(context, builder, sig.args[0], rows, place) for place in places]
        for i, column in enumerate(columns_of(builder, loaded)):
            target = builder.add(index, ir.Constant(index.type, LANES * i))
            put(context, builder, sig.args[4], array, target, builder.fpext(column, VECTOR))
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp, types.intp, array, types.intp), generate


@intrinsic
def turn_tile_back(typingctx, array, index, rows, first, stride, last):
    """Set rows[first + stride lane + i] = array[index + 8 i + lane] for eight i, the last lane first."""

    def generate(context, builder, sig, arguments):
        array, index, rows, first, stride, last = arguments
        sources = [builder.add(index, ir.Constant(index.type, LANES * i)) for i in range(LANES)]
        loaded = [get(context, builder, sig.args[0], array, source) for source in sources]
        narrow = columns_of(builder, [builder.fptrunc(one, NARROW_VECTOR) for one in loaded])
        for place, row in reversed(list(zip(row_places(builder, first, stride, last), narrow, strict=True))):
            put(context, builder, sig.args[2], rows, place, row)
        return context.get_dummy_value()

    return types.void(array, types.intp, rows, types.intp, types.intp, types.intp), generate


@inlined
def tanh(x):
    """The hyperbolic tangent of lanes to 1e-9, as x P(x²) / Q(x²)."""
    x = limited(x, 9.0)  # 1 - tanh(9) = 3e-8 is below the rounding of float32
    s = x * x
    t = s * s  # halves of the polynomials run side by side: a step of the recurrence waits for them
    over = (s * 0.1378632610983273 + 0.9999999990746035) + t * (
        (s * 3.161581273037254e-05 + 0.004009736066679887) + t * 5.085660236345205e-08
    )
    under = (s * 0.47119658535608844 + 1.0) + t * (
        (s * 0.00042096284728284576 + 0.027741946000058647) + t * (s * 7.393481490187737e-10 + 1.619563201722467e-06)
    )
    return x * over / under


@inlined
def sigmoid(x):
    """The logistic function of lanes."""
    return tanh(x * 0.5) * 0.5 + 0.5
