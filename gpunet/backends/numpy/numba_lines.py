"""Lines: rows of c channels taken several at a time, so that one flat loop of 512 elements serves every channel.

LLVM makes vectors of a loop `for i in range(part.size)` over slices: an index that it cannot prove to be 0 or more
costs it that. A result is made in a line of scratch and copied out, for an output may be an input: two arrays that
overlap are not made vectors of.
"""

from gpunet.backends.numpy.jit import jit
from gpunet.backends.numpy.scratch import LINE

DEPTH = 64  # lines that are summed in the arrays' own type; then those sums are added up in double


def length(c):
    """Return how many elements a line has: whole rows of c."""
    return max(1, LINE // c) * c


@jit
def repeat(row, line):
    """Fill a line with copies of a row."""
    for start in range(0, line.size, row.size):
        part = line[start : start + row.size]
        for i in range(part.size):
            part[i] = row[i]


@jit
def copy(line, out):
    """out = the beginning of a line."""
    for i in range(out.size):
        out[i] = line[i]


@jit
def fold(line, sums):
    """sums[channel] += the line's elements of this channel, which become 0."""
    for start in range(0, line.size, sums.size):
        part = line[start : start + sums.size]
        for i in range(part.size):
            sums[i] += part[i]
            part[i] = 0
