"""How busy a machine is with other work than ours: figures from a loaded one lie."""

import os
import resource
import time
from pathlib import Path

LIMIT = 0.05  # of one core; a run above it is marked, and stored only where that is asked for
STAT = Path("/proc/stat")


class Others:
    """Tells what share of one core was used by all but this process and its ended children.

    From when it was made, or asked last. Time that a hypervisor took counts; 0 where the system tells nothing.
    """

    def __init__(self):
        self.before = _now()

    def share(self):
        """Return the share, and begin anew."""
        before, self.before = self.before, _now()
        wall, all_of_it, ours = (b - a for a, b in zip(before, self.before, strict=True))
        return max(0.0, all_of_it - ours) / max(wall, 1e-9)

    def look(self, seconds=0.5):
        """Return the share over some seconds in which we do nothing."""
        self.share()
        time.sleep(seconds)
        return self.share()


def verdict(share):
    """Return a share in words."""
    return f"other work took {share:.0%} of a core: {'quiet' if share <= LIMIT else 'NOT QUIET, figures lie'}"


def may_store(share, force):
    """Return whether figures may be stored; say so where not."""
    if share <= LIMIT or force:
        return True
    print(f"not stored: {verdict(share)}; --force stores them all the same")
    return False


def _now():
    """Return seconds: of the clock, of all cores' work, of ours."""
    ours = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return time.perf_counter(), busy(STAT.read_text()) if STAT.exists() else ours, ours


def busy(stat):
    """Return the seconds that all cores were not idle, from the text of /proc/stat."""
    fields = [int(f) for f in stat.split("\n", 1)[0].split()[1:9]]  # what follows is in user and nice already
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
