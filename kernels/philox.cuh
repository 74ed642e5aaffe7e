// Counter-based draws: Philox4x64-10 with the bits of np.random.Philox. Who draws what: gpunet.core.random.
//
//     key = (seed, 0); block b of the stream (site, time): counter (b + 1, site, time, 0), four 64-bit words
//
// The + 1 is NumPy's, which increments its counter before it generates.
#ifndef GPUNET_PHILOX
#define GPUNET_PHILOX

#include "common.cuh"

#define AUGMENT_SITE 0x61756721u
#define ORDER_SITE 0x6f726465u
#define SAMPLE_SITE 0x73616d70u

struct Draw {
    word at[4];
};

DEVICE word high_product(word a, word b) {
#ifdef __CUDACC__
    return __umul64hi(a, b);
#else
    return (word)((unsigned __int128)a * b >> 64);
#endif
}

DEVICE Draw philox(word seed, unsigned int site, word time, word block) {
    const word m0 = 0xD2E7470EE14C6C93ull, m1 = 0xCA5A826395121157ull;
    word x0 = block + 1, x1 = site, x2 = time, x3 = 0, k0 = seed, k1 = 0;
    UNROLL for (int round = 0; round < 10; round++) {
        const word y0 = high_product(m1, x2) ^ x1 ^ k0, y2 = high_product(m0, x0) ^ x3 ^ k1;
        x1 = m1 * x2;
        x3 = m0 * x0;
        x0 = y0;
        x2 = y2;
        k0 += 0x9E3779B97F4A7C15ull;
        k1 += 0xBB67AE8584CAA73Bull;
    }
    return {{x0, x1, x2, x3}};
}

// lane[j] = lane `place` + j of `bits` bits of a stream: e is lane e%(256/bits) of block e//(256/bits), low bits
// first. For those who cannot share blocks among threads.
template <int bits>
DEVICE void four_lanes(word seed, unsigned int site, word time, word place, unsigned int* lane) {
    const int per = 256 / bits, first = (int)(place % per);
    const Draw here = philox(seed, site, time, place / per);
    const Draw next = first + 3 < per ? here : philox(seed, site, time, place / per + 1);
    UNROLL for (int j = 0; j < 4; j++) {
        const bool inside = first + j < per;
        const int at = inside ? first + j : first + j - per, number = at * bits / 64;
        word w = 0;
        UNROLL for (int k = 0; k < 4; k++)  // an index that is known only now would put the words into memory
            w = k == number ? (inside ? here.at[k] : next.at[k]) : w;
        lane[j] = (unsigned int)(w >> at * bits % 64 & ((word)1 << bits) - 1);
    }
}

#endif
