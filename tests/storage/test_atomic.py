"""Files that appear as a whole: what is not whole yet is gone when its writer fails, or with the next sweep."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disks import fill

from arbor_core.storage.atomic import create, remove_temporary, replace, replace_link


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_that_cannot_be_written_whole_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(tmp_path / "desired", b"run")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace(tmp_path / "desired", b"pause")
    assert (tmp_path / "desired").read_bytes() == b"run"
    assert names(tmp_path) == {"desired"}


def test_on_a_full_disk_nothing_is_left_of_what_found_no_room(small_disk: Path) -> None:
    replace(small_disk / "desired", b"run")
    ballast = fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        replace(small_disk / "desired", bytes(1 << 16))
    assert (small_disk / "desired").read_bytes() == b"run"
    assert names(small_disk) == {"desired", ballast.name}


def test_a_file_is_created_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: create(tmp_path / "keeper", f"{n}".encode()), range(8)))
    assert made.count(True) == 1
    assert (tmp_path / "keeper").read_bytes() == f"{made.index(True)}".encode()
    assert names(tmp_path) == {"keeper"}


def test_what_this_process_is_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".left.123.tmp").touch()
    monkeypatch.setattr("arbor_core.storage.atomic.crash_point", lambda _: remove_temporary(tmp_path))
    replace(tmp_path / "asked", b"a checkpoint")
    assert names(tmp_path) == {"asked"}


def test_a_link_is_replaced(tmp_path: Path) -> None:
    for target in ("2-1", "4-1"):
        replace_link(tmp_path / "best", Path("..") / target)
    assert (tmp_path / "best").readlink() == Path("..") / "4-1"
    assert names(tmp_path) == {"best"}


@pytest.mark.parametrize("point", ["file.written", "file.renamed"])
@pytest.mark.parametrize("call", ["replace(p, b'run')", "create(p, b'run')", "replace_link(p, Path('run'))"])
def test_what_a_writer_that_was_killed_leaves_is_swept(tmp_path: Path, point: str, call: str) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom arbor_core.storage.atomic import create, replace, replace_link\n"
        f"p = Path(sys.argv[1]) / 'it'\n{call}"
    )
    env = {**os.environ, "ARBOR_CRASH_AT": point}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env).returncode == -signal.SIGKILL
    remove_temporary(tmp_path)
    assert names(tmp_path) == ({"it"} if point == "file.renamed" else set())


def test_nothing_else_is_swept(tmp_path: Path) -> None:
    for name in ("2-1/x.tmp", "4-1.tmp/x", ".desired.7.tmp/x", "tmp", "desired.tmp.old"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    remove_temporary(tmp_path)
    remove_temporary(tmp_path / "nothing")
    assert names(tmp_path) == {"2-1", "tmp", "desired.tmp.old"}
    assert (tmp_path / "2-1" / "x.tmp").exists(), "what lies in folders belongs to somebody else"
