"""Initial values from training images, found on the host in float64: input whitening and LSUV.

    data_init.whitening(graph, images)
    data_init.lsuv(graph, images[:128])
    step = gpunet.Step(graph, ...)

Images are floats (n, h, w, c) as the network takes them: normalised. A Graph's next Step starts so; with a Step in its
place, its weights change at once.
"""

import numpy as np

from gpunet.core.params import generator
from gpunet.core.step import Step
from gpunet.errors import GpunetError
from gpunet.nn.conv import Conv2d
from gpunet.nn.init import orthogonal

CHUNK = 1 << 22  # patch values that are held as float64 at a time


def whitening(target, images, weight=None, *, epsilon=5e-4):
    """Make the first convolution of a Graph or Step whiten patches: w = +-v_i / sqrt(lambda_i + epsilon).

    v_i, lambda_i: eigenvectors and eigenvalues, largest first, of the covariance of all patches of its size in the
    images; all v_i, then all -v_i, so it has 2 * kh * kw * in filters. weight: its name, where not the only one that
    reads the images. Returns the eigenvalues. Its bias stays as it is (Jordan 2024, airbench, after Page 2019).
    """
    graph, images = target.graph if isinstance(target, Step) else target, _images(target, images)
    found = {n.layer.parameters["weight"].name: n.layer for n in graph.nodes if _reads_images(graph, n)}
    if weight not in found and (weight is not None or len(found) != 1):
        raise GpunetError(
            f"init: whitening: {weight or 'weight'}: expected the weight of a convolution without groups that reads "
            f"the images: {', '.join(found) or 'there is none'}"
        )
    weight = weight or next(iter(found))
    layer = found[weight]
    shape = layer.parameters["weight"].shape
    count = 2 * int(np.prod(shape[:3]))
    if shape[3] != count:
        raise GpunetError(
            f"init: whitening: {weight}: expected {count} filters, two for each of the {count // 2} values of a patch "
            f"of shape {shape[:3]}; the layer has {shape[3]}"
        )
    values, vectors = np.linalg.eigh(_patch_covariance(images, layer.size, layer.dilation))
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    vectors = vectors * np.where(vectors[np.abs(vectors).argmax(axis=0), range(len(values))] < 0, -1, 1)
    half = (vectors / np.sqrt(values + epsilon)).reshape(*shape[:3], -1)
    _give(target, {weight: np.concatenate([half, -half], axis=3)})
    return values


def _reads_images(graph, node):
    return isinstance(node.layer, Conv2d) and node.layer.groups == 1 and graph.input in node.inputs


def _patch_covariance(images, size, dilation):
    """Return the covariance (d, d) of all patches (kh, kw, c), flattened, that lie in the images."""
    reach = tuple(d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True))
    if any(n < r for n, r in zip(images.shape[1:3], reach, strict=True)):
        raise GpunetError(f"init: whitening: expected images of at least {reach} pixels, got {images.shape[1:3]}")
    windows = np.lib.stride_tricks.sliding_window_view(images, reach, axis=(1, 2))
    windows = windows[..., :: dilation[0], :: dilation[1]].transpose(0, 1, 2, 4, 5, 3)
    d = size[0] * size[1] * images.shape[3]
    step = max(1, CHUNK // windows[0].size)
    centre = np.tile(images.mean(axis=(0, 1, 2), dtype=np.float64), size[0] * size[1])  # near the mean: no cancellation
    count, total, squares = windows[..., 0, 0, 0].size, np.zeros(d), np.zeros((d, d))
    for start in range(0, len(windows), step):
        patches = windows[start : start + step].astype(np.float64).reshape(-1, d) - centre
        total += patches.sum(axis=0)
        squares += patches.T @ patches
    return squares / count - np.outer(total / count, total / count)


def lsuv(target, images, weights=None, *, tolerance=0.01, iterations=10, seed=0):
    """Start weights of a Graph or Step orthogonal, then w /= sd(output) until a layer's outputs have variance 1.

    Layer by layer in call order, on the images as one batch, in inference: batch normalisation is by running
    statistics, nothing is dropped. Done with a layer within `tolerance` of 1 or after so many iterations. weights:
    names of those that are set, of two axes or more; all of these unless told. seed: of the orthogonal start. Returns
    {name: (divisions done, variance then)} (Mishkin & Matas 2015).
    """
    graph, images = target.graph if isinstance(target, Step) else target, _images(target, images)
    nodes = {}
    for node in graph.nodes:
        for p in node.layer.parameters.values():
            if p.trainable and len(p.shape) > 1 and (weights is None or p.name in weights):
                nodes.setdefault(p, node.path)
    if absent := set(weights or ()) - {p.name for p in nodes}:
        raise GpunetError(f"init: lsuv: {min(absent)}: expected the name of a weight of two axes or more")
    keep = [f"{path}:output" for path in nodes.values()]
    measure = Step(graph, batch=len(images), dtype="float64", seed=seed, keep=keep)
    try:
        if isinstance(target, Step):
            for tensors, given in ((measure.weights, target.weights), (measure.statistics, target.statistics)):
                tensors.update(given.copy())
        measure.weights.update({p.name: orthogonal()(generator(seed, p.name), p.shape) for p in nodes})
        report = _scale(measure, images, {p.name: path for p, path in nodes.items()}, tolerance, iterations)
        _give(target, {p.name: measure.weights[p.name] for p in nodes})
    finally:
        measure.close()
    return report


def _scale(step, images, paths, tolerance, iterations):
    """Divide weights {name: path} in order by the deviation of their layers' outputs; return what `lsuv` does.

    A pass over the images measures all layers; so one that finds a layer done serves the next one, too.
    """
    report = {}
    step.predict(images)
    for weight, path in paths.items():
        for done in range(iterations + 1):
            variance = float(np.var(step.read(f"{path}:output")))
            if not 0 < variance < np.inf:
                raise GpunetError(
                    f"init: lsuv: {path}: expected outputs that differ and are finite, got variance {variance:g} on "
                    f"{len(images)} images; what comes before it, or its images, are all the same or not finite"
                )
            report[weight] = done, variance
            if abs(variance - 1) < tolerance or done == iterations:
                break
            step.weights[weight] = step.weights[weight] / variance**0.5
            step.predict(images)
    return report


def _images(target, images):
    """Return images as an array, checked."""
    images = np.asarray(images)
    graph = target.graph if isinstance(target, Step) else target
    if images.dtype.kind != "f" or images.shape[1:] != graph.input_shape or not len(images):
        expected = ", ".join(map(str, graph.input_shape))
        raise GpunetError(
            f"init: images: expected floats of shape (n, {expected}) as the network takes them, got {images.dtype} "
            f"of shape {images.shape}"
        )
    if not np.isfinite(images).all():
        raise GpunetError("init: images: expected finite numbers, got NaN or infinity")
    return images


def _give(target, values):
    """Make values those of a Step, or those that a Graph's next Step starts with."""
    if isinstance(target, Step):
        target.weights.update(values)
        return
    for p in target.parameters():
        if p.name in values:
            p.initial = lambda rng, shape, value=values[p.name]: value
