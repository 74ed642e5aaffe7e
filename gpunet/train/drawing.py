"""The network as an SVG: boxes from top to bottom in call order, frames for blocks. Needs no other program.

A box reads the one above it unless there is no arrow between them; all other edges run beside the boxes, each in a lane
of its own as long as others run there, so that no edge crosses a box.
"""

import re
from html import escape
from pathlib import Path

from gpunet.errors import GpunetError
from gpunet.train.checkpoint import write_whole
from gpunet.train.text import quantity

BOX, GAP = 26, 16  # height of a box, and room for an arrow
HEAD, FOOT, INSET = 20, 8, 10  # of a frame: room for its title, below its last box, and on its sides
LANE, MARGIN, TOP = 16, 16, 92
LETTER = 7.6  # pixels: an upper bound on the mean width of a letter
LONGEST = 28  # letters of a name; its tooltip has all of it
FILLS = {"with weights": "#DCE9F5", "several inputs": "#FBE3CF", "other": "#FFFFFF"}
STYLE = """
text { font: 12px "DejaVu Sans", Verdana, Helvetica, Arial, sans-serif; fill: #222222 }
.title { font-size: 16px; font-weight: bold } .name { font-weight: bold } .number { text-anchor: end }
.note, .frame-title { fill: #555555 } .frame-title { font-size: 11px }
.frame { fill: none; stroke: #AAAAAA; stroke-dasharray: 4 3 } .box { stroke: #555555 }
.edge { fill: none; stroke: #555555; stroke-width: 1.3 } .side { stroke: #C04E00; stroke-width: 1.6 }
"""
MARKERS = "".join(
    f'<marker id="{name}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
    f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>'
    for name, colour in (("arrow", "#555555"), ("side-arrow", "#C04E00"))
)
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_graph(path, graph, title):
    """Write the drawing of a Graph; GpunetError for a name that does not end in .svg or that cannot be written."""
    if Path(path).suffix.lower() != ".svg":
        raise GpunetError(f"--graph {path}: expected a file that ends in .svg")
    write_whole(Path(path), draw_graph(graph, title).encode())


def draw_graph(graph, title):
    """Return the SVG of a Graph under a title, its weights and FLOPs."""
    nodes, rows = [graph.input, *graph.nodes], graph.summary()
    texts = [("input", "Input", _shape(graph.input_shape), "")]
    texts += [
        (row.path.rpartition(".")[2], row.kind, _shape(row.shape), f"{row.parameters:,}" if row.parameters else "")
        for row in rows
    ]
    tops, frames, bottom = _stack([node.path for node in nodes])
    columns = _columns(texts)
    around = INSET * max(node.path.count(".") for node in nodes)  # what all frames need on a side
    left = MARGIN + around
    right = left + columns[-1]
    side, outer = _side_edges(nodes, tops, right, right + around)
    total = quantity(sum(row.flops for row in rows))
    note = f"{graph.size:,} weights, {total}FLOPs an image forward"
    width = round(max(outer, MARGIN + 1.4 * LETTER * len(title), MARGIN + LETTER * len(note))) + MARGIN
    parts = [_text(MARGIN, 24, title, "title"), _text(MARGIN, 46, note, "note"), *_legend()]
    parts += [_frame(left, right, *frame) for frame in frames]
    parts += [_box(left, top, columns, *row) for top, *row in zip(tops, nodes, texts, strict=True)]
    middle = left + columns[-1] / 2
    parts += [_down(middle, tops[i], tops[i + 1]) for i, node in enumerate(nodes[1:]) if nodes[i] in node.inputs]
    body = "\n".join([*parts, *side])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom}" viewBox="0 0 {width} {bottom}">\n'
        f'<style>{STYLE}</style>\n<defs>{MARKERS}</defs>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _shape(shape):
    return " x ".join(map(str, shape))


def _stack(paths):
    """Return ([the top of each box], [(name, depth, top, bottom) of each frame], the picture's height).

    A frame holds boxes that follow one another and whose paths begin alike.
    """
    tops, frames, opened, y = [], [], [], TOP
    for path in [*paths, ""]:
        scopes, common = path.split(".")[:-1], 0
        while common < min(len(scopes), len(opened)) and scopes[common] == opened[common][0]:
            common += 1
        while len(opened) > common:
            name = ".".join(scope for scope, _ in opened)
            _, top = opened.pop()
            y += FOOT
            frames.append((name, len(opened), top, y - GAP))
        for scope in scopes[common:]:
            opened.append((scope, y))
            y += HEAD
        if path:
            tops.append(y)
            y += BOX + GAP
    return tops, frames, y - GAP + MARGIN


def _columns(texts):
    """Return, from a box's left side: where name and kind begin, where output and weights end, and the box's width."""
    longest = [LETTER * max(min(len(text), LONGEST) for text in column) for column in zip(*texts, strict=True)]
    name, kind, shape, weights = longest
    begin = 10 + 1.12 * name + 12  # names are bold
    end = begin + kind + 12 + shape
    return 10, begin, end, end + 12 + weights, end + 12 + weights + 10


def _side_edges(nodes, tops, right, outer):
    """Return ([the edges that skip boxes], where the last lane is): right of `outer`, short ones in inner lanes."""
    number = {node: i for i, node in enumerate(nodes)}
    edges = [(number[source], i) for i, node in enumerate(nodes) for source in dict.fromkeys(node.inputs)]
    edges = sorted((edge for edge in edges if edge[1] - edge[0] > 1), key=lambda edge: (edge[1] - edge[0], edge))
    lanes, parts, into = [], [], dict.fromkeys(range(len(nodes)), 0)
    for start, end in edges:
        free = (i for i, lane in enumerate(lanes) if all(end < a or b < start for a, b in lane))
        place = next(free, len(lanes))
        if place == len(lanes):
            lanes.append([])
        lanes[place].append((start, end))
        x, top, bottom = outer + (place + 1) * LANE, tops[start] + 0.7 * BOX, tops[end] + 8 - 4 * into[end]
        into[end] += 1
        parts.append(
            f'<path class="edge side" marker-end="url(#side-arrow)" d="M{right:.1f} {top:.1f} H{x - 6:.1f} '
            f'q6 0 6 6 V{bottom - 6:.1f} q0 6 -6 6 H{right:.1f}"/>'
        )
    return parts, outer + LANE * len(lanes)


def _down(x, top, below):
    return f'<path class="edge" marker-end="url(#arrow)" d="M{x:.1f} {top + BOX} V{below}"/>'


def _box(left, top, columns, node, texts):
    """Draw a node; its tooltip has the path."""
    name, kind, end, weights, width = (left + x for x in columns)
    fill = FILLS["with weights" if texts[3] else "several inputs" if len(node.inputs) > 1 else "other"]
    middle = top + BOX / 2
    return "\n".join(
        [
            f"<g><title>{_escape(', '.join(filter(None, (node.path, *texts[1:]))))}</title>",
            f'<rect class="box" x="{left}" y="{top}" width="{width - left:.1f}" height="{BOX}" rx="4" fill="{fill}"/>',
            _text(name, middle, _cut(texts[0]), "name"),
            _text(kind, middle, _cut(texts[1]), "kind"),
            _text(end, middle, texts[2], "number"),
            *([_text(weights, middle, texts[3], "number")] if texts[3] else []),
            "</g>",
        ]
    )


def _frame(left, right, name, depth, top, bottom):
    """Draw a frame; those inside others are narrower."""
    inset = left - MARGIN - INSET * depth
    x, width = left - inset, right - left + 2 * inset
    title = _text(x + 8, top + HEAD / 2, _cut(name), "frame-title")
    return (
        f'<rect class="frame" x="{x}" y="{top}" width="{width:.1f}" height="{bottom - top}" rx="6"/>'
        f"<g><title>{_escape(name)}</title>{title}</g>"
    )


def _legend():
    """Draw what the fills mean, under the header."""
    x, parts = MARGIN, []
    for name, fill in FILLS.items():
        parts.append(f'<rect class="box" x="{x}" y="60" width="14" height="14" rx="3" fill="{fill}"/>')
        parts.append(_text(x + 20, 67, name, "note"))
        x += round(20 + LETTER * len(name) + 16)
    return parts


def _text(x, y, text, kind):
    """Write a text whose small letters are centred on y; dominant-baseline is not understood alike everywhere."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y + 4:.1f}">{_escape(text)}</text>'


def _cut(text):
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _escape(text):
    """Return a text as XML has it, without characters that XML cannot have."""
    return escape(NO_XML.sub("�", text))
