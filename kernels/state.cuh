// What changes from step to step, read by kernels at run time: a captured graph needs no edit. The NumPy
// record of the same layout is gpunet.core.state.STATE.
#ifndef GPUNET_STATE
#define GPUNET_STATE

struct State {
    long long batch;        // batches drawn: keys every random draw; moved by state_advance only
    long long update;       // updates applied: indexes schedules and bias corrections
    long long halt;         // batch at which a non-finite value stopped the run, or -1
    int epoch;              // batch // batches an epoch
    int count;              // images of the last finished gradient
    int apply;              // 1: the update may write, 0: its gradient was not finite
    int good;               // finite steps since the loss scale changed
    double loss_scale;      // the loss is multiplied by it before backward
    double gradient_scale;  // 1/count, 1/loss_scale and clipping in one factor
    double lr_scale[16];    // a factor a parameter group, written by the host between replays
};

#endif
