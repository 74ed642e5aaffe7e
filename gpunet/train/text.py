"""Numbers and tables as people read them."""

import re

from gpunet.errors import GpunetError


def columns(rows, left):
    """Return rows of texts as lines with aligned columns, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [t.ljust(w) if i < left else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def clock(seconds):
    """Return 75 as "1:15", 3700 as "1:01:40"."""
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def quantity(n):
    """Return 1234567 as "1.23 M" and 0 as nothing."""
    for unit in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.3g} {unit}".rstrip() if n else ""
        n /= 1000
    return f"{n:.3g} T"


def size(n):
    """Return bytes as "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def parse_size(text):
    """Return "8G", "8GB", "500 MiB" or a number of bytes as bytes, in powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise GpunetError(f"--memory {text}: expected a size such as 8G or 500MB")
    return int(float(match[1]) * 1024 ** ("KMGT".find(match[2].upper()) + 1 if match[2] else 0))
