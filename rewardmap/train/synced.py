"""SGLang servers kept at the trainer's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from rewardmap.config import ServerConfig
from rewardmap.policy import Policy
from rewardmap.rollout.engine import OnGroup, RolloutError
from rewardmap.rollout.sglang_engine import Replica, SGLangEngine
from rewardmap.rollout.sglang_server import Keys, Progress, Router, SGLangServer
from rewardmap.train.forest import Answers, pack_forest
from rewardmap.train.forward import response_hidden
from rewardmap.train.weight_sync import MEMORY, WeightSync
from rewardmap.types import Problem, RolloutGroup, SamplingParams
from rewardmap_kernels import linear_logprobs


def start_servers(
    policy: Policy, config: ServerConfig, folder: Path, progress: Progress, *, load_weights: bool
) -> tuple[list[SGLangServer], Keys]:
    """Servers of our own, ready to answer. On an error or an interrupt none is left running.

    Raises:
        ConfigError, RolloutError: see ``SGLangServer``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = Keys.create(folder)
    model = folder / "model"
    if load_weights:
        policy.save(model)
    else:
        save_without_weights(policy, model)
    dtype = str(policy.model.dtype).removeprefix("torch.")
    servers = [
        SGLangServer(
            config,
            index,
            model,
            folder,
            keys,
            policy.device.type,
            dtype,
            load_weights,
            policy.freeze_vision,
            policy.banned_token_ids,
        )
        for index in range(config.replicas)
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(progress)
    except BaseException:
        for server in servers:
            server.stop()
        raise
    return servers, keys


def save_without_weights(policy: Policy, folder: Path) -> None:
    """Configuration, tokenizer and image processor: what a server needs that gets its weights from the trainer."""
    config = copy.deepcopy(policy.model.config)
    config.architectures = [type(policy.model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    policy.model.generation_config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)


class SyncedEngine:
    """``RolloutEngine`` on SGLang servers that get the trainer's weights whenever they change."""

    def __init__(self, policy: Policy, config: ServerConfig, folder: Path, progress: Progress) -> None:
        """Start the servers or attach to those named, check them, push the weights as version 0.

        Raises:
            ConfigError, RolloutError: see ``SGLangServer`` and ``check_server``.
        """
        self._policy, self._config = policy, config
        self._router: Router | None = None
        self._asleep = False
        self._sample: tuple[Problem, tuple[int, ...]] | None = None
        self._metrics: dict[str, float] = {}
        servers: list[SGLangServer] = []
        keys = Keys.read(config.keys_file) if config.keys_file else Keys()
        if not config.urls:
            servers, keys = start_servers(policy, config, folder, progress, load_weights=False)
        try:
            if config.router:
                self._router = Router(config, [server.url for server in servers], folder, keys)
                self._router.start()
            self._engine = SGLangEngine(policy, config, servers, keys, self._router.url if self._router else None)
            self._sync = WeightSync(policy, self._engine, folder)
            self._engine.check()
            self._engine.on_restart = self._bring_up
            self.update_weights(0)
        except BaseException:
            self.close()
            for server in servers:
                server.stop()
            raise

    def check(self, problems: Sequence[Problem], max_new_tokens: int) -> None:
        """Whether the servers can take the longest of these. Raises ConfigError."""
        self._engine.check(problems, max_new_tokens)

    def generate(
        self,
        problems: Sequence[Problem],
        group_size: int,
        sampling: SamplingParams,
        on_group: OnGroup | None = None,
    ) -> list[RolloutGroup]:
        """See ``SGLangEngine.generate``. Colocated servers are awake only meanwhile."""
        if self._asleep:
            self._engine.control("/resume_memory_occupation", {"tags": MEMORY})
            self._asleep = False
        groups = self._engine.generate(problems, group_size, sampling, on_group)
        if groups:
            longest = max(groups[0].rollouts, key=lambda rollout: len(rollout.token_ids))
            self._sample = (groups[0].problem, longest.token_ids)
        if self._config.colocated:
            self._engine.control("/release_memory_occupation", {"tags": MEMORY})
            self._asleep = True
        return groups

    def update_weights(self, version: int) -> None:
        """Push the weights, then compare log-probabilities of the last answer with the trainer's own.

        Raises:
            RolloutError: the push failed twice, or the difference is above ``rollout.server.drift_alarm``.
        """
        self._sync.push(version)
        self._asleep = False
        self._engine.update_weights(version)
        self._metrics |= {"sync_seconds": self._sync.seconds}
        if self._sample is not None:
            self._metrics |= self.probe(*self._sample)

    def probe(self, problem: Problem, response: Sequence[int]) -> dict[str, float]:
        """Mean and largest difference in nats between each server's log-probabilities of an answer and the trainer's.

        Raises:
            RolloutError: the mean is above the alarm's threshold.
        """
        here = self._own_logprobs(problem, response)
        there = torch.tensor(self._engine.logprobs(problem, response))
        difference = (there - here).abs()  # [servers, R]
        means = difference.nanmean(dim=1)
        if means.isnan().all():  # nothing but a token that the server cannot score
            return {}
        mean, server = float(means.nan_to_num().max()), int(means.nan_to_num().argmax())
        if mean > self._config.drift_alarm:
            raise RolloutError(
                f"{self._engine.replicas[server].client.url}: after a weight sync its log-probabilities differ from "
                f"the trainer's by {mean:.3g} nats on average over {len(response)} tokens of {problem.uid}, above "
                f"rollout.server.drift_alarm={self._config.drift_alarm:g}: weights or numerics are not the trainer's"
            )
        largest = float(difference.nan_to_num().max())
        return {"sync_drift_mean": mean, "sync_drift_max": largest}

    def metrics(self) -> dict[str, float]:
        """``sync_seconds``, ``sync_drift_mean`` and ``sync_drift_max`` in nats; see ``RolloutEngine``."""
        taken, self._metrics = self._metrics, {}
        return taken

    def close(self) -> None:
        """End servers of our own. A second call does nothing."""
        if hasattr(self, "_sync"):
            self._sync.close()
        if hasattr(self, "_engine"):
            self._engine.close()
        if self._router is not None:
            self._router.stop()

    def _bring_up(self, replica: Replica) -> None:
        """The current weights for a server that was started again."""
        assert self._engine.version is not None
        self._sync.push(self._engine.version, [replica])

    @torch.no_grad()
    def _own_logprobs(self, problem: Problem, response: Sequence[int]) -> torch.Tensor:
        """[R] at temperature 1."""
        answers = Answers(self._policy.encode(problem), problem.image, (tuple(response),), (0,))
        [forest] = pack_forest([answers], max_tokens=1 << 30)
        hidden = response_hidden(self._policy, forest)
        weight = self._policy.model.lm_head.weight
        return linear_logprobs(hidden, weight, forest.target.to(hidden.device))[0].float().cpu()
