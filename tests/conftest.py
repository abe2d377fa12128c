"""Fixtures of several files."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
# Jobs of several ranks are forked from a process that has one thread; Arrow's allocator would start another.
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
CORES = len(os.sched_getaffinity(0))
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // workers)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``pytest -n auto``: more would wait for the longest file, with a gigabyte each."""
    return min(CORES, 8)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """``pytest -n``: a file's tests stay together, for they share what it sets up; the files go in their order, since
    those of few tests, which would be last, are long."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist, config.option.loadscopereorder = "loadfile", False


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small data set: six maps to train on, four held out."""
    from rewardmap.transit.reasonmap import write_dataset

    folder = tmp_path_factory.mktemp("data") / "maps"
    write_dataset(folder, maps={"train": 6, "test": 4}, seed=1)
    return folder


@pytest.fixture(scope="module")
def policy():
    """The tiny policy, warm. Files that need another have their own."""
    from rewardmap.config import PolicyConfig
    from rewardmap.policy import load_policy
    from rewardmap.tiny import WARM_START

    return load_policy(WARM_START, PolicyConfig())


@pytest.fixture
def server(policy):
    """A stand-in for an SGLang server."""
    import sglang_fake

    with sglang_fake.FakeServer(policy.tokenizer, policy.model.config.image_token_id).running() as running:
        yield running


@pytest.fixture
def proxy(server):
    """Injects faults between a client and the stand-in."""
    import sglang_fake  # needs aiohttp, as those files do

    with sglang_fake.Proxy(server.url).running() as running:
        yield running
