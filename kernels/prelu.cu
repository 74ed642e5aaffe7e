// PReLU over a (rows, c) matrix: a rectifier with a learned slope a column; c = 1 is one slope in all.
//
//   prelu_forward        y = x if x > 0 else slope*x                                     rows*c reals in and out
//   prelu_backward       dx = dy if x > 0 else slope*dy; dx may be dy or x               2*rows*c reals in, rows*c out
//   prelu_backward_sums  sums[p] = sum of dy*x where x <= 0, over the rows p*rows//parts to (p+1)*rows//parts
//                                                                                        2*rows*c reals in
//
// A slope may be negative, so the sign of y says nothing and backward reads x. NaN stays NaN.
// Outputs: overwritten.
// Bytes:   at the right.
// Launch:  over, four elements a thread; the sums a block for each part and 32 columns.
#include "reduce.cuh"

// launch: over=(rows*c+3)//4
KERNEL prelu_forward(const real* x /*rows*c*/, const wide* slope /*c*/, real* y /*rows*c*/, long long rows,
                     int c) {
    OVER(i, (rows * c + 3) / 4) {
        const int count = up_to_four(rows * c - 4 * i);
        wide v[4], s[4];
        load_four(x + 4 * i, count, v);
        load_columns(slope, (int)(4 * i % c), c, s);
        UNROLL for (int j = 0; j < 4; j++) v[j] = v[j] > 0 ? v[j] : s[j] * v[j];
        store_four(y + 4 * i, count, v);
    }
}

// launch: over=(rows*c+3)//4
KERNEL prelu_backward(const real* dy /*rows*c*/, const real* x /*rows*c*/, const wide* slope /*c*/,
                      real* dx /*rows*c*/, long long rows, int c) {
    OVER(i, (rows * c + 3) / 4) {
        const int count = up_to_four(rows * c - 4 * i);
        wide d[4], v[4], s[4];
        load_four(dy + 4 * i, count, d);
        load_four(x + 4 * i, count, v);
        load_columns(slope, (int)(4 * i % c), c, s);
        UNROLL for (int j = 0; j < 4; j++) d[j] = v[j] > 0 ? d[j] : s[j] * d[j];
        store_four(dx + 4 * i, count, d);
    }
}

// launch: blocks=parts*((c+31)//32)
KERNEL prelu_backward_sums(const real* dy /*rows*c*/, const real* x /*rows*c*/, wide* sums /*parts*c*/,
                           long long rows, int c, int parts) {
    const Tile tile(rows, c, parts);
    wide sum = 0;
    if (tile.column < c)
        for (long long row = tile.first; row < tile.stop; row += tile.step) {
            const long long at = row * c + tile.column;
            const wide v = load(x + at);
            sum += v > 0 ? wide(0) : load(dy + at) * v;
        }
    sum = fold_rows(sum, tile.lanes, [](wide a, wide b) { return a + b; });
    if (tile.writes) sums[(long long)tile.part * c + tile.column] = sum;
}
