"""Plans: no tensor is written over while it is needed, nothing needless runs, little memory is wasted.

The proof does not trust the planner's own lifetimes: `replay` walks the list with a map of who wrote which bytes last.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpunet import models
from gpunet.core.backend import Types
from gpunet.core.params import Layout
from gpunet.core.plan import ALIGN, plan
from gpunet.core.state import STATE
from gpunet.core.trace import Base, Entry, Share, Tensor, Trace
from gpunet.nn import Add, Concat, Conv2d, Dropout, Flatten, Graph, Input, Linear, MeanSquaredError, ReLU, Sequential


def below(base):
    """Return the bases that this one may lie on."""
    while base.over is not None:
        base = base.over
        yield base


def replay(planned, kept=()):
    """Walk the list; raise AssertionError where a tensor is read after its bytes were written by another."""
    owner = [None] * (planned.nbytes // ALIGN)
    written, waiting = set(), []  # waiting: what the last reduce read, which a slow replica may still read

    def span(base):
        start = planned.offsets[base]
        assert start % ALIGN == 0
        assert start + base.nbytes <= planned.nbytes
        return range(start // ALIGN, -(-(start + base.nbytes) // ALIGN))

    def intact(base, entry):
        assert base in written, f"{entry.name}: reads what nobody wrote"
        assert all(owner[i] is base for i in span(base)), f"{entry.name}: its memory was taken"

    for entry in planned.entries:
        reads = [t.base for t in entry.reads if t.base.arena is None]
        writes = [t.base for t in entry.writes if t.base.arena is None]
        for base in [*reads, *(b for b in writes if b in written)]:
            intact(base, entry)
        for base in writes:
            for other in reads:
                if other is not base and set(span(base)) & set(span(other)):
                    assert other in below(base), f"{entry.name}: in place without having asked"
        if entry.kind in ("reduce", "barrier"):
            waiting = reads
        for base in writes:
            for other in waiting:
                assert base is other or not set(span(base)) & set(span(other)), f"{entry.name}: a replica may read it"
            written.add(base)
            for i in span(base):
                owner[i] = base
    for tensor in (k for k in kept if k.base.arena is None):
        assert all(owner[i] is tensor.base for i in span(tensor.base)), "a kept tensor was overwritten"


def trace_of(graph, n=4, *, share=None, engine="blocked", keep=(), dtype="float32"):
    """Trace forward, loss and backward of a graph on `n` images."""
    types = Types.of(dtype)
    parameters = graph.parameters()
    layouts = {
        "weights": Layout(p for p in parameters if p.trainable),
        "statistics": Layout(p for p in parameters if not p.trainable),
    }
    sizes = {"weights": "weights", "gradient": "weights", "statistics": "statistics", "batch_statistics": "statistics"}
    arenas = {name: ((layouts[layout].size,), types.wide) for name, layout in sizes.items()}
    arenas |= {"state": ((), STATE), "input": ((n, *graph.input_shape), types.real)}
    arenas |= {"targets": ((n, *graph.output_shape), types.real)}
    t = Trace(types, share or Share(n, 0, n), layouts, arenas, training=True, engine=engine, keep=keep)
    y, saved = graph.forward(t, t.arena("input"))
    t.mark("prediction", y)
    losses, hits = t.empty((n,), t.wide), t.empty((n,), np.int32)
    dy = MeanSquaredError().trace(t, y, t.arena("targets"), losses, hits, t.arena("state"))
    graph.backward(t, dy, saved)
    return t


def branching(input_shape, classes):
    image = Input(input_shape)
    stem = Sequential(Conv2d(4, 3), ReLU(), Dropout(0.1))(image)
    left, right = ReLU()(stem), ReLU()(Conv2d(4, 1)(stem))
    joined = Concat()(Add()(left, right, stem), ReLU()(left), right)
    return Graph(image, Linear(classes)(ReLU()(Flatten()(joined))))


NETS = {**models.MODELS, "branching": branching}
EXTRA = {"resnet9": {"widths": (4, 8, 12, 16)}, "vgg": {"dropout": 0.3}}
EXTRA |= {"layers": {"layers": [{"layer": "Conv2d", "outputs": 3, "size": 3}, {"layer": "Linear"}]}}


@pytest.mark.parametrize("engine", ["blocked", "unfold"])
@pytest.mark.parametrize("name", [n for n in NETS if n not in ("resnet32", "resnet44", "resnet56", "resnet110")])
def test_no_tensor_is_overwritten_while_it_is_needed(name, engine):
    graph = NETS[name](input_shape=(32, 32, 3), classes=5, **EXTRA.get(name, {}))
    for keep in ((), ("*:output",), ("*",)):
        for share in (Share(4, 0, 4), Share(12, 4, 4, 1, 3)):
            t = trace_of(graph, share=share, engine=engine, keep=("prediction", *keep))
            assert not keep or len(t.kept) >= len(graph.nodes)
            planned = plan(t.entries, t.kept.values())
            replay(planned, t.kept.values())
            assert planned.nbytes >= planned.live


def test_memory_is_little_above_the_bytes_alive():
    """Activations of resnet9 for 32 images in float32; live is what no plan can go below."""
    t = trace_of(models.resnet9(), 32)
    planned = plan(t.entries)
    assert planned.nbytes <= 1.02 * planned.live
    everything = sum(b.nbytes for b in planned.offsets)
    assert planned.nbytes < 0.6 * everything


def test_in_place_layers_take_no_memory_of_their_own():
    image = Input((16, 16, 8))
    plain = Graph(image, Linear(3)(Conv2d(8, 3)(image)))
    image = Input((16, 16, 8))
    relu = Graph(image, Linear(3)(Dropout(0.1)(ReLU()(Conv2d(8, 3)(image)))))
    ours, without = (plan(trace_of(graph).entries) for graph in (relu, plain))
    one = 4 * 16 * 16 * 8 * 4
    assert ours.live - without.live <= one  # dropout cannot overwrite what the ReLU's backward reads; the ReLU can


def test_entries_that_nobody_reads_are_dropped():
    graph = models.cifar10_quick()
    t = trace_of(graph)
    names = [(e.path.rpartition(".")[2], e.name) for e in plan(t.entries).entries]
    assert ("conv1", "blocked_backward_weight") in names
    assert ("conv1", "blocked_backward_input") not in names
    assert ("conv2", "blocked_backward_input") in names
    t = trace_of(graph, keep=("input:gradient",))
    names = [(e.path.rpartition(".")[2], e.name) for e in plan(t.entries, t.kept.values()).entries]
    assert ("conv1", "blocked_backward_input") in names


# Small lists, by hand


def tensor(nbytes=256, over=None, arena=None):
    return Tensor(Base(nbytes, arena, over and over.base), (nbytes,), np.dtype("u1"))


OUT = tensor(arena="out")


def entry(reads, writes, kind="launch"):
    return Entry(kind, kind, (*reads, *writes), tuple(reads), tuple(writes), "here")


def test_memory_is_used_again_once_its_tensor_is_dead():
    a, b, c = tensor(), tensor(), tensor()
    planned = plan([entry([], [a]), entry([a], [b]), entry([b], [c]), entry([c], [OUT])])
    assert planned.nbytes == planned.live == 512
    assert planned.offsets[a.base] == planned.offsets[c.base] != planned.offsets[b.base]
    replay(planned)


def test_over_is_granted_where_nobody_reads_the_lower_one_later():
    a = tensor()
    b = tensor(over=a)
    planned = plan([entry([], [a]), entry([a], [b]), entry([b], [OUT])])
    assert planned.offsets[a.base] == planned.offsets[b.base]
    assert planned.nbytes == 256


def test_over_is_refused_where_the_lower_one_is_read_again_or_kept():
    a = tensor()
    b = tensor(over=a)
    read_again = [entry([], [a]), entry([a], [b]), entry([b, a], [OUT])]
    read_once = [entry([], [a]), entry([a], [b]), entry([b], [OUT])]
    for entries, kept in ((read_again, []), (read_once, [a]), (read_once[:2], [a, b])):
        planned = plan(entries, kept)
        assert planned.offsets[a.base] != planned.offsets[b.base]
        replay(planned, kept)


def test_two_may_not_lie_over_one():
    a = tensor()
    b, c = tensor(over=a), tensor(over=a)
    planned = plan([entry([], [a]), entry([a], [b]), entry([a], [c]), entry([b, c], [OUT])])
    assert planned.offsets[a.base] == planned.offsets[c.base] != planned.offsets[b.base]
    replay(planned)


def test_a_chain_of_over_shares_one_place():
    a = tensor()
    b = tensor(over=a)
    c = tensor(over=b)
    planned = plan([entry([], [a]), entry([a], [b]), entry([b], [c]), entry([c], [OUT])])
    assert planned.nbytes == 256
    planned = plan([entry([], [a]), entry([a], [b]), entry([b], [c]), entry([c, b], [OUT])])
    assert planned.nbytes == 512
    replay(planned)


def test_what_a_reduce_reads_lives_to_the_next_one():
    a, total, b, c = tensor(), tensor(), tensor(), tensor()
    entries = [entry([], [a]), entry([a], [total], "reduce"), entry([total], [b]), entry([b], [c]), entry([c], [OUT])]
    planned = plan(entries)
    assert planned.offsets[a.base] not in [planned.offsets[t.base] for t in (total, b, c)]
    replay(planned)
    planned = plan([*entries[:2], entry([], [], "barrier"), *entries[2:]])
    assert planned.nbytes == 512


def test_reduces_that_nobody_needs_are_dropped_and_barriers_stay():
    a, total = tensor(), tensor()
    entries = [entry([], [a]), entry([a], [total], "reduce"), entry([], [], "barrier"), entry([], [OUT])]
    assert [e.kind for e in plan(entries).entries] == ["barrier", "launch"]


@given(st.data())
@settings(max_examples=100)
def test_any_list(data):
    """Random programs: every entry reads up to three living tensors and writes one new, perhaps over one it reads."""
    tensors, entries = [], []
    for _ in range(data.draw(st.integers(1, 14))):
        reads = data.draw(st.lists(st.sampled_from(tensors), max_size=3)) if tensors else []
        kind = data.draw(st.sampled_from(["launch", "launch", "launch", "reduce", "barrier"])) if reads else "launch"
        if kind == "barrier":
            entries.append(entry([], [], kind))
            continue
        over = data.draw(st.sampled_from([None, *reads])) if reads and kind == "launch" else None
        new = tensor(over.base.nbytes if over else data.draw(st.sampled_from([1, 256, 300, 1024])), over)
        entries.append(entry(reads, [new], kind))
        tensors.append(new)
        if data.draw(st.booleans()):
            entries.append(entry([data.draw(st.sampled_from(tensors))], [OUT]))
    kept = data.draw(st.lists(st.sampled_from(tensors), max_size=2))
    planned = plan(entries, kept)
    replay(planned, [k for k in kept if k.base in planned.offsets])
    assert all(k.base in planned.offsets for k in kept)
    assert planned.nbytes >= planned.live
