"""SGLang servers kept at the trainer's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock

import torch

from rewardmap.config import ServerConfig
from rewardmap.policy import Policy
from rewardmap.rollout.engine import OnGroup, RolloutError
from rewardmap.rollout.sglang_adapters import Adapters
from rewardmap.rollout.sglang_engine import Replica, SGLangEngine
from rewardmap.rollout.sglang_server import Keys, Progress, Router, SGLangServer, stop_all
from rewardmap.train.adapter_sync import AdapterSync
from rewardmap.train.forest import Answers, pack_forest
from rewardmap.train.forward import Vision, response_hidden
from rewardmap.train.parallel import Forward, split_again
from rewardmap.train.ranks import ALONE, Ranks, gather_groups
from rewardmap.train.weight_sync import WeightSync, check_here, check_nccl
from rewardmap.types import Problem, RolloutGroup, SamplingParams
from rewardmap_kernels import linear_logprobs


def start_servers(
    policy: Policy,
    config: ServerConfig,
    folder: Path,
    progress: Progress,
    *,
    load_weights: bool,
    dtype: torch.dtype | None = None,
    adapters: Adapters | None = None,
) -> tuple[list[SGLangServer], Keys]:
    """Servers of our own, ready to answer. On an error or an interrupt none is left running.

    Args:
        dtype: they compute in; None: the model's own.
        adapters: that they can apply.

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
    name = str(dtype or policy.model.dtype).removeprefix("torch.")
    servers = [
        SGLangServer(
            config,
            index,
            model,
            folder,
            keys,
            policy.device.type,
            name,
            load_weights,
            policy.freeze_vision,
            policy.banned_token_ids,
            adapters,
        )
        for index in range(config.replicas)
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(progress)
    except BaseException:
        stop_all(servers)
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
    """``RolloutEngine`` on SGLang servers that get the trainer's weights whenever they change.

    Under several ranks every rank makes every call. The first rank of each node starts servers there, or rank 0 alone
    speaks to those named in ``urls``; such a rank asks for its share of the problems, then all ranks hold all groups.
    """

    def __init__(
        self,
        policy: Policy,
        config: ServerConfig,
        folder: Path,
        progress: Progress,
        *,
        dtype: torch.dtype | None = None,
        ranks: Ranks = ALONE,
        forward: Forward | None = None,
        ahead: bool = False,
        adapters: Adapters | None = None,
    ) -> None:
        """Start the servers or attach to those named, check them, push the weights as version 0.

        Args:
            dtype: the servers compute in; None: the model's own.
            forward: of a sharded policy.
            ahead: answers are sampled while the policy trains, so that shards cannot be gathered meanwhile.
            adapters: what to send instead of all weights with the adapters merged in.

        Raises:
            ConfigError, RolloutError: see ``SGLangServer``, ``check_server`` and ``AdapterSync``.
            OtherRankError: either of them, on another rank.
        """
        self._policy, self._config = policy, config
        self._ranks = ranks.apart()  # answers may be gathered while the trainer's collectives run
        self._forward = forward or partial(response_hidden, policy)
        leads = ranks.is_first if config.urls else ranks.local_rank == 0
        self._leaders = [rank for rank, does in enumerate(ranks.gather(leads)) if does]
        self._asked = False
        self._sample: tuple[Problem, tuple[int, ...]] | None = None
        self._metrics: dict[str, float] = {}
        self._ended: SimpleQueue[tuple[Replica, Future[None]]] = SimpleQueue()
        self._pushing, self._closed = Lock(), False
        self._router: Router | None = None
        self._servers: list[SGLangServer] = []
        own = folder if ranks.is_first else folder / f"rank-{ranks.rank}"
        try:
            keys = self._ranks.patiently(lambda: self._start(own, progress, dtype, adapters) if leads else Keys())
            asked = config if leads else replace(config, urls=())
            router = self._router.url if self._router else None
            self._engine = SGLangEngine(policy, asked, self._servers, keys, router, adapters)
            if adapters is None:
                self._sync = WeightSync(policy, self._engine, own, dtype, self._ranks)
            else:
                self._sync = AdapterSync(policy, self._engine, own, adapters, dtype, self._ranks)
            self.check([], 0)
            if forward is None or not ahead:
                self._engine.on_restart = self._bring_up
            self.update_weights(0)
        except BaseException:
            self.close()
            raise

    def check(self, problems: Sequence[Problem], max_new_tokens: int) -> None:
        """Whether the servers can take the longest of these. Raises ConfigError."""
        self._ranks.patiently(lambda: self._engine.check(problems, max_new_tokens) if self._engine.replicas else None)

    def generate(
        self,
        problems: Sequence[Problem],
        group_size: int,
        sampling: SamplingParams,
        on_group: OnGroup | None = None,
    ) -> list[RolloutGroup]:
        """See ``SGLangEngine.generate``. Colocated servers are awake meanwhile, and from an update before it."""
        alone = self._ranks.size == 1
        mine = self._share(problems)
        self._asked |= sampling.temperature > 0  # greedily only an evaluation asks, or a baseline beside its answers
        self._make_room()
        groups = self._ranks.patiently(
            lambda: self._generate(mine, group_size, sampling, on_group if alone else None), self._push_to_restarted
        )
        if not alone:
            groups = gather_groups(self._ranks, problems, groups, on_group)
        if groups:
            longest = max(groups[0].rollouts, key=lambda rollout: len(rollout.token_ids))
            self._sample = (groups[0].problem, longest.token_ids)
        return groups

    def update_weights(self, version: int) -> None:
        """Push the weights, then compare log-probabilities of the last answer with the trainer's own.

        Raises:
            RolloutError: the push failed twice, or the difference is above ``rollout.server.drift_alarm``.
            OtherRankError: either of them, on another rank.
        """
        self._make_room()
        self._sync.push(version)
        self._engine.update_weights(version, self._sync.adapter(version))
        self._metrics |= {"sync_seconds": self._sync.seconds}
        restarts = self._ranks.sum({"servers": sum(replica.restarts for replica in self._engine.replicas)})["servers"]
        if restarts:
            self._metrics["server_restarts"] = int(restarts)
        if self._sample is not None:
            self._metrics |= self.probe(*self._sample)
        if not self._asked:  # for answers to train on, since the last update: what trains now is a supervised stage
            self._ranks.patiently(self._sleep)
        self._asked = False

    def probe(self, problem: Problem, response: Sequence[int]) -> dict[str, float]:
        """Mean and largest difference in nats between each server's log-probabilities of an answer and the trainer's.

        Raises:
            RolloutError: the mean is above the alarm's threshold.
        """
        here = self._own_logprobs(problem, response)
        mine = self._ranks.patiently(lambda: self._drift(problem, response, here), self._push_to_restarted)
        found = self._ranks.gather(mine)
        servers = [drift for drift in found if drift]
        return {name: max(drift[name] for drift in servers) for name in (servers[0] if servers else ())}

    def metrics(self) -> dict[str, float]:
        """``sync_seconds``, ``sync_drift_mean`` and ``sync_drift_max`` in nats, ``server_restarts`` if there were
        any; see ``RolloutEngine``."""
        taken, self._metrics = self._metrics, {}
        return taken

    def close(self) -> None:
        """End servers of our own. A second call does nothing."""
        self._closed = True
        self._refuse_restarted()
        if hasattr(self, "_sync"):
            self._sync.close()
        if hasattr(self, "_engine"):
            if self._config.urls and self._engine.replicas:  # as they were found
                with suppress(RolloutError):
                    self._engine.wake()
            self._engine.close()
        if self._router is not None:
            self._router.stop()
        stop_all(self._servers)

    def _start(
        self, folder: Path, progress: Progress, dtype: torch.dtype | None, adapters: Adapters | None
    ) -> Keys:
        """Servers of our own and the router, where the configuration asks for them."""
        config = self._config
        if config.urls:
            if config.sync == "tensor" and self._policy.device.type == "cuda":
                check_here(config.urls)
            return Keys.read(config.keys_file) if config.keys_file else Keys()
        if config.sync == "distributed" and self._policy.device.type == "cuda":
            check_nccl(config)
        self._servers, keys = start_servers(
            self._policy, config, folder, progress, load_weights=False, dtype=dtype, adapters=adapters
        )
        if config.router:
            self._router = Router(config, [server.url for server in self._servers], folder, keys)
            self._router.start()
        return keys

    def _share(self, problems: Sequence[Problem]) -> Sequence[Problem]:
        """What this rank's servers are asked."""
        if self._ranks.rank not in self._leaders:
            return ()
        return Ranks(self._leaders.index(self._ranks.rank), len(self._leaders)).share(problems)

    def _make_room(self) -> None:
        """Colocated servers wake up once no rank of theirs computes or keeps memory it does not use."""
        if self._config.colocated:
            torch.cuda.empty_cache()
            self._ranks.wait()

    def _generate(
        self, problems: Sequence[Problem], group_size: int, sampling: SamplingParams, on_group: OnGroup | None
    ) -> list[RolloutGroup]:
        groups: list[RolloutGroup] = []
        if problems:
            self._engine.wake()
            groups = self._engine.generate(problems, group_size, sampling, on_group)
        self._sleep()
        return groups

    def _sleep(self) -> None:
        if self._config.colocated:
            self._engine.sleep()

    def _bring_up(self, replica: Replica) -> None:
        """The current weights for a server that was started again; called in a thread of the generation."""
        done: Future[None] = Future()
        self._ended.put((replica, done))
        if self._closed:  # nobody will look there any more
            self._refuse_restarted()
        elif self._ranks.size == 1:
            with self._pushing:  # one after the other: pushes share a process group, and a folder
                self._push_to_restarted()
        done.result()

    def _refuse_restarted(self) -> None:
        for _, done in self._take_restarted():
            done.set_exception(RolloutError("the run ends"))

    def _take_restarted(self) -> list[tuple[Replica, Future[None]]]:
        taken = []
        with suppress(Empty):
            while True:
                taken.append(self._ended.get_nowait())
        return taken

    def _push_to_restarted(self) -> None:
        """Every rank gathers, those that brought a server up send."""
        waiting = self._take_restarted()
        if not self._ranks.any(bool(waiting)):
            return
        assert self._engine.version is not None
        try:
            self._sync.push(self._engine.version, [replica for replica, _ in waiting])
        except BaseException as error:
            for _, done in waiting:
                done.set_exception(error)
            raise
        for _, done in waiting:
            done.set_result(None)

    def _drift(self, problem: Problem, response: Sequence[int], here: torch.Tensor) -> dict[str, float]:
        """Of this rank's servers; nothing without any."""
        if not self._engine.replicas:
            return {}
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

    @torch.no_grad()
    def _own_logprobs(self, problem: Problem, response: Sequence[int]) -> torch.Tensor:
        """[R] at temperature 1. Every rank computes it, because each holds a part of the weights."""
        answers = Answers(self._policy.encode(problem), problem.image, (tuple(response),), (0,))
        [forest] = pack_forest([answers], max_tokens=1 << 30)
        hidden = self._forward(forest, Vision(self._policy, [forest]))
        weight = self._policy.model.lm_head.weight
        logprobs = linear_logprobs(hidden, weight, forest.target.to(hidden.device))[0].float().cpu()
        split_again(self._policy)
        return logprobs
