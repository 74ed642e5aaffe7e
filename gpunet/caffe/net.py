"""A Caffe net as a list of layers: what its training phase reads, who reads whom, and where its loss is."""

import inspect
import re
from collections import Counter
from dataclasses import dataclass, field

from gpunet.caffe.layers import LAYER, LAYERS, OLD_TYPES, PHASES, WEIGHTED, scale
from gpunet.caffe.prototxt import Field, Message, Word
from gpunet.caffe.schema import FLAG, MESSAGE, TEXT, WHOLE, Values, shortened, shown
from gpunet.models.layers import KINDS

NET = {
    "name": TEXT,
    "layer": [MESSAGE],
    "layers": [MESSAGE],
    "force_backward": FLAG,
    "debug_info": FLAG,
    "input": [TEXT],
    "input_dim": [WHOLE],
    "input_shape": [MESSAGE],
}
SOURCES = {"Data": "data_param", "ImageData": "image_data_param"}
MEASURES = ("Accuracy", "Silence")  # which change nothing
SEVERAL = {"Concat": 1, "Eltwise": 2}  # types that may read more than one blob, and how many they must


@dataclass
class Net:
    """`layers` as model "layers" takes them; the data of the training phase, and how they are prepared."""

    layers: list
    data: dict
    images: dict  # flip, mean and scale
    batch: int
    shuffle: bool
    tests: bool  # whether it has data for the test phase
    notes: list = field(default_factory=list)


def read_net(message):
    """Return the Net that a file describes for training; GpunetError names file, line and layer of what is refused."""
    values = Values(message, NET)
    for name in ("input", "input_dim", "input_shape"):
        if name in values:
            values.fail(f"{name}: expected a net to train, with data layers and a loss, got one to deploy", name)
    found = [f.value for f in message.fields if f.name in ("layer", "layers")]  # in the order of the file
    layers = [_layer(raw, number) for number, raw in enumerate(found, 1)]
    phases = {phase: [layer for layer in layers if _runs(layer, phase)] for phase in PHASES}
    data = _Data(values, phases)
    graph = _Graph()
    for layer in phases["TRAIN"]:
        graph.enter(layer)
    _check_phases(phases)
    entries = graph.finish(values)
    return Net(entries, data.data, data.images, data.batch, data.shuffle, data.tests, data.notes + graph.notes)


def _layer(raw, number):
    """Return the Values of a layer in either form."""
    name = next((f.value for f in raw.fields if f.name == "name" and isinstance(f.value, str)), None)
    owner = f"layer '{shortened(name)}'" if name else f"layer {number}"
    layer = Values(_modern(raw), LAYER, owner)
    if "type" not in layer:
        layer.fail("'type' is missing")
    return layer


def _modern(raw):
    """Return a layer of the first form in the second: types are words there, rates and decays lists of their own."""
    fields, factors = [], {"blobs_lr": [], "weight_decay": []}
    for f in raw.fields:
        if f.name in factors:
            factors[f.name].append(f)
        elif f.name == "type" and isinstance(f.value, Word):
            fields.append(Field("type", OLD_TYPES.get(f.value.name, f.value.name), f.line))
        else:
            fields.append(f)
    for i in range(max(map(len, factors.values()))):
        given = [
            Field(name, found[i].value, found[i].line)
            for name, found in zip(("lr_mult", "decay_mult"), factors.values(), strict=True)
            if i < len(found)
        ]
        fields.append(Field("param", Message(raw.place, given[0].line, given), given[0].line))
    return Message(raw.place, raw.line, fields)


def _runs(layer, phase):
    """Return whether a layer is there in a phase."""
    include, exclude = layer.all("include"), layer.all("exclude")
    if include and exclude:
        layer.fail("expected include or exclude, got both", "exclude")
    if include:
        return any(rule.get("phase", phase) == phase for rule in include)
    return layer.get("phase", phase) == phase and not any(rule.get("phase", phase) == phase for rule in exclude)


def _check_phases(phases):
    """Refuse layers of one phase alone, unless they are what differs between training and testing anyway."""
    harmless = (*SOURCES, *MEASURES, "Softmax", "SoftmaxWithLoss", "Dropout")
    for phase, other in (PHASES, PHASES[::-1]):
        both = set(map(id, phases[other]))
        for layer in phases[phase]:
            if id(layer) not in both and layer.get("type") not in harmless:
                layer.fail(f"expected a layer of both phases, got one of phase {phase} alone")


class _Data:
    """The data layers: which set of gpunet's they stand for, and what is done to its pixels."""

    def __init__(self, net, phases):
        found = {phase: [la for la in layers if la.get("type") in SOURCES] for phase, layers in phases.items()}
        if len(found["TRAIN"]) != 1:
            line = found["TRAIN"][1].line if found["TRAIN"] else None
            net.fail(
                f"expected one layer of type {' or '.join(SOURCES)} in phase TRAIN, got {len(found['TRAIN'])}",
                line=line,
            )
        self.notes, self.tests = [], bool(found["TEST"])
        self._read(found["TRAIN"][0])
        for test in found["TEST"]:
            p = test.inner(SOURCES[test.get("type")])
            if (given := self._prepared(test, p)) != (expected := {**self.images, "flip": given["flip"]}):
                test.fail(f"expected mean and scale of phase TRAIN, {_prepared(expected)}, got {_prepared(given)}")

    def _read(self, layer):
        p = layer.inner(SOURCES[layer.get("type")])
        p.only("rand_skip", 0)
        self.batch, self.shuffle = p.get("batch_size", 0), p.get("shuffle", False)
        if self.batch < 1:
            layer.fail(f"batch_size: expected at least 1, got {p.get('batch_size', 'none')}", "batch_size")
        source = p.get("source", "")
        squeezed = re.sub(r"[-_]", "", source.lower())
        name = "cifar100" if "cifar100" in squeezed else "cifar10" if "cifar" in squeezed else "folder"
        self.data = {"name": name, "validation": 0}
        if name == "folder":
            self._pictures(layer, p)
        self.images = self._prepared(layer, p)
        self.notes.append(f"source {shown(source)}: taken for data set {name}; --data says where that is")
        if self.images["mean"] == "image":
            self.notes.append("mean_file: the mean image of the training set, which is computed and not read")

    def _pictures(self, layer, p):
        """Note the size of the pictures of a folder, which a Caffe database knows and its prototxt does not."""
        if layer.get("type") == "ImageData":
            p.only("is_color", True)
            height, width = p.get("new_height", 0), p.get("new_width", 0)
            if height and width:
                self.data["size"] = [height, width]
        if "size" not in self.data:
            self.notes.append("data.size, which the file does not tell, has to be set: --set data.size=N")

    def _prepared(self, layer, p):
        """Return what a data layer does to its images: flip, mean and scale."""
        t = layer.inner("transform_param") if "transform_param" in layer else p
        size = {"cifar10": 32, "cifar100": 32}.get(self.data["name"], 0)
        t.only("crop_size", 0, size, why="gpunet has no cuts that are smaller than the pictures")
        values = [float(v) for v in t.all("mean_value")]
        if values and "mean_file" in t:
            t.fail("mean_value: expected either it or mean_file", "mean_value")
        if len(values) == 3 and self.data["name"] == "folder":
            values.reverse()  # Caffe's pictures are blue, green, red
        mean = "image" if "mean_file" in t else values if len(values) > 1 else (values or [0.0])[0]
        return {"flip": t.get("mirror", False), "mean": mean, "scale": float(t.get("scale", 1))}


def _prepared(images):
    return f"mean {images['mean']} and scale {images['scale']:g}"


class _Graph:
    """Entries in the making. `blobs` says which entry made each blob last; layers in place write one again."""

    def __init__(self):
        self.entries, self.blobs, self.readers, self.lines = {}, {}, Counter(), {}
        self.label, self.loss, self.notes = set(), None, []

    def enter(self, layer):
        """Add what a layer of the training phase comes to."""
        kind = layer.get("type")
        if kind in SOURCES:
            tops = layer.all("top")
            if not 1 <= len(tops) <= 2:
                layer.fail(f"top: expected those of images and labels, got {len(tops)}", "top")
            self.blobs[tops[0]] = "input"
            self.label.update(tops[1:])
        elif kind == "SoftmaxWithLoss":
            self._end(layer)
        elif kind in MEASURES:
            pass
        elif kind == "Scale":
            self._scale(layer)
        elif kind in LAYERS:
            self._layer(layer, kind)
        else:
            known = ", ".join([*SOURCES, *LAYERS, "Scale", "SoftmaxWithLoss", *MEASURES])
            where = " in phase TRAIN; it is a part of SoftmaxWithLoss" if kind == "Softmax" else ""
            layer.fail(f"unknown type {shown(kind)}{where}; known: {known}", "type")

    def finish(self, net):
        """Return the list of entries; the last one is what the loss reads."""
        if self.loss is None:
            net.fail("expected a layer of type SoftmaxWithLoss, got none")
        for name in self.entries:
            if name != self.loss and not self.readers[name]:
                net.fail(f"layer '{name}': no layer reads it, and it is not what the loss is of", line=self.lines[name])
            if name == self.loss and self.readers[name]:
                net.fail(f"layer '{name}': expected the loss to be all that reads it", line=self.lines[name])
        before, found = "input", []
        for name, entry in self.entries.items():
            inputs = entry.pop("inputs")
            found.append(entry if inputs == [before] else {**entry, "inputs": inputs})
            before = name
        return found

    def _layer(self, layer, kind):
        name, inputs = self._name(layer, kind), self._inputs(layer, kind)
        if "param" in layer and kind not in WEIGHTED:
            layer.fail(f"param: expected none, {kind} has no weights", "param")
        called, arguments = LAYERS[kind](layer)
        known = inspect.signature(KINDS[called]).parameters
        self.entries[name] = {
            "layer": called,
            "name": name,
            "inputs": inputs,
            **{key: value for key, value in arguments.items() if known[key].default != value},
        }
        self.lines[name] = layer.line
        self._write(layer, name)
        if kind == "BatchNorm" and not any("BatchNorm" in note for note in self.notes):
            self.notes.append(
                "BatchNorm: its running statistics begin with mean 0 and variance 1, which some thousand steps forget"
            )

    def _scale(self, layer):
        """Give the BatchNorm that a Scale reads its gamma and beta."""
        (name,) = self._inputs(layer, "Scale")
        entry = self.entries.get(name, {})
        if entry.get("layer") != "BatchNorm" or "scale" not in entry or self.readers[name] > 1:
            layer.fail("expected a Scale behind a BatchNorm that nobody else reads; gpunet has no others")
        del entry["scale"]  # which is true by default
        if scale(layer):
            del entry["shift"]
        self.readers[name] -= 1
        self._write(layer, name)

    def _end(self, layer):
        if self.loss is not None:
            layer.fail("expected one loss, got a second")
        bottoms = layer.all("bottom")
        if len(bottoms) != 2 or bottoms[1] not in self.label:
            layer.fail("bottom: expected two, a prediction and the labels of the data layer", "bottom")
        if any(weight != 1 for weight in layer.all("loss_weight")):
            layer.fail("loss_weight: expected 1", "loss_weight")
        p = layer.inner("loss_param")
        p.only("normalization", "VALID", "FULL", "BATCH_SIZE")  # which agree where each image has one label
        if "ignore_label" in p:
            p.fail("ignore_label: gpunet has none", "ignore_label")
        layer.inner("softmax_param").only("axis", 1)
        self.loss = self._blob(layer, bottoms[0])
        if self.loss == "input":
            layer.fail("bottom: expected a prediction, got the images", "bottom")

    def _name(self, layer, kind):
        """Return a layer's name as gpunet takes it, one that no other has."""
        name = re.sub(r"[^\w/+.-]", "_", layer.get("name", "") or f"{kind.lower()}{len(self.entries) + 1}")
        name = f"_{name}"[:200] if name == "input" or name[0] == "." else name[:200]
        if name in self.entries:
            layer.fail("a layer before it has this name, too", "name")
        return name

    def _inputs(self, layer, kind):
        bottoms, least = layer.all("bottom"), SEVERAL.get(kind, 1)
        if len(bottoms) < least or (len(bottoms) > 1 and kind not in SEVERAL):
            layer.fail(f"bottom: expected {least}{' or more' * (kind in SEVERAL)}, got {len(bottoms)}", "bottom")
        inputs = [self._blob(layer, bottom) for bottom in bottoms]
        self.readers.update(inputs)
        return inputs

    def _blob(self, layer, bottom):
        if bottom in self.label:
            layer.fail(f"bottom: '{shortened(bottom)}' are the labels, which only a loss reads", "bottom")
        if bottom not in self.blobs:
            layer.fail(f"bottom: no layer before it has the top '{shortened(bottom)}'", "bottom")
        return self.blobs[bottom]

    def _write(self, layer, name):
        tops = layer.all("top")
        if len(tops) != 1:
            layer.fail(f"top: expected one, got {len(tops)}", "top")
        if tops[0] in self.label or (tops[0] in self.blobs and tops[0] not in layer.all("bottom")):
            layer.fail(f"top: '{shortened(tops[0])}' is written by a layer before it", "top")
        self.blobs[tops[0]] = name
