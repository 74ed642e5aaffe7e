// What every kernel file begins with: the launch words, the types, and accesses by four.
//
// Types are chosen when a file is compiled, one module a file and choice:
//
//   -DREAL=    float (default)   double   half    bfloat16      real: what activations are stored in
//   wide       float             double   float   float         what sums, weights and arithmetic are in
//   -DPIXEL=   uint8 (default) | float                          pixel: what a data set is stored in
//
// A half or bfloat16 `real` is two bytes without arithmetic: load, compute in wide, store. Conversions round
// to nearest even, with the same bits on a GPU and under g++. Literals are written wide(0.5): a float kernel
// never computes in double, nor a double one in float.
//
// Outside of CUDA its words come from emulator/cuda.h, which is the list of what a kernel may use.
#ifndef GPUNET_COMMON
#define GPUNET_COMMON

#define THREADS 256  // of every block of every launch
#define WARP 32
#define KERNEL extern "C" __global__ void  // no __launch_bounds__: with 256, ptxas spills to fill the chip
#define DEVICE static __device__ inline

// The loop of a launch over=n: whatever the grid, each i of 0 .. n-1 is taken by one thread.
#define OVER(i, n)                                                             \
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < (n); \
         i += (long long)gridDim.x * THREADS)

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")  // small arrays indexed by the loop stay in registers
#else
#define UNROLL
#endif

#ifndef REAL
#define REAL float
#endif
#ifndef PIXEL
#define PIXEL uint8
#endif
#define KIND_float 1
#define KIND_double 2
#define KIND_half 3
#define KIND_bfloat16 4
#define KIND_uint8 5
#define KIND_PASTED(name) KIND_##name
#define KIND(name) KIND_PASTED(name)  // #if compares numbers only: a name nobody knows is 0

typedef unsigned long long word;

// The same 32 bits, read as the other type.
union Bits {
    float value;
    unsigned int bits;
};

DEVICE float float_of(unsigned int bits) {
    Bits b;
    b.bits = bits;
    return b.value;
}

DEVICE unsigned int bits_of(float value) {
    Bits b;
    b.value = value;
    return b.bits;
}

// Types, and widen and narrow between them, overloaded for wide too: load and store serve sums as well.

#if KIND(REAL) == KIND_float
typedef float real;
typedef float wide;
#elif KIND(REAL) == KIND_double
typedef double real;
typedef double wide;
#elif KIND(REAL) == KIND_half
struct real {
    unsigned short bits;
};
typedef float wide;

DEVICE wide widen(real x) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
#else
    _Float16 value;
    __builtin_memcpy(&value, &x.bits, 2);
    return value;
#endif
}

DEVICE void narrow(wide v, real& x) {
#ifdef __CUDACC__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(v));
#else
    const _Float16 value = (_Float16)v;
    __builtin_memcpy(&x.bits, &value, 2);
#endif
}
#elif KIND(REAL) == KIND_bfloat16
struct real {
    unsigned short bits;
};
typedef float wide;

DEVICE wide widen(real x) { return float_of((unsigned int)x.bits << 16); }

// In integers on every architecture: cvt.rn.bf16 needs sm_80, and five operations hide behind the memory.
DEVICE void narrow(wide v, real& x) {
    const unsigned int bits = bits_of(v);
    const unsigned int rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    x.bits = (unsigned short)(v != v ? bits >> 16 | 0x40 : rounded);
}
#else
#error "REAL must be float, double, half or bfloat16"
#endif

#if KIND(PIXEL) == KIND_uint8
typedef unsigned char pixel;
#elif KIND(PIXEL) == KIND_float
typedef float pixel;
#else
#error "PIXEL must be uint8 or float"
#endif

DEVICE wide widen(wide x) { return x; }
DEVICE void narrow(wide v, wide& x) { x = v; }

template <class T>
DEVICE wide load(const T* p) {
    return widen(*p);
}

template <class T>
DEVICE void store(T* p, wide v) {
    narrow(v, *p);
}

DEVICE wide not_a_number() { return float_of(0x7fc00000); }

template <class T>
DEVICE bool is_nan(T v) {
    return v != v;
}

template <class T>
DEVICE bool is_finite(T v) {
    return v - v == 0;
}

// a goes before b in a search for the maximum. NaN is above all, as in np.argmax, so that it is never hidden.
DEVICE bool beats(wide a, wide b) { return a > b || (is_nan(a) && !is_nan(b)); }

// Four neighbours at a time. An arena or a view may begin anywhere, so the address decides at run time: one
// access where it is a multiple of four elements (16 bytes of float), else one by one. `count` < 4 is a tail:
// places behind it are read as zero and not written.

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T at[4];
};

DEVICE int up_to_four(long long left) { return left < 4 ? (int)left : 4; }

template <class T>
DEVICE bool one_access(const T* p, int count) {
    return count == 4 && (word)p % sizeof(Four<T>) == 0;
}

template <class T>
DEVICE void read_four(const T* p, int count, T* v) {
    if (one_access(p, count)) {
        const Four<T> four = *(const Four<T>*)p;
        UNROLL for (int j = 0; j < 4; j++) v[j] = four.at[j];
    } else {
        UNROLL for (int j = 0; j < 4; j++) v[j] = j < count ? p[j] : T();
    }
}

template <class T>
DEVICE void write_four(T* p, int count, const T* v) {
    if (one_access(p, count)) {
        Four<T> four;
        UNROLL for (int j = 0; j < 4; j++) four.at[j] = v[j];
        *(Four<T>*)p = four;
    } else {
        UNROLL for (int j = 0; j < 4; j++)
            if (j < count) p[j] = v[j];
    }
}

template <class T>
DEVICE void load_four(const T* p, int count, wide* v) {
    T raw[4];
    read_four(p, count, raw);
    UNROLL for (int j = 0; j < 4; j++) v[j] = widen(raw[j]);
}

template <class T>
DEVICE void store_four(T* p, int count, const wide* v) {
    T raw[4];
    UNROLL for (int j = 0; j < 4; j++) narrow(v[j], raw[j]);
    write_four(p, count, raw);
}

// v[j] = p[(column + j) % c]: the parameters of four neighbours in a row-major matrix of c columns.
DEVICE void load_columns(const wide* p, int column, int c, wide* v) {
    if (column + 4 <= c) {
        load_four(p + column, 4, v);
    } else {
        UNROLL for (int j = 0; j < 4; j++) {
            v[j] = p[column];
            column = column + 1 < c ? column + 1 : 0;
        }
    }
}

// y = f(x) and y = f(a, b), element by element; y may be an input. Launch over=(n+3)//4.

template <class F>
DEVICE void each(const real* x, real* y, long long n, F f) {
    OVER(i, (n + 3) / 4) {
        const int count = up_to_four(n - 4 * i);
        wide v[4];
        load_four(x + 4 * i, count, v);
        UNROLL for (int j = 0; j < 4; j++) v[j] = f(v[j]);
        store_four(y + 4 * i, count, v);
    }
}

template <class F>
DEVICE void each(const real* a, const real* b, real* y, long long n, F f) {
    OVER(i, (n + 3) / 4) {
        const int count = up_to_four(n - 4 * i);
        wide v[4], u[4];
        load_four(a + 4 * i, count, v);
        load_four(b + 4 * i, count, u);
        UNROLL for (int j = 0; j < 4; j++) v[j] = f(v[j], u[j]);
        store_four(y + 4 * i, count, v);
    }
}

#endif
