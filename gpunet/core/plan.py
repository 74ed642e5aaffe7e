"""Lifetimes and memory: which entries are needed, which tensors may share bytes, and how large the arena is.

Input is a traced list; output the entries that remain and an offset for each scratch base. Pure bookkeeping:
this module knows no backend and touches no memory.
"""

from dataclasses import dataclass

ALIGN = 256  # bytes; what a GPU's vector loads and cuBLAS like


@dataclass
class Plan:
    """The entries to run, each scratch base's offset, and the arena's size in bytes."""

    entries: list
    offsets: dict
    nbytes: int
    live: int  # the largest sum of bytes alive at one entry: no plan can be smaller
    spans: dict  # base -> (first entry, last entry)


def plan(entries, kept=()):
    """Drop entries whose outputs nobody reads, grant `over` where it is safe, and place every scratch base."""
    kept = {t.base for t in kept}
    entries = _needed(entries, kept)
    spans = _spans(entries, kept)
    owner = _merge(spans, _first_writes(entries), kept)
    shared = {}
    for base, (first, last) in spans.items():
        root = owner.get(base, base)
        start, stop = shared.get(root, (first, last))
        shared[root] = (min(start, first), max(stop, last))
    placed, nbytes = _place(shared)
    offsets = {base: placed[owner.get(base, base)] for base in spans}
    changes = [0] * (len(entries) + 1)
    for base, (first, last) in shared.items():
        changes[first] += _round(base.nbytes)
        changes[last + 1] -= _round(base.nbytes)
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return Plan(entries, offsets, nbytes, peak, spans)


def _needed(entries, kept):
    """Return the entries that write to memory that outlives the list, to a kept base, or to what a needed one reads."""
    wanted, needed = set(kept), []
    for entry in reversed(entries):
        outputs = {t.base for t in entry.writes}
        if entry.kind == "barrier" or any(b.arena or b in wanted for b in outputs):
            needed.append(entry)
            wanted.update(t.base for t in entry.reads)
    return needed[::-1]


def _spans(entries, kept):
    """Return {scratch base: (first, last)}. What a reduce reads lives to the next: a slow replica may still read it."""
    spans, last_entry = {}, len(entries) - 1
    collectives = [i for i, e in enumerate(entries) if e.kind in ("reduce", "barrier")]
    for i, entry in enumerate(entries):
        for t in (*entry.reads, *entry.writes):
            if t.base.arena is None:
                spans[t.base] = (spans.get(t.base, (i, i))[0], i)
    for position, i in enumerate(collectives):
        later = collectives[position + 1] if position + 1 < len(collectives) else last_entry
        for t in entries[i].reads:
            if t.base in spans:
                spans[t.base] = (spans[t.base][0], max(spans[t.base][1], later))
    for base in kept & spans.keys():
        spans[base] = (spans[base][0], last_entry)
    return spans


def _first_writes(entries):
    """Return {base: index of the first entry that writes it}."""
    first = {}
    for i, entry in enumerate(entries):
        for t in entry.writes:
            first.setdefault(t.base, i)
    return first


def _merge(spans, first_write, kept):
    """Return {base: base it lies on}: granted if the lower one is not used after the upper one's first write."""
    owner, end = {}, {base: last for base, (_, last) in spans.items()}
    for base in sorted((b for b in spans if b.over), key=lambda b: first_write[b]):
        root = owner.get(base.over, base.over)
        if base.over not in spans or base.over in kept or end[root] > first_write[base]:
            continue
        owner[base] = root
        end[root] = spans[base][1]
    return owner


def _round(nbytes):
    return -(-nbytes // ALIGN) * ALIGN


def _place(spans):
    """Place largest first, each at the lowest offset that no base alive at the same time occupies."""
    placed, taken, total = {}, [], 0
    for base, (first, last) in sorted(spans.items(), key=lambda item: (-item[0].nbytes, item[1])):
        size, offset = _round(base.nbytes), 0
        for low, high, start, stop in taken:
            if start <= last and first <= stop and low < offset + size and offset < high:
                offset = high
        placed[base] = offset
        taken.append((offset, offset + size, first, last))
        taken.sort()
        total = max(total, offset + size)
    return placed, total
