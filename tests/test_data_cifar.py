"""CIFAR in both layouts, real and small; all ways in which its files can be wrong or hostile; downloads, fallback."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import struct
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpunet import data
from gpunet.data import DataNotFound, cifar, download, unpickle
from gpunet.errors import GpunetError

COUNT = 20  # images in a file of the small sets here
RNG = np.random.default_rng(0)
PLANES = RNG.integers(0, 256, (6, COUNT, 3072), np.uint8)
LABELS = np.arange(6 * COUNT).reshape(6, COUNT) % 10
STEMS = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


@pytest.fixture(autouse=True)
def small(request, monkeypatch, tmp_path):
    """Sets of a few images, an empty cache folder, no data folder, no network."""
    if "cifar10" in request.fixturenames:  # the real data
        return
    for name, layout in cifar.SETS.items():
        archive = replace(layout.archive, url="http://127.0.0.1:9/none.tar.gz")
        monkeypatch.setitem(cifar.SETS, name, replace(layout, images={"train": COUNT, "test": COUNT}, archive=archive))
    monkeypatch.setenv("GPUNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPUNET_DATA", raising=False)


def write(folder, layout):
    folder.mkdir(parents=True)
    for stem, planes, labels in zip(STEMS, PLANES, LABELS, strict=True):
        if layout == "binary":
            np.hstack([labels[:, None], planes]).astype(np.uint8).tofile(folder / f"{stem}.bin")
        else:
            pickled(folder / stem, {b"data": planes, b"labels": labels.tolist()})
    return folder


def pickled(path, content):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.fixture(params=["binary", "python"])
def folder(request, tmp_path):
    return write(tmp_path / "data", request.param)


def refused(call, *words, kind=GpunetError):
    """The call fails with one line that holds the words."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 900
    for word in words:
        assert str(word) in text, text


def same(d):
    expected = PLANES.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(d.train.images, expected[: 5 * COUNT]) and np.array_equal(
        d.test.images, expected[5 * COUNT :]
    )
    assert np.array_equal(d.train.labels, LABELS[:5].ravel()) and np.array_equal(d.test.labels, LABELS[5])
    return True


def test_the_real_set_in_both_layouts(cifar10, monkeypatch):
    first = data.load("cifar10", cifar10, validation=0)
    mean, sd = data.channel_statistics(first)
    assert np.allclose(mean / 255, [0.49140, 0.48216, 0.44653], atol=5e-6)  # as is widely published
    assert np.allclose(sd / 255, [0.24703, 0.24349, 0.26159], atol=5e-6)
    held = data.hold_out(first, 0.1)
    assert [len(s) for s in held.splits.values()] == [45_000, 5_000, 10_000]
    assert np.bincount(held.validation.labels).tolist() == [500] * 10
    assert np.bincount(held.test.labels).tolist() == [1000] * 10
    # The pickles hold the same; two of the six tell.
    monkeypatch.setitem(cifar.SETS, "cifar10", replace(cifar.SETS["cifar10"], train=("data_batch_2",)))
    if (cifar10 / "cifar-10-batches-py").is_dir():
        other = data.load("cifar10", cifar10 / "cifar-10-batches-py", validation=0)
        for mine, its in ((first.train.pick(slice(10_000, 20_000)), other.train), (first.test, other.test)):
            assert np.array_equal(mine.images, its.images) and np.array_equal(mine.labels, its.labels)


def test_both_layouts_directly(folder):
    d = data.load("cifar10", folder, validation=0)
    assert same(d) and d.name == "cifar10" and d.classes[3] == "cat"
    held = data.load("cifar10", str(folder), validation=10)
    assert np.bincount(held.validation.labels).tolist() == [1] * 10


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    cache = write(tmp_path / "cache" / "cifar-10-batches-py", "python")
    assert same(data.load("cifar10", validation=0))
    write(tmp_path / "there" / "cifar-10-batches-bin", "binary")
    monkeypatch.setenv("GPUNET_DATA", str(tmp_path / "there"))
    shutil.copy(cache / "test_batch", cache / "data_batch_1")  # now the two differ
    assert same(data.load("cifar10", validation=0))
    assert np.array_equal(data.load("cifar10", cache, validation=0).train.labels[:COUNT], LABELS[5])
    refused(lambda: data.load("cifar10", tmp_path), tmp_path, "data_batch_1", "cifar-10-batches-bin", kind=DataNotFound)


def test_cifar_100_has_two_kinds_of_label(tmp_path):
    fine, coarse = np.arange(COUNT) + 80, np.arange(COUNT)
    for stem in ("train", "test"):
        content = {"data": PLANES[0], "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
        pickled(tmp_path / stem, content)
        np.hstack([coarse[:, None], fine[:, None], PLANES[0]]).astype(np.uint8).tofile(tmp_path / f"{stem}.bin")
    for _ in range(2):
        d = data.load("cifar100", tmp_path, validation=0)
        assert np.array_equal(d.train.labels, fine) and len(d.classes) == 100 and d.classes[99] == "worm"
        assert list(d.classes) == sorted(set(d.classes)) and len(d.train) == len(d.test) == COUNT
        d = data.load("cifar100", tmp_path, validation=0, coarse=True)
        assert np.array_equal(d.test.labels, coarse) and len(set(d.classes)) == 20 and d.classes[-1] == "vehicles_2"
        (tmp_path / "train.bin").unlink(missing_ok=True)  # then the pickles
        (tmp_path / "test.bin").unlink(missing_ok=True)


def test_missing_files_are_named(folder):
    for path in sorted(folder.iterdir())[2:4]:
        path.unlink()
    refused(lambda: data.load("cifar10", folder, fallback="shapes"), folder, "missing: data_batch_3", "data_batch_4")
    assert "missing" in str(data.check(folder))


def test_files_cut_short(folder):
    path = sorted(folder.iterdir())[1]
    whole = path.read_bytes()
    for size in (0, 1000, len(whole) - 5):
        path.write_bytes(whole[:size])
        least = COUNT * 3073 if path.suffix else f"at least {COUNT * 3072}"
        words = (f"expected {least} bytes",) if path.suffix or size < COUNT * 3072 else ()
        refused(lambda: data.load("cifar10", folder), path, size, *words)
    assert str(path) in str(data.check(folder))


def test_an_unreadable_file(folder, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(np, "fromfile", broken)
    monkeypatch.setattr(Path, "read_bytes", broken)
    refused(lambda: data.load("cifar10", folder), folder / "data_batch_1", "Input/output error")


@pytest.mark.parametrize("label", [10, -1, 2**70])
def test_labels_out_of_range(folder, label):
    if any(folder.glob("*.bin")):
        path = folder / "data_batch_2.bin"
        content = bytearray(path.read_bytes())
        content[3073 * 7] = label % 256 | 16
        path.write_bytes(content)
        refused(lambda: data.load("cifar10", folder), path, "0 to 9")
    else:
        labels = LABELS[1].tolist()
        labels[7] = label
        pickled(folder / "data_batch_2", {"data": PLANES[1], "labels": labels})
        refused(lambda: data.load("cifar10", folder), folder / "data_batch_2", "0 to 9", label)


def test_wrong_numbers_of_images(folder):
    if any(folder.glob("*.bin")):
        path = folder / "test_batch.bin"
        path.write_bytes(path.read_bytes() * 2)
        refused(lambda: data.load("cifar10", folder), path, f"expected {COUNT * 3073} bytes", f"({COUNT * 2} images)")
    else:
        path = folder / "test_batch"
        for content, word in (
            ({"data": np.tile(PLANES[0], (2, 1)), "labels": LABELS[0].tolist()}, f"({COUNT * 2}, 3072)"),
            ({"data": PLANES[0], "labels": LABELS[0].tolist()[1:]}, COUNT - 1),
            ({"data": PLANES[0], "labels": [0.5] * COUNT}, "whole numbers"),
            ({"data": PLANES[0].astype(np.int16), "labels": LABELS[0].tolist()}, "int16"),
            ({"data": [1] * 100_000, "labels": LABELS[0].tolist()}, "list"),
            ({"data": PLANES[0]}, "labels"),
            ([PLANES[0]], "refused"),
        ):
            pickled(path, content)
            refused(lambda: data.load("cifar10", folder), path, word)


def test_no_pickle_at_all(tmp_path):
    folder = write(tmp_path / "data", "python")
    (folder / "data_batch_1").write_bytes(b"<html>not found</html>" * 5000)
    refused(lambda: data.load("cifar10", folder), folder / "data_batch_1", "expected a pickle", "<html>")


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def dtype_state(code):
    return b"cnumpy\ndtype\n" + pickle.dumps((code, False, True), protocol=2)[2:-1] + b"R"


def array(shape, code="u1", raw=b""):
    """A pickle of {"data": array} which says of it what we like."""
    head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + pickle.dumps((0,), protocol=2)[2:-1]
    head += pickle.dumps(b"b", protocol=3)[2:-1] + b"\x87R"
    body = pickle.dumps(shape, protocol=2)[2:-1] + dtype_state(code)
    body = b"(K\x01" + body + b"\x89" + pickle.dumps(raw, protocol=3)[2:-1] + b"tb"
    return b"\x80\x03}X\x04\x00\x00\x00data" + head + body + b"s."


HOSTILE = {
    "runs a command": (pickle.dumps({"data": Call(os.system, "touch ran")}, protocol=2), "system"),
    "evaluates": (pickle.dumps({"data": Call(eval, "open('ran', 'w')")}, protocol=2), "eval"),
    "imports": (pickle.dumps(Call(__import__, "antigravity"), protocol=4), "__import__"),
    "numpy's own loader": (b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x00x\x85R.", "numpy.load"),
    "an attribute path": (b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.", "ndarray.dump"),
    "a persistent name": (b"\x80\x02X\x01\x00\x00\x00xQ.", "refused"),
    "calls ndarray": (b"\x80\x02cnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.", "refused"),
    "a terabyte": (array((10**12,)), "1000000000000 bytes"),
    "a terabyte by factors": (array((10**6, 10**6)), "1000000000000 bytes"),
    "reconstructs a terabyte": (
        b"\x80\x02}X\x04\x00\x00\x00datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85U\x01b\x87Rs.",
        "no attribute 'array'",
    ),
    "minus one image": (array((-1, -5), raw=b"12345"), "refused"),
    "too few bytes": (array((5,), raw=b"1234"), "5 bytes asked for, 4 there"),
    "objects": (array((1,), "O8", [1]), "type 'O8'"),
    "records": (array((1,), "V8", b"12345678"), "type 'V8'"),
    "sets what it should not": (
        b"\x80\x02c_codecs\nencode\nN}X\x08\x00\x00\x00__code__Ns\x86b.",
        "refused",
    ),
    "another codec": (
        pickle.dumps({"data": 1}, protocol=2)[:-1] + b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
        "'hex'",
    ),
    "a text that claims 4 GB": (b"\x80\x02X\xff\xff\xff\xffabc.", "cut short or damaged"),
    "bytes that claim 2**62": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.", "cut short or damaged"),
    "a byte array that claims 2**62": (b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"abc.", "cut short or damaged"),
    "a memo of 32 GB": (b"\x80\x02Nr\xff\xff\xff\xff.", "memo place 4294967295"),
    "a stack that is empty": (b"\x80\x02R.", "refused"),
    "never ends": (b"\x80\x02N", "cut short or damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(name, tmp_path, monkeypatch):
    content, word = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "batch"
    path.write_bytes(content)
    start = time.process_time()
    refused(lambda: unpickle.read_pickle(path), path, word)
    assert not (tmp_path / "ran").exists()
    assert time.process_time() - start < 1


def test_large_files_and_arrays_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "batch"
    pickled(path, {"data": PLANES[0]})
    assert np.array_equal(unpickle.read_pickle(path)["data"], PLANES[0])
    monkeypatch.setattr(unpickle, "ARRAY_LIMIT", PLANES[0].nbytes - 1)
    refused(lambda: unpickle.read_pickle(path), f"{PLANES[0].nbytes} bytes asked for")
    monkeypatch.setattr(unpickle, "STEP_LIMIT", 4)
    refused(lambda: unpickle.read_pickle(path), "more than 4 operations")
    monkeypatch.setattr(unpickle, "FILE_LIMIT", 1000)
    refused(lambda: unpickle.read_pickle(path), path.stat().st_size, "at most 1000")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">f4", "b1"])
def test_arrays_come_back(tmp_path, protocol, dtype):
    path = tmp_path / "batch"
    arrays = {
        "c": np.arange(24).reshape(2, 3, 4).astype(dtype),
        "f": np.asfortranarray(np.arange(6).reshape(2, 3), dtype),
    }
    path.write_bytes(pickle.dumps(arrays | {"n": 3, "list": ["x", 1.5, None]}, protocol=protocol))
    content = unpickle.read_pickle(path)
    for name in arrays:
        assert content[name].dtype == arrays[name].dtype and np.array_equal(content[name], arrays[name])
    assert content["n"] == 3


def test_a_pickle_as_python_2_wrote_it(tmp_path):
    """Texts as byte strings and NumPy's old module name, as in the published archives."""
    short = lambda b: b"U" + bytes([len(b)]) + b  # noqa: E731
    dtype = (
        b"cnumpy\ndtype\n"
        + short(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + short(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
    array += b"(K\x01K\x02K\x03\x86" + dtype + b"\x89" + short(bytes([1, 2, 3, 200, 255, 0])) + b"tb"
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x02}(" + short(b"data") + array + short(b"labels") + b"](K\x06K\x07eu.")
    content = unpickle.read_pickle(path)
    assert content["data"].tolist() == [[1, 2, 3], [200, 255, 0]] and content["labels"] == [6, 7]


# Downloads, from a server on this machine


@pytest.fixture
def server():
    """A server of `files`; `cut` bytes of a file are sent where it is set, though all are promised."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = serving.files.get(self.path)
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write((content or b"")[: serving.cut])

        def log_message(self, *_):
            pass

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving.files, serving.cut = {}, None
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
    thread.start()
    yield serving
    serving.shutdown()
    thread.join()
    serving.server_close()


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """The small CIFAR-10 as an archive on the server, known to gpunet."""
    folder = write(tmp_path / "made" / "cifar-10-batches-py", "python")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.add(folder, folder.name)
    return publish(server, monkeypatch, stream.getvalue())


def publish(server, monkeypatch, content):
    server.files["/cifar.tar.gz"] = content
    url = f"http://127.0.0.1:{server.server_port}/cifar.tar.gz"
    archive = download.Archive(url, hashlib.sha256(content).hexdigest(), len(content), "cifar-10-batches-py")
    monkeypatch.setitem(cifar.SETS, "cifar10", replace(cifar.SETS["cifar10"], archive=archive))
    return server


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").iterdir())


def test_a_download_is_announced_and_kept(published, tmp_path, capsys):
    assert same(data.load("cifar10", validation=0))
    said = capsys.readouterr().err
    assert "0 MB" in said and "http://127.0.0.1" in said and str(tmp_path / "cache" / "cifar-10-batches-py") in said
    published.files.clear()
    assert same(data.load("cifar10", validation=0)) and cached(tmp_path) == ["cifar-10-batches-py"]


def test_a_cut_download_leaves_nothing(published, tmp_path):
    published.cut = 100_000
    refused(lambda: data.load("cifar10"), published.server_port, "cut", "GPUNET_DATA", kind=DataNotFound)
    assert cached(tmp_path) == []
    published.cut = None
    assert same(data.load("cifar10", validation=0))


def test_a_wrong_checksum_leaves_nothing(published, tmp_path):
    content = bytearray(published.files["/cifar.tar.gz"])
    content[-1] ^= 1
    published.files["/cifar.tar.gz"] = bytes(content)
    refused(lambda: data.load("cifar10"), "wrong checksum", len(content), kind=DataNotFound)
    assert cached(tmp_path) == []


def test_a_missing_page(published, tmp_path):
    published.files.clear()
    refused(lambda: data.load("cifar10"), "404", kind=DataNotFound)
    assert cached(tmp_path) == []


def test_a_silent_server(published, monkeypatch):
    monkeypatch.setattr(download, "LIMITS", (1, 0.2))
    held = threading.Event()
    published.RequestHandlerClass.do_GET = lambda self: held.wait(5)
    refused(lambda: data.load("cifar10"), "no answer", kind=DataNotFound)
    held.set()


@pytest.mark.parametrize("harm", ["cut", "no gzip inside", "a bad length"])
def test_a_damaged_archive_with_the_right_checksum(harm, published, tmp_path, monkeypatch):
    content = published.files["/cifar.tar.gz"]
    tar = gzip.decompress(content)
    bad = {"cut": content[: len(content) // 2], "no gzip inside": content[:100] + bytes(50) + content[150:]}
    bad["a bad length"] = gzip.compress(tar[:124] + b"\xff" * 12 + tar[136:])
    publish(published, monkeypatch, bad[harm])
    refused(lambda: data.load("cifar10"), "cifar-10-batches-py", kind=DataNotFound)
    assert cached(tmp_path) == []


def test_an_archive_that_climbs_out(server, tmp_path, monkeypatch):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        member = tarfile.TarInfo("../../escaped")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    publish(server, monkeypatch, stream.getvalue())
    refused(lambda: data.load("cifar10"), "outside")
    assert cached(tmp_path) == [] and not list(tmp_path.rglob("escaped"))


def test_another_process_was_quicker(published, tmp_path, monkeypatch):
    rename = os.rename

    def late(old, new):
        if not Path(new).exists():
            shutil.copytree(old, new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", late)
    assert same(data.load("cifar10", validation=0)) and cached(tmp_path) == ["cifar-10-batches-py"]


def test_no_room_on_the_disk(published, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(lambda: data.load("cifar10"), tmp_path / "cache", "MB needed", "GPUNET_CACHE")


def test_a_cache_that_cannot_be_made(published, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    refused(lambda: data.load("cifar10"), "cannot be written", "GPUNET_CACHE")


def test_offline_is_quick_and_falls_back_only_when_told():
    start = time.monotonic()
    refused(lambda: data.load("cifar10"), "no connection", "GPUNET_DATA", "cifar-10-batches-py", kind=DataNotFound)
    refused(lambda: data.load("cifar10", download=False), "not found", kind=DataNotFound)
    assert time.monotonic() - start < 5
    d = data.load("cifar10", validation=5000, limit=100, fallback="shapes", download=False)
    assert d.name == "shapes" and (len(d.train), len(d.validation)) == (100, 1000)
    assert d.note.startswith("shapes, a synthetic stand-in for cifar10: ") and "\n" not in d.note


def test_a_named_folder_is_not_stood_in_for(tmp_path):
    refused(lambda: data.load("cifar10", tmp_path, fallback="shapes"), "not found", tmp_path)


def test_what_is_there_is_used_in_spite_of_a_fallback(folder):
    assert data.load("cifar10", folder, fallback="shapes", validation=0).name == "cifar10"
    path = sorted(folder.iterdir())[0]
    path.write_bytes(b"damaged")
    refused(lambda: data.load("cifar10", folder, fallback="shapes"), path)  # damaged is not absent


def test_check_counts_classes(folder):
    report = data.check(folder.parent if folder.name.startswith("cifar") else folder)
    assert report.counts["train"]["cat"] == COUNT * 5 // 10 and report.counts["test"]["truck"] == COUNT // 10
    assert report.problems == [] and "cifar10" in str(report) and "no problem" in str(report)
