// The update: norm and verdict, optimizers over the flat arenas, running statistics, counters.
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
//                          gradient_scale, verdict, batch, update + 1. verdict: 1 applied, 0 skipped, -1 halted.
//                          The last is 0 while the rest is written: the host may look at any time.
//   sgd_update         d = g*gradient_scale + decay*w
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

// launch: blocks=1
KERNEL gradient_finish(const double* norms /*parts*/, const double* sums /*4*/, const wide* rates /*steps*/,
                       double* table /*rows*9*/, State* state /*1*/, double clip, int dynamic, int parts,
                       int steps, int rows) {
    double squares = 0;
    for (int p = threadIdx.x; p < parts; p += THREADS) squares += norms[p];
    squares = block_sum(squares);
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
        double* row = table + update % rows * 9;
        row[8] = 0;
        __threadfence_system();
        row[0] = sums[0] / count;
        row[1] = sums[1] / count;
        row[2] = count;
        row[3] = norm;
        row[4] = (double)rates[min(update, steps - 1ll)] * state->lr_scale[0];
        row[5] = state->gradient_scale;
        row[6] = state->halt < 0 ? state->apply : -1;
        row[7] = (double)state->batch;
        __threadfence_system();
        row[8] = (double)(update + 1);
    }
}

// launch: over=n//4
KERNEL sgd_update(wide* w /*n*/, const wide* g /*n*/, wide* velocity /*n*/, const int* table /*n//256*/,
                  const wide* rate /*rows*/, const wide* decay /*rows*/, const int* group /*rows*/,
                  const wide* rates /*steps*/, const State* state /*1*/, wide momentum, int nesterov,
                  int caffe, int rows, int steps, long long n) {
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
            d[j] = d[j] * scale + shrink * x[j];
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
