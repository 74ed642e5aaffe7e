"""Nearly valid inputs out of valid ones: bytes, settings, TOML, JSON, safetensors, pickles, archives, pictures.

Every function takes a `random.Random` first and gives the same for the same draws.
"""

import contextlib
import copy
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
import tarfile
import zlib

import numpy as np

NUMBERS = (
    0, 1, -1, 2, 3, 7, 32, 255, 256, 65536, 10**6, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30,
    -(2**31), -(2**63), 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-320, 1e-30, 1e30, 1e308, -1e308, math.nan, math.inf,
    -math.inf,
)  # fmt: skip
TEXTS = (
    "", " ", "x", "0", "nan", "\x00", "a\x00b", "\n", "a\nb",
    "\x1b[31m", "ü", "\u202e", "\U0001f600", "\udc80", "a" * 5000,
    "../../up", "~nobody-of-this-name", "~", "/dev/null", "/proc/self/mem", "os", "os.system", "__import__('os')",
    "{0.__class__}", "%s%n", "$HOME", "shapes", "folder", "cifar10", "cifar100", "mlp", "vgg", "resnet20",
    "cosine", "step",
    "multistep", "onecycle", "numpy", "cuda", "auto", "he", "normal", "data", "checkpoint", "image", "channel",
    "float16",
    "float64", "bfloat16", "*", "[", "head", "*.weight", "cross_entropy", "mse", "best", "last", "train", "test",
)  # fmt: skip
KEYS = (
    "init", "preprocess", "average",
    "model", "data", "augment", "loss", "optimizer", "schedule", "train", "start", "run", "name", "directory",
    "train", "test",
    "validation", "seed", "limit", "fallback", "size", "channels", "coarse", "download", "hidden", "depth",
    "widths", "dropout",
    "init", "bias_rate", "input_shape", "classes", "outputs", "config", "state", "progress", "best", "pins",
    "epoch", "format",
    "__class__", "__init__", "model_config", "model_extra", "copy", "self", "é", "", "\x00", "a.b", "a b", "x" * 300,
)  # fmt: skip


def number(rng):
    """Return a number at an edge, or near one."""
    if rng.random() < 0.7:
        return rng.choice(NUMBERS)
    return rng.choice((rng.randint(-5, 40), rng.uniform(-2, 2), rng.randint(0, 2 ** rng.randint(1, 70))))


def nested(depth, inner, kind=list):
    """Return lists or tables in each other."""
    for _ in range(depth):
        inner = [inner] if kind is list else {"a": inner}
    return inner


def value(rng):
    """Return a value of any kind that a file can hold."""
    kind = rng.randrange(12)
    if kind < 5:
        return number(rng)
    if kind < 8:
        return rng.choice(TEXTS)
    if kind == 8:
        return rng.choice((True, False, None))
    if kind == 9:
        return [number(rng) for _ in range(rng.choice((0, 1, 2, 3, 5, 40)))]
    if kind == 10:
        return rng.choice(
            ([], {}, [[]], ["x"], {"name": "x"}, [None], [1, "x"], ["normal", "x"], ["he", -1], ["uniform", 1e308])
        )
    return nested(rng.choice((2, 20, 90)), 1, rng.choice((list, dict)))


def places(tree, path=()):
    """Return the paths of all values in a tree of dicts and lists."""
    found = []
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found.append((*path, key))
        if isinstance(inner, (dict, list)):
            found += places(inner, (*path, key))
    return found


def tree(rng, original, times=None):
    """Return a copy of a tree with some places changed, removed, renamed, exchanged or new."""
    made = copy.deepcopy(original)
    for _ in range(times or rng.choice((1, 1, 1, 1, 2, 4))):
        known = places(made)
        if not known:
            return made
        *above, key = rng.choice(known)
        holder = made
        for step in above:
            holder = holder[step]
        kind = rng.randrange(10)
        if kind < 5:
            holder[key] = near(rng, holder[key])
        elif kind == 5:
            del holder[key]
        elif kind == 6 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = holder.pop(key)
        elif kind == 7 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = value(rng)
        elif kind == 8:
            holder[key] = [holder[key]] * rng.choice((1, 2, 3))
        elif isinstance(holder, list):
            holder.insert(0, value(rng))
        else:
            other = rng.choice(list(holder))
            holder[key], holder[other] = holder[other], holder[key]
    return made


def near(rng, old):
    """Return a value like the old one, half the time of its type."""
    if rng.random() < 0.3:
        return value(rng)
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return rng.choice(
            (old + 1, old + 2, max(old - 1, 1), 2 * old, 1, -old, old * 1000, rng.randint(0, 40), number(rng))
        )
    if isinstance(old, float):
        return rng.choice((old / 2, old / 2, 0.0, 1, old * 1e3, old * 1e30, -old, rng.random(), number(rng)))
    if isinstance(old, str):
        return rng.choice((old + "x", old[:-1], old.upper(), old * 2, *rng.choices(TEXTS, k=6)))
    if isinstance(old, list) and old:
        kind = rng.randrange(4)
        if kind < 2:
            return old[1:] if kind else old * 2
        return [*old[:-1], near(rng, old[-1])] if kind == 2 else [near(rng, inner) for inner in old]
    return value(rng)


def octets(rng, content, times=None):
    """Return bytes with some flipped, cut out, doubled, moved, or replaced by numbers at the edges."""
    made = bytearray(content)
    for _ in range(times or rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(made) + 1)
        end = min(len(made), place + rng.choice((1, 2, 4, 8, 100, 5000)))
        kind = rng.randrange(8)
        if kind < 3 and place < len(made):
            made[place] ^= 1 << rng.randrange(8)
        elif kind == 3 and place < len(made):
            made[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 4:
            del made[place : len(made) if rng.random() < 0.5 else end]
        elif kind == 5:
            made[place:place] = made[place:end]
        elif kind == 6:
            made[place:end] = rng.randbytes(end - place)
        else:
            word = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            piece = struct.pack(rng.choice(("<Q", ">Q")), word)
            made[place : place + 4] = piece[: rng.choice((4, 8))]
    return bytes(made)


def prototxt(rng, text):
    """Return a .prototxt with lines moved, doubled or gone, words and numbers replaced, or bytes changed."""
    if rng.random() < 0.15:
        return octets(rng, text.encode())
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind == 0:
            del lines[at : at + rng.choice((1, 1, 3, 20))]
        elif kind == 1:
            lines[at:at] = lines[other : other + rng.choice((1, 3, 20))]
        elif kind == 2:
            lines[at] = lines[other]
        elif kind == 3:
            lines[at] = re.sub(r"[-+.\w]+\s*$", lambda _: str(rng.choice(NUMBERS))[:400], lines[at])
        elif kind == 4:
            lines[at] = re.sub(r'"[^"]*"', lambda _: '"' + rng.choice(TEXTS) + '"', lines[at])
        elif kind == 5:
            lines[at] = re.sub(r"\w+", lambda _: rng.choice(re.findall(r"\w+", text)), lines[at], count=1)
        elif kind == 6:
            lines[at] += rng.choice(("{", "}", "[", "]", '"', "#", ":", "<", ">", "{" * 3000, "x" * 5000, "\x00"))
        else:
            lines.insert(at, rng.choice(("layer {", "}", "param { lr_mult: 1e400 }", "include { phase: TEST }")))
        lines = lines or [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# TOML and JSON


def toml(made):
    """Return a tree as TOML, sections first; what TOML cannot hold becomes text."""
    lines = []
    for section, values in made.items():
        if isinstance(values, dict):
            lines.append(f"[{_key(section)}]")
            lines += [f"{_key(key)} = {_toml(inner)}" for key, inner in values.items()]
        else:
            lines.insert(0, f"{_key(section)} = {_toml(values)}")
    return "\n".join(lines) + "\n"


def _key(key):
    return key if re.fullmatch(r"\w+", key, re.ASCII) else json.dumps(key)


def _toml(inner):
    if isinstance(inner, list):
        return f"[{', '.join(map(_toml, inner))}]"
    if isinstance(inner, dict):
        return "{" + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in inner.items()) + "}"
    if isinstance(inner, float):
        return repr(inner)
    return json.dumps("none" if inner is None else inner, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_file(rng, original):
    """Return the bytes of a TOML file near a valid tree: mostly changed as a tree, else as text."""
    kind = rng.randrange(10)
    text = toml(tree(rng, original) if kind < 7 else original)
    lines = text.splitlines(keepends=True)
    if kind == 7:
        line = rng.choice(lines)
        lines.insert(rng.randrange(len(lines)), line)  # a key or a section twice
        text = "".join(lines)
    elif kind == 8:
        odd = (
            "a" * 100_000 + " = 1",
            "x = " + "[" * rng.choice((50, 5000)), "x = " + "{a=" * 2000, "[[model]]", "[model.data]",
            "model.name.x = 1", "x = 1979-05-27T07:32:00Z", "x = 07:32:00", "x = 0x" + "f" * 5000,
            "x = " + "9" * 5000, 'x = """',
            "[" + "a." * 5000 + "a]", "x = '\ufeff'", "\ufeff", "x = \x00", "a" + ".a" * 900 + " = 1",
            "x = 1e999999", "[a]\n" * 2,
        )  # fmt: skip
        lines.insert(rng.randrange(len(lines)), rng.choice(odd) + "\n")
        text = "".join(lines)
    content = text.encode("utf-8", "surrogatepass")
    if kind == 9:
        content = octets(rng, content)
        content = content if rng.random() < 0.2 else content.decode("utf-8", "replace").encode()
    return content


def override(rng, original):
    """Return one "section.key=value" near a valid one."""
    section, key = rng.choice([(s, k) for s, values in original.items() for k in values])
    name = f"{section}.{key}" if rng.random() < 0.9 else f"{rng.choice(KEYS)}.{rng.choice(KEYS)}"
    made = near(rng, original[section][key])
    text = f"{name}={_toml(made) if rng.random() < 0.8 else made}"
    text = (
        text if rng.random() < 0.95 else octets(rng, text.encode("utf-8", "replace")).decode("utf-8", "surrogateescape")
    )
    return text.replace("\x00", "" if rng.random() < 0.5 else "\x00")


def json_text(rng, made):
    """Return a tree as JSON: now and then with a key twice, or nested deeply."""
    text = json.dumps(made)
    kind = rng.randrange(12)
    if kind == 0 and isinstance(made, dict):
        return (
            text[:-1]
            + (", " if made else "")
            + json.dumps(rng.choice([*made, "x"]))
            + ": "
            + json.dumps(value(rng))
            + "}"
        )
    if kind == 1:
        return text.replace(
            rng.choice(("1", "0", "true", '"')), rng.choice(("1e999", "[" * 3000, "9" * 5000, "NaN", "")), 1
        )
    return text


# Checkpoints

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "U16": 2,
         "U32": 4, "U64": 8,
         "BOOL": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "C64": 8, "F4": 1, "X": 1}  # fmt: skip


def parts(content):
    """Return (header, {tensor: bytes}) of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    return header, {name: body[slice(*t["data_offsets"])] for name, t in header.items() if name != "__metadata__"}


def joined(header, tensors):
    """Return the bytes of a safetensors file, offsets in order, with the checksum that belongs to it."""
    header, place = copy.deepcopy(header), 0
    for name, raw in tensors.items():
        if isinstance(header.get(name), dict):
            header[name]["data_offsets"] = [place, place + len(raw)]
        place += len(raw)
    return sealed(header, b"".join(tensors.values()))


def sealed(header, body):
    """Return header and body as a file whose checksum is right, as far as there is one."""
    meta = header.get("__metadata__")
    if isinstance(meta, dict) and "sha256" in meta:
        meta["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + body
    blank = b'"sha256":"' + b"0" * 64
    return content.replace(blank, b'"sha256":"' + hashlib.sha256(content).hexdigest().encode(), 1)


def about(rng, content, change):
    """Return a checkpoint whose metadata is change(rng, metadata), a tree or JSON."""
    header, tensors = parts(content)
    made = change(rng, json.loads(header["__metadata__"]["gpunet"]))
    header["__metadata__"]["gpunet"] = made if isinstance(made, str) else json.dumps(made)
    return joined(header, tensors)


def about_tree(rng, content):
    """Return a checkpoint whose metadata is another tree."""
    return about(rng, content, lambda rng, found: json_text(rng, tree(rng, found)))


def about_config(rng, content):
    """Return a checkpoint that says it was trained by another recipe."""
    import tomllib

    def change(rng, found):
        table = tomllib.loads(found["config"])
        found["config"] = toml_file(rng, table).decode("utf-8", "replace")
        return found

    return about(rng, content, change)


def tensors(rng, content):
    """Return a checkpoint with tensors of other names, shapes, types or values, or fewer or more of them."""
    header, raws = parts(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice(sorted(raws)) if raws else None
        if name is None or name not in header:
            break
        kind, entry = rng.randrange(9), header[name]
        if kind == 0:
            del header[name], raws[name]
        elif kind == 1:
            other = rng.choice(
                (name + "x", "weights/", "weights", "", "optimizer/", "optimizer//", "input/mean", "input/x", "a/b\x00")
            )
            header[other], raws[other] = header.pop(name), raws.pop(name)
        elif kind == 2:
            kinds = [k for k, size in SIZES.items() if size == SIZES[entry["dtype"]]]
            entry["dtype"] = rng.choice(kinds)
        elif kind == 3:  # the same shape of another type
            entry["dtype"] = rng.choice(sorted(SIZES))
            raws[name] = rng.randbytes(SIZES[entry["dtype"]] * math.prod(entry["shape"]))
        elif kind == 4:
            size = math.prod(entry["shape"])
            entry["shape"] = rng.choice(([size], [1, size], [size, 1, 1], entry["shape"][::-1], [*entry["shape"], 1]))
        elif kind == 5:
            values = (math.nan, math.inf, 1e308, -1e308, 1e38, 0.0, 1e-320)
            raw = np.full(max(1, len(raws[name]) // 8 + 1), rng.choice(values)).tobytes()
            raws[name] = raw[: len(raws[name])]
        elif kind == 6:
            raws[name] = octets(rng, raws[name])[: len(raws[name])].ljust(len(raws[name]), b"\xff")
        elif kind == 7:
            entry["shape"], raws[name] = rng.choice(([0], [2, 0, 3])), b""
        else:
            header["weights/more"] = {"dtype": "F32", "shape": [3]}
            raws["weights/more"] = b"\0" * 12
    return joined(header, raws)


def header_lies(rng, content):
    """Return a file whose header does not fit it: its tree, its offsets, its length."""
    header, raws = parts(content)
    body, kind = b"".join(raws.values()), rng.randrange(6)
    if kind == 0:
        return sealed(tree(rng, header), body)
    if kind == 1:
        entry = header[rng.choice(sorted(raws))]
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([start + 4, end + 4], [0, end - start], [end, start], [start, 2**63], [-1, 3], [start])
        )
        return sealed(header, body)
    if kind == 2:
        entry = header[rng.choice(sorted(raws))]
        entry["shape"] = rng.choice(([2**62, 4], [-1], [2**40] * 2, [0] * 70, [1] * 70, ["x"], [1.5], None, 3))
        return sealed(header, body)
    if kind == 3:
        return (
            struct.pack("<Q", rng.choice((0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, len(content), len(content) - 8)))
            + content[8:]
        )
    if kind == 4:
        text = rng.choice(
            (b"{}", b"[]", b"null", b"[" * 50_000, b'{"__metadata__":{}}', b'{"__metadata__":null}', b'{"a":' * 5000)
        )
        return struct.pack("<Q", len(text)) + text + body
    header["__metadata__"] = rng.choice(
        ({}, [], None, "x", {"gpunet": "{}"}, {"gpunet": 3}, {"sha256": "0" * 64}, tree(rng, header["__metadata__"]))
    )
    return sealed(header, body)


def checkpoint(rng, content):
    """Return the bytes of a file near a checkpoint, mostly with a checksum that is right."""
    kind = rng.randrange(10)
    if kind < 3:
        return about_tree(rng, content)
    if kind < 5:
        return about_config(rng, content)
    if kind < 7:
        return tensors(rng, content)
    if kind == 7:
        return header_lies(rng, content)
    if kind == 8:
        return octets(rng, content)
    return rng.choice(
        (
            b"",
            b"\0" * 8,
            pickle.dumps(Call(os.system, "touch ran")),
            torch_zip(),
            rng.randbytes(100),
            tensors(rng, about_tree(rng, content)),
        )
    )


# Pickles and archives


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def torch_zip():
    """Return the bytes of a zip file as torch.save writes it, whose pickle would make the file `ran`."""
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr(
            zipfile.ZipInfo("archive/data.pkl"), pickle.dumps({"state": Call(os.system, "touch ran")}, protocol=2)
        )
        made.writestr(zipfile.ZipInfo("archive/version"), "3\n")
    return stream.getvalue()


def pickled(rng, content):
    """Return a pickle near that of a dict of arrays, lists and texts: its tree, its operations or its bytes changed."""
    made, kind = dict(content), rng.randrange(8)
    key = rng.choice(sorted(made))
    if kind == 0:
        made[key] = value(rng)
    elif kind == 1:
        array = np.asarray(made["data"])
        made["data"] = rng.choice((
            array[1:], array.T, array.reshape(-1),
            array.astype(rng.choice(("i8", ">f4", "?", "c16", "O", "S3", "U2", "M8[s]", "f2"))),
            np.asfortranarray(array), array[:0], np.array(3), array.tolist(), array.view(np.recarray), np.float64(3),
        ))  # fmt: skip
    elif kind == 2:
        labels = list(made["labels"])
        labels[rng.randrange(len(labels))] = value(rng)
        made["labels"] = rng.choice((labels, tuple(labels), labels[1:], labels * 2, {0: 1}))
    elif kind == 3:
        made[rng.choice((key.encode(), 3, None, (1, 2), "é", "", b"\xff"))] = made.pop(key)
    elif kind == 4:
        made[key] = Call(
            *rng.choice(
                (
                    (os.system, "touch ran"),
                    (eval, "1"),
                    (print, "ran"),
                    (bytearray, 10**10),
                    (np.zeros, 10**10),
                    (list, "x" * 1000),
                )
            )
        )
    raw = pickle.dumps(made, protocol=rng.choice((0, 1, 2, 2, 2, 3, 4, 5)))
    if kind == 5:
        return octets(rng, raw)
    if kind == 6:
        odd = (
            b"cos\nsystem\n", b"\x8a\xff", b"\x8b\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"X\xff\xff\xff\x7f",
            b"0", b"2" * 1000,
            b"(" * 5000, b"]" * 5000, b"\x85" * 20000, b"R", b"b", b"Q", b"\x82\x01", b"\x93", b"\x94", b"\x97",
            b"\x98", b"\x81", b"i", b"o",
            b"I" + b"9" * 5000 + b"\n", b"F1e999\n", b"V\\ud800\n", b"S'\n", b"h\x00", b"j\xff\xff\xff\x00",
            b"cbuiltins\neval\n",
        )  # fmt: skip
        place = rng.choice((2, rng.randrange(2, min(len(raw), 300)), len(raw) - 1))
        return raw[:place] + rng.choice(odd) + raw[place:]
    return raw if kind < 7 else raw[: rng.randrange(len(raw))]


def archive(rng, files, folder):
    """Return the bytes of a .tar.gz of files in a folder, with members that should not be there."""
    stream = io.BytesIO()
    members = [(f"{folder}/{name}", content) for name, content in files.items()]
    with tarfile.open(
        fileobj=stream, mode="w", format=rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    ) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            if rng.random() < 0.2:
                _odd_member(rng, tar, folder)
    raw = stream.getvalue()
    kind = rng.randrange(8)
    if kind == 0:
        raw = bytearray(raw)  # a field of a header, its checksum made right
        start = rng.choice([i for i in range(0, len(raw), 512) if raw[i + 257 : i + 262] == b"ustar"])
        field, width = rng.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155)))
        raw[start + field : start + field + width] = octets(rng, raw[start + field : start + field + width])[
            :width
        ].ljust(width, b"\xff")
        raw[start + 148 : start + 156] = b" " * 8
        raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + 512])
        raw = bytes(raw)
    elif kind == 1:
        raw = octets(rng, raw)
    elif kind == 2:
        raw = raw[: rng.randrange(len(raw))]
    packed = gzip.compress(raw, 1, mtime=0)
    if kind == 3:
        packed = octets(rng, packed)
    return (
        packed if kind != 4 else rng.choice((raw, b"", packed[: rng.randrange(len(packed))], packed * 2, b"\x1f\x8b"))
    )


def _odd_member(rng, tar, folder):
    """Add a member of a kind that an archive of pictures has no use for."""
    names = (
        "../../up",
        "/dev/shm/gpunet-fuzz/abs",
        f"{folder}/../../up",
        folder,
        "",
        ".",
        "a" * 120,
        f"{folder}/{'b/' * 60}c",
        "é\udc80",
        f"{folder}/test_batch",
    )
    member = tarfile.TarInfo(rng.choice(names))
    kinds = (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        tarfile.CONTTYPE,
        b"Z",
    )
    member.type = rng.choice(kinds)
    member.linkname = rng.choice(("../../../up", "/etc/passwd", f"{folder}/test_batch", "", folder, member.name))
    member.mode, member.uid, member.mtime = rng.choice((0o777, 0o4755, 0)), rng.choice((0, 2**20)), rng.choice((0, 1e9))
    if rng.random() < 0.3:
        member.type, member.pax_headers = (
            tarfile.REGTYPE,
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**12)},
        )
    with contextlib.suppress(ValueError):  # of what the format cannot hold
        tar.addfile(member)


# Pictures


def picture(rng, seeds):
    """Return the bytes of a picture file near one of the seeds {name: bytes}."""
    content = seeds[rng.choice(sorted(seeds))]
    kind = rng.randrange(6)
    if kind == 0:
        return content[: rng.randrange(len(content) + 1)]
    if content.startswith(b"\x89PNG") and kind < 4:
        return _png(rng, content)
    if kind == 5:
        return content + octets(rng, content)
    return octets(rng, content)


def _png(rng, content):
    """Change a chunk of a PNG and make its checksum right."""
    chunks, place = [], 8
    while place + 8 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append([content[place + 4 : place + 8], content[place + 8 : place + 8 + length]])
        place += 12 + length
    for _ in range(rng.choice((1, 1, 2))):
        chunk, kind = rng.choice(chunks), rng.randrange(6)
        if kind < 2 and chunks[0][0] == b"IHDR" and len(chunks[0][1]) == 13:
            sides = (0, 1, 5, 7999, 8000, 8001, 65535, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
            wide, high = rng.choice(sides), rng.choice(sides)
            depth, colour, lace = rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 1)), rng.choice((0, 1, 2))
            chunks[0][1] = struct.pack(">IIBBBBB", wide, high, depth, colour, 0, 0, lace)
        elif kind == 2:
            chunk[1] = octets(rng, chunk[1])
        elif kind == 3:
            chunks.insert(rng.randrange(len(chunks) + 1), [*chunk])
        elif kind == 4:
            bomb = zlib.compress(b"\0" * rng.choice((10**6, 10**7)), 9)
            extra = ([b"zTXt", b"a\0\0" + bomb], [b"iCCP", b"a\0\0" + bomb], [b"iTXt", b"a\0\1\0\0\0" + bomb],
                     [b"tRNS", b"\0" * 300],
                     [b"acTL", struct.pack(">II", 2**31, 0)], [b"eXIf", rng.randbytes(40)],
                     [b"fdAT", b"\0" * 8], [b"IDAT", bomb])  # fmt: skip
            chunks.insert(rng.randrange(1, len(chunks) + 1), rng.choice(extra))
        elif len(chunks) > 1:
            chunks.remove(chunk)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
