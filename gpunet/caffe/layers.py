"""Caffe's layers in gpunet's words: for each type its fields, and a function that gives layer and arguments.

What gpunet has nothing like is refused, by the layer's name and line; what only says how Caffe computes is ignored.
"""

from gpunet.caffe.schema import FLAG, NUMBER, TEXT, WHOLE, shown

PHASES = ("TRAIN", "TEST")
ENGINE = {"engine": ("DEFAULT", "CAFFE", "CUDNN")}
FILLER = {
    "type": TEXT,
    "value": NUMBER,
    "min": NUMBER,
    "max": NUMBER,
    "mean": NUMBER,
    "std": NUMBER,
    "sparse": WHOLE,
    "variance_norm": ("FAN_IN", "FAN_OUT", "AVERAGE"),
}
TRANSFORM = {"scale": NUMBER, "mirror": FLAG, "crop_size": WHOLE, "mean_file": TEXT, "mean_value": [NUMBER]}
LOADER = {"source": TEXT, "batch_size": WHOLE, "rand_skip": WHOLE}
SIDES = {name: WHOLE for what in ("kernel", "stride", "pad") for name in (f"{what}_h", f"{what}_w")}
WEIGHTS = {"num_output": WHOLE, "bias_term": FLAG, "weight_filler": FILLER, "bias_filler": FILLER, "axis": WHOLE}

PARAMS = {
    "data_param": {**LOADER, "backend": ("LEVELDB", "LMDB"), "prefetch": WHOLE, **TRANSFORM},
    "image_data_param": {
        **LOADER, "shuffle": FLAG, "new_height": WHOLE, "new_width": WHOLE, "is_color": FLAG, "root_folder": TEXT,
        **TRANSFORM,
    },
    "convolution_param": {
        **WEIGHTS, **SIDES, **ENGINE, "kernel_size": [WHOLE], "stride": [WHOLE], "pad": [WHOLE], "dilation": [WHOLE],
        "group": WHOLE, "force_nd_im2col": FLAG,
    },
    "inner_product_param": {**WEIGHTS, "transpose": FLAG},
    "pooling_param": {
        **SIDES, **ENGINE, "pool": ("MAX", "AVE", "STOCHASTIC"), "kernel_size": WHOLE, "stride": WHOLE, "pad": WHOLE,
        "global_pooling": FLAG, "round_mode": ("CEIL", "FLOOR"),
    },
    "lrn_param": {
        **ENGINE, "local_size": WHOLE, "alpha": NUMBER, "beta": NUMBER, "k": NUMBER,
        "norm_region": ("ACROSS_CHANNELS", "WITHIN_CHANNEL"),
    },
    "relu_param": {**ENGINE, "negative_slope": NUMBER},
    "sigmoid_param": ENGINE,
    "tanh_param": ENGINE,
    "dropout_param": {"dropout_ratio": NUMBER},
    "concat_param": {"axis": WHOLE, "concat_dim": WHOLE},
    "eltwise_param": {"operation": ("PROD", "SUM", "MAX"), "coeff": [NUMBER], "stable_prod_grad": FLAG},
    "flatten_param": {"axis": WHOLE, "end_axis": WHOLE},
    "batch_norm_param": {"use_global_stats": FLAG, "moving_average_fraction": NUMBER, "eps": NUMBER},
    "scale_param": {"axis": WHOLE, "num_axes": WHOLE, "filler": FILLER, "bias_term": FLAG, "bias_filler": FILLER},
    "softmax_param": {**ENGINE, "axis": WHOLE},
    "loss_param": {"normalization": ("VALID", "FULL", "BATCH_SIZE", "NONE"), "normalize": FLAG, "ignore_label": WHOLE},
    "accuracy_param": {"top_k": WHOLE, "axis": WHOLE},
}  # fmt: skip
RULE = {"phase": PHASES}
LAYER = {
    "name": TEXT,
    "type": TEXT,
    "bottom": [TEXT],
    "top": [TEXT],
    "include": [RULE],
    "exclude": [RULE],
    "phase": PHASES,
    "param": [{"name": TEXT, "lr_mult": NUMBER, "decay_mult": NUMBER}],
    "loss_weight": [NUMBER],
    "transform_param": TRANSFORM,
    **PARAMS,
}
OLD_TYPES = {  # of the first form, layers { type: CONVOLUTION ... }
    "ACCURACY": "Accuracy", "CONCAT": "Concat", "CONVOLUTION": "Convolution", "DATA": "Data", "DROPOUT": "Dropout",
    "ELTWISE": "Eltwise", "FLATTEN": "Flatten", "IMAGE_DATA": "ImageData", "INNER_PRODUCT": "InnerProduct",
    "LRN": "LRN", "POOLING": "Pooling", "RELU": "ReLU", "SIGMOID": "Sigmoid", "SILENCE": "Silence",
    "SOFTMAX": "Softmax", "SOFTMAX_LOSS": "SoftmaxWithLoss", "TANH": "TanH",
}  # fmt: skip


def convolution(layer):
    """Conv2d, by its weights' shape and both fillers."""
    p = layer.inner("convolution_param")
    p.only("axis", 1)
    p.only("force_nd_im2col", False)
    return "Conv2d", {
        **_outputs(p),
        "size": _sides(p, "kernel_size", "kernel"),
        "stride": _sides(p, "stride", "stride", 1),
        "padding": _sides(p, "pad", "pad", 0),
        "dilation": _sides(p, "dilation", None, 1),
        "groups": p.get("group", 1),
        **_weights(layer, p),
    }


def inner_product(layer):
    """Linear."""
    p = layer.inner("inner_product_param")
    p.only("axis", 1)
    p.only("transpose", False)
    return "Linear", {**_outputs(p), **_weights(layer, p)}


def pooling(layer):
    """MaxPool or AvgPool by Caffe's rounding, or GlobalAvgPool."""
    p = layer.inner("pooling_param")
    p.only("pool", "MAX", "AVE")
    average = p.get("pool") == "AVE"
    if p.get("global_pooling", False):
        if not average:
            p.fail("global_pooling: expected pool: AVE beside it; write MAX with kernel_size", "global_pooling")
        return "GlobalAvgPool", {}
    return "AvgPool" if average else "MaxPool", {
        "size": _sides(p, "kernel_size", "kernel"),
        "stride": _sides(p, "stride", "stride", 1),
        "padding": _sides(p, "pad", "pad", 0),
        "ceil": p.get("round_mode", "CEIL") == "CEIL",
    }


def lrn(layer):
    """LRN; Caffe reads no k where it normalises within a channel."""
    p = layer.inner("lrn_param")
    within = p.get("norm_region") == "WITHIN_CHANNEL"
    if within:
        p.only("k", 1.0, why="Caffe ignores it within a channel")
    return "LRN", {
        "size": p.get("local_size", 5),
        "alpha": float(p.get("alpha", 1.0)),
        "beta": float(p.get("beta", 0.75)),
        "k": float(p.get("k", 1.0)),
        "region": "within" if within else "across",
    }


def relu(layer):
    """ReLU, or LeakyReLU where it has a slope."""
    slope = layer.inner("relu_param").get("negative_slope", 0)
    return ("LeakyReLU", {"slope": float(slope)}) if slope else ("ReLU", {})


def dropout(layer):
    """Dropout, which scales while training in Caffe, too."""
    return "Dropout", {"rate": float(layer.inner("dropout_param").get("dropout_ratio", 0.5))}


def concat(layer):
    """Concat of channels."""
    p = layer.inner("concat_param")
    p.only("axis", 1)
    p.only("concat_dim", 1)
    return "Concat", {}


def eltwise(layer):
    """Add."""
    p = layer.inner("eltwise_param")
    p.only("operation", "SUM")
    if any(coefficient != 1 for coefficient in p.all("coeff")):
        p.fail("coeff: expected 1 for each; gpunet has sums without factors", "coeff")
    return "Add", {}


def flatten(layer):
    """Flatten; in another order of the values, which what comes behind learns as well."""
    p = layer.inner("flatten_param")
    p.only("axis", 1)
    p.only("end_axis", -1)
    return "Flatten", {}


def batch_norm(layer):
    """BatchNorm without gamma and beta, which a Scale behind it adds."""
    p = layer.inner("batch_norm_param")
    p.only("use_global_stats", False)
    if any(param.get("lr_mult", 1) or param.get("name") for param in layer.all("param")):
        layer.fail("param: expected lr_mult: 0 without a name; what a BatchNorm holds is no weight", "param")
    momentum = round(1 - p.get("moving_average_fraction", 0.999), 12)
    return "BatchNorm", {"momentum": momentum, "eps": float(p.get("eps", 1e-5)), "scale": False, "shift": False}


def scale(layer):
    """Return whether a Scale, behind a BatchNorm, has a bias as well."""
    p = layer.inner("scale_param")
    p.only("axis", 1)
    p.only("num_axes", 1)
    for param in layer.all("param"):
        if param.get("lr_mult", 1) != 1 or param.get("decay_mult", 1) != 1 or param.get("name"):
            param.fail("param: expected lr_mult and decay_mult of 1 and no name; a BatchNorm has no others")
    for name, value in (("filler", 1), ("bias_filler", 0)):
        if name in p and _filler(p, name) != ["constant", float(value)]:
            p.fail(f"{name}: expected the constant {value}", name)
    return p.get("bias_term", False)


def plain(kind):
    """A layer without arguments."""
    return lambda layer: (kind, {})


LAYERS = {
    "Convolution": convolution,
    "InnerProduct": inner_product,
    "Pooling": pooling,
    "LRN": lrn,
    "ReLU": relu,
    "Sigmoid": plain("Sigmoid"),
    "TanH": plain("Tanh"),
    "Dropout": dropout,
    "Concat": concat,
    "Eltwise": eltwise,
    "Flatten": flatten,
    "BatchNorm": batch_norm,
}
WEIGHTED = ("Convolution", "InnerProduct", "BatchNorm")  # types whose `param` is read


def _outputs(p):
    if p.get("num_output", 0) < 1:
        p.fail(f"num_output: expected at least 1 in {p.name}, got {p.get('num_output', 'none')}", "num_output")
    return {"outputs": p.get("num_output")}


def _sides(p, name, stem, default=None):
    """Return a size along both axes as gpunet takes it: one whole number where they are alike."""
    given = p.all(name)
    sides = [p.get(f"{stem}_{axis}") for axis in "hw"] if stem else [None, None]
    if any(side is not None for side in sides):
        if given or None in sides:
            p.fail(f"{name}: expected either {name}, or both {stem}_h and {stem}_w", name if given else None)
        given = sides
    if len(given) > 2 or (not given and default is None):
        p.fail(f"{name}: expected one or two whole numbers in {p.name}, got {len(given)}", name)
    first, last = (given or [default])[0], (given or [default])[-1]
    return first if first == last else [first, last]


def _weights(layer, p):
    """Return the arguments of weights and biases: first values, and factors of rate and decay."""
    found = {"weight_init": _filler(p, "weight_filler")}
    if not p.get("bias_term", True):
        found["bias"] = False
    elif (init := _filler(p, "bias_filler")) != ["constant", 0.0]:
        found["bias_init"] = init
    params = layer.all("param")
    if len(params) > 2:
        params[2].fail("param: expected at most two, of weights and of biases")
    for which, param in zip(("weight", "bias"), params, strict=False):
        if param.get("name"):
            param.fail(f"param: name: weights that layers share, got {shown(param.get('name'))}: gpunet has none")
        found[f"{which}_rate"] = float(param.get("lr_mult", 1))
        found[f"{which}_decay"] = float(param.get("decay_mult", 1))
    return found


def _filler(p, name):
    """Return what gpunet calls a filler, which is the constant 0 where none is given."""
    filler = p.inner(name)
    kind = filler.get("type", "constant")
    if kind == "constant":
        return ["constant", float(filler.get("value", 0))]
    if kind == "gaussian":
        filler.only("mean", 0)
        filler.only("sparse", -1)
        return ["normal", float(filler.get("std", 1))]
    if kind == "uniform":
        low, high = filler.get("min", 0), filler.get("max", 1)
        if low != -high:
            filler.fail(f"{name}: uniform: expected min: -a max: a, got {low} and {high}")
        return ["uniform", float(high)]
    if kind == "xavier":
        filler.only("variance_norm", "FAN_IN", "AVERAGE")
        return ["xavier", "uniform"] if filler.get("variance_norm") == "AVERAGE" else ["he", "uniform", 1.0]
    if kind == "msra":
        filler.only("variance_norm", "FAN_IN")
        return ["he", "normal"]
    known = "constant, gaussian, uniform, xavier, msra"
    return filler.fail(f"{name}: unknown type {shown(kind)}; known: {known}", "type")
