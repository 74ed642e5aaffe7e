"""The SVG of a network: well formed, complete, and nothing in it crosses a box."""

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpunet.errors import GpunetError
from gpunet.models import MODELS, build
from gpunet.nn import Add, Block, Conv2d, GlobalAvgPool, Graph, Input, Linear, ReLU, Sequential
from gpunet.train.drawing import draw_graph, write_graph

SVG = "{http://www.w3.org/2000/svg}"


class Picture:
    """What a drawing holds: boxes [(left, top, right, bottom, title, texts)], frames, and edges as lists of points."""

    def __init__(self, svg):
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg"
        self.width, self.height = float(root.get("width")), float(root.get("height"))
        self.boxes, self.frames, self.edges, self.sides = [], [], [], []
        for group in root.iter(f"{SVG}g"):
            texts = [text.text for text in group.iter(f"{SVG}text")]
            for rect in group.findall(f"{SVG}rect"):
                self.boxes.append((*_corners(rect), group.find(f"{SVG}title").text, texts))
        for rect in root.findall(f"{SVG}rect"):
            if rect.get("class") == "frame":
                self.frames.append(_corners(rect))
        for path in root.findall(f"{SVG}path"):
            self.sides.append("side" in path.get("class"))
            self.edges.append(_points(path.get("d")))
        self.texts = list(root.iter(f"{SVG}text"))

    def ends(self):
        """Return {(title of the box that an edge leaves, of the one that it reaches)}."""
        found = set()
        for points in self.edges:
            pair = []
            for x, y in (points[0], points[-1]):
                (hit,) = (b[4] for b in self.boxes if b[0] <= x <= b[2] + 0.1 and b[1] <= y <= b[3])
                pair.append(hit.split(", ")[0])
            found.add(tuple(pair))
        return found


def _corners(rect):
    x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def _points(d):
    """Return the corners of a path of M, H, V and q."""
    points, (x, y) = [], (0.0, 0.0)
    for command, numbers in re.findall(r"([MHVq])([-\d. ]+)", d):
        values = [float(number) for number in numbers.split()]
        if command == "M":
            x, y = values
        elif command == "H":
            (x,) = values
        elif command == "V":
            (y,) = values
        else:
            x, y = x + values[2], y + values[3]
        points.append((x, y))
    return points


def crosses(box, a, b):
    """Whether the straight line from a to b, along an axis, runs through a box's inside."""
    (left, right), (top, bottom) = sorted((a[0], b[0])), sorted((a[1], b[1]))
    return left < box[2] - 0.5 and right > box[0] + 0.5 and top < box[3] - 0.5 and bottom > box[1] + 0.5


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_drawn_whole(name):
    graph = build(name, **({"layers": [{"layer": "Linear"}]} if name == "layers" else {}))
    picture = Picture(draw_graph(graph, name))
    rows = graph.summary()
    assert [box[4] for box in picture.boxes[1:]] == [
        ", ".join(
            [row.path, row.kind, " x ".join(map(str, row.shape)), *([f"{row.parameters:,}"] if row.parameters else [])]
        )
        for row in rows
    ]
    tops = [box[1] for box in picture.boxes]
    assert tops == sorted(tops) and all(a[3] < b[1] for a, b in pairwise(picture.boxes))
    assert picture.ends() == {(source.path, node.path) for node in graph.nodes for source in node.inputs}
    for points in picture.edges:
        for a, b in pairwise(points):
            assert not any(crosses(box, a, b) for box in picture.boxes), points
    assert max(x for points in picture.edges for x, _ in points) < picture.width
    assert picture.boxes[-1][3] < picture.height
    scopes = {tuple(row.path.split(".")[:i]) for row in rows for i in range(1, len(row.path.split(".")))}
    assert len(picture.frames) == len(scopes)


def test_edges_that_run_at_one_height_have_lanes_of_their_own():
    picture = Picture(draw_graph(build("resnet20"), ""))
    sides = [points for points, side in zip(picture.edges, picture.sides, strict=True) if side]
    assert len(sides) == 11  # nine blocks, and in two of them the body's end beside the projection
    spans = [(max(x for x, _ in points), points[0][1], points[-1][1]) for points in sides]
    for i, (x, top, bottom) in enumerate(spans):
        for other, top2, bottom2 in spans[:i]:
            assert x != other or bottom < top2 or bottom2 < top


def test_frames_hold_their_boxes_and_no_others():
    picture = Picture(draw_graph(build("resnet9"), ""))
    for left, top, right, bottom in picture.frames:
        for box in picture.boxes:
            inside = top < box[1] and box[3] < bottom
            outside = box[3] < top or bottom < box[1]
            assert inside or outside
            assert not inside or (left < box[0] and box[2] < right)
    for i, a in enumerate(picture.frames):
        for b in picture.frames[:i]:
            apart = a[3] < b[1] or b[3] < a[1]
            nested = (a[1] > b[1] and a[3] < b[3] and a[0] > b[0]) or (b[1] > a[1] and b[3] < a[3] and b[0] > a[0])
            assert apart or nested


def test_texts_fit_into_their_boxes_side_by_side():
    """A letter of 12 pixels is at most 7.6 wide on average, 8.5 if bold, in the widest of the fonts that are named."""
    for name in ("resnet20", "vgg", "mlp"):
        root = ElementTree.fromstring(draw_graph(build(name), ""))
        for group in root.iter(f"{SVG}g"):
            rect, spans = group.find(f"{SVG}rect"), []
            for text in group.iter(f"{SVG}text"):
                width = len(text.text) * (8.5 if text.get("class") == "name" else 7.6)
                x = float(text.get("x"))
                spans.append((x - width, x) if text.get("class") == "number" else (x, x + width))
            if rect is not None:
                left, _, right, _ = _corners(rect)
                assert left < spans[0][0] and spans[-1][1] < right
                assert all(a[1] < b[0] + 1 for a, b in pairwise(spans)), name


class Branches(Block):
    """Three branches from one value, one of which is the value itself, and a sum of all."""

    def connect(self, x):
        a = Conv2d(4, 1, name="<a&b>")(x)
        b = Conv2d(4, 1, name='quo"te\x07\ud800')(x)
        return Add(name="sum")(ReLU(name="deep")(a), b, x)


def hostile():
    image = Input((8, 8, 4))
    x = Sequential(Branches(name="]]> <script>"), name="scope-of-a-name-that-is-much-too-long-to-be-shown")(image)
    return Graph(image, Linear(3, name="kopf äöü 頭")(GlobalAvgPool(name="pool")(x)))


def test_any_name_is_escaped():
    svg = draw_graph(hostile(), "<svg onload=1> & more")
    svg.encode()
    picture = Picture(svg)
    shown = [text for box in picture.boxes for text in box[5]]
    assert "<a&b>" in shown and 'quo"te\ufffd\ufffd' in shown and "kopf äöü 頭" in shown
    assert "<script" not in svg and "<svg onload" not in svg
    assert all(len(text.text) < 60 for text in picture.texts)
    assert "sum" in shown and len(picture.boxes) == 7
    # into the sum: three edges that arrive apart
    arrivals = [points[-1] for points in picture.edges if abs(points[-1][1] - picture.boxes[4][1]) < 26]
    assert len(set(arrivals)) == len(arrivals) == 3


def test_a_file_is_written_and_mistakes_are_told(tmp_path):
    graph = build("lenet")
    write_graph(tmp_path / "net.SVG", graph, "lenet")
    assert Picture((tmp_path / "net.SVG").read_text(encoding="utf-8")).boxes
    with pytest.raises(GpunetError, match=r"--graph .*net.png: expected a file that ends in .svg"):
        write_graph(tmp_path / "net.png", graph, "lenet")
    with pytest.raises(GpunetError, match=r"net.svg: cannot be written"):
        write_graph(tmp_path / "no" / "net.svg", graph, "lenet")


def test_the_command(tmp_path, gpunet):
    code, out, _ = gpunet("summary", "cifar10_resnet9", "--graph", tmp_path / "net.svg")
    assert code == 0
    assert str(tmp_path / "net.svg") in out
    text = Path(tmp_path / "net.svg").read_text(encoding="utf-8")
    assert "resnet9, from cifar10_resnet9" in text and "MFLOPs an image forward" in text
