// The update: norm and verdict, SGD over the flat arenas (other rules: rules.cu), running statistics, counters.
//
// An arena has n elements, a multiple of 256, and a parameter starts at such a multiple: table[i//256] is the
// row of element i in rate, decay, momentum and group, so that one launch serves all parameters. Where
// state.apply is 0, optimizers and statistics write nothing.
//
//   gradient_norm      norms[p] = sum of g^2 over elements p*n//parts to (p+1)*n//parts, in double: n wides
//   gradient_finish    norm = sqrt(sum of norms)/(count*loss_scale), count = sums[2] = state.count
//                      if norm and sums[0] are finite and halt < 0: apply = 1, good += 1, and
//                          gradient_scale = 1/(count*loss_scale) * min(1, clip/norm), clip 0: no min;
//                          dynamic: after 2000 good updates loss_scale *= 2, good = 0
//                      else: apply = good = 0, gradient_scale stays; and unless halted before,
//                          dynamic and loss_scale > 1: loss_scale = max(loss_scale/2, 1), else halt = batch
//                      table[update % rows] = loss/count, hits/count, count, norm, rate of group 0,
//                          gradient_scale, sum of penalties, verdict, batch, update + 1.
//                          verdict: 1 applied, 0 skipped, -1 halted.
//                          The last is 0 while the rest is written: the host may look at any time.
//   penalty_sum        penalties[p] = sum of decay/2*w^2 (decoupled: 0) + l1*|w| over part p: n wides in
//   bias_correction    factors[k] = 1 - beta_k^(update + 1), by squaring in double: the same bits everywhere
//   probe_shift        probe = w + g*radius/|g|, |g| the root of the sum of norms (0: w); radius 0:
//                      w + g/(sums[2]*loss_scale)                                          2n wides in, n out
//   sgd_update         d = g*gradient_scale + decay*w; decoupled: d = g*gradient_scale, first w *= 1 - lr*decay
//                      lr = rates[min(update, steps - 1)] * lr_scale[group] * rate
//                      v = momentum*v + d; w -= lr*(nesterov ? d + momentum*v : v)
//                      caffe: u = momentum*v + lr*d; w -= nesterov ? (1 + momentum)*u - momentum*v : u; v = u
//                                                                                        3n wides in, 2n out
//   statistics_update  running += momentum*(batch/sums[3] - running)                     2n wides in, n out
//   state_update       update += apply
//   state_advance      batch += 1; epoch = batch // batches
//
// Outputs: as written above; table one row, state some fields.
// Bytes:   at the right.
// Launch:  gradient_norm a block a part; gradient_finish one block, whose thread 0 decides; optimizers over,
//          four elements a thread.
#include "reduce.cuh"
#include "state.cuh"

// launch: blocks=parts
KERNEL gradient_norm(const wide* g /*n*/, double* norms /*parts*/, long long n, int parts) {
    const long long stop = (blockIdx.x + 1) * n / parts;
    double sum = 0;
    for (long long i = blockIdx.x * n / parts + threadIdx.x; i < stop; i += THREADS)
        sum += (double)g[i] * g[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) norms[blockIdx.x] = sum;
}

// launch: blocks=parts
KERNEL penalty_sum(const wide* w /*n*/, const int* table /*n//256*/, const wide* decay /*rows*/,
                   const wide* l1 /*rows*/, double* penalties /*parts*/, int decoupled, int rows, long long n,
                   int parts) {
    const long long stop = (blockIdx.x + 1) * n / parts;
    double sum = 0;
    for (long long i = blockIdx.x * n / parts + threadIdx.x; i < stop; i += THREADS) {
        const int row = table[i / 256];
        const double x = w[i];
        const double shrink = decoupled ? 0 : 0.5 * decay[row];
        sum += shrink * x * x + l1[row] * (x < 0 ? -x : x);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) penalties[blockIdx.x] = sum;
}

// launch: blocks=1
KERNEL bias_correction(const State* state /*1*/, wide* factors /*2*/, double beta1, double beta2) {
    if (threadIdx.x < 2) {
        double base = threadIdx.x ? beta2 : beta1, power = 1;
        for (long long t = state->update + 1; t > 0; t /= 2) {
            if (t % 2) power *= base;
            base *= base;
        }
        factors[threadIdx.x] = (wide)(1 - power);
    }
}

// launch: blocks=1
KERNEL gradient_finish(const double* norms /*parts*/, const double* penalties /*terms*/, const double* sums /*4*/,
                       const wide* rates /*steps*/, double* table /*rows*10*/, State* state /*1*/, double clip, int dynamic, int parts,
                       int terms, int steps, int rows) {
    double squares = 0;
    for (int p = threadIdx.x; p < parts; p += THREADS) squares += norms[p];
    squares = block_sum(squares);
    double penalty = 0;
    for (int p = threadIdx.x; p < terms; p += THREADS) penalty += penalties[p];
    penalty = block_sum(penalty);
    if (threadIdx.x == 0) {
        const double count = sums[2], unit = 1 / (count * state->loss_scale), norm = sqrt(squares) * unit;
        const long long update = state->update;
        state->count = (int)count;
        if (is_finite(norm) && is_finite(sums[0]) && state->halt < 0) {
            state->apply = 1;
            state->gradient_scale = clip > 0 && norm > clip ? unit * (clip / norm) : unit;
            state->good += 1;
            if (dynamic && state->good >= 2000) {
                state->loss_scale *= 2;
                state->good = 0;
            }
        } else {
            state->apply = 0;
            state->good = 0;
            if (state->halt < 0) {
                if (dynamic && state->loss_scale > 1)
                    state->loss_scale = max(state->loss_scale / 2, 1.0);
                else
                    state->halt = state->batch;
            }
        }
        double* row = table + update % rows * 10;
        row[9] = 0;
        __threadfence_system();
        row[0] = sums[0] / count;
        row[1] = sums[1] / count;
        row[2] = count;
        row[3] = norm;
        row[4] = (double)rates[min(update, steps - 1ll)] * state->lr_scale[0];
        row[5] = state->gradient_scale;
        row[6] = penalty;
        row[7] = state->halt < 0 ? state->apply : -1;
        row[8] = (double)state->batch;
        __threadfence_system();
        row[9] = (double)(update + 1);
    }
}

// launch: over=n//4
KERNEL probe_shift(const wide* w /*n*/, const wide* g /*n*/, const double* norms /*parts*/, const double* sums /*4*/,
                   const State* state /*1*/, wide* probe /*n*/, double radius, long long n, int parts) {
    double squares = 0;
    for (int p = threadIdx.x; p < parts; p += THREADS) squares += norms[p];
    const double norm = sqrt(block_sum(squares)), unit = 1 / (sums[2] * state->loss_scale);
    const wide way = (wide)(radius == 0 ? unit : norm == 0 ? 0.0 : radius / norm);
    OVER(i, n / 4) {
        wide x[4], d[4];
        load_four(w + 4 * i, 4, x);
        load_four(g + 4 * i, 4, d);
        UNROLL for (int j = 0; j < 4; j++) x[j] += way * d[j];
        store_four(probe + 4 * i, 4, x);
    }
}

// launch: over=n//4
KERNEL sgd_update(wide* w /*n*/, const wide* g /*n*/, wide* velocity /*n*/, const int* table /*n//256*/,
                  const wide* rate /*rows*/, const wide* decay /*rows*/, const int* group /*rows*/,
                  const wide* rates /*steps*/, const State* state /*1*/, wide momentum, int nesterov,
                  int caffe, int decoupled, int rows, int steps, long long n) {
    if (state->apply == 0) return;
    const wide scale = (wide)state->gradient_scale, now = rates[min(state->update, steps - 1ll)];
    OVER(i, n / 4) {
        const int row = table[i / 64];
        const wide lr = now * (wide)state->lr_scale[group[row]] * rate[row], shrink = decay[row];
        wide x[4], d[4], v[4];
        load_four(w + 4 * i, 4, x);
        load_four(g + 4 * i, 4, d);
        load_four(velocity + 4 * i, 4, v);
        UNROLL for (int j = 0; j < 4; j++) {
            d[j] *= scale;
            if (decoupled)
                x[j] *= 1 - lr * shrink;
            else
                d[j] += shrink * x[j];
            const wide before = v[j];
            v[j] = momentum * before + (caffe ? lr * d[j] : d[j]);
            if (caffe)
                x[j] -= nesterov ? (1 + momentum) * v[j] - momentum * before : v[j];
            else
                x[j] -= lr * (nesterov ? d[j] + momentum * v[j] : v[j]);
        }
        store_four(w + 4 * i, 4, x);
        store_four(velocity + 4 * i, 4, v);
    }
}

// launch: over=n//4
KERNEL statistics_update(wide* running /*n*/, const wide* batch /*n*/, const int* table /*n//256*/,
                         const wide* momentum /*rows*/, const double* sums /*4*/, const State* state /*1*/,
                         int rows, long long n) {
    if (state->apply == 0) return;
    const wide gradients = (wide)sums[3];
    OVER(i, n / 4) {
        const wide blend = momentum[table[i / 64]];
        wide s[4], b[4];
        load_four(running + 4 * i, 4, s);
        load_four(batch + 4 * i, 4, b);
        UNROLL for (int j = 0; j < 4; j++) s[j] += blend * (b[j] / gradients - s[j]);
        store_four(running + 4 * i, 4, s);
    }
}

// launch: blocks=1
KERNEL state_update(State* state /*1*/) {
    if (threadIdx.x == 0) state->update += state->apply;
}

// launch: blocks=1
KERNEL state_advance(State* state /*1*/, int batches) {
    if (threadIdx.x == 0) {
        state->batch += 1;
        state->epoch = (int)(state->batch / batches);
    }
}
