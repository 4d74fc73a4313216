"""What Ray Train writes of a run: whole, or as it was before."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from helpers import tiny
from loram_ray.alignment.atomic_filesystem import atomic_local_filesystem


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_bytes(b"old")
    files = pickle.loads(pickle.dumps(atomic_local_filesystem()))
    with files.open_output_stream(str(file)) as stream:
        stream.write(b"new ")
        stream.flush()
        assert file.read_bytes() == b"old"
        stream.write(b"and whole")
    with files.open_input_stream(str(file)) as stream:
        assert stream.read() == b"new and whole"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    with tiny.disk(small, "400k"):
        file = small / "list.json"
        file.write_bytes(b"old")
        with (
            pytest.raises(OSError) as error,
            atomic_local_filesystem().open_output_stream(str(file)) as stream,
        ):
            for _ in range(100):
                stream.write(bytes(10_000))
        assert error.value.errno == 28
        assert list(small.iterdir()) == [file]
        assert file.read_bytes() == b"old"
        # a few bytes reach the disk only when they are closed
        (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free))
        with (
            pytest.raises(OSError),
            atomic_local_filesystem().open_output_stream(str(file)) as stream,
        ):
            stream.write(b"few")
        assert file.read_bytes() == b"old"
        (small / "filler").unlink()
        assert list(small.iterdir()) == [file]
