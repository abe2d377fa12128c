"""Training on recorded rollouts with 1, 2 or 4 processes: ``python parallel_job.py FOLDER SIZE...``.

Started by ``test_parallel.py``. Imports once, then forks the ranks of each size one after the other; rank 0 writes
``FOLDER/<variant>-<size>.safetensors`` with the losses, gradient norms, gradients and weights of ten steps.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText

from rewardmap import policy as policy_module
from rewardmap.config import Config, ParallelConfig, PolicyConfig, RolloutConfig, StageConfig, TrainConfig
from rewardmap.config_file import load_config
from rewardmap.curriculum import Curriculum
from rewardmap.policy import Policy
from rewardmap.rollout.engine import OnGroup
from rewardmap.rollout.local import LocalEngine
from rewardmap.tiny import build_tiny
from rewardmap.train import checkpoint as checkpointing
from rewardmap.train import run
from rewardmap.train.ahead import OneStepOff
from rewardmap.train.checkpoint import Checkpoints, find_damage, list_checkpoints, load_training_state, read_state
from rewardmap.train.parallel import needs_sharding, prepare_policy, shard_policy, whole
from rewardmap.train.ranks import Ranks, SharedRollouts, join_ranks
from rewardmap.train.reference import make_reference
from rewardmap.train.trainer import Trainer
from rewardmap.transit.draw import draw_map, encode_png
from rewardmap.transit.generate import generate_network
from rewardmap.types import Problem, Rollout, RolloutGroup

STEPS, GROUP = 10, 3
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "exact": {"double": True, "sgd": True},
    "updates": {"double": True, "sgd": True, "train": {"updates_per_step": 2}},
    "checkpointing": {"parallel": {"activation_checkpointing": True}},
    "hybrid": {"parallel": {"shard": 2}},
    "offload": {"parallel": {"offload": True}},
    "lora": {"policy": {"lora_rank": 4}},
    "reference": {"double": True, "sgd": True, "train": {"kl_coef": 0.3}},
    "reference tower": {
        "double": True,
        "sgd": True,
        "train": {"kl_coef": 0.3},
        "policy": {"freeze_vision": False},
        "parallel": {"shard": 2, "offload": True},
    },
    "tower": {"policy": {"freeze_vision": False}},
    "tower checkpointing": {"policy": {"freeze_vision": False}, "parallel": {"activation_checkpointing": True}},
    "everything": {
        "double": True,
        "sgd": True,
        "policy": {"lora_rank": 4, "freeze_vision": False},
        "parallel": {"shard": 2, "offload": True, "activation_checkpointing": True},
    },
}
# The float64 run beside each float32 one: what rounding does to a run is measured against it.
VARIANTS |= {f"{name} wide": {**VARIANTS[name], "double": True} for name in ("plain", "lora", "tower")}


class Recorded:
    """An engine that replays answers: random tokens, seeded by the step."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.step = policy, 0

    def generate(
        self, problems: Sequence[Problem], group_size: int, sampling: Any, on_group: OnGroup | None = None
    ) -> list[RolloutGroup]:
        rng = np.random.default_rng([5, self.step])
        self.step += 1
        groups = [RolloutGroup(p, self.policy.encode(p).token_ids, self._answers(rng)) for p in problems]
        for index, group in enumerate(groups):
            if on_group is not None:
                on_group(index, group)
        return groups

    def _answers(self, rng: np.random.Generator) -> tuple[Rollout, ...]:
        stop, words = self.policy.stop_token_ids[0], ("yes", "no", "\\boxed{yes}", "\\boxed{no}")
        rollouts = []
        for length in rng.integers(1, 9, GROUP):
            ids = (*map(int, rng.integers(0, 200, length)), stop)
            nats = tuple(map(float, np.float32(rng.normal(-3, 1, len(ids)))))
            rollouts.append(Rollout(ids, nats, str(rng.choice(words)), "stop", 0))
        return tuple(rollouts)

    def update_weights(self, version: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


def make_problems() -> tuple[list[Problem], dict[str, Any]]:
    problems, networks = [], {}
    for place in range(4):
        network = generate_network("tiny-easy", np.random.default_rng(place), f"a/{place}")
        networks[network.network_id] = network.metro_data()
        picture = encode_png(draw_map(network))
        for number, text in enumerate(("Is it red?", "Is the blue line longer than that?")):
            problems.append(Problem(f"q{place}{number}", picture, text, "TorF1", number, "", "", f"a/{place}", "easy"))
    return problems, networks


def make_trainer(variant: dict[str, Any], ranks: Ranks, kind: type[Trainer] = Trainer) -> Trainer:
    policy_config = PolicyConfig(device="cpu", **variant.get("policy", {}))
    config = Config(
        policy=policy_config,
        rollout=RolloutConfig(group_size=GROUP, max_new_tokens=12, **variant.get("rollout", {})),
        train=TrainConfig(
            stages=(StageConfig(name="all", question_kinds=("TorF1",)),),
            prompts_per_step=5, learning_rate=1e-3, max_tokens_per_micro_batch=150, objective="dapo",
            **variant.get("train", {}),
        ),
        parallel=ParallelConfig(**variant.get("parallel", {})),
    )  # fmt: skip
    if ranks.size % (config.parallel.shard or 1):
        config = replace(config, parallel=replace(config.parallel, shard=0))
    policy = build_tiny(3, policy_config.freeze_vision)
    if variant.get("double"):
        policy.model.double()
    sharded = needs_sharding(config.parallel, ranks, "float32")
    trainer = put_together(config, policy, ranks, torch.device("cpu") if sharded else None, kind)
    if variant.get("sgd"):
        trainer.optimizer = torch.optim.SGD(trainer.optimizer.param_groups[0]["params"], lr=0.1)
    return trainer


def put_together(
    config: Config, policy: Policy, ranks: Ranks, device: torch.device | None, kind: type[Trainer] = Trainer
) -> Trainer:
    """The trainer of recorded answers; ``device``: where the policy is split over the ranks, None for a whole one."""
    shard = None
    if device is not None:
        shard = partial(shard_policy, parallel=config.parallel, ranks=ranks, device=device)
    reference = make_reference(policy, config, policy, shard)
    prepare_policy(policy, config)
    forward = None if shard is None else shard(policy)
    problems, networks = make_problems()
    curriculum = Curriculum(problems, config.train.stages, config.train.prompts_per_step, seed=0)
    return kind(
        config,
        policy,
        Recorded(policy),
        {"reference": networks},
        curriculum,
        ranks=ranks,
        forward=forward,
        reference=reference,
    )


def run_variant(folder: Path, name: str, ranks: Ranks) -> None:
    trainer = make_trainer(VARIANTS[name], ranks)
    rows, gradients = [], {}
    for step in range(STEPS):
        if step == STEPS - 1:
            keep_gradients(trainer, gradients)
        rows.append(trainer.train_step())
    if trainer.reference is not None and ranks.size > 1:
        frozen = trainer.reference.frozen
        assert frozen is not None and all(isinstance(p, DTensor) for p in frozen.text_model.parameters())
    state = get_model_state_dict(trainer.policy.model, options=StateDictOptions(full_state_dict=True))
    if ranks.is_first:
        weights = {key: value.clone() for key, value in state.items()}
        numbers = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in ("loss", "grad_norm")}
        save_file(
            numbers | {f"weight.{k}": v for k, v in weights.items()} | {f"grad.{k}": v for k, v in gradients.items()},
            folder / f"{name}-{ranks.size}.safetensors",
        )
        same = [{key: row[key] for key in ("reward", "packed_tokens", "logical_tokens")} for row in rows]
        (folder / f"{name}-{ranks.size}.json").write_text(json.dumps(same))


def run_sampling(folder: Path, ranks: Ranks) -> None:
    """Answers sampled by the ranks themselves, on sharded weights; the last step has one question only. The trained
    tower runs once a map, and ranks hold different numbers of maps."""
    policy_module.PATCHES_AT_ONCE = 1  # in this process, which ends with its job
    trainer = make_trainer({"policy": {"freeze_vision": False}, "train": {"entropy_coef": 0.01}}, ranks)
    policy = trainer.policy
    trainer.engine = SharedRollouts(LocalEngine(policy, 8), ranks, policy.whole_weights)
    rows = [trainer.train_step() for _ in range(2)]
    trainer.curriculum._batch = 1
    rows.append(trainer.train_step())
    everyone = ranks.gather(
        [{key: row[key] for key in ("loss", "grad_norm", "rollout_drift", "reward")} for row in rows]
    )
    if ranks.is_first:
        (folder / f"sampling-{ranks.size}.json").write_text(json.dumps(everyone))


def run_ahead(folder: Path, ranks: Ranks) -> None:
    """One step off: answers are gathered in a thread while the trainer's own collectives run."""
    # An engine that is not the trainer's model is asked in a thread.
    rollout = {"staleness": 1, "importance_correction": "truncate", "engine": "sglang"}
    trainer = make_trainer({"rollout": rollout}, ranks, OneStepOff)
    trainer.engine = SharedRollouts(trainer.engine, ranks)
    rows = [trainer.train_step() for _ in range(5)]
    everyone = ranks.gather([{key: row[key] for key in ("loss", "grad_norm", "reward")} for row in rows])
    if ranks.is_first:
        (folder / f"ahead-{ranks.size}.json").write_text(json.dumps(everyone))


def run_checkpoint(folder: Path, ranks: Ranks) -> None:
    """Reads what the job before wrote, whatever its number of ranks, makes a step and writes in turn."""
    trainer = make_trainer({"train": {"entropy_coef": 0.01}}, ranks)
    policy, optimizer, place = trainer.policy, trainer.optimizer, folder / "checkpoints"
    present = list_checkpoints(place)
    if present:
        load_training_state(present[-1], policy, optimizer)
        assert read_state(present[-1]) == {"jobs": len(present)}
        expected = load_file(folder / "moments.safetensors")
        found = moments(trainer)
        assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    trainer.train_step()
    if ranks.size == 2:  # slow storage: what one rank does alone takes longer than the others would wait for a message
        ranks, seal = replace(ranks, timeout_seconds=10.0), checkpointing._seal
        checkpointing._seal = lambda folder: seal(folder) if time.sleep(14) is None else None
    with Checkpoints(place, keep=9, ranks=ranks) as checkpoints:
        checkpoints.save(len(present) + 1, policy, optimizer, {"jobs": len(present) + 1})
    state = get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True))
    kept = moments(trainer)
    if ranks.is_first:
        newest = list_checkpoints(place)[-1]
        assert find_damage(newest) is None
        assert len(list((newest / "training").glob("*.safetensors"))) == ranks.size
        saved = AutoModelForImageTextToText.from_pretrained(newest).state_dict()
        assert saved.keys() == state.keys() and all(torch.equal(saved[key], state[key]) for key in saved)
        save_file(kept, folder / "moments.safetensors")


def moments(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The optimizer's whole state."""
    names = {parameter: name for name, parameter in trainer.policy.model.named_parameters()}
    states = trainer.optimizer.state.items()
    return {f"{names[p]}.{key}": whole(value).clone() for p, state in states for key, value in state.items()}


def keep_gradients(trainer: Trainer, into: dict[str, torch.Tensor]) -> None:
    """Fills ``into`` with the whole gradients of the next step."""
    update = trainer._update

    def kept(*arguments: Any, **named: Any) -> Any:
        for name, parameter in trainer.policy.model.named_parameters():
            if parameter.grad is not None:
                into[name] = whole(parameter.grad).clone()
        return update(*arguments, **named)

    trainer._update = kept  # type: ignore[method-assign]


def one_rank(folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    with join_ranks(120) as ranks:
        for name in names:
            if name.endswith(" wide") and ranks.size > 1:
                continue
            if name == "sampling":
                run_sampling(folder, ranks)
            elif name == "ahead":
                run_ahead(folder, ranks)
            elif name == "checkpoint":
                run_checkpoint(folder, ranks)
            else:
                run_variant(folder, name, ranks)


def whole_run(folder: Path) -> None:
    """``rewardmap train`` from its beginning to its report, on all ranks."""
    torch.set_num_threads(1)
    settings = [
        "data.train_maps=3", "data.test_maps=3", "train.prompts_per_step=5", "rollout.group_size=2",
        "train.checkpoint_every=1", "train.kl_coef=0.05",
        "eval.max_problems=3", "eval.samples=0", "eval.text_only=false",
        "train.stages=[{name='warm', kind='sft', steps=0, checkpoint='shipped'}, {name='all', steps=2}]",
    ]  # fmt: skip
    run.train(load_config("tiny", settings), folder / "run", console=Console())


def fork_ranks(size: int, work: Any) -> None:
    """``work()`` in ``size`` processes that torch.distributed finds by its environment variables; raises when one
    fails. A child of a process with other threads inherits their locks and not them, so there must be none."""
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    if len(threads) > 1:
        raise SystemExit(f"fork from one thread only, not from {threads}; conftest.py and OMP_NUM_THREADS=1 see to it")
    faulthandler.enable()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise SystemExit(f"ranks of {size} ended with {codes}")


if __name__ == "__main__":
    out, *sizes = sys.argv[1:]
    chosen = os.environ.get("VARIANTS", ",".join(VARIANTS)).split(",")
    for count in map(int, sizes):
        fork_ranks(count, lambda: whole_run(Path(out)) if chosen == ["run"] else one_rank(Path(out), chosen))
