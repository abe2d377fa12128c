"""Decoded pictures of a node's ranks: one copy, each decoded once, nothing left in shared memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from rewardmap.train import shared_pictures
from rewardmap.train.ranks import ALONE, Ranks, join_ranks
from rewardmap.train.shared_pictures import SHARED_MEMORY, SharedPictures, share_pictures
from rewardmap.types import DataError
from rewardmap.vision import EncodedImage, ImageStore

sys.path.append(str(Path(__file__).parent))
from parallel_job import fork_ranks

pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm on this system")
PATCHES, WIDTH = 16, 12


class Store(ImageStore):
    """Of small patches; notes each picture it decodes in a file that all processes write."""

    def __init__(self, calls: Path):
        small = {"shortest_edge": 64, "longest_edge": 64}
        super().__init__(Qwen2VLImageProcessorPil(patch_size=2, merge_size=2, size=small), 1 << 20)
        self._calls = calls

    def _read(self, source):
        image = super()._read(source)
        with self._calls.open("a") as file:
            file.write("decoded\n")
        return image


def draw(folder, count):
    paths = []
    for number in range(count):
        values = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        paths.append(str(folder / f"map-{number}.png"))
        Image.fromarray(values).save(paths[-1])
    return paths


def picture(value, size=PATCHES):
    return EncodedImage(torch.full((size, WIDTH), value), (1, 4, size // 4), bytes([int(value)] * 16))


SIZE = 4096 + PATCHES * WIDTH * 4


def test_one_copy_is_decoded_once_and_seen_by_every_store(tmp_path):
    paths, calls = draw(tmp_path, 3), tmp_path / "calls"
    (tmp_path / "shared").mkdir()
    stores = [Store(calls) for _ in range(2)]
    plain = Store(tmp_path / "other")
    for place, store in enumerate(stores):
        store.share(SharedPictures(tmp_path / "shared", 1 << 20, place, 2).keep, place / 2)
        store.prefetch(paths)
    for path in paths:
        mine, theirs, expected = stores[0].get(path), stores[1].get(path), plain.get(path)
        assert mine.digest == theirs.digest == expected.digest
        assert mine.grid_thw == theirs.grid_thw == expected.grid_thw
        assert torch.equal(mine.pixels, expected.pixels)
        mine.pixels[0, 0, 0] ^= 1  # one memory under both
        assert torch.equal(mine.pixels, theirs.pixels)
    assert len(calls.read_text().splitlines()) == 3
    assert len(list((tmp_path / "shared").glob("*.pixels"))) == 3


def test_a_file_written_anew_is_another_picture(tmp_path):
    [path] = draw(tmp_path, 1)
    (tmp_path / "shared").mkdir()
    store = Store(tmp_path / "calls")
    store.share(SharedPictures(tmp_path / "shared", 1 << 20).keep, 0.0)
    before = store.get(path).digest
    Image.new("RGB", (8, 8), "red").save(path)
    assert store.get(path).digest != before


def test_decoding_ahead_begins_elsewhere_on_each_rank(tmp_path):
    for place, first in ((0, 0), (1, 2), (2, 5)):
        order = []
        store = ImageStore(None, 1 << 20)
        store.share(lambda key, decode: decode(), place / 3)
        store._start = lambda source, order=order: order.append(source)
        store.prefetch([str(number) for number in (*range(8), 0)])
        assert order == [str((first + number) % 8) for number in range(8)]


def test_what_was_opened_longest_ago_makes_room(tmp_path):
    pictures = SharedPictures(tmp_path, 3 * SIZE)
    for number in (1, 2, 3):
        pictures.keep(number, lambda number=number: picture(float(number)))
        time.sleep(0.01)
    mapped = pictures.keep(1, lambda: pytest.fail("it is there"))
    time.sleep(0.01)
    pictures.keep(4, lambda: picture(4.0))
    again = []
    for number in (1, 3, 4, 2):
        pictures.keep(number, lambda number=number: again.append(number) or picture(float(number)))
    assert again == [2]
    assert (mapped.pixels == 1).all()  # also where its file has gone
    assert sum(path.stat().st_size for path in tmp_path.glob("*.pixels")) <= 3 * SIZE


def test_a_picture_that_does_not_fit_stays_with_its_rank(tmp_path):
    large = picture(1.0, 16 * PATCHES)
    with pytest.warns(UserWarning, match=r"No space left on device; each rank keeps.*--shm-size"):
        assert SharedPictures(tmp_path, 2 * SIZE).keep("a", lambda: large) is large
    assert not list(tmp_path.glob("*.pixels"))


def test_full_shared_memory_is_said_once_and_costs_only_memory(tmp_path, monkeypatch):
    def full(self, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SharedPictures, "_make_room", full)
    pictures, one, two = SharedPictures(tmp_path, 1 << 20), picture(1.0), picture(2.0)
    with pytest.warns(UserWarning, match=r"No space left on device; each rank keeps.*--shm-size") as told:
        assert pictures.keep("a", lambda: one) is one
        assert pictures.keep("b", lambda: two) is two
    assert len(told) == 1
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_a_folder_that_is_taken_away_costs_only_memory(tmp_path):
    (tmp_path / "shared").mkdir()
    pictures, one = SharedPictures(tmp_path / "shared", 1 << 20), picture(1.0)
    mapped = pictures.keep("a", lambda: one)
    shutil.rmtree(tmp_path / "shared")
    assert (mapped.pixels == 1).all()
    with pytest.warns(UserWarning, match="No such file or directory; each rank keeps") as told:
        assert pictures.keep("a", lambda: one) is one and pictures.keep("b", lambda: one) is one
    assert len(told) == 1


def test_an_unreadable_picture_is_named_to_all_who_ask(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "shared").mkdir()
    for _ in range(2):
        store = Store(tmp_path / "calls")
        store.share(SharedPictures(tmp_path / "shared", 1 << 20).keep, 0.0)
        with pytest.raises(DataError, match=r"broken\.png: cannot be read"):
            store.get(str(tmp_path / "broken.png"))


def test_threads_of_several_stores_wait_for_the_one_that_decodes(tmp_path):
    made, found = [], []

    def decode():
        time.sleep(0.05)
        made.append(1)
        return picture(7.0)

    def ask():
        found.append(SharedPictures(tmp_path, 1 << 20).keep("a", decode))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(found) == 6 and all((one.pixels == 7).all() for one in found)


def test_a_process_alone_shares_with_nobody():
    with share_pictures(ALONE, 1 << 20) as pictures:
        assert pictures is None


@pytest.fixture
def shared_memory(monkeypatch):
    """Shared memory of this test alone, beside what other jobs of the machine have there; nothing is left in it."""
    with tempfile.TemporaryDirectory(prefix="tests-of-rewardmap-", dir=SHARED_MEMORY) as name:
        monkeypatch.setattr(shared_pictures, "SHARED_MEMORY", Path(name))
        monkeypatch.setenv("SHARED_MEMORY_OF_THE_TEST", name)
        yield
        assert not list(Path(name).iterdir())


def run_ranks(folder, *arguments):
    command = [sys.executable, __file__, str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    seen = [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9].json"))]
    return done, seen


@pytest.mark.usefixtures("shared_memory")
def test_ranks_of_a_node_decode_each_picture_once(tmp_path):
    paths = draw(tmp_path, 9)
    done, seen = run_ranks(tmp_path, "3")
    assert done.returncode == 0, done.stderr[-4000:]
    assert [rank["place"] for rank in seen] == [0, 1, 2]
    assert len({rank["folder"] for rank in seen}) == 1
    assert len({tuple(rank["digests"]) for rank in seen}) == 1
    assert len((tmp_path / "calls").read_text().splitlines()) == len(paths)


@pytest.mark.usefixtures("shared_memory")
def test_ranks_alone_on_their_nodes_keep_their_own(tmp_path):
    draw(tmp_path, 2)
    done, seen = run_ranks(tmp_path, "2", "nodes")
    assert done.returncode == 0, done.stderr[-4000:]
    assert [rank["place"] for rank in seen] == [None, None]
    assert len((tmp_path / "calls").read_text().splitlines()) == 4


@pytest.mark.usefixtures("shared_memory")
def test_what_a_killed_job_left_is_removed_and_what_another_holds_is_not(tmp_path, monkeypatch):
    draw(tmp_path, 2)
    monkeypatch.setattr(shared_pictures, "_YOUNG_S", -1.0)
    done, _ = run_ranks(tmp_path, "2", "killed")
    assert done.returncode != 0
    folder = Path((tmp_path / "folder").read_text())
    assert list(folder.glob("*.pixels"))
    holder = shared_pictures._hold(folder)
    begun = [shared_pictures._begin()]
    assert folder.exists()
    os.close(holder)
    begun.append(shared_pictures._begin())
    assert not folder.exists()
    for one in begun:
        shared_pictures._remove_unless_held(one)


def one_rank(folder: Path, how: str) -> None:
    if how == "nodes":
        os.environ["LOCAL_RANK"] = "0"
    with join_ranks(60) as ranks, share_pictures(ranks, 1 << 20) as pictures:
        digests = ask_all(folder, pictures, ranks)
        if how == "killed":
            (folder / "folder").write_text(str(pictures.folder))
            ranks.wait()
            os.kill(os.getpid(), 9)
        place, where = (pictures.place, str(pictures.folder)) if pictures else (None, None)
        (folder / f"{ranks.rank}.json").write_text(json.dumps({"place": place, "folder": where, "digests": digests}))


def ask_all(folder: Path, pictures: SharedPictures | None, ranks: Ranks) -> list[str]:
    store = Store(folder / "calls")
    if pictures is not None:
        store.share(pictures.keep, pictures.place / pictures.ranks)
    paths = sorted(map(str, folder.glob("*.png")))
    store.prefetch(paths)
    return [store.get(path).digest.hex() for path in paths]


if __name__ == "__main__":
    out, size, *rest = sys.argv[1:]
    shared_pictures.SHARED_MEMORY = Path(os.environ["SHARED_MEMORY_OF_THE_TEST"])
    fork_ranks(int(size), lambda: one_rank(Path(out), *(rest or ["node"])))
