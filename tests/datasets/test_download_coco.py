"""The downloader against a server that drops connections, damages files and does not support ranges."""

from __future__ import annotations

import hashlib
import io
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import download_coco
import numpy as np
import pytest
from download_coco import Archive, download, fetch, unpack


class Server(ThreadingHTTPServer):
    """Serves `files`, at most `cut` bytes of each answer (None: all), and notes the first byte of each answer."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.ranges = True
        self.starts: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.server.ranges else 0
        self.server.starts.append(start)
        self.send_response(206 if self.server.ranges else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = len(content) if self.server.cut is None else start + self.server.cut
        self.wfile.write(content[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def archives(server):
    """Two archives, on the server and described."""
    noise = np.random.default_rng(0)
    described = []
    for folder in ("val2017", "annotations"):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as content:
            content.writestr(f"{folder}/", b"")
            for number in range(3):
                content.writestr(f"{folder}/{number}.bin", noise.bytes(40_000))
        server.files[f"zips/{folder}.zip"] = packed.getvalue()
        described.append(
            Archive(folder, f"zips/{folder}.zip", len(packed.getvalue()), hashlib.sha1(packed.getvalue()).hexdigest())
        )
    return described


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


COMPLETE = [f"{folder}/{number}.bin" for folder in ("annotations", "val2017") for number in range(3)]


def test_download_creates_the_folders_and_nothing_else(server, archives, tmp_path):
    download(archives, server.url, tmp_path / "coco")
    assert tree(tmp_path / "coco") == COMPLETE
    with zipfile.ZipFile(io.BytesIO(server.files["zips/val2017.zip"])) as content:
        assert (tmp_path / "coco" / "val2017" / "1.bin").read_bytes() == content.read("val2017/1.bin")


def test_second_download_requests_nothing(server, archives, tmp_path):
    download(archives, server.url, tmp_path)
    server.starts.clear()
    download(archives, server.url, tmp_path)
    assert server.starts == []


def test_fetch_resumes_after_a_lost_connection(server, archives, tmp_path):
    server.cut = 50_000
    path = fetch(archives[0], server.url, tmp_path, retry_wait_s=0)
    assert server.starts == [0, 50_000, 100_000]
    assert path.read_bytes() == server.files[archives[0].path]


def test_fetch_resumes_the_archive_of_an_earlier_run(server, archives, tmp_path):
    archives[0].file(tmp_path).write_bytes(server.files[archives[0].path][:70_001])
    fetch(archives[0], server.url, tmp_path)
    assert server.starts == [70_001]


def test_fetch_restarts_if_the_server_does_not_support_ranges(server, archives, tmp_path):
    server.ranges = False
    archives[0].file(tmp_path).write_bytes(b"x" * 70_001)
    assert fetch(archives[0], server.url, tmp_path).read_bytes() == server.files[archives[0].path]


def test_fetch_ends_after_five_attempts_without_data(server, archives, tmp_path):
    server.cut = 0
    with pytest.raises(ValueError, match=r"val2017.zip: expected data, got none in 5 attempts .* run again to resume"):
        fetch(archives[0], server.url, tmp_path, retry_wait_s=0)
    assert server.starts == [0] * 5


def test_fetch_deletes_a_damaged_archive_and_can_restart(server, archives, tmp_path):
    good = server.files[archives[0].path]
    server.files[archives[0].path] = good[:500] + bytes([good[500] ^ 1]) + good[501:]
    with pytest.raises(
        ValueError, match=rf"val2017.zip: expected SHA-1 {archives[0].sha1}, got \w+: the file was damaged"
    ):
        download(archives, server.url, tmp_path)
    assert tree(tmp_path) == []
    server.files[archives[0].path] = good
    download(archives, server.url, tmp_path)
    assert tree(tmp_path) == COMPLETE


def test_fetch_refuses_a_file_of_another_size_before_the_download(server, archives, tmp_path):
    server.files[archives[0].path] += b"more"
    with pytest.raises(ValueError, match=rf"expected {archives[0].size} bytes, the server has {archives[0].size + 4}"):
        fetch(archives[0], server.url, tmp_path)
    server.files.clear()
    with pytest.raises(
        ValueError, match=r"val2017.zip: expected the archive, got HTTP 404 Not Found. Check --base-url"
    ):
        fetch(archives[0], server.url, tmp_path)


def test_unpack_resumes_and_replaces_a_truncated_file(server, archives, tmp_path):
    fetch(archives[0], server.url, tmp_path)
    unfinished = tmp_path / ".val2017.part" / "val2017"
    unfinished.mkdir(parents=True)
    (unfinished / "0.bin").write_bytes(b"cut short")
    unpack(archives[0], tmp_path)
    assert tree(tmp_path) == [f"val2017/{number}.bin" for number in range(3)]
    assert (tmp_path / "val2017" / "0.bin").stat().st_size == 40_000


def test_download_checks_the_free_space_first(server, archives, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 300_000))
    with pytest.raises(
        ValueError, match=r"expected 0.0 GB of free space, got 0.0 GB. Make room or choose another --out"
    ):
        download(archives, server.url, tmp_path)  # 120 kB each, unpacked, and one archive beside them: 360 kB
    assert server.starts == []


def test_archives_are_those_of_coco():
    assert [archive.folder for archive in download_coco.ARCHIVES] == ["train2017", "val2017", "annotations"]
    assert all(len(archive.sha1) == 40 and archive.size > 2e8 for archive in download_coco.ARCHIVES)
