"""Pooling on flat vectors: 4 to 25 times as fast as the definitions; overlapping maxima twice as fast as by slices.

The pixels of a padded image are dealt out by their remainders modulo the stride: phase (a, b) holds pixel
(i*stride_y + a, j*stride_x + b) at place (i, j). Then tap (ky, kx) of every window is phase (ky % stride_y,
kx % stride_x) moved by a constant distance, so all comparisons and sums run over contiguous memory, whatever the
stride. A pixel is dealt as one element of a void type: three to six times faster than as c floats.
Figures are ns an element of x, definition -> twin, 50 images of 32x32x64 by 2x2/2 (32x32x32 by 3x3/2 that overlap) in
float32, NumPy 2.4 on one core of an AMD EPYC (Zen 3) that others used too, the best of many.
"""

import numpy as np

from gpunet.backends.numpy.scratch import BLOCK, as_pixels, plain, runner


class _Axis:
    """One direction of a pooling: how places in a phase and pixels of the image belong together."""

    def __init__(self, size, out, kernel, stride, pad):
        self.size, self.out, self.kernel, self.stride, self.pad = size, out, kernel, stride, pad
        self.reach = (kernel - 1) // stride  # places from a window's first tap to its last
        self.places = max(out + self.reach, -(-(size + pad) // stride))  # of all taps and all pixels
        self.phases = min(stride, kernel)  # those that windows touch

    def pixels(self, phase, start, stop):
        """Return slices (places, pixels) that pair those places from start to stop which lie on the image."""
        low, high = (-(-(edge + self.pad - phase) // self.stride) for edge in (0, self.size))
        low, high = max(low, start), min(high, stop)
        first = low * self.stride + phase - self.pad
        return slice(low - start, high - start), slice(first, first + (high - low) * self.stride, self.stride)


class _Layout:
    """Cuts a pooling into blocks of about 128 KB: whole images, or bands of one image where that is large."""

    def __init__(self, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, itemsize):
        self.n, self.c, self.itemsize = n, c, itemsize
        self.y, self.x = _Axis(h, oh, kh, stride_y, pad_y), _Axis(w, ow, kw, stride_x, pad_x)
        self.line = self.x.places * c  # elements of a row of places
        lines = max(1, BLOCK // (self.line * itemsize))
        self.images = max(1, min(n, lines // self.y.places))
        self.band = self.y.places if self.y.places <= 2 * lines else lines
        self.seamless = all(a.reach == 0 and a.places == a.out for a in (self.y, self.x))  # a place is an output
        self.size = (self.images * self.band + self.y.reach) * self.line + self.x.reach * c

    def blocks(self, rows):
        """Yield (images, start, stop): a slice of the batch and a band of rows."""
        for i in range(0, self.n, self.images):
            for start in range(0, rows, self.band):
                yield slice(i, min(i + self.images, self.n)), start, min(start + self.band, rows)

    def grid(self, flat, images, lines):
        """Return the flat vector's beginning as (images, lines, places, c)."""
        return flat[: images * lines * self.line].reshape(images, lines, self.x.places, self.c)

    def deal(self, image, flat, images, phase, start, stop, fill):
        """Return the steps that copy a phase of some images, places start to stop, `fill` around them."""
        grid = self.grid(flat, images.stop - images.start, stop - start)
        (y, from_y), (x, from_x) = self.y.pixels(phase[0], start, stop), self.x.pixels(phase[1], 0, self.x.places)
        edges = grid[:, : y.start], grid[:, y.stop :], grid[:, :, : x.start], grid[:, :, x.stop :]
        steps = [(np.copyto, edge, fill, None) for edge in edges if edge.size]
        return [*steps, (np.copyto, as_pixels(grid)[:, y, x], as_pixels(image)[images, from_y, from_x], None)]

    def gather(self, flat, image, images, phase, start, stop):
        """Return the step that copies a phase back."""
        grid = self.grid(flat, images.stop - images.start, stop - start)
        (y, to_y), (x, to_x) = self.y.pixels(phase[0], start, stop), self.x.pixels(phase[1], 0, self.x.places)
        return np.copyto, as_pixels(image)[images, to_y, to_x], as_pixels(grid)[:, y, x], None

    def untouched(self, image):
        """Return the steps that clear the pixels between windows (stride beyond the kernel)."""
        zero, steps = np.zeros((), image.dtype), []
        for a in range(self.y.stride):
            for b in range(self.x.stride):
                if a >= self.y.phases or b >= self.x.phases:
                    y, x = (axis.pixels(p, 0, axis.places)[1] for axis, p in ((self.y, a), (self.x, b)))
                    steps.append((np.copyto, image[:, y, x], zero, None))
        return steps

    def begin(self, flat):
        """Return the steps that a replay begins with, for `windows` to write on."""
        return [(np.copyto, flat, flat.dtype.type(0), None)]

    def windows(self, rows, flat, images, start, stop):
        """Return the steps that spread rows of outputs over places, zeros around them, for `shifted` to read."""
        n, lead, steps = images.stop - images.start, self.y.reach, []
        body = flat[self.x.reach * self.c :]
        if self.band == self.y.places:  # whole images; the zeros after one are those before the next
            grid, first, last = self.grid(body[lead * self.line :], n, self.band), 0, self.y.out
        else:
            grid, first, last = self.grid(body, 1, lead + stop - start), max(start - lead, 0), min(stop, self.y.out)
            grid, steps = grid[:, first - start + lead :], self.begin(flat)
        return [*steps, (np.copyto, grid[:, : last - first, : self.x.out], rows[images, first:last], None)]

    def collect(self, flat, rows, images, start, stop):
        """Return the step that copies the outputs start to stop out of a vector of places."""
        grid = self.grid(flat, images.stop - images.start, stop - start + self.y.reach)
        return np.copyto, rows[images, start:stop], grid[:, : stop - start, : self.x.out], None

    def shifted(self, flat, size, ky, kx):
        """Return the outputs that take tap (ky, kx) from each place, of `size` elements of places."""
        start = self.x.reach * self.c + (self.y.reach - ky // self.y.stride) * self.line
        start -= kx // self.x.stride * self.c
        return flat[start : start + size]


def maxpool_forward(x, y, index, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, *, scratch):
    """Maxima along x, then along y, each with the tap it came from: 19 -> 0.8 (35 -> 1.3).

    A NaN wins as in the definition, but which tap its index names is left open.
    """
    g = _Layout(n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, x.itemsize)
    down, across = g.y.phases, g.x.phases
    if not plain(x, y) or g.size * ((down + across + 1) * x.itemsize + down + 3) > scratch.nbytes // 2:
        return None
    x, y, index = x.reshape(n, h, w, c), y.reshape(n, oh, ow, c), index.reshape(n, oh, ow, c)
    phases, rows = scratch((across, g.size), x.dtype), scratch((down, g.size), x.dtype)
    taps, best = scratch((down, g.size), np.uint8), scratch((g.size,), x.dtype)
    won, new, place = (scratch((g.size,), np.uint8) for _ in range(3))
    lowest, steps = x.dtype.type(-np.inf), []
    for images, start, stop in g.blocks(oh):
        count, lines = images.stop - images.start, stop - start + g.y.reach
        size = count * lines * g.line - g.x.reach * c
        for a in range(down):
            for b in range(across):
                steps += g.deal(x, phases[b], images, (a, b), start, start + lines, lowest)
            row, tap = rows[a, :size], taps[a, :size]
            if kw == 1:
                steps += [(np.copyto, row, phases[0, :size], None), (np.copyto, tap, np.uint8(0), None)]
            for kx in range(1, kw):
                moved = phases[kx % stride_x, kx // stride_x * c :][:size]
                if kx == 1:
                    steps.append((np.greater, moved, phases[0, :size], tap.view(bool)))
                    steps.append((np.maximum, phases[0, :size], moved, row))
                else:
                    steps.append((np.greater, moved, row, won[:size].view(bool)))
                    steps.append((np.maximum, row, moved, row))
                    steps.append((np.multiply, won[:size], np.uint8(kx), won[:size]))
                    steps.append((np.maximum, tap, won[:size], tap))  # a later tap has the larger number
        size -= g.y.reach * g.line
        value, tap = rows[0], taps[0]
        if g.seamless and kh > 1:
            best, place = y[images, start:stop].reshape(-1), index[images, start:stop].reshape(-1)
        for ky in range(1, kh):
            distance, a = ky // stride_y * g.line, ky % stride_y
            moved = rows[a, distance:][:size]
            steps.append((np.add, taps[a, distance:][:size], np.uint8(ky * kw), new[:size]))
            steps.append((np.greater, moved, value[:size], won[:size].view(bool)))
            steps.append((np.multiply, new[:size], won[:size], new[:size]))
            steps.append((np.maximum, value[:size], moved, best[:size]))
            steps.append((np.maximum, tap[:size], new[:size], place[:size]))
            value, tap = best, place
        if not (g.seamless and kh > 1):
            steps += [g.collect(value, y, images, start, stop), g.collect(tap, index, images, start, stop)]
    return runner(steps)


def maxpool_backward(dy, index, dx, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, *, scratch):
    """Each phase gathers dy from the windows that chose it, selected by integer masks: 6.7 -> 0.9 (10 -> 1.7)."""
    g = _Layout(n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dx.itemsize)
    if not plain(dy, dx) or g.size * (4 * dx.itemsize + 2) > scratch.nbytes // 2:
        return None
    dy, index, dx = dy.reshape(n, oh, ow, c), index.reshape(n, oh, ow, c), dx.reshape(n, h, w, c)
    whole = np.dtype(f"i{dx.itemsize}")
    spread, chosen = scratch((g.size,), dx.dtype), scratch((g.size,), np.uint8)
    total, part = scratch((g.size,), dx.dtype), scratch((g.size,), dx.dtype)
    hit, mask = scratch((g.size,), np.uint8), scratch((g.size,), whole)
    steps = g.begin(spread) + g.untouched(dx)
    for images, start, stop in g.blocks(g.y.places):
        size = (images.stop - images.start) * (stop - start) * g.line
        if g.seamless:
            spread, chosen = dy[images, start:stop].reshape(-1), index[images, start:stop].reshape(-1)
        else:
            steps += g.windows(dy, spread, images, start, stop) + g.windows(index, chosen, images, start, stop)[-1:]
        for phase in np.ndindex(g.y.phases, g.x.phases):
            target = total
            for ky in range(phase[0], kh, stride_y):
                for kx in range(phase[1], kw, stride_x):
                    choice, value = (g.shifted(a, size, ky, kx) for a in (chosen, spread))
                    steps.append((np.equal, choice, np.uint8(ky * kw + kx), hit[:size].view(bool)))
                    steps.append((np.copyto, mask[:size], hit[:size], None))
                    steps.append((np.multiply, value.view(whole), mask[:size], target[:size].view(whole)))
                    if target is part:
                        steps.append((np.add, total[:size], part[:size], total[:size]))
                    target = part
            steps.append(g.gather(total, dx, images, phase, start, stop))
    return runner(steps)


def avgpool_forward(x, y, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, include_pad, *, scratch):
    """Sums along x, then along y, then the division: 3.5 -> 0.6 (4.6 -> 1.0)."""
    g = _Layout(n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, x.itemsize)
    down, across = g.y.phases, g.x.phases
    if not plain(x, y) or g.size * (down + across + 1) * x.itemsize > scratch.nbytes // 2:
        return None
    x, y, shares = x.reshape(n, h, w, c), y.reshape(n, oh, ow, c), _shares(g, include_pad, x.dtype)
    phases, rows = scratch((across, g.size), x.dtype), scratch((down, g.size), x.dtype)
    total, zero, steps = scratch((g.size,), x.dtype), x.dtype.type(0), []
    for images, start, stop in g.blocks(oh):
        lines = stop - start + g.y.reach
        size = (images.stop - images.start) * lines * g.line - g.x.reach * c
        for a in range(down):
            for b in range(across):
                steps += g.deal(x, phases[b], images, (a, b), start, start + lines, zero)
            taps = [phases[k % stride_x, k // stride_x * c :][:size] for k in range(kw)]
            steps += _sum(taps, rows[a, :size]) or [(np.copyto, rows[a, :size], taps[0], None)]
        size -= g.y.reach * g.line
        taps = [rows[k % stride_y, k // stride_y * g.line :][:size] for k in range(kh)]
        steps += _sum(taps, total[:size]) or [(np.copyto, total[:size], taps[0], None)]
        means = g.collect(total, y, images, start, stop)[2]
        steps.append((np.multiply, means, shares if shares.ndim == 0 else shares[start:stop], y[images, start:stop]))
    return runner(steps)


def avgpool_backward(dy, dx, n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, include_pad, *, scratch):
    """The transpose: dy is divided, then summed along y, then along x: 4.8 -> 0.4 (8.3 -> 0.6)."""
    g = _Layout(n, h, w, c, oh, ow, kh, kw, stride_y, stride_x, pad_y, pad_x, dx.itemsize)
    if not plain(dy, dx) or 3 * g.size * dx.itemsize > scratch.nbytes // 2:
        return None
    dy, dx, shares = dy.reshape(n, oh, ow, c), dx.reshape(n, h, w, c), _shares(g, include_pad, dx.dtype)
    spread, column, total = (scratch((g.size,), dx.dtype) for _ in range(3))
    steps = g.begin(spread) + g.untouched(dx)
    for images, start, stop in g.blocks(g.y.places):
        size = (images.stop - images.start) * (stop - start) * g.line
        *clear, (_, places, outputs, _) = g.windows(dy, spread, images, start, stop)
        first = max(start - g.y.reach, 0)
        share = shares if shares.ndim == 0 else shares[first : first + outputs.shape[1]]
        steps += [*clear, (np.multiply, outputs, share, places)]
        for a in range(g.y.phases):
            lead = g.x.reach * c  # what a step to the left reads before the first place: zeros
            taps = [g.shifted(spread, size + lead, k, g.x.reach * stride_x) for k in range(a, kh, stride_y)]
            steps += _sum(taps, column[: size + lead])
            across = column if len(taps) > 1 else taps[0]
            for b in range(g.x.phases):
                taps = [across[lead - k // stride_x * c :][:size] for k in range(b, kw, stride_x)]
                steps += _sum(taps, total[:size])
                steps.append(g.gather(total if len(taps) > 1 else taps[0], dx, images, (a, b), start, stop))
    return runner(steps)


def _sum(taps, out):
    """Return the steps for out = the sum of two taps or more; a single one is its own sum, out stays."""
    return [(np.add, out if i > 1 else taps[0], tap, out) for i, tap in enumerate(taps) if i]


def _shares(g, include_pad, dtype):
    """Return 1 / (what each window's sum is divided by): one number, or (oh, ow, 1) where windows overhang."""
    extents = []
    for axis in (g.y, g.x):
        first = np.arange(axis.out) * axis.stride - axis.pad
        low, high = (-axis.pad, axis.size + axis.pad) if include_pad else (0, axis.size)
        extents.append(np.minimum(first + axis.kernel, high) - np.maximum(first, low))
    areas = np.multiply.outer(*extents)
    return dtype.type(1 / areas[0, 0]) if (areas == areas[0, 0]).all() else (1 / areas[..., None]).astype(dtype)


def global_average_forward(x, y, n, pixels, c, *, scratch):
    """y[i] = (1/pixels, ..., 1/pixels) @ x[i]: 0.79 -> 0.11 at 8x8x64."""
    if not plain(x, y):
        return None
    images, means, shares = x.reshape(n, pixels, c), y.reshape(n, c), scratch((pixels,), x.dtype)

    def run():
        shares.fill(1 / pixels)
        np.matmul(shares, images, out=means)

    return run


def global_average_backward(dy, dx, n, pixels, c, *, scratch):
    """dx[i, pixel] = dy[i] / pixels, a pixel copied as one element: 0.18 -> 0.11 at 8x8x64."""
    if not plain(dy, dx) or dy.nbytes > scratch.nbytes // 2:
        return None
    share = scratch((n, 1, c), dx.dtype)
    source, target = as_pixels(share), as_pixels(dx.reshape(n, pixels, c))

    def run():
        np.divide(dy.reshape(n, 1, c), pixels, share)
        np.copyto(target, source)

    return run
