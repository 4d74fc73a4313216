"""Text in an S3 store, in Google's and on a hub, all served on this machine's loopback."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import local_cluster
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from helpers import tiny
from loram_ray.config import CorpusConfig, SourceConfig, TextSource
from loram_ray.corpus import read
from loram_ray.corpus.prepare import prepare_unit
from loram_ray.corpus.read import BadRow, documents, identify, list_units
from loram_ray.errors import LoramError

TEXTS = [row["text"] for row in tiny.texts(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real S3 server; yields the query of its addresses."""
    server_module = pytest.importorskip("moto.server", reason="moto is a development dependency")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server.start()
        host, port = server.get_host_and_port()
        query = f"?endpoint_override=http://{host}:{port}&region=us-east-1"
        filesystem, _ = fs.FileSystem.from_uri(f"s3://texts{query}&allow_bucket_creation=true")
        filesystem.create_dir("texts")
        yield query
        server.stop()


@pytest.fixture(scope="module")
def gs() -> Iterator[str]:
    """A server of Google's store, in a process of its own: pyarrow reads with the GIL held."""
    pytest.importorskip("gcp_storage_emulator", reason="it is a development dependency")
    port = local_cluster.free_port()
    command = f"start --host 127.0.0.1 --port {port} --in-memory --default-bucket texts"
    server = subprocess.Popen(
        [sys.executable, "-m", "gcp_storage_emulator", *command.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not _listens(port):
        assert server.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    yield f"?scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=30"
    server.terminate()
    server.wait()


def _listens(port: int) -> bool:
    with socket.socket() as there:
        return there.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request: pytest.FixtureRequest) -> str:
    """The query of a store's addresses."""
    query: str = request.getfixturevalue(request.param)
    return query


@pytest.fixture(scope="module")
def bucket(store: str) -> str:
    address = "s3://texts" if "region" in store else "gs://anonymous@texts"
    filesystem, _ = fs.FileSystem.from_uri(f"{address}{store}")
    table = pa.table({"text": TEXTS})
    objects = {
        "web/a.jsonl": LINES,
        "web/deep/b.jsonl.gz": gzip.compress(LINES),
        "web/.hidden/c.jsonl": b"{",
        "web/notes.md": b"no text",
        "cut/d.jsonl.gz": gzip.compress(LINES)[:-20],
    }
    for name, content in objects.items():
        with filesystem.open_output_stream(f"texts/{name}", compression=None) as stream:
            stream.write(content)
    pq.write_table(table, "texts/columns/e.parquet", filesystem=filesystem, row_group_size=25)
    with (
        filesystem.open_output_stream("texts/columns/f.arrow") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=9)
    return address


def read_all(path: str) -> list[str | BadRow]:
    units = list_units([TextSource(path=path)])
    return [document for unit in units for document in documents(unit)]


def test_objects_are_read_as_files_are(
    bucket: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unit_bytes in (50, 500, 10**6):
        monkeypatch.setattr(read, "UNIT_BYTES", unit_bytes)
        assert read_all(f"{bucket}/web/a.jsonl{store}") == TEXTS
    assert read_all(f"{bucket}/web{store}") == TEXTS * 2
    assert read_all(f"{bucket}/web/**/*.jsonl.gz{store}") == TEXTS
    assert read_all(f"{bucket}/columns/{store}") == TEXTS * 2
    units = list_units([TextSource(path=f"{bucket}/columns{store}")])
    names = [Path(unit.path.partition("?")[0]).name for unit in units]
    assert names == ["e.parquet"] * 3 + ["f.arrow"]


def test_a_prepared_unit_of_an_object_is_that_of_the_file(
    bucket: str, store: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    for name, path in (
        ("near", str(tmp_path / "a.jsonl")),
        ("far", f"{bucket}/web/a.jsonl{store}"),
    ):
        (tmp_path / name).mkdir()
        [unit] = list_units([TextSource(path=path)])
        prepare_unit(unit, tmp_path / name, 16, tiny.tokenizer())
    assert tiny.tree(tmp_path / "near") == tiny.tree(tmp_path / "far")


def test_bad_objects_are_told_with_their_address(bucket: str, store: str) -> None:
    with pytest.raises(
        LoramError, match=rf"^{bucket}/cut/d.jsonl.gz\?.* is truncated or damaged past"
    ):
        read_all(f"{bucket}/cut{store}")
    with pytest.raises(LoramError, match=r"has none; check the path"):
        read_all(f"{bucket}/absent{store}")
    with pytest.raises(
        LoramError, match=r"must name files in the formats .*notes.md.*; convert it"
    ):
        read_all(f"{bucket}/web/*.md{store}")


def test_an_object_that_is_written_again_is_another(bucket: str, store: str) -> None:
    filesystem, _ = fs.FileSystem.from_uri(f"{bucket}{store}")
    seen = []
    for content in (b"one", b"one, longer"):
        with filesystem.open_output_stream("texts/again/x.txt") as stream:
            stream.write(content)
        [entry] = identify([TextSource(path=f"{bucket}/again/x.txt{store}")])
        assert entry[0] == "x.txt"
        seen.append(entry)
    assert seen[0] != seen[1]
    assert "hidden" not in json.dumps(seen)


def test_addresses_stay_as_they_are() -> None:
    sources = (SourceConfig(path="s3://b/x/*.jsonl?region=y"), SourceConfig(path="near/x.jsonl"))
    resolved = CorpusConfig(sources=sources).resolved().sources
    assert resolved[0].path == sources[0].path
    assert resolved[1].path == str(Path("near/x.jsonl").resolve())


HUB_FILES = {
    "README.md": b"no text",
    "data/train-0.jsonl": LINES,
    "data/train-1.jsonl.gz": gzip.compress(LINES, mtime=0),
}


class _Hub(BaseHTTPRequestHandler):
    """What HfFileSystem asks a hub for, of one data set."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/datasets/org/name" or path.startswith("/api/datasets/org/name/revision/"):
            self._send({"id": "org/name", "sha": "0" * 40, "siblings": []})
        elif path.startswith("/api/datasets/org/name/tree/main"):
            folder = path.removeprefix("/api/datasets/org/name/tree/main").strip("/")
            inside = [self._entry(name) for name in HUB_FILES if name.startswith(folder)]
            self._send([*inside, {"type": "directory", "path": "data", "oid": "d"}])
        elif path.startswith("/datasets/org/name/resolve/main/"):
            content = HUB_FILES[path.removeprefix("/datasets/org/name/resolve/main/")]
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            self._send(content[int(first) : int(last) + 1], status=206)
        else:
            self._send({"error": "absent"}, status=404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._send([self._entry(name) for name in HUB_FILES if name in body])

    def _entry(self, name: str) -> dict[str, object]:
        content = HUB_FILES[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def _send(self, value: object, status: int = 200) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


ASK_THE_HUB = """
import json
from loram_ray.config import TextSource
from loram_ray.corpus.read import documents, identify, list_units
sources = [TextSource(path="hf://datasets/org/name" + rest) for rest in ("", "/data/*.gz")]
units = list_units(sources)
print(json.dumps([[d for u in units for d in documents(u)], identify(sources)]))
"""


def ask_the_hub(script: str) -> subprocess.CompletedProcess[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
    )
    server.shutdown()
    return done


DECLARED = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: extra, path: data/more.jsonl}
---
"""


@pytest.mark.parametrize(
    ("more", "splits"),
    [
        ({"data/test-0.jsonl": LINES}, "train, test"),
        ({"data/more.jsonl": LINES, "README.md": DECLARED}, "train, extra"),
    ],
)
def test_a_data_set_of_the_hub_with_several_splits_is_refused(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, bytes], splits: str
) -> None:
    for name, content in more.items():
        monkeypatch.setitem(HUB_FILES, name, content)
    script = "from loram_ray.corpus.files import list_files\nlist_files({!r}, 'train.data')"
    for address in ("hf://datasets/org/name", "hf://datasets/org/name/data"):
        done = ask_the_hub(script.format(address))
        assert done.stderr.splitlines()[-1] == (
            f"loram_ray.errors.LoramError: train.data must be one split of a dataset, but "
            f"{address} has {splits}; use hf://datasets/org/name/data/train-*"
        )
    assert ask_the_hub(script.format("hf://datasets/org/name/data/train-*")).returncode == 0


def test_a_data_set_of_the_hub_is_read() -> None:
    done = ask_the_hub(ASK_THE_HUB)
    assert done.returncode == 0, done.stderr
    found, identity = json.loads(done.stdout.splitlines()[-1])
    assert found == TEXTS * 3
    blobs = {name: hashlib.sha1(content).hexdigest() for name, content in HUB_FILES.items()}
    names = ["data/train-0.jsonl", "data/train-1.jsonl.gz", "data/train-1.jsonl.gz"]
    assert [entry[3] for entry in identity] == [blobs[name] for name in names]
    assert [entry[0] for entry in identity] == [Path(name).name for name in names]
