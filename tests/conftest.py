"""Fixtures of several files."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
# Jobs of several ranks are forked from a process that has one thread; Arrow's allocator would start another.
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small data set: six maps to train on, four held out."""
    from rewardmap.transit.reasonmap import write_dataset

    folder = tmp_path_factory.mktemp("data") / "maps"
    write_dataset(folder, maps={"train": 6, "test": 4}, seed=1)
    return folder


@pytest.fixture
def proxy(server):
    """Injects faults between a client and the stand-in ``server`` of its file."""
    import sglang_fake  # needs aiohttp, as those files do

    with sglang_fake.Proxy(server.url).running() as running:
        yield running
