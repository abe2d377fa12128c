"""SGLang servers of our own: start, wait until ready, stop, restart; and the router in front of them.

A server runs in the environment whose interpreter the configuration names, because SGLang pins its own torch and
transformers.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch

from rewardmap.config import ConfigError, ServerConfig
from rewardmap.rollout.engine import RolloutError
from rewardmap.rollout.process import GuardedProcess, answers, free_port
from rewardmap.rollout.sglang_adapters import Adapters
from rewardmap.rollout.sglang_reply import bans

KEYS_FILE = "keys.json"
VISION_CACHE_MB = "1024"
"""For the server's store of vision outputs, which SGLang leaves out on large GPUs. It is never cleared: where the
tower is trained there must be none."""
_ROUTER = """import os, sys
from sglang_router.launch_router import main
sys.argv += ["--api-key", key] if (key := os.environ.pop("ROUTER_KEY")) else []
main()
"""
"""It takes its key as an option alone, and a command line is seen by every user of the machine."""
_POLL_S = 0.25
_HEALTH_S = 25.0
"""A busy server that answers later than this is taken for dead. SGLang itself says so after 20."""
_LAUNCHERS = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} | {
    f"{prefix}_{name}" for prefix in ("LOCAL", "GROUP", "ROLE") for name in ("RANK", "WORLD_SIZE", "NAME")
}
"""Environment variables that say who one of several ranks is."""
_TORCHRUN = {"OMP_NUM_THREADS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
"""What torchrun gives its ranks where the user gave nothing. Any other value is the user's."""
_ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""How the trainer keeps its GPU memory. SGLang's memory saver does not start with expandable segments."""
_PORT_TRIES = 3

Progress = Callable[[str], None]
"""Called with one line about what is going on."""


@dataclass(frozen=True, slots=True)
class Keys:
    """What a server asks for: ``api`` to sample, ``admin`` to change weights. None where it asks for nothing."""

    api: str | None = None
    admin: str | None = None

    @classmethod
    def create(cls, folder: Path) -> Keys:
        """New random keys in ``folder/keys.json``, readable by this user alone; those of before if there are any."""
        path = folder / KEYS_FILE
        if path.exists():
            return cls.read(path)
        keys = cls(secrets.token_hex(24), secrets.token_hex(24))  # no dash: SGLang takes "-…" for an option
        _write_private(path, json.dumps({"api_key": keys.api, "admin_key": keys.admin}))
        return keys

    @classmethod
    def read(cls, path: str | Path) -> Keys:
        """Raises ConfigError."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(stored["api_key"], stored["admin_key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"rollout.server.keys_file='{path}': not a JSON object with api_key and admin_key ({error!r})"
            ) from None


@dataclass
class SGLangServer:
    """One replica. Example: ``server.start(); server.wait_ready(print); ...; server.stop()``."""

    config: ServerConfig
    index: int
    """Number of the replica: decides its GPUs and its log, ``folder/server-<index>.log``."""
    model: Path
    """Folder of configuration, tokenizer, image processor, and of the weights if ``load_weights``."""
    folder: Path
    keys: Keys
    device: str
    """``cuda`` or ``cpu``."""
    dtype: str
    load_weights: bool
    """False: it starts with random weights, and the trainer sends them."""
    frozen_vision: bool
    """Whether the vision tower stays as it is, so that its outputs may be kept."""
    banned: Sequence[int] = ()
    """Tokens that no request samples, also one that comes through the router, which drops a request's own bans."""
    adapters: Adapters | None = None
    """That it can apply beside its weights."""
    _process: GuardedProcess | None = None
    _port: int = 0
    _stopped: bool = False
    _lock: Lock = field(default_factory=Lock)

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.config.host == "0.0.0.0" else self.config.host
        return f"http://{host}:{self._port}"

    def answers(self) -> bool:
        """Whether it computes a token, waiting as long as SGLang does. Not while it sleeps: its scheduler would end."""
        return not self.ended and answers(f"{self.url}/health_generate", _HEALTH_S)

    @property
    def ended(self) -> bool:
        """Whether its process is gone."""
        return self._process is None or self._process.exit_code is not None

    def start(self) -> None:
        """Start the process on a free port, again if it runs; does not wait.

        Raises:
            ConfigError: no such interpreter.
            RolloutError: it was stopped, perhaps by another thread while this one brought it up again.
        """
        self._end()
        self._port = free_port(self.config.host)
        python = interpreter(self.config)
        settings = self.folder / f"server-{self.index}.yaml"
        # Keys on a command line would be seen by every user of the machine.
        _write_private(settings, f"api-key: {self.keys.api}\nadmin-api-key: {self.keys.admin}\n")
        command = [python, "-m", "sglang.launch_server", "--config", str(settings.absolute()), *self._options()]
        with self._lock:
            if self._stopped:
                raise RolloutError(f"SGLang server {self.index} was stopped")
            self._process = GuardedProcess(command, self.folder / f"server-{self.index}.log", self._environment())

    def wait_ready(self, progress: Progress | None = None) -> None:
        """Until the server answers. A port that something else took meanwhile is changed for another.

        Raises:
            ConfigError: its interpreter has no SGLang.
            RolloutError: it ended, or is not ready in time; with its own last lines.
        """
        tries = 1
        while (ended := self._wait_ready(progress)) is not None:
            if "No module named 'sglang'" in ended:
                raise ConfigError(_no_sglang(interpreter(self.config)))
            if tries == _PORT_TRIES or "address already in use" not in ended.lower():
                raise RolloutError(f"SGLang server {self.index} {ended}")
            tries += 1
            self.start()

    def _wait_ready(self, progress: Progress | None) -> str | None:
        """None when ready; why not when it ended or the time is up."""
        assert self._process is not None, "start first"
        begin = shown = time.monotonic()
        while not answers(f"{self.url}/health"):
            now = time.monotonic()
            if self._process.exit_code is not None:
                return f"ended with code {self._process.exit_code} before it was ready; {self.last_lines()}"
            if now - begin > self.config.start_timeout_s:
                self._end()
                limit = f"rollout.server.start_timeout_s={self.config.start_timeout_s:g}"
                return f"was not ready within {limit}; {self.last_lines()}"
            if progress is not None and now - shown > 5:
                shown = now
                progress(f"server {self.index}: {now - begin:.0f} s, {self._process.last_lines(1)[:120]}")
            time.sleep(_POLL_S)
        return None

    def stop(self) -> None:
        """End the process group for good and wait for it. A second call does nothing."""
        with self._lock:
            self._stopped = True
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.stop()

    def last_lines(self) -> str:
        """For messages: what it printed last, and where the rest is."""
        if self._process is None:
            return "it was never started"
        return f"the last lines of {self._process.log}:\n{self._process.last_lines()}"

    def _options(self) -> list[str]:
        config = self.config
        options = ["--model-path", str(self.model.absolute()), "--host", config.host, "--port", str(self._port)]
        options += ["--tp-size", str(config.tensor_parallel), "--dtype", self.dtype, "--skip-server-warmup"]
        if self.banned:
            options += ["--preferred-sampling-params", json.dumps({"logit_bias": bans(self.banned)})]
        if not self.load_weights:
            options += ["--load-format", "dummy"]
        if config.colocated:
            # Without the copy a server that wakes up for a second round, as in an evaluation, has lost its weights.
            options += ["--enable-memory-saver", "--enable-weights-cpu-backup"]
        if config.deterministic:
            options += ["--enable-deterministic-inference"]
        if self.adapters is not None:
            options += self.adapters.options()
        if self.device == "cpu":
            options += ["--device", "cpu", "--attention-backend", "torch_native", "--mm-attention-backend", "sdpa"]
            options += ["--disable-overlap-schedule", "--sleep-on-idle", "--mem-fraction-static", "0.3"]
            options += ["--lora-backend", "torch_native"] if self.adapters is not None else []
        return [*options, *config.args]

    def _environment(self) -> dict[str, str]:
        # Else /health computes a token too, and the router asks for it every minute, also of a server that sleeps.
        environment = _foreign_environment() | {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}
        if self.frozen_vision:
            environment.setdefault("SGLANG_VLM_CACHE_SIZE_MB", VISION_CACHE_MB)
        else:
            environment["SGLANG_VLM_CACHE_SIZE_MB"] = "0"
        if self.device == "cpu":
            # More threads than cores wait for each other in busy loops; compiling takes longer than it saves.
            environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
        else:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus())
        return environment

    def _gpus(self) -> list[str]:
        """All that this machine shows us, this replica's first: it takes those, and can open what a trainer on another
        one shares with it."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        known = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        chosen, size = [str(gpu) for gpu in self.config.gpus] or known, self.config.tensor_parallel
        own = chosen[self.index * size : (self.index + 1) * size]
        if len(own) < size:
            raise ConfigError(
                f"rollout.server.replicas={self.config.replicas} of {size} GPUs each: this machine shows "
                f"{len(known)}; name them in rollout.server.gpus, one more than once if replicas share it"
            )
        return [*own, *(gpu for gpu in known if gpu not in own)]


def stop_all(servers: Sequence[SGLangServer]) -> None:
    """At once: one that hangs is given many seconds, and who stops a job gives it few. A second call does nothing."""
    with ThreadPoolExecutor(max(1, len(servers))) as threads:
        for stopping in [threads.submit(server.stop) for server in servers]:
            stopping.result()


@dataclass
class Router:
    """sglang-router in front of replicas: one URL that spreads requests over them, by the prompts they know."""

    config: ServerConfig
    urls: Sequence[str]
    folder: Path
    keys: Keys
    _process: GuardedProcess | None = None
    url: str = ""

    def start(self) -> None:
        """Start it and wait until it serves. Raises RolloutError."""
        port = free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{port}"
        command = [interpreter(self.config), "-c", _ROUTER]
        command += ["--worker-urls", *self.urls, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--policy", "cache_aware", "--prometheus-port", str(free_port("127.0.0.1")), "--disable-retries"]
        environment = _foreign_environment() | {"ROUTER_KEY": self.keys.api or ""}
        self._process = GuardedProcess(command, self.folder / "router.log", environment)
        deadline = time.monotonic() + 60
        while not answers(f"{self.url}/health"):
            if self._process.exit_code is not None or time.monotonic() > deadline:
                self.stop()
                lines = self._process.last_lines()
                raise RolloutError(f"sglang-router is not ready; the last lines of {self._process.log}:\n{lines}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """A second call does nothing."""
        if self._process is not None:
            self._process.stop()


def need_sglang(config: ServerConfig) -> None:
    """Raises ConfigError where the interpreter of our own servers has no SGLang."""
    code = "import importlib.util, sys; sys.exit(3 if importlib.util.find_spec('sglang') is None else 0)"
    if _run_there(config, code).returncode == 3:
        raise ConfigError(_no_sglang(interpreter(config)))


def nccl_of(config: ServerConfig) -> str:
    """The version of NCCL in the servers' environment; what went wrong where it has none. Raises ConfigError: no such
    program."""
    said = _run_there(config, "import torch; print(*torch.cuda.nccl.version(), sep='.')")
    return (said.stdout or said.stderr).strip().rpartition("\n")[2]


def _run_there(config: ServerConfig, code: str) -> subprocess.CompletedProcess[str]:
    command = [interpreter(config), "-c", code]
    return subprocess.run(command, env=_foreign_environment(), capture_output=True, text=True, check=False)


def interpreter(config: ServerConfig) -> str:
    """The servers' interpreter, absolute, for they run in another folder. Raises ConfigError: no such program."""
    python = shutil.which(config.python or sys.executable)
    if python is None:
        raise ConfigError(f"rollout.server.python='{config.python}': no such program")
    return os.path.abspath(python)


def _no_sglang(python: str) -> str:
    return (
        f"{python} has no SGLang: install it in an environment of its own (python3 -m venv sglang-env && "
        "sglang-env/bin/pip install sglang) and name it with rollout.server.python=sglang-env/bin/python"
    )


def _foreign_environment() -> dict[str, str]:
    """For a process with packages of its own. PYTHONPATH is ours, and what launched our ranks did not launch it: with
    torchrun's variables a server's processes would look for each other at torchrun's store, and each prepare its
    pictures with a single thread."""
    ours = {name for name in os.environ if name == "PYTHONPATH" or name.startswith("TORCHELASTIC_")}
    ours |= _LAUNCHERS | _ALLOCATOR
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ours |= {name for name, value in _TORCHRUN.items() if os.environ.get(name) == value}
    return {name: value for name, value in os.environ.items() if name not in ours} | {"PYTHONSAFEPATH": "1"}


def _write_private(path: Path, text: str) -> None:
    """A file that only this user may read, from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
