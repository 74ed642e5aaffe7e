// Normalisation within an image: x is (n, pixels, c), its channels in groups of c/groups neighbours; a group's
// mean and variance are over its pixels*c/groups values. Layer normalisation is one group.
//
//   groupnorm_forward        y = xhat*gamma + beta, xhat = (x - mean)*inverse; mean and
//                            inverse = 1/sqrt(variance + eps) of every group; y may be x
//                                                                      n*pixels*c reals in and out
//   groupnorm_backward       dx = inverse*(g - mean of g - xhat * mean of g*xhat), g = dy*gamma, means over the
//                            group; dx may be dy or x                  2*n*pixels*c reals in, n*pixels*c out
//   groupnorm_backward_sums  dgamma[p] = sum of dy*xhat, dbeta[p] = sum of dy over part p of the n*pixels rows,
//                            p*rows//parts to (p+1)*rows//parts        2*n*pixels*c reals in
//
// The moments are those of two passes, of which the second also finds what rounding left of the mean: as good
// as sums in double, with none. NaN stays NaN.
// Outputs: overwritten.
// Bytes:   at the right; a group is read more than once, but the second time from the cache.
// Launch:  `width` threads a group, 32 or 256: a warp, eight groups a block, or a block; the sums a block for each
//          part and 32 columns.
#include "reduce.cuh"

// The sum over the `width` threads of a group, given to them all.
DEVICE wide group_sum(wide value, int width) { return width == WARP ? warp_sum(value) : block_sum(value); }

// This thread's walk over its group: elements at `first + step * ...`, row after row.
struct Group {
    long long number, base;  // of the group; of its first element
    int per, column, lane, rows;

    __device__ Group(int n, int pixels, int c, int groups, int width) {
        const int thread = threadIdx.x;
        number = (long long)blockIdx.x * (THREADS / width) + thread / width;
        lane = thread % width;
        per = c / groups;
        const long long image = number / groups;
        column = (int)(number - image * groups) * per;
        base = image * pixels * c + column;
        rows = image < n ? pixels : 0;  // without a group: company in the sums
    }
};

// f(element, channel within the group), for every element of the group that is this thread's.
template <class F>
DEVICE void walk(const Group& group, int c, int width, F f) {
    long long row = group.lane / group.per;
    int channel = group.lane - (int)row * group.per;
    const int down = width / group.per, across = width - down * group.per;
    while (row < group.rows) {
        f(group.base + row * c + channel, channel);
        row += down;
        channel += across;
        if (channel >= group.per) {
            channel -= group.per;
            row++;
        }
    }
}

// launch: blocks=(n*groups*width+255)//256
KERNEL groupnorm_forward(const real* x /*n*pixels*c*/, const wide* gamma /*c*/, const wide* beta /*c*/,
                         real* y /*n*pixels*c*/, wide* mean /*n*groups*/, wide* inverse /*n*groups*/, wide eps,
                         int n, int pixels, int c, int groups, int width) {
    const Group group(n, pixels, c, groups, width);
    const wide count = (wide)pixels * (wide)group.per;
    wide sum = 0;
    walk(group, c, width, [&](long long at, int) { sum += load(x + at); });
    wide center = group_sum(sum, width) / count;
    wide left = 0, m2 = 0;  // of the deviations from that: their sum, which rounding alone makes, and of squares
    walk(group, c, width, [&](long long at, int) {
        const wide d = load(x + at) - center;
        left += d;
        m2 += d * d;
    });
    left = group_sum(left, width) / count;
    m2 = group_sum(m2, width) - count * left * left;
    center += left;
    const wide spread = 1 / sqrt((m2 < 0 ? wide(0) : m2) / count + eps);
    if (group.lane == 0 && group.rows) {
        mean[group.number] = center;
        inverse[group.number] = spread;
    }
    const wide *scale = gamma + group.column, *shift = beta + group.column;
    walk(group, c, width, [&](long long at, int channel) {
        store(y + at, (load(x + at) - center) * spread * scale[channel] + shift[channel]);
    });
}

// launch: blocks=(n*groups*width+255)//256
KERNEL groupnorm_backward(const real* dy /*n*pixels*c*/, const real* x /*n*pixels*c*/,
                          const wide* mean /*n*groups*/, const wide* inverse /*n*groups*/,
                          const wide* gamma /*c*/, real* dx /*n*pixels*c*/, int n, int pixels, int c,
                          int groups, int width) {
    const Group group(n, pixels, c, groups, width);
    const wide count = (wide)pixels * (wide)group.per;
    const wide center = group.rows ? mean[group.number] : wide(0),
               spread = group.rows ? inverse[group.number] : wide(0);
    const wide* scale = gamma + group.column;
    wide plain = 0, weighted = 0;
    walk(group, c, width, [&](long long at, int channel) {
        const wide g = load(dy + at) * scale[channel];
        plain += g;
        weighted += g * (load(x + at) - center);
    });
    plain = group_sum(plain, width) / count;
    weighted = group_sum(weighted, width) * spread / count;
    walk(group, c, width, [&](long long at, int channel) {
        const wide xhat = (load(x + at) - center) * spread;
        store(dx + at, spread * (load(dy + at) * scale[channel] - plain - xhat * weighted));
    });
}

struct Pair {
    wide dy, product;
};

// launch: blocks=parts*((c+31)//32)
KERNEL groupnorm_backward_sums(const real* dy /*n*pixels*c*/, const real* x /*n*pixels*c*/,
                               const wide* mean /*n*groups*/, const wide* inverse /*n*groups*/,
                               wide* dgamma /*parts*c*/, wide* dbeta /*parts*c*/, int n, int pixels, int c,
                               int groups, int parts) {
    const Tile tile((long long)n * pixels, c, parts);
    Pair sum = {0, 0};
    if (tile.column < c) {
        const int own = tile.column / (c / groups);
        for (long long row = tile.first; row < tile.stop; row += tile.step) {
            const long long at = row * c + tile.column, group = row / pixels * groups + own;
            const wide d = load(dy + at);
            sum.dy += d;
            sum.product += d * ((load(x + at) - mean[group]) * inverse[group]);
        }
    }
    sum = fold_rows(sum, tile.lanes, [](Pair a, Pair b) { return Pair{a.dy + b.dy, a.product + b.product}; });
    if (tile.writes) {
        const long long to = (long long)tile.part * c + tile.column;
        dgamma[to] = sum.product;
        dbeta[to] = sum.dy;
    }
}
