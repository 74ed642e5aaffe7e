"""Tiles of vector registers for kernels that numba compiles: what a product of matrices is made of.

A tile holds rows x vectors registers of `lanes` floats. LLVM keeps it in registers where there are enough of them, so
a loop over `multiply_add` runs at the processor's peak; its own vectoriser finds no such blocking.

    acc = load(8, 2, 16, bias, 0, 0)                           # 8 rows of 32 floats, each a copy of bias[:32]
    for k in range(depth):
        acc = multiply_add(acc, x, k, depth, w, k * 32)        # acc[r] += x[k + r * depth] * w[k * 32 :][:32]
    store(acc, y, 0, 32)

Arrays are one-dimensional float32; places and steps count elements and nothing checks them.
"""

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

WIDE = "+avx512f" in (config.CPU_FEATURES or llvm.get_host_cpu_features().flatten())
LANES = 16 if WIDE else 8  # floats in the widest register
REGISTERS = 24 if WIDE else 12  # of 32 or 16: those of a tile; the others hold operands

_FLOAT, _INDEX, _LANE = ir.FloatType(), ir.IntType(64), ir.IntType(32)


class Tile(types.Type):
    """The type of a tile."""

    def __init__(self, rows, vectors, lanes):
        self.rows, self.vectors, self.lanes = rows, vectors, lanes
        super().__init__(name=f"Tile({rows}, {vectors}, {lanes})")

    @property
    def vector(self):
        """LLVM's type of one register."""
        return ir.VectorType(_FLOAT, self.lanes)

    @property
    def places(self):
        """(register's number, row, first lane) of each register."""
        return [(r * self.vectors + v, r, v * self.lanes) for r in range(self.rows) for v in range(self.vectors)]


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, tile):
        super().__init__(manager, tile, ir.ArrayType(tile.vector, tile.rows * tile.vectors))


@intrinsic(prefer_literal=True)
def zeros(_, rows, vectors, lanes):
    """Return a tile of zeros; the three sizes are constants."""
    tile = Tile(rows.literal_value, vectors.literal_value, lanes.literal_value)

    def generate(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(tile), None)

    return tile(rows, vectors, lanes), generate


@intrinsic(prefer_literal=True)
def load(_, rows, vectors, lanes, x, at, step):
    """Return a tile: row r is x[at + r*step :][: vectors*lanes]; step 0 repeats one row."""
    tile = Tile(rows.literal_value, vectors.literal_value, lanes.literal_value)

    def generate(context, builder, signature, arguments):
        *_, x_value, at_value, step_value = arguments
        result = ir.Constant(context.get_value_type(tile), ir.Undefined)
        rows_at = _rows(context, builder, x, x_value, at_value, step_value, tile.rows)
        for number, row, lane in tile.places:
            result = builder.insert_value(result, _load(builder, tile, _offset(builder, rows_at[row], lane)), number)
        return result

    return tile(rows, vectors, lanes, x, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def store(_, tile, y, at, step):
    """y[at + r*step :][: vectors*lanes] = row r."""

    def generate(context, builder, signature, arguments):
        value, y_value, at_value, step_value = arguments
        rows_at = _rows(context, builder, y, y_value, at_value, step_value, tile.rows)
        for number, row, lane in tile.places:
            place = builder.bitcast(_offset(builder, rows_at[row], lane), tile.vector.as_pointer())
            builder.store(builder.extract_value(value, number), place).align = 4
        return context.get_dummy_value()

    return types.none(tile, y, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def multiply_add(_, tile, a, at, step, b, place):
    """Return tile[r] + a[at + r*step] * b[place :][: vectors*lanes], each with one rounding."""

    def generate(context, builder, signature, arguments):
        result, a_value, at_value, step_value, b_value, place_value = arguments
        fma = _fma(builder, tile)
        (row,) = _rows(context, builder, b, b_value, place_value, None, 1)
        operands = [_load(builder, tile, _offset(builder, row, v * tile.lanes)) for v in range(tile.vectors)]
        factors = _rows(context, builder, a, a_value, at_value, step_value, tile.rows)
        factors = [_repeat(builder, tile, builder.load(p)) for p in factors]
        for number, r, lane in tile.places:
            sums = builder.extract_value(result, number)
            sums = builder.call(fma, [factors[r], operands[lane // tile.lanes], sums])
            result = builder.insert_value(result, sums, number)
        return result

    return tile(tile, a, types.int64, types.int64, b, types.int64), generate


def _fma(builder, tile):
    kind = ir.FunctionType(tile.vector, [tile.vector] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{tile.lanes}f32")


def _rows(context, builder, array_type, array, at, step, count):
    """Return pointers to array[at + r * step]."""
    pointer = builder.gep(context.make_array(array_type)(context, builder, array).data, [at])
    found = [pointer]
    for _ in range(count - 1):
        found.append(builder.gep(found[-1], [step]))
    return found


def _offset(builder, pointer, elements):
    return builder.gep(pointer, [ir.Constant(_INDEX, elements)])


def _load(builder, tile, pointer):
    value = builder.load(builder.bitcast(pointer, tile.vector.as_pointer()))
    value.align = 4  # bytes: rows of an image begin anywhere
    return value


def _repeat(builder, tile, number):
    """Return a register with the number in every lane."""
    empty = ir.Constant(tile.vector, ir.Undefined)
    first = builder.insert_element(empty, number, ir.Constant(_LANE, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_LANE, tile.lanes), None))
