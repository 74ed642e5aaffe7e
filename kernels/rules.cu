// Update rules over the flat arenas, one launch for all parameters: weights w, gradient g, and what a rule keeps.
//
// As in sgd_update (optim.cu) an arena has n elements, a multiple of 256; table[i//256] is the row of element i.
// Where state.apply is 0 nothing is written. With t = state.update + 1, for each element:
//
//   lr = rates[min(update, steps - 1)] * lr_scale[group] * rate
//   d  = g*gradient_scale + decay*w; decoupled: d = g*gradient_scale, and w *= 1 - lr*decay comes first
//
//   gradient_adjust   g = (clip(g*gradient_scale, limit) + l1*sign(w)) / gradient_scale; limit 0: no clip
//                                                                                              2n wides in, n out
//   adagrad_update    s += d^2; w -= lr*d/(sqrt(s) + eps)                                      3n in, 2n out
//   window_square     update % window == place: square = d^2; total = square, or += where accumulate
//                                                                                              4n in, 2n out
//   window_update     w -= lr*d/(sqrt(total) + eps)                                            3n in, n out
//   adadelta_update   s = rho*s + (1 - rho)*d^2; u = d*sqrt(a + eps)/sqrt(s + eps);
//                     a = rho*a + (1 - rho)*u^2; w -= lr*u                                     4n in, 3n out
//   rmsprop_update    s = alpha*s + (1 - alpha)*d^2; centered: m += (1 - alpha)*(d - m), r = s - m^2, else r = s;
//                     v = momentum*v + d/(sqrt(r) + eps), inside: d/sqrt(r + eps); w -= lr*v   5n in, 4n out
//   rprop_update      update 0: step = lr; step *= up where d*before > 0, down where < 0, to low .. high;
//                     d = 0 where d*before < 0; w -= sign(d)*step; before = d                  4n in, 3n out
//   adam_update       m += (1 - beta1)*(d - m); v = beta2*v + (1 - beta2)*d^2;
//                     w -= lr/correction[0] * m/(sqrt(v)/sqrt(correction[1]) + eps)            4n in, 3n out
//   sign_update       v = momentum*v + (1 - momentum)*d; w -= lr*sign(v)                       3n in, 2n out
//   lion_update       w -= lr*sign(beta1*m + (1 - beta1)*d); m = beta2*m + (1 - beta2)*d       3n in, 2n out
//   asgd_update       eta = lr/(1 + lambd*lr*update)^alpha; w -= eta*(d + lambd*w);
//                     average += (w - average)/max(1, update - t0), update 0: average = w      3n in, 2n out
//   fisher_update     f = rho*f + (1 - rho)*count*d^2; w -= lr*d/(f/correction[0] + damping)   3n in, 2n out
//   average_update    every = 0: average = w at update 0, else average += (1 - keep)*(w - average), keep =
//                     min(decay, (t + 1)/(t + 10)); every > 0, with k = (t - start)/every: average = w where
//                     k <= 1, else average += (w - average)/k where that is whole                2n in, n out
//   max_norm_limit    of one matrix: a column whose norm is above `limit` is scaled to it      n to 2n in, n out
//
// Outputs: as written above, overwritten.
// Launch:  over, four elements a thread; max_norm_limit a block for 32 columns.
#include "reduce.cuh"
#include "state.cuh"

DEVICE wide sign_of(wide x) { return wide(x > 0) - wide(x < 0); }

// rule(x, d, lr, s) moves one weight x along direction d; s are its SLOTS values of state.
template <int SLOTS, class Rule>
DEVICE void each_weight(wide* w, const wide* g, wide* const (&slots)[SLOTS], const int* table, const wide* rate,
                        const wide* decay, const int* group, const wide* rates, const State* state, int decoupled,
                        int steps, long long n, Rule rule) {
    if (state->apply == 0) return;
    const wide scale = (wide)state->gradient_scale, now = rates[min(state->update, steps - 1ll)];
    OVER(i, n / 4) {
        const int row = table[i / 64];
        const wide lr = now * (wide)state->lr_scale[group[row]] * rate[row], shrink = decay[row];
        wide x[4], d[4], s[SLOTS][4];
        load_four(w + 4 * i, 4, x);
        load_four(g + 4 * i, 4, d);
        UNROLL for (int k = 0; k < SLOTS; k++) load_four(slots[k] + 4 * i, 4, s[k]);
        UNROLL for (int j = 0; j < 4; j++) {
            wide own[SLOTS];
            UNROLL for (int k = 0; k < SLOTS; k++) own[k] = s[k][j];
            d[j] *= scale;
            if (decoupled)
                x[j] *= 1 - lr * shrink;
            else
                d[j] += shrink * x[j];
            rule(x[j], d[j], lr, own);
            UNROLL for (int k = 0; k < SLOTS; k++) s[k][j] = own[k];
        }
        store_four(w + 4 * i, 4, x);
        UNROLL for (int k = 0; k < SLOTS; k++) store_four(slots[k] + 4 * i, 4, s[k]);
    }
}

// launch: over=n//4
KERNEL gradient_adjust(const wide* w /*n*/, wide* g /*n*/, const int* table /*n//256*/, const wide* l1 /*rows*/,
                       const State* state /*1*/, wide limit, int rows, long long n) {
    if (state->apply == 0) return;
    const wide scale = (wide)state->gradient_scale;
    OVER(i, n / 4) {
        const wide pull = l1[table[i / 64]];
        wide x[4], d[4];
        load_four(w + 4 * i, 4, x);
        load_four(g + 4 * i, 4, d);
        UNROLL for (int j = 0; j < 4; j++) {
            d[j] *= scale;
            if (limit > 0) d[j] = min(max(d[j], -limit), limit);
            d[j] = (d[j] + pull * sign_of(x[j])) / scale;
        }
        store_four(g + 4 * i, 4, d);
    }
}

// launch: over=n//4
KERNEL adagrad_update(wide* w /*n*/, const wide* g /*n*/, wide* square /*n*/, const int* table /*n//256*/,
                      const wide* rate /*rows*/, const wide* decay /*rows*/, const int* group /*rows*/,
                      const wide* rates /*steps*/, const State* state /*1*/, wide eps, int decoupled, int rows,
                      int steps, long long n) {
    wide* slots[] = {square};
    each_weight(w, g, slots, table, rate, decay, group, rates, state, decoupled, steps, n,
                [=](wide& x, wide d, wide lr, wide* s) {
                    s[0] += d * d;
                    x -= lr * d / (sqrt(s[0]) + eps);
                });
}

// launch: over=n//4
KERNEL window_square(const wide* w /*n*/, const wide* g /*n*/, wide* square /*n*/, wide* total /*n*/,
                     const int* table /*n//256*/, const wide* decay /*rows*/, const State* state /*1*/, int place,
                     int window, int accumulate, int decoupled, int rows, long long n) {
    if (state->apply == 0) return;
    const wide scale = (wide)state->gradient_scale;
    const bool now = state->update % window == place;
    OVER(i, n / 4) {
        const wide shrink = decoupled ? wide(0) : decay[table[i / 64]];
        wide x[4], d[4], s[4], sum[4];
        load_four(w + 4 * i, 4, x);
        load_four(g + 4 * i, 4, d);
        load_four(square + 4 * i, 4, s);
        UNROLL for (int j = 0; j < 4; j++) sum[j] = 0;
        if (accumulate) load_four(total + 4 * i, 4, sum);
        UNROLL for (int j = 0; j < 4; j++) {
            d[j] = d[j] * scale + shrink * x[j];
            if (now) s[j] = d[j] * d[j];
            sum[j] += s[j];
        }
        store_four(square + 4 * i, 4, s);
        store_four(total + 4 * i, 4, sum);
    }
}

// launch: over=n//4
KERNEL window_update(wide* w /*n*/, const wide* g /*n*/, wide* total /*n*/, const int* table /*n//256*/,
                     const wide* rate /*rows*/, const wide* decay /*rows*/, const int* group /*rows*/,
                     const wide* rates /*steps*/, const State* state /*1*/, wide eps, int decoupled, int rows,
                     int steps, long long n) {
    wide* slots[] = {total};
    each_weight(w, g, slots, table, rate, decay, group, rates, state, decoupled, steps, n,
                [=](wide& x, wide d, wide lr, wide* s) { x -= lr * d / (sqrt(s[0]) + eps); });
}

// launch: over=n//4
KERNEL adadelta_update(wide* w /*n*/, const wide* g /*n*/, wide* square /*n*/, wide* change /*n*/,
                       const int* table /*n//256*/, const wide* rate /*rows*/, const wide* decay /*rows*/,
                       const int* group /*rows*/, const wide* rates /*steps*/, const State* state /*1*/, wide rho,
                       wide eps, int decoupled, int rows, int steps, long long n) {
    wide* slots[] = {square, change};
    each_weight(w, g, slots, table, rate, decay, group, rates, state, decoupled, steps, n,
                [=](wide& x, wide d, wide lr, wide* s) {
                    s[0] = rho * s[0] + (1 - rho) * d * d;
                    const wide u = d * (sqrt(s[1] + eps) / sqrt(s[0] + eps));
                    s[1] = rho * s[1] + (1 - rho) * u * u;
                    x -= lr * u;
                });
}

// launch: over=n//4
KERNEL rmsprop_update(wide* w /*n*/, const wide* g /*n*/, wide* square /*n*/, wide* velocity /*n*/, wide* mean /*n*/,
                      const int* table /*n//256*/, const wide* rate /*rows*/, const wide* decay /*rows*/,
                      const int* group /*rows*/, const wide* rates /*steps*/, const State* state /*1*/, wide alpha,
                      wide eps, wide momentum, int centered, int inside, int decoupled, int rows, int steps,
                      long long n) {
    wide* slots[] = {square, velocity, mean};
    each_weight(w, g, slots, table, rate, decay, group, rates, state, decoupled, steps, n,
                [=](wide& x, wide d, wide lr, wide* s) {
                    s[0] = alpha * s[0] + (1 - alpha) * d * d;
                    wide spread = s[0];
                    if (centered) {
                        s[2] += (1 - alpha) * (d - s[2]);
                        spread -= s[2] * s[2];
                        spread = spread < 0 ? 0 : spread;
                    }
                    s[1] = momentum * s[1] + d / (inside ? sqrt(spread + eps) : sqrt(spread) + eps);
                    x -= lr * s[1];
                });
}

// launch: over=n//4
KERNEL rprop_update(wide* w /*n*/, const wide* g /*n*/, wide* step /*n*/, wide* before /*n*/,
                    const int* table /*n//256*/, const wide* rate /*rows*/, const wide* decay /*rows*/,
                    const int* group /*rows*/, const wide* rates /*steps*/, const State* state /*1*/, wide up,
                    wide down, wide low, wide high, int decoupled, int rows, int steps, long long n) {
    const bool first = state->update == 0;
    wide* slots[] = {step, before};
    each_weight(w, g, slots, table, rate, decay, group, rates, state, decoupled, steps, n,
                [=](wide& x, wide d, wide lr, wide* s) {
                    const wide turn = d * s[1];
                    s[0] = (first ? lr : s[0]) * (turn > 0 ? up : turn < 0 ? down : wide(1));
                    s[0] = min(max(s[0], low), high);
                    s[1] = turn < 0 ? wide(0) : d;
                    x -= sign_of(s[1]) * s[0];
                });
}

// launch: over=n//4
KERNEL adam_update(wide* w /*n*/, const wide* g /*n*/, wide* mean /*n*/, wide* square /*n*/,
                   const int* table /*n//256*/, const wide* rate /*rows*/, const wide* decay /*rows*/,
                   const int* group /*rows*/, const wide* rates /*steps*/, const State* state /*1*/,
                   const wide* correction /*2*/, wide beta1, wide beta2, wide eps, int decoupled, int rows, int steps,
                   long long n) {
    const wide first = correction[0], second = sqrt(correction[1]);
    wide* slots[] = {mean, square};
    each_weight(w, g, slots, table, rate, decay, group, rates, state, decoupled, steps, n,
                [=](wide& x, wide d, wide lr, wide* s) {
                    s[0] += (1 - beta1) * (d - s[0]);
                    s[1] = beta2 * s[1] + (1 - beta2) * d * d;
                    x -= lr / first * (s[0] / (sqrt(s[1]) / second + eps));
                });
}

// launch: over=n//4
KERNEL sign_update(wide* w /*n*/, const wide* g /*n*/, wide* velocity /*n*/, const int* table /*n//256*/,
                   const wide* rate /*rows*/, const wide* decay /*rows*/, const int* group /*rows*/,
                   const wide* rates /*steps*/, const State* state /*1*/, wide momentum, int decoupled, int rows,
                   int steps, long long n) {
    wide* slots[] = {velocity};
    each_weight(w, g, slots, table, rate, decay, group, rates, state, decoupled, steps, n,
                [=](wide& x, wide d, wide lr, wide* s) {
                    s[0] = momentum * s[0] + (1 - momentum) * d;
                    x -= lr * sign_of(s[0]);
                });
}

// launch: over=n//4
KERNEL lion_update(wide* w /*n*/, const wide* g /*n*/, wide* mean /*n*/, const int* table /*n//256*/,
                   const wide* rate /*rows*/, const wide* decay /*rows*/, const int* group /*rows*/,
                   const wide* rates /*steps*/, const State* state /*1*/, wide beta1, wide beta2, int decoupled,
                   int rows, int steps, long long n) {
    wide* slots[] = {mean};
    each_weight(w, g, slots, table, rate, decay, group, rates, state, decoupled, steps, n,
                [=](wide& x, wide d, wide lr, wide* s) {
                    x -= lr * sign_of(beta1 * s[0] + (1 - beta1) * d);
                    s[0] = beta2 * s[0] + (1 - beta2) * d;
                });
}

// launch: over=n//4
KERNEL asgd_update(wide* w /*n*/, const wide* g /*n*/, wide* average /*n*/, const int* table /*n//256*/,
                   const wide* rate /*rows*/, const wide* decay /*rows*/, const int* group /*rows*/,
                   const wide* rates /*steps*/, const State* state /*1*/, wide lambd, wide alpha, wide t0,
                   int decoupled, int rows, int steps, long long n) {
    const wide update = (wide)state->update;
    const wide share = update > t0 + 1 ? 1 / (update - t0) : wide(1);
    wide* slots[] = {average};
    each_weight(w, g, slots, table, rate, decay, group, rates, state, decoupled, steps, n,
                [=](wide& x, wide d, wide lr, wide* s) {
                    const wide eta = lr / pow(1 + lambd * lr * update, alpha);
                    x = x * (1 - lambd * eta) - eta * d;
                    s[0] = share == 1 ? x : s[0] + (x - s[0]) * share;
                });
}

// launch: over=n//4
KERNEL fisher_update(wide* w /*n*/, const wide* g /*n*/, wide* fisher /*n*/, const int* table /*n//256*/,
                     const wide* rate /*rows*/, const wide* decay /*rows*/, const int* group /*rows*/,
                     const wide* rates /*steps*/, const State* state /*1*/, const wide* correction /*2*/, wide rho,
                     wide damping, int decoupled, int rows, int steps, long long n) {
    const wide count = (wide)state->count, seen = correction[0];
    wide* slots[] = {fisher};
    each_weight(w, g, slots, table, rate, decay, group, rates, state, decoupled, steps, n,
                [=](wide& x, wide d, wide lr, wide* s) {
                    s[0] = rho * s[0] + (1 - rho) * count * d * d;
                    x -= lr * d / (s[0] / seen + damping);
                });
}

// launch: over=n//4
KERNEL average_update(const wide* w /*n*/, wide* average /*n*/, const State* state /*1*/, wide decay, long long start,
                      int every, long long n) {
    if (state->apply == 0) return;
    const long long t = state->update + 1, since = t - start;
    wide share = 1;
    if (every == 0 && t > 1)
        share = 1 - min(decay, (wide)(t + 1) / (wide)(t + 10));
    else if (every > 0 && since > every)
        share = since % every == 0 ? 1 / (wide)(since / every) : wide(0);
    OVER(i, n / 4) {
        wide x[4], a[4];
        load_four(w + 4 * i, 4, x);
        load_four(average + 4 * i, 4, a);
        UNROLL for (int j = 0; j < 4; j++) a[j] = share == 1 ? x[j] : a[j] + share * (x[j] - a[j]);
        store_four(average + 4 * i, 4, a);
    }
}

// launch: blocks=(c+31)//32
KERNEL max_norm_limit(wide* w /*rows*c*/, const State* state /*1*/, wide limit, long long rows, int c) {
    __shared__ wide factors[WARP];
    const Tile tile(rows, c, 1);
    wide sum = 0;
    if (tile.column < c)
        for (long long row = tile.first; row < tile.stop; row += tile.step) {
            const wide x = w[row * c + tile.column];
            sum += x * x;
        }
    sum = fold_rows(sum, tile.lanes, [](wide a, wide b) { return a + b; });
    if (threadIdx.x < tile.lanes) {
        const wide norm = sqrt(sum);
        factors[threadIdx.x] = state->apply != 0 && norm > limit ? limit / norm : wide(1);
    }
    __syncthreads();
    const wide factor = factors[threadIdx.x % tile.lanes];
    if (tile.column < c && factor != 1)
        for (long long row = tile.first; row < tile.stop; row += tile.step) w[row * c + tile.column] *= factor;
}
