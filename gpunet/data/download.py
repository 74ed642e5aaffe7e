"""Fetches a published archive into the cache folder: announced, checked, unpacked aside, and only then given its name.

A transfer that is cut leaves nothing that could be taken for a data set.
"""

import os
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pooch

from gpunet.data.dataset import DataNotFound

LIMITS = (10, 30)  # seconds to connect, and between two pieces


@dataclass(frozen=True)
class Archive:
    """A tar file to fetch: `folder` is what it unpacks to, `size` its bytes."""

    url: str
    sha256: str
    size: int
    folder: str


def cache_folder():
    """The folder for what can be had again: GPUNET_CACHE, else the platform's own."""
    return Path(os.environ.get("GPUNET_CACHE") or pooch.os_cache("gpunet")).expanduser()


def fetch(archive, into):
    """Return the folder into / archive.folder after downloading and unpacking it there.

    Raises DataNotFound where the archive cannot be had or the disk cannot take it.
    """
    target = into / archive.folder
    advice = f"set GPUNET_DATA to a folder that holds {archive.folder}, or unpack {archive.url} into {into}"
    try:
        into.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(into).free
        if free < 3 * archive.size:
            raise DataNotFound(
                f"{into}: {3 * archive.size / 1e6:.0f} MB needed to download and unpack {archive.folder}, "
                f"{free / 1e6:.0f} MB free; make room or set GPUNET_CACHE to another folder"
            )
        print(
            f"downloading {archive.folder}: {archive.size / 1e6:.0f} MB from {archive.url} to {target}",
            file=sys.stderr,
        )
        with tempfile.TemporaryDirectory(prefix=f".{archive.folder}-", dir=into) as aside:
            file = Path(aside, "archive.tar.gz")
            _transfer(archive, file, advice)
            _unpack(file, Path(aside, "unpacked"))
            try:
                os.rename(Path(aside, "unpacked", archive.folder), target)
            except OSError:
                if not target.is_dir():  # else another process was quicker
                    raise
    except (OSError, tarfile.TarError) as error:
        raise DataNotFound(f"{target}: cannot be written: {error}; set GPUNET_CACHE to another folder") from None
    return target


def _unpack(file, into):
    """Unpack files and folders that stay inside `into`, and nothing else; TarError where it is no whole archive."""
    try:
        with tarfile.open(file) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(into, filter="data")
                return
            plain = [m for m in tar if (m.isfile() or m.isdir()) and not {"..", "/"} & set(Path(m.name).parts)]
            tar.extractall(into, plain)  # Python 3.11.0 to 3.11.3 have no filter
    except (OSError, tarfile.TarError):
        raise
    except Exception as error:  # tarfile and zlib raise a dozen kinds for a damaged file
        raise tarfile.ReadError(f"the archive is damaged: {error}") from None


def _transfer(archive, file, advice):
    """Write the archive to `file` and hold it to its checksum."""
    import requests  # pooch itself imports it when it is needed

    get = pooch.HTTPDownloader(timeout=LIMITS, chunk_size=1 << 16, progressbar=sys.stderr.isatty())
    try:
        get(archive.url, str(file), None)
    except requests.HTTPError as error:
        reason = f"the server answered {error.response.status_code}"
    except requests.Timeout:
        reason = f"no answer within {LIMITS[0]} s, or a pause of {LIMITS[1]} s"
    except requests.ConnectionError as error:
        reason = f"no connection ({type(error).__name__})"
    except requests.RequestException as error:
        reason = f"the transfer was cut ({type(error).__name__})"
    else:
        if pooch.file_hash(str(file), alg="sha256") == archive.sha256:
            return
        reason = f"wrong checksum (expected {archive.size} bytes, got {file.stat().st_size})"
    raise DataNotFound(f"{archive.url}: not downloaded: {reason}; {advice}")
