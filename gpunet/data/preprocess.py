"""Preprocessing that is more than a mean and a scale: contrast normalisation, PCA, whitening. Fitted on images given.

    preprocess = fit(dataset.train.images, gcn=GCN(), whiten="zca", epsilon=0.1)
    x = preprocess(images)          # float32, of the same shape
    ready = preprocess.of(dataset)  # every split, by what was fitted on one

What it holds goes into checkpoints as arrays; nothing else is needed to do the same to new images.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gpunet.errors import GpunetError

CHUNK = 1 << 22  # pixel values that are held as float64 at a time
LARGEST = 12_288  # values of an image that is whitened, 64 x 64 x 3: their covariance has 1.2 GB
WHITEN = ("none", "pca", "pca_whiten", "zca")


@dataclass(frozen=True)
class GCN:
    """Global contrast normalisation: y = scale * (x - mean(x)) / max(epsilon, sqrt(bias + var(x))), of each image x.

    mean and var are over all pixels and channels of the image. Coates et al. 2011 have bias 10 for pixels of 0 to 255.
    """

    scale: float = 1.0
    bias: float = 0.0
    epsilon: float = 1e-8

    def __call__(self, images):
        """Return the images as float64."""
        x = images.astype(np.float64)
        x -= x.mean(axis=(1, 2, 3), keepdims=True)
        variance = np.square(x).mean(axis=(1, 2, 3), keepdims=True)
        x *= self.scale / np.maximum(self.epsilon, np.sqrt(self.bias + variance))
        return x


@dataclass(frozen=True, eq=False)
class Whitening:
    """Principal components of images and what is made of them; x is an image, flattened, less `mean`.

    components: U (d, k), float32, the eigenvectors of the covariance of the largest `variances` S (k,). kind:
    "pca": y = mean + U U^T x, the image as its first k components have it.
    "pca_whiten": y = U^T x / sqrt(S + epsilon): component i at place i of the flattened image, 0 from k on.
    "zca": y = U (U^T x / sqrt(S + epsilon)), an image whose pixels are as good as uncorrelated (Krizhevsky 2009).
    epsilon is in the units of S here.
    """

    kind: str
    mean: np.ndarray
    components: np.ndarray
    variances: np.ndarray
    epsilon: float

    @property
    def covariance(self):
        """What the fitted images' components have as variances after it: S / (S + epsilon), or S for "pca"."""
        return self.variances if self.kind == "pca" else self.variances / (self.variances + self.epsilon)

    @cached_property
    def matrices(self):
        """The float32 matrices that rows x are multiplied by, one after the other."""
        u = self.components.astype(np.float64)
        d, k = u.shape
        rotate = u if self.kind == "pca" else u / np.sqrt(self.variances + self.epsilon)
        if self.kind == "pca_whiten":
            found = [np.pad(rotate, ((0, 0), (0, d - k)))]
        else:
            found = [rotate @ u.T] if 2 * k > d else [rotate, u.T]
        return [np.ascontiguousarray(m, np.float32) for m in found]

    def __call__(self, images):
        """Return the images as float32."""
        x = (images.reshape(len(images), -1) - self.mean).astype(np.float32)
        for matrix in self.matrices:
            x = x @ matrix
        if self.kind == "pca":
            x += self.mean.astype(np.float32)
        return x.reshape(images.shape)


@dataclass(frozen=True, eq=False)
class Preprocess:
    """`gcn`, then `whitening`, each of which may be None; with both None images stay as they are, in their own type."""

    gcn: GCN | None = None
    whitening: Whitening | None = None

    def __bool__(self):
        return self.gcn is not None or self.whitening is not None

    def __call__(self, images):
        """Return images (n, h, w, c) preprocessed, float32; in pieces, so that memory is theirs and little more."""
        if not self:
            return images
        result = np.empty(images.shape, np.float32)
        for piece in _pieces(images):
            x = images[piece]
            for stage in (self.gcn, self.whitening):
                x = stage(x) if stage is not None else x
            result[piece] = x
        return result

    def of(self, dataset, names=None):
        """Return a DataSet whose splits `names` (all unless told) are preprocessed; the others are left out."""
        if not self:
            return dataset
        names = dataset.splits if names is None else names
        made = {
            name: replace(split, images=self(split.images)) if name in names else None
            for name, split in dataset.splits.items()
        }
        return replace(dataset, **made)

    def arrays(self):
        """Return {name: array}: all there is to it, for a checkpoint."""
        found = {}
        if self.gcn is not None:
            found["gcn"] = np.array([self.gcn.scale, self.gcn.bias, self.gcn.epsilon])
        if (w := self.whitening) is not None:
            parts = {"mean": w.mean, "components": w.components, "variances": w.variances, "epsilon": w.epsilon}
            found |= {f"{w.kind}/{name}": np.asarray(value) for name, value in parts.items()}
        return found

    @classmethod
    def from_arrays(cls, arrays):
        """Return what `arrays` was of; GpunetError where these are not such."""
        try:
            gcn = None
            if "gcn" in arrays:
                scale, bias, epsilon = map(float, arrays["gcn"])
                gcn = GCN(scale, bias, epsilon)
            kinds = [kind for kind in WHITEN if f"{kind}/components" in arrays]
            if not kinds:
                return cls(gcn)
            given = [arrays[f"{kinds[0]}/{name}"] for name in ("mean", "components", "variances")]
            mean, components, variances = given
            if components.shape != (mean.size, variances.size) or mean.ndim != 1 or variances.ndim != 1:
                raise ValueError(f"shapes {', '.join(str(a.shape) for a in given)}")
            return cls(gcn, Whitening(kinds[0], *given, float(arrays[f"{kinds[0]}/epsilon"])))
        except (KeyError, TypeError, ValueError) as error:
            raise GpunetError(f"preprocess: expected the arrays of a preprocessing, got others: {error}") from None

    def __str__(self):
        parts = []
        if self.gcn is not None:
            parts.append("global contrast normalisation")
        if (w := self.whitening) is not None:
            d, k = w.components.shape
            epsilon = "" if w.kind == "pca" else f", epsilon {w.epsilon:.3g}"
            parts.append(f"{w.kind} with {k:,} of {d:,} components{epsilon}")
        return ", ".join(parts) or "none"


def fit(images, *, gcn=None, whiten="none", components=None, epsilon=0.1):
    """Return the Preprocess whose means and components are those of training images (n, h, w, c).

    components: how many are kept, or the least share of the variance that they are to have, below 1; all unless told.
    epsilon: what is added to each variance, in units of the mean variance of a pixel, so that it does not depend on the
    pixels' units. Eigenvectors by float64 `eigh`; the largest element of each is positive.
    """
    if whiten not in WHITEN:
        raise GpunetError(f"preprocess: whiten: expected one of {', '.join(WHITEN)}, got {whiten!r}")
    if whiten == "none":
        return Preprocess(gcn)
    shape, d = images.shape[1:], int(np.prod(images.shape[1:]))
    if d > LARGEST:
        raise GpunetError(
            f"preprocess: whiten: expected images of at most {LARGEST:,} values, so that their covariance fits into "
            f"memory, got {d:,} of shape {shape}"
        )
    if components is not None and components >= 1 and components > d:
        raise GpunetError(f"preprocess: components: expected at most the {d:,} values of an image, got {components}")
    if not epsilon > 0:
        raise GpunetError(f"preprocess: epsilon: expected a number above 0, got {epsilon}")
    mean, covariance = _moments(images, gcn)
    variances, vectors = np.linalg.eigh(covariance)
    variances, vectors = np.maximum(variances[::-1], 0), vectors[:, ::-1]
    if not variances[0] > 0:
        raise GpunetError(f"preprocess: whiten: expected training images that differ, got {len(images):,} that do not")
    k = _count(variances, components)
    u = vectors[:, :k] * np.where(vectors[np.abs(vectors[:, :k]).argmax(axis=0), range(k)] < 0, -1.0, 1.0)
    u = np.ascontiguousarray(u, np.float32)
    return Preprocess(gcn, Whitening(whiten, mean, u, variances[:k].copy(), float(epsilon * variances.mean())))


def _count(variances, components):
    """Return how many components there are to be."""
    if components is None:
        return len(variances)
    if components >= 1:
        return int(components)
    share = np.cumsum(variances) / variances.sum()
    return min(int(np.searchsorted(share, components)) + 1, len(variances))


def _moments(images, gcn):
    """Return (mean (d,), covariance (d, d)) of the flattened images after `gcn`, in float64, in two passes."""
    d = int(np.prod(images.shape[1:]))
    mean, covariance = np.zeros(d), np.zeros((d, d))
    for x in _flat(images, gcn):
        mean += x.sum(axis=0)
    mean /= len(images)
    for x in _flat(images, gcn):
        x -= mean
        covariance += x.T @ x
    covariance /= len(images)
    return mean, covariance


def _flat(images, gcn):
    """Yield pieces of the images as float64 (n, d), after `gcn`."""
    for piece in _pieces(images):
        x = images[piece].astype(np.float64) if gcn is None else gcn(images[piece])
        yield x.reshape(len(x), -1)


def _pieces(images):
    """Return slices that cut images into pieces of at most CHUNK values."""
    step = max(1, CHUNK // int(np.prod(images.shape[1:])))
    return [slice(start, start + step) for start in range(0, len(images), step)]
