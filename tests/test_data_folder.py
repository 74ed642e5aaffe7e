"""Folders of pictures: every kind of picture file, unreadable ones, the packed copy, what `check` reports."""

import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from gpunet import data
from gpunet.data import DataNotFound, folder, picture
from gpunet.errors import GpunetError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GPUNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "folders"


@pytest.fixture
def root(tmp_path):
    """Two classes of 8 training and 2 test pictures, 6 high and 8 wide, each of its own colour."""
    for split, n in (("train", 8), ("test", 2)):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(n):
                colour = (10 * i, 100 * k, 50 if split == "train" else 200)
                Image.new("RGB", (8, 6), colour).save(tmp_path / "set" / split / name / f"{i}.png")
    return tmp_path / "set"


def refused(call, *words, kind=GpunetError):
    """The call fails with one line that holds the words."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(re.sub(r"/popen-gw\d+", "", text)) < 1200  # without a test process's own folder
    for word in words:
        assert str(word) in text, text


def load(root, **options):
    return data.load("folder", root, **({"size": 4, "validation": 0} | options))


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


# One picture


def quarters(mode="RGB"):
    """A 4 x 4 picture: red and green above, blue and black below."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2, :2, 0] = pixels[:2, 2:, 1] = pixels[2:, :2, 2] = 255
    return Image.fromarray(pixels).convert(mode)


def corners(path, channels=3):
    pixels = data.prepare_image(path, (4, 4), channels)
    assert pixels.shape == (4, 4, channels) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    return pixels[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()


RED, GREEN, BLUE, BLACK, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0], [255, 255, 255]


@pytest.mark.parametrize("ending", ["png", "bmp", "gif", "tif", "ppm", "webp"])
def test_lossless_formats(tmp_path, ending):
    path = saved(tmp_path, quarters(), f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    assert corners(path) == [RED, GREEN, BLUE, BLACK]


def test_jpeg(tmp_path):
    path = saved(tmp_path, quarters().resize((64, 64), 0), "a.jpg", quality=95)
    assert np.abs(np.array(corners(path)) - [RED, GREEN, BLUE, BLACK]).max() < 30


def test_the_content_decides_not_the_name(tmp_path):
    assert corners(saved(tmp_path, quarters(), "a.jpg", format="PNG"))[0] == RED


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_are_undone(tmp_path, turn):
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = quarters() if turn == 1 else quarters().transpose(stored[turn])
    exif = Image.Exif()
    exif[0x0112] = turn
    assert corners(saved(tmp_path, image, exif=exif)) == [RED, GREEN, BLUE, BLACK]


def test_transparent_parts_become_white(tmp_path):
    image = quarters("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 2, 2))
    image.paste((0, 0, 0, 128), (2, 0, 4, 2))
    half = [127, 127, 127]
    assert corners(saved(tmp_path, image)) == [WHITE, half, BLUE, BLACK]
    assert corners(saved(tmp_path, image.convert("LA")))[:2] == [WHITE, half]
    keyed = saved(tmp_path, quarters(), transparency=(255, 0, 0))
    assert corners(keyed) == [WHITE, GREEN, BLUE, BLACK]


def test_palettes(tmp_path):
    image = quarters().quantize(4)
    assert corners(saved(tmp_path, image)) == [RED, GREEN, BLUE, BLACK]
    see_through = saved(tmp_path, image, transparency=image.getpixel((0, 0)))
    assert corners(see_through) == [WHITE, GREEN, BLUE, BLACK]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_keep_the_upper_8(tmp_path, name):
    pixels = np.repeat(np.array([[0, 255], [0x1234, 65535]], np.uint16), 2, 0).repeat(2, 1)
    path = saved(tmp_path, Image.fromarray(pixels), name)
    assert corners(path, 1) == [[0], [0], [0x12], [255]]
    assert corners(path, 3)[2] == [0x12] * 3


def png(path, width, height, bits, rows):
    """An RGB file as Pillow cannot write it."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def test_16_bit_colour(tmp_path):
    rows = (b"\0" + struct.pack(">HHH", 0x8040, 0, 0xFFFF) * 2) * 2
    assert corners(png(tmp_path / "a.png", 2, 2, 16, rows))[0] == [0x80, 0, 255]


def test_cmyk(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.jpg", quality=95)
    red = np.array(corners(path))
    assert red[:, 0].min() > 225 and red[:, 1:].max() < 30


def test_grey_and_bits(tmp_path):
    assert corners(saved(tmp_path, Image.new("L", (4, 4), 77)))[0] == [77, 77, 77]
    assert corners(saved(tmp_path, Image.new("1", (4, 4), 1)), 1)[0] == [255]
    assert corners(saved(tmp_path, Image.new("RGB", (4, 4), (255, 0, 0))), 1)[0] == [76]  # 0.299 of 255


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame(tmp_path, ending):
    more = {"lossless": True} if ending == "webp" else {}
    frames = {"save_all": True, "append_images": [Image.new("RGB", (4, 4), "white")] * 2}
    assert corners(saved(tmp_path, quarters(), f"a.{ending}", **frames, **more)) == [RED, GREEN, BLUE, BLACK]


def test_cut_centrally_and_not_distorted(tmp_path):
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste("white", (10, 0, 20, 10))
    path = saved(tmp_path, wide)
    assert data.prepare_image(path, (10, 10)).min() == 255
    assert data.prepare_image(path, (5, 5)).shape == (5, 5, 3)
    light = data.prepare_image(path, (5, 15), 1)[:, :, 0] > 127
    assert light.tolist() == [[False] * 5 + [True] * 5 + [False] * 5] * 5
    assert data.open_image(path).size == (30, 10)
    rows = np.arange(0, 256, 8, dtype=np.uint8)
    shrunk = data.prepare_image(saved(tmp_path, Image.fromarray(np.tile(rows, (32, 1)))), (4, 4), 1)
    assert np.abs(shrunk[0, 1:3, 0] - [92.0, 156.0]).max() < 2  # an average, not a sample


def test_decompression_bombs_are_refused_before_they_are_opened(tmp_path):
    bomb = png(tmp_path / "bomb.png", 100_000, 100_000, 8, bytes(10_000))
    mild = png(tmp_path / "mild.png", 8001, 8000, 8, bytes(10_000))
    refused(lambda: data.prepare_image(bomb, (4, 4)), bomb, "bomb")
    refused(lambda: data.prepare_image(mild, (4, 4)), mild, "8001 x 8000", picture.PIXEL_LIMIT)


def test_what_is_no_picture(tmp_path):
    path = tmp_path / "a.png"
    refused(lambda: data.prepare_image(path, (4, 4)), path, "No such file")
    for content in (b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        path.write_bytes(content)
        refused(lambda: data.prepare_image(path, (4, 4)), path, "no picture in a format known here")
    whole = saved(tmp_path, Image.fromarray(RNG.integers(0, 256, (40, 40, 3), np.uint8))).read_bytes()
    for size in (60, len(whole) // 2):
        path.write_bytes(whole[:size])
        refused(lambda: data.prepare_image(path, (4, 4)), path, "cannot be read")
    real = saved(tmp_path, Image.fromarray(np.ones((4, 4), np.float32)), "a.tif")
    refused(lambda: data.prepare_image(real, (4, 4)), real, "floating point")
    refused(lambda: data.prepare_image(real, (4, 4), 4), "1 or 3")


# Folders


def test_a_folder(root):
    d = load(root, size=(3, 4))
    assert d.classes == ("cat", "dog") and d.name == "folder" and d.note == ""
    assert d.train.images.shape == (16, 3, 4, 3) and d.train.labels.tolist() == [0] * 8 + [1] * 8
    assert d.train.images[:, 0, 0].tolist() == [[10 * i, 100 * k, 50] for k in range(2) for i in range(8)]
    assert d.test.images[:, 0, 0].tolist() == [[10 * i, 100 * k, 200] for k in range(2) for i in range(2)]
    assert load(root, channels=1).train.images.shape == (16, 4, 4, 1)
    held = load(root, validation=0.25)
    assert np.bincount(held.validation.labels).tolist() == [2, 2] and len(held.train) == 12 and len(held.test) == 4


def test_a_folder_with_its_own_validation(root):
    shutil.copytree(root / "test", root / "validation")
    shutil.rmtree(root / "test")
    d = load(root, validation=5)
    assert (len(d.train), len(d.validation), d.test) == (16, 4, None)


def test_folders_that_are_not_as_expected(root, tmp_path):
    refused(lambda: load(tmp_path / "none"), tmp_path / "none", "train", "CLASS", kind=DataNotFound)
    for size in (0, (4, 0), (4, 4, 3), (1e3, 4), "44"):
        refused(lambda size=size: load(root, size=size), "size")
    (root / "test" / "bird").mkdir()
    refused(lambda: load(root), root / "test" / "bird", "cat, dog")
    (root / "train" / "bird").mkdir()
    (root / "train" / "bird" / "notes.txt").write_text("x")
    refused(lambda: load(root), root / "train" / "bird", "found none")
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    refused(lambda: load(root), root / "train", "one a class")


def test_unreadable_pictures_are_listed_or_left_out(root):
    bad = [root / "train" / "cat" / "3.png", root / "test" / "dog" / "1.png"]
    for path in bad:
        path.write_bytes(b"broken")
    (root / "train" / "dog" / "gone.png").symlink_to(root / "nowhere")
    refused(lambda: load(root), "3 of 21 pictures are unreadable", *bad, "gone.png", "skip_unreadable")
    for _ in range(2):  # the second time from the packed copy
        d = load(root, skip_unreadable=True)
        assert (len(d.train), len(d.test)) == (15, 3) and d.train.images[3, 0, 0].tolist() == [40, 0, 50]
        assert d.note.startswith("3 unreadable pictures left out: train/cat/3.png: ")
    refused(lambda: load(root), "3 of 21")
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"broken")
    refused(lambda: load(root, skip_unreadable=True), "unreadable")  # nothing is left of test


def test_many_unreadable_pictures_stay_one_line(root):
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    refused(lambda: load(root), "20 of 20", "and 15 more", "gpunet data check")


def test_the_packed_copy_is_used_and_follows_the_files(root, cache, monkeypatch):
    first = load(root)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(folder, "prepare_image", lambda *_: pytest.fail("opened a picture again"))
    again = load(root)
    assert np.array_equal(first.train.images, again.train.images) and again.train.images.flags.c_contiguous
    assert np.array_equal(first.test.labels, again.test.labels)
    monkeypatch.undo()
    monkeypatch.setenv("GPUNET_CACHE", str(cache.parent))
    path = root / "train" / "cat" / "0.png"
    stat = path.stat()
    Image.new("RGB", (8, 6), (1, 2, 3)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load(root).train.images[0, 0, 0].tolist() == [1, 2, 3]
    path.rename(root / "train" / "dog" / "moved.png")
    assert np.bincount(load(root).train.labels).tolist() == [7, 9]
    assert load(root, size=5).train.images.shape[1:] == (5, 5, 3)
    assert load(root, channels=1).train.images.shape[1:] == (4, 4, 1)
    assert len(list(cache.iterdir())) == 5
    load(root, cache=False, size=6)
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", None])
def test_a_damaged_packed_copy_is_made_anew(root, cache, damage):
    load(root)
    (packed,) = cache.iterdir()
    packed.write_bytes(packed.read_bytes()[:-100] if damage is None else damage)
    assert len(load(root).train) == 16 and np.load(packed)["train_images"].shape == (16, 4, 4, 3)


def test_a_cache_that_cannot_be_written_is_no_error(root, cache, monkeypatch):
    monkeypatch.setenv("GPUNET_CACHE", "/proc/gpunet")
    d = load(root)
    assert len(d.train) == 16 and d.note == ""


def test_a_disk_that_fills_up_leaves_nothing_behind(root, cache, monkeypatch):
    def full(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert load(root).note == "" and list(cache.iterdir()) == []


def test_too_small_a_disk_is_noted(root, cache, monkeypatch):
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    d = load(root)
    assert len(d.train) == 16 and d.note.startswith("not packed: ") and list(cache.iterdir()) == []


def test_too_little_memory(root, monkeypatch):
    def none(*_):
        raise MemoryError

    monkeypatch.setattr(folder.np, "empty", none)
    refused(lambda: load(root, cache=False), root, "GB of memory", "16 pictures")


def test_check_reports_counts_and_problems(root, tmp_path):
    report = data.check(root)
    assert report.counts == {"train": {"cat": 8, "dog": 8}, "test": {"cat": 2, "dog": 2}} and report.problems == []
    assert "6 x 8 pixels (20 of 20)" in str(report) and "no problem" in str(report)
    (root / "train" / "cat" / "0.png").write_bytes(b"broken")
    (root / "train" / "notes.txt").write_text("x")
    shutil.copy(root / "train" / "dog" / "1.png", root / "test" / "cat" / "leak.png")
    text = str(data.check(root))
    for words in ("cat/0.png: cannot be read", "1 files are not used", "notes.txt", "same picture", "leak.png"):
        assert words in text, text
    assert "expected pictures" in str(data.check(tmp_path / "set" / "train"))
    refused(lambda: data.check(tmp_path / "none"), "expected a folder", "found nothing")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "I;16", "CMYK", "L"])
def test_large_pictures_are_converted_in_strips_to_the_same_pixels(mode, tmp_path, monkeypatch):
    pixels = RNG.integers(0, 256, (37, 45, 4 if mode in ("RGBA", "CMYK") else 3), np.uint8)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 250) if mode == "I;16" else Image.fromarray(pixels, None)
    image = image if mode in ("I;16", image.mode) else image.convert(mode)
    path = saved(
        tmp_path, image, "a.tif" if mode == "CMYK" else "a.png", **({"transparency": 3} if mode == "P" else {})
    )
    for channels in (1, 3):
        whole = np.asarray(data.open_image(path, channels))
        with monkeypatch.context() as patch:
            patch.setattr(picture, "STRIP", 45 * 5)
            assert np.array_equal(np.asarray(data.open_image(path, channels)), whole)


def test_threads_wait_for_room(tmp_path, monkeypatch):
    """Of pictures that are large together, some wait; all are read."""
    paths = [saved(tmp_path, Image.new("RGB", (30, 30), (i, 0, 0)), f"{i}.png") for i in range(6)]
    held, most, lock = [0], [0], threading.Lock()
    original = picture._plain

    def plain(image, mode):
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        time.sleep(0.02)
        with lock:
            held[0] -= 1
        return original(image, mode)

    monkeypatch.setattr(picture, "_plain", plain)
    for room, expected in ((2 * 900, 2), (10**9, 6)):
        monkeypatch.setattr(picture, "ROOM", picture._Room(room))
        most[0] = 0
        with ThreadPoolExecutor(6) as pool:
            found = [int(p[0, 0, 0]) for p in pool.map(lambda path: data.prepare_image(path, (2, 2)), paths)]
        assert found == [0, 1, 2, 3, 4, 5]
        assert most[0] == expected if expected == 2 else most[0] > 2


def test_a_picture_of_64_million_pixels_is_read_in_little_memory(tmp_path):
    """In a process of its own, whose highest memory is measured."""
    stream = Image.new("RGBA", (8000, 8000))
    stream.save(tmp_path / "a.png", compress_level=1)
    script = f"""
import numpy, PIL.Image
from gpunet.data import prepare_image
assert prepare_image({str(tmp_path / "a.png")!r}, (4, 4)).shape == (4, 4, 3)
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])  # without the parent's
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 800_000  # kB; the picture has 256 MB, and 256 MB as RGB


def test_the_number_of_channels_is_looked_at_first(root):
    refused(lambda: load(root, channels=-1), "folder: channels: expected 1 or 3, got -1")
