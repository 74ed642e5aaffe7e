"""Numbers and tables for people."""

import pytest

from gpunet.errors import GpunetError
from gpunet.train.text import clock, columns, parse_size, quantity, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8G", 8 * 2**30), ("8GB", 8 * 2**30), ("1.5 MiB", 3 * 2**19), ("10k", 10240), ("77", 77), ("2t", 2**41)],
)
def test_sizes_are_read(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "much", "8X", "-1G", "8 G B", "G"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(GpunetError, match="expected a size such as 8G"):
        parse_size(text)


def test_numbers_are_written():
    assert [clock(s) for s in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]
    assert [quantity(n) for n in (0, 12, 1_234_567, 5e13)] == ["", "12", "1.23 M", "50 T"]
    assert [size(n) for n in (0, 1023, 1536, 3 * 2**19, 3 * 2**30, 5 * 2**40)] == [
        "0 B", "1023 B", "1.5 KiB", "1.5 MiB", "3 GiB", "5120 GiB",
    ]  # fmt: skip


def test_columns_are_aligned():
    assert columns([("a", "1"), ("bcd", "1,000")], 1) == "a        1\nbcd  1,000"
