// Addition, scaling, concatenation, bias, sums down columns, casts. In a matrix a row is a pixel, a column a channel.
//
//   add_forward      y = a + b; y may be a or b                                           2n reals in, n out
//   scale_forward    y = factor*x; y may be x                                              n reals in and out
//   concat_forward   y[:, offset : offset + c] = x, other columns stay               rows*c reals in and out
//   concat_backward  dx = dy[:, offset : offset + c]                                 rows*c reals in and out
//   bias_forward     y += b in every row, in place                                   rows*c reals in and out
//   column_sum       sums[p] = sum of the rows p*rows//parts to (p+1)*rows//parts of x       rows*c reals in
//   sum_parts        y (+)= sum of x[p] over all parts p                                    parts*n wides in
//   cast_forward     y = x: weights as products take them                              n wides in, n reals out
//
// Outputs: overwritten; (+)= adds where accumulate is 1.
// Bytes:   at the right.
// Launch:  over, four elements a thread; column sums a block for each part and 32 columns, which adds rows in
//          steps and then halves, always in the same order.
#include "reduce.cuh"

// launch: over=(n+3)//4
KERNEL add_forward(const real* a /*n*/, const real* b /*n*/, real* y /*n*/, long long n) {
    each(a, b, y, n, [](wide u, wide v) { return u + v; });
}

// launch: over=(n+3)//4
KERNEL scale_forward(const real* x /*n*/, real* y /*n*/, wide factor, long long n) {
    each(x, y, n, [factor](wide v) { return factor * v; });
}

// Four neighbours of x lie in one row of y or are walked into the next one: one division serves them.

// launch: over=(rows*c+3)//4
KERNEL concat_forward(const real* x /*rows*c*/, real* y /*rows*width*/, long long rows, int c, int width,
                      int offset) {
    OVER(i, (rows * c + 3) / 4) {
        const int count = up_to_four(rows * c - 4 * i);
        long long row = 4 * i / c;
        int column = (int)(4 * i - row * c);
        real v[4];
        read_four(x + 4 * i, count, v);
        if (column + 4 <= c) {
            write_four(y + row * width + offset + column, 4, v);
        } else {
            UNROLL for (int j = 0; j < 4; j++) {
                if (j < count) y[row * width + offset + column] = v[j];
                if (++column == c) {
                    column = 0;
                    row++;
                }
            }
        }
    }
}

// launch: over=(rows*c+3)//4
KERNEL concat_backward(const real* dy /*rows*width*/, real* dx /*rows*c*/, long long rows, int c, int width,
                       int offset) {
    OVER(i, (rows * c + 3) / 4) {
        const int count = up_to_four(rows * c - 4 * i);
        long long row = 4 * i / c;
        int column = (int)(4 * i - row * c);
        real v[4] = {};
        if (column + 4 <= c) {
            read_four(dy + row * width + offset + column, 4, v);
        } else {
            UNROLL for (int j = 0; j < 4; j++) {
                if (j < count) v[j] = dy[row * width + offset + column];
                if (++column == c) {
                    column = 0;
                    row++;
                }
            }
        }
        write_four(dx + 4 * i, count, v);
    }
}

// launch: over=(rows*c+3)//4
KERNEL bias_forward(const wide* b /*c*/, real* y /*rows*c*/, long long rows, int c) {
    OVER(i, (rows * c + 3) / 4) {
        const int count = up_to_four(rows * c - 4 * i);
        wide v[4], bias[4];
        load_four(y + 4 * i, count, v);
        load_columns(b, (int)(4 * i % c), c, bias);
        UNROLL for (int j = 0; j < 4; j++) v[j] += bias[j];
        store_four(y + 4 * i, count, v);
    }
}

// launch: blocks=parts*((c+31)//32)
KERNEL column_sum(const real* x /*rows*c*/, wide* sums /*parts*c*/, long long rows, int c, int parts) {
    const Tile tile(rows, c, parts);
    const wide sum = column_tile_sum(x, tile, c);
    if (tile.writes) sums[(long long)tile.part * c + tile.column] = sum;
}

// launch: blocks=(n+31)//32
KERNEL sum_parts(const wide* x /*parts*n*/, wide* y /*n*/, int accumulate, int parts, int n) {
    const Tile tile(parts, n, 1);
    const wide sum = column_tile_sum(x, tile, n);
    if (tile.writes) y[tile.column] = accumulate ? y[tile.column] + sum : sum;
}

// launch: over=(n+3)//4
KERNEL cast_forward(const wide* x /*n*/, real* y /*n*/, long long n) {
    OVER(i, (n + 3) / 4) {
        const int count = up_to_four(n - 4 * i);
        wide v[4];
        load_four(x + 4 * i, count, v);
        store_four(y + 4 * i, count, v);
    }
}
