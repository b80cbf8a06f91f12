"""Download COCO 2017 into its standard folders: train2017/, val2017/, annotations/.

Every step can be interrupted and run again. The download of an archive resumes (an archive from elsewhere may be put
beside the folders), a folder gets its name when it is complete, and existing folders are skipped. An archive is checked
by size and SHA-1 before it is unpacked, which checks the CRC of each file, and is deleted afterwards.

    python datasets/download_coco.py --out datasets/coco --parts val2017 annotations
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn, track

# The bucket behind images.cocodataset.org, whose own certificate is for another host.
BASE_URL = "https://s3.amazonaws.com/images.cocodataset.org"
CHUNK = 1 << 20  # bytes
TIMEOUT_S = 30.0
ATTEMPTS = 5  # in a row without new data


@dataclass(frozen=True)
class Archive:
    """A zip file with one of the folders."""

    folder: str  # also the name of the part
    path: str  # below the base URL
    size: int  # bytes
    sha1: str

    def file(self, out: Path) -> Path:
        return out / Path(self.path).name


# Sizes and sums are not COCO's own but those that GluonCV and others have published independently.
ARCHIVES = (
    Archive("train2017", "zips/train2017.zip", 19_336_861_798, "10ad623668ab00c62c096f0ed636d6aff41faca5"),
    Archive("val2017", "zips/val2017.zip", 815_585_330, "4950dc9d00dbe1c933ee0170f5797584351d2a41"),
    Archive(
        "annotations",
        "annotations/annotations_trainval2017.zip",
        252_907_541,
        "8551ee4bb5860311e79dace7e79cb91e432e78b3",
    ),
)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha1(path: Path) -> str:
    digest = hashlib.sha1()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}: expected {needed / 1e9:.1f} GB of free space, got {free / 1e9:.1f} GB. Make room or choose another --out."
        )


def _append(archive: Archive, url: str, path: Path, progress: Progress) -> None:
    """Request the rest of an archive and append it to `path` until the connection ends."""
    have = _size(path)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        partial = (
            response.status == http.HTTPStatus.PARTIAL_CONTENT
        )  # else the server does not support ranges and sends all
        start = have if partial else 0
        total = start + int(response.headers.get("Content-Length", archive.size - start))
        if total != archive.size:
            raise ValueError(f"{url}: expected {archive.size} bytes, the server has {total}. Check --base-url.")
        task = progress.add_task(path.name, total=total, completed=start)
        with path.open("ab" if partial else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                progress.advance(task, len(chunk))


def fetch(archive: Archive, base_url: str, out: Path, retry_wait_s: float = 1.0) -> Path:
    """Download the missing part of an archive and check it.

    Args:
        retry_wait_s: before the second attempt; each further one waits twice as long.

    Raises:
        ValueError: the server has no such file or does not answer; what came is not the archive (it is deleted then).
    """
    url, path = f"{base_url.rstrip('/')}/{archive.path}", archive.file(out)
    failures = 0
    with Progress(
        "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    ) as progress:
        while (have := _size(path)) < archive.size:
            problem = "the connection ended early"
            try:
                _append(archive, url, path, progress)
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise ValueError(
                        f"{url}: expected the archive, got HTTP {error.code} {error.reason}. Check --base-url."
                    ) from error
                problem = f"HTTP {error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
            if _size(path) > have:
                failures = 0
                continue
            failures += 1
            if failures == ATTEMPTS:
                raise ValueError(
                    f"{url}: expected data, got none in {ATTEMPTS} attempts ({problem}). Check the network and run again to resume."
                )
            time.sleep(retry_wait_s * 2 ** (failures - 1))
    if (sha1 := _sha1(path)) != archive.sha1:
        path.unlink()
        raise ValueError(
            f"{path}: expected SHA-1 {archive.sha1}, got {sha1}: the file was damaged and is deleted. Run again."
        )
    return path


def unpack(archive: Archive, out: Path) -> None:
    """Unpack a checked archive into its folder, resuming an earlier attempt."""
    unfinished = out / f".{archive.folder}.part"
    with zipfile.ZipFile(archive.file(out)) as content:
        files = [info for info in content.infolist() if not info.is_dir()]
        missing = [info for info in files if _size(unfinished / info.filename) != info.file_size]
        _require_space(out, sum(info.file_size for info in missing))
        for info in track(missing, f"unpacking {archive.file(out).name}"):
            content.extract(info, unfinished)
    (unfinished / archive.folder).replace(out / archive.folder)
    shutil.rmtree(unfinished)
    archive.file(out).unlink()


def download(archives: Sequence[Archive], base_url: str, out: Path, retry_wait_s: float = 1.0) -> None:
    """Download and unpack the folders of `archives` that do not exist in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [archive for archive in archives if not (out / archive.folder).exists()]
    # images hardly shrink in an archive, and one archive exists beside the unpacked folders
    sizes = [archive.size for archive in missing]
    _require_space(out, sum(sizes) + max(sizes, default=0) - sum(_size(archive.file(out)) for archive in missing))
    for archive in missing:
        fetch(archive, base_url, out, retry_wait_s)
        unpack(archive, out)


def main() -> None:
    """Run the command line."""
    names = [archive.folder for archive in ARCHIVES]
    parser = argparse.ArgumentParser(
        description="Download COCO 2017.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "coco", help="folder to make; data.root for training"
    )
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="which folders")
    parser.add_argument("--base-url", default=BASE_URL, help="of a mirror with the same files")
    options = parser.parse_args()
    try:
        download([archive for archive in ARCHIVES if archive.folder in options.parts], options.base_url, options.out)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "Interrupted. Run again to resume.\n")
    print(f"{options.out}: {', '.join(options.parts)} complete.")


if __name__ == "__main__":
    main()
