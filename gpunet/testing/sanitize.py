"""AddressSanitizer with UBSan, and ThreadSanitizer: how they are started, and what their words come to."""

import re

KINDS = ("address", "thread")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0:detect_stack_use_after_return=0:handle_segv=1",
    "UBSAN_OPTIONS": "print_stacktrace=0",
    "TSAN_OPTIONS": "exitcode=0:report_bugs=1:history_size=4",
}
FOUND = re.compile(r"(?:ERROR: AddressSanitizer: |WARNING: ThreadSanitizer: |: runtime error: )[^\n]*")
PLACE = re.compile(r"([\w./-]+\.cuh?):(\d+)")


def found(text):
    """Return each thing that a sanitizer reported, once: what it is, and the first places in kernels it names."""
    starts = [m.start() for m in FOUND.finditer(text)]
    complaints = {}
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=False):
        line = text.rfind("\n", 0, start) + 1
        report = text[line:stop]
        what = re.sub(r"^=*\d+=*|\(pid=\d+\)|on address.*|0x[0-9a-f]+|\s+", " ", FOUND.search(report)[0]).strip(" :")
        places = list(dict.fromkeys(f"{m[1].rsplit('/', 1)[-1]}:{m[2]}" for m in PLACE.finditer(report)))
        complaints[f"{what} ({', '.join(places[:3]) or 'no place in a kernel'})"] = None
    return list(complaints)
