"""Looking at data: the contact sheet of a split, and a report of what a folder holds and what is wrong with it."""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gpunet.data import cifar
from gpunet.data.folder import list_pictures
from gpunet.data.picture import open_image
from gpunet.errors import GpunetError

GAP = 2  # pixels between pictures


def contact_sheet(split, classes, columns=12):
    """Return a Pillow image: a row a class under its name with its first pictures; without classes, plain rows.

    Small pictures are enlarged to about 64 pixels; float pixels are shown from their lowest to their highest value.
    """
    if split.labels is None:
        rows = [range(start, min(start + columns, len(split))) for start in range(0, len(split), columns)][:10]
        names = [""] * len(rows)
    else:
        rows = [np.flatnonzero(split.labels == i)[:columns] for i in range(len(classes))]
        names = [f"{name} ({np.count_nonzero(split.labels == i):,})" for i, name in enumerate(classes)]
    return _rows(names, [_visible(split.images[index]) for index in rows], columns)


def preprocess_sheet(images, preprocess, mean, scale, average, columns=12):
    """Return a Pillow image of what becomes of the first images (n, h, w, c): a row for each stage under its name.

    Stages: the images, each of a Preprocess, and (x - mean) * scale, what the network takes. Below: `average`, the mean
    image of the training images, and the leading eigenvectors. Each row is shown from its 1st to its 99th percentile,
    each eigenvector from its own lowest to its highest value.
    """
    x, stages = images[:columns], [("images", images[:columns])]
    for stage, name in ((preprocess.gcn, "gcn"), (preprocess.whitening, getattr(preprocess.whitening, "kind", ""))):
        if stage is not None:
            x = stage(x)
            stages.append((name, x))
    stages.append(("network's input", (x - mean) * scale))
    rows = [(name, _visible(_stretched(x))) for name, x in stages] + [
        ("mean image", _visible(_stretched(average[None])))
    ]
    if (whitening := preprocess.whitening) is not None:
        vectors = whitening.components[:, : 2 * columns].T.reshape(-1, *images.shape[1:])
        pictures = np.concatenate([_visible(vector[None]) for vector in vectors])
        for first in range(0, len(pictures), columns):
            some = pictures[first : first + columns]
            rows.append((f"eigenvectors {first + 1} to {first + len(some)}", some))
    names, pictures = zip(*rows, strict=True)
    return _rows(names, pictures, columns)


def _stretched(images):
    """Return float images cut off at their 1st and 99th percentile; pixels as they are."""
    return images if images.dtype == np.uint8 else images.clip(*np.percentile(images, (1, 99)))


def _rows(names, rows, columns):
    """Return a Pillow image of rows of pictures, uint8 (n, h, w, 3), each row under its name on the left."""
    height, width = next(pictures.shape[1:3] for pictures in rows)
    zoom = max(1, 64 // max(height, width))
    height, width = height * zoom, width * zoom
    font = ImageFont.load_default(14)
    margin = 5 * GAP + max(int(font.getlength(name)) for name in names)
    line = max(height, 18) + GAP
    sheet = Image.new("RGB", (margin + columns * (width + GAP), len(rows) * line + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (pictures, name) in enumerate(zip(rows, names, strict=True)):
        top = GAP + row * line
        pen.text((GAP, top + height // 2), name, fill="black", font=font, anchor="lm")
        for column, pixels in enumerate(pictures):
            picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + column * (width + GAP), top))
    return sheet


def captioned_sheet(images, captions, columns=6, side=144):
    """Return a Pillow image of pictures (n, h, w, c) that fit into `side` pixels, each over the lines of its caption.

    Small pictures are enlarged by a whole number, so that their pixels stay seen; lines that are too long are cut.
    """
    longest = max(images.shape[1:3])
    factor = side // longest if longest <= side else side / longest
    height, width = (max(1, round(size * factor)) for size in images.shape[1:3])
    font, line, gap = ImageFont.load_default(12), 15, 10
    columns, cell = min(columns, len(images)), max(width, side)
    step = height + line * max(map(len, captions)) + gap
    sheet = Image.new("RGB", (gap + columns * (cell + gap), gap + -(-len(images) // columns) * step), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (pixels, caption) in enumerate(zip(_visible(images), captions, strict=True)):
        left, top = gap + i % columns * (cell + gap), gap + i // columns * step
        method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(pixels).resize((width, height), method), (left, top))
        for number, text in enumerate(caption):
            colour = "black" if number == 0 else "#444444"
            pen.text((left, top + height + 2 + number * line), _cut(text, font, cell), fill=colour, font=font)
    return sheet


def rows_sheet(rows, captions, heads, limits=(0, 255), side=72):
    """Return a Pillow image of rows of pictures (n, h, w, c) beside the lines of their captions, under `heads`.

    limits: the pixel values that are black and white.
    """
    low, high = limits
    height, width = rows[0].shape[1:3]
    factor = max(1, side // max(height, width)) if max(height, width) <= side else side / max(height, width)
    height, width = round(height * factor), round(width * factor)
    font, line, head = ImageFont.load_default(12), 15, 20
    margin = 3 * GAP + round(max(font.getlength(text) for caption in captions for text in caption))
    tops = np.cumsum([head, *(max(height, line * len(caption)) + 3 * GAP for caption in captions)]).tolist()
    sheet = Image.new("RGB", (margin + len(heads) * (width + GAP), tops[-1]), "white")
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(heads):
        pen.text((margin + column * (width + GAP), GAP), _cut(text, font, width), fill="#444444", font=font)
    for row, caption, top in zip(rows, captions, tops, strict=False):
        for i, text in enumerate(caption):
            pen.text((GAP, top + i * line), text, fill="#444444" if i else "black", font=font)
        pixels = ((row - low) * (255 / max(high - low, 1e-12))).clip(0, 255).round().astype(np.uint8)
        for column, picture in enumerate(_visible(pixels)):
            shown = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (margin + column * (width + GAP), top))
    return sheet


def _cut(text, font, width):
    """Return a text, or as much of its beginning as fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _visible(images):
    """Return the images as uint8 (n, h, w, 3); of other than 3 channels the first, in grey."""
    if images.dtype != np.uint8 and images.size:
        low, high = images.min(), images.max()
        images = ((images - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    return images if images.shape[3] == 3 else images[..., :1].repeat(3, axis=3)


@dataclass
class Report:
    """What `check` found: `kind`, the pictures a class of each split, and what is wrong, a line each."""

    kind: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self):
        lines = [self.kind]
        for split, counts in self.counts.items():
            lines.append(f"{split}: {sum(counts.values()):,} pictures in {len(counts)} classes")
            lines += [f"  {name:<20} {count:>7,}" for name, count in counts.items()]
        lines += [f"problem: {problem}" for problem in self.problems] or ["no problem found"]
        return "\n".join(lines)


def check(directory):
    """Return a Report on a folder: CIFAR in either layout, or folders of pictures, all of which are opened."""
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise GpunetError(f"{root}: expected a folder, found {'a file' if root.exists() else 'nothing'}")
    for name, layout in cifar.SETS.items():
        try:
            found = cifar.find(layout, [root])
            if found:
                dataset = cifar.read(name, *found, list(layout.classes)[-1])
                return Report(f"{name} in {found[0]}", {n: _counts(dataset, s) for n, s in dataset.splits.items()})
        except GpunetError as error:
            return Report(f"{name} in {root}", problems=[str(error)])
    return _check_pictures(root)


def _counts(dataset, split):
    return dict(zip(dataset.classes, np.bincount(split.labels, minlength=len(dataset.classes)).tolist(), strict=True))


def _check_pictures(root):
    """Open every picture; note unreadable and unused files and pictures that stand in two splits."""
    report = Report(f"folders of pictures in {root}")
    try:
        classes, listing = list_pictures(root)
    except GpunetError as error:
        report.problems.append(str(error))
        return report
    homes, sizes = defaultdict(set), Counter()
    for split, pictures in listing.items():
        report.counts[split] = dict.fromkeys(classes, 0)
        for path, label in pictures:
            try:
                sizes[open_image(path).size] += 1
                homes[hashlib.sha256(path.read_bytes()).digest()].add((split, path))
                report.counts[split][classes[label]] += 1
            except GpunetError as error:
                report.problems.append(str(error))
        used = {path for path, _ in pictures}
        unused = [p for p in (root / split).rglob("*") if p.is_file() and p not in used and p.name[0] != "."]
        if unused:
            report.problems.append(f"{split}: {len(unused)} files are not used: {', '.join(map(str, unused[:5]))}")
    for places in homes.values():
        if len({split for split, _ in places}) > 1:
            report.problems.append(
                f"the same picture in several splits: {', '.join(sorted(str(p) for _, p in places))}"
            )
    if sizes:
        (width, height), count = sizes.most_common(1)[0]
        report.kind += f", most often {height} x {width} pixels ({count:,} of {sizes.total():,})"
    return report
