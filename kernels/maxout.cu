// Maxout: the largest of k neighbours.
//
//   maxout_forward   y[i] = largest of x[i*k .. i*k + k - 1], index = which (k <= 256), the first of equals; NaN wins
//   maxout_backward  dx[i*k + j] = dy[i] if index[i] is j else 0
//
// Outputs: overwritten.
// Bytes:   n*k reals on one side, n reals and n bytes on the other.
// Launch:  over, an output a thread; backward four elements of dx a thread.
#include "common.cuh"

// launch: over=n
KERNEL maxout_forward(const real* x /*n*k*/, real* y /*n*/, unsigned char* index /*n*/, long long n, int k) {
    OVER(i, n) {
        const real* from = x + i * k;
        wide best = load(from);
        int piece = 0;
        for (int j = 1; j < k; j++) {
            const wide v = load(from + j);
            if (beats(v, best)) {
                best = v;
                piece = j;
            }
        }
        store(y + i, best);
        index[i] = (unsigned char)piece;
    }
}

// launch: over=(n*k+3)//4
KERNEL maxout_backward(const real* dy /*n*/, const unsigned char* index /*n*/, real* dx /*n*k*/, long long n,
                       int k) {
    OVER(i, (n * k + 3) / 4) {
        const int count = up_to_four(n * k - 4 * i);
        long long from = 4 * i / k;
        int piece = (int)(4 * i - from * k);
        wide v[4];
        UNROLL for (int j = 0; j < 4; j++) {
            v[j] = j < count && index[from] == piece ? load(dy + from) : wide(0);
            if (++piece == k) {
                piece = 0;
                from++;
            }
        }
        store_four(dx + 4 * i, count, v);
    }
}
