"""The folder of compiled kernels. What lies there is code that will be run: it belongs to the user alone."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from gpunet.errors import GpunetError


def folder():
    """Return the folder, made if need be: kernels in GPUNET_CACHE, or in gpunet in the user's cache folder.

    Raises GpunetError where it cannot be made or written, belongs to somebody else, or others may write to it.
    """
    given = os.environ.get("GPUNET_CACHE")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    place = (Path(given) if given else caches / "gpunet") / "kernels"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.stat()
    except OSError as error:
        raise GpunetError(
            f"kernel cache '{place}': cannot be made: {error.strerror}; name another folder in GPUNET_CACHE"
        ) from None
    if found.st_uid != os.getuid():
        raise GpunetError(
            f"kernel cache '{place}': expected a folder of your own (user {os.getuid()}), got one of user "
            f"{found.st_uid}; compiled kernels are code: name another folder in GPUNET_CACHE"
        )
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise GpunetError(
            f"kernel cache '{place}': expected a folder that only you may write, got mode "
            f"{stat.S_IMODE(found.st_mode):o}; compiled kernels are code: chmod 700 it, or name another in GPUNET_CACHE"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise GpunetError(f"kernel cache '{place}': cannot be written; name another folder in GPUNET_CACHE")
    return place


def key(*parts):
    """Return the name of what was compiled from these texts: source, flags, compiler version."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def kept(name, make):
    """Return the path of `name` in the folder; where it is absent `make(path)` writes it, aside, and it is renamed.

    Two processes may make the same at once: the later one replaces the earlier, which is the same.
    """
    path = folder() / name
    if path.is_file():
        return path
    try:
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".making-", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise GpunetError(f"kernel cache '{path.parent}': cannot be written: {error.strerror}") from None
    try:
        make(Path(aside))
        os.replace(aside, path)
    except OSError as error:
        raise GpunetError(f"kernel cache '{path}': cannot be written: {error.strerror}") from None
    finally:
        Path(aside).unlink(missing_ok=True)
    return path
