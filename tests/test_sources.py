"""How `.cu` files are read: declarations, extents, includes."""

import inspect
import re
from importlib import import_module

import pytest

from gpunet import resources
from gpunet.core import sources
from gpunet.core.backend import evaluate
from gpunet.errors import GpunetError


def written(tmp_path, text, name="op.cu"):
    path = tmp_path / name
    path.write_text(text)
    return path


GOOD = """// y = a * x and sums.
#include "common.cuh"

// launch: over=n
KERNEL scale(const real* x /*n*/, real* y /*n*/, wide a, long long n) {
    EACH(i, n) { y[i] = a * x[i]; }
}

// launch: blocks=parts
KERNEL sums(const real* __restrict__ x /*rows*(c//groups)*/,
            wide* sums /* max(parts, 1) * c */, State* state, const unsigned char* index /*rows*/,
            unsigned long long seed, int rows, int c, int groups, int parts)
{
}
"""


def test_declarations_are_read(tmp_path):
    kernels = sources.parse(written(tmp_path, GOOD))
    assert list(kernels) == ["scale", "sums"]
    scale, sums = kernels.values()
    assert (scale.form, scale.count, scale.stem) == ("over", "n", "op")
    assert (sums.form, sums.count) == ("blocks", "parts")
    got = [(a.name, a.type, a.pointer, a.const, a.extent, a.output) for a in scale.arguments]
    assert got == [
        ("x", "real", True, True, "n", False),
        ("y", "real", True, False, "n", True),
        ("a", "wide", False, False, None, False),
        ("n", "long long", False, False, None, False),
    ]
    assert [a.extent for a in sums.arguments] == [
        "rows*(c//groups)", "max(parts, 1) * c", "1", "rows", None, None, None, None, None,
    ]  # fmt: skip
    assert sums.arguments[3].type == "unsigned char"
    assert sums.arguments[4].type == "unsigned long long"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("// launch: over=n\n", ""), r"op\.cu:4: kernel scale has no '// launch: over=...'"),
        (("// launch: over=n\n", "// launch: over=n\n\n// y\n"), r"op\.cu:7: kernel scale has no '// launch"),
        ((" /*n*/, real* y", ", real* y"), r"op\.cu:5: scale: pointer 'x' has no extent comment"),
        (("x /*n*/", "x /*m*/"), r"op\.cu:5: scale: expected an expression over n, got 'm'"),
        (("x /*n*/", "x /*a*/"), r"op\.cu:5: scale: expected an expression over n, got 'a'"),
        (("x /*n*/", "x /*n**/"), r"op\.cu:5: scale: .*'const real\* x /\*n\*\*/'|expression over n, got 'n\*'"),
        (("over=n", "over=size"), r"op\.cu:5: scale: expected an expression over n, got 'size'"),
        (("wide a,", "wide,"), r"op\.cu:5: scale: cannot read the parameter 'wide'"),
        (("wide a", "half a"), r"op\.cu:5: scale: a: expected a type of int, .*, got 'half'"),
        (("wide a", "wide a[2]"), r"op\.cu:5: scale: cannot read the parameter 'wide a\[2\]'"),
    ],
)
def test_mistakes_are_named_with_file_and_line(tmp_path, change, message):
    text = GOOD.replace(*change, 1)
    assert text != GOOD
    with pytest.raises(GpunetError, match=message):
        sources.parse(written(tmp_path, text))


def test_one_name_in_two_files_is_an_error(tmp_path, monkeypatch):
    written(tmp_path, GOOD, "a.cu")
    written(tmp_path, GOOD, "b.cu")
    monkeypatch.setattr(resources, "kernels", lambda: tmp_path)
    sources.kernels.cache_clear()
    try:
        with pytest.raises(GpunetError, match=r"b\.cu: kernel scale is already defined in .*a\.cu"):
            sources.kernels()
    finally:
        sources.kernels.cache_clear()


def test_includes_are_inlined_once_and_lines_keep_their_files(tmp_path):
    (tmp_path / "deep").mkdir()
    written(tmp_path, "#pragma once\n#include \"deep/b.cuh\"\nint a;\n", "a.cuh")
    written(tmp_path, "#pragma once\n#include <math.h>\nint b;\n", "deep/b.cuh")
    main = written(tmp_path, '// main\n#include "a.cuh"\n#include "deep/b.cuh"  // again\nint c; here\n', "c.cu")
    text = sources.inlined(main)
    assert [text.count(f"int {x};") for x in "abc"] == [1, 1, 1]
    assert '#include "' not in text
    assert "#include <math.h>" in text
    assert "#pragma once" not in text
    place = {}
    for line in text.splitlines():
        marker = re.fullmatch(r'#line (\d+) "(.+)"', line)
        if marker:
            number, file = int(marker[1]), marker[2]
        else:
            place[line] = (file.rpartition("/")[2], number)
            number += 1
    assert place["int a;"] == ("a.cuh", 3)
    assert place["int b;"] == ("b.cuh", 3)
    assert place["int c; here"] == ("c.cu", 4)


@pytest.mark.parametrize("path", sorted(resources.kernels().glob("*.cu")), ids=lambda p: p.stem)
def test_shipped_kernels_and_their_twins(path):
    """Every kernel of a file has a function of its name and parameters in the module of its stem."""
    kernels = sources.parse(path)
    assert kernels
    twins = import_module(f"gpunet.backends.numpy.{path.stem}")
    for name, kernel in kernels.items():
        names = [a.name for a in kernel.arguments]
        assert list(inspect.signature(getattr(twins, name)).parameters) == names
        sizes = {a.name: 512 for a in kernel.arguments if not a.pointer}
        for a in kernel.arguments:
            assert not a.pointer or evaluate(a.extent, sizes) > 0
        assert any(a.output for a in kernel.arguments), f"{name} writes nothing"
    assert path.read_text().count("KERNEL ") == len(kernels), "a declaration that the parser does not see"
    assert "#include" not in re.sub(r"#include <[^>]+>", "", sources.inlined(path))
