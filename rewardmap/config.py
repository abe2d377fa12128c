"""The configuration: a tree of frozen dataclasses. Defaults are the paper's recipe (arXiv 2510.02240) where it states
one; the file shipped for small machines is ``rewardmap/configs/tiny.toml``. ``rewardmap.config_file`` reads and writes.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from rewardmap.config_numbers import NUMBER, Beta, Count, NotNegative, Positive, Real, Share, Whole
from rewardmap.types import KINDS

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class ConfigError(ValueError):
    """A wrong configuration: names the key, the value and the remedy."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    path: str | None = None
    """Folder of a ReasonMap-Train data set, from the working directory, or ``hf://datasets/OWNER/NAME``, which is
    fetched. None: a seeded one is generated into the run folder."""
    train_split: str = "train"
    test_split: str = "test"
    level: Literal["tiny", "full"] = "tiny"
    """Size of generated maps; ignored with ``path``."""
    train_maps: Count = 300
    test_maps: Count = 150
    seed: Whole = 0
    """Seed of the generated maps and questions."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """What a malformed row does: stop before training, or be skipped and counted."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PolicyConfig:
    model: str = "tiny"
    """``tiny``: the small Qwen2.5-VL built here. Else a folder or hub name, e.g. ``Qwen/Qwen2.5-VL-7B-Instruct``."""
    device: str = "auto"
    """``auto``: cuda where there is one, else cpu."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    freeze_vision: bool = True
    """The vision tower does not train: its outputs are computed once per map and run."""
    freeze: tuple[str, ...] = ()
    """Names of parameters that do not train, ``*`` for any text: ``*.embed_tokens.*``, ``lm_head.*``. Nor do their
    adapters."""
    lora_rank: Whole = 0
    """Train adapters of this rank instead of the decoder's weights (needs ``peft``); 0: train the weights."""
    lora_alpha: Count = 16
    """Adapters are scaled by ``lora_alpha / lora_rank``."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    min_pixels: Count = 3136
    """Smallest picture the processor makes, in pixels."""
    max_pixels: Count = 12_845_056
    """Largest picture the processor makes, in pixels (16,384 visual tokens of 28 x 28)."""
    image_cache_gb: NotNegative = 8.0
    """Decoded pictures kept in host memory at most, by all ranks of a node together, and as much again of a frozen
    tower's outputs by each."""

    def __post_init__(self) -> None:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels}: not more than max_pixels={self.max_pixels}")

    @property
    def image_cache_bytes(self) -> int:
        return int(self.image_cache_gb * 2**30)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ServerConfig:
    """SGLang servers: started by us, or running ones named in ``urls``. ``docs/rollouts.md`` explains each choice."""

    urls: tuple[str, ...] = ()
    """Servers that run already, one URL each. Empty: start our own."""
    keys_file: str | None = None
    """JSON with ``api_key`` and ``admin_key`` of the servers in ``urls`` (``rewardmap serve`` writes one)."""
    python: str | None = None
    """Interpreter of the environment that holds SGLang. None: this one."""
    replicas: Count = 1
    tensor_parallel: Count = 1
    """GPUs that one replica spreads over."""
    gpus: tuple[Whole, ...] = ()
    """GPUs of our own servers, in order, ``tensor_parallel`` a replica. Empty: the trainer's own view of them."""
    host: str = "127.0.0.1"
    """Address our own servers listen on; another than loopback opens them to the network, behind their keys."""
    router: bool = False
    """Send requests through sglang-router, installed beside SGLang. Otherwise this client spreads them itself."""
    colocated: bool = False
    """Servers share the trainer's GPUs: they move to host memory while it trains (``--enable-memory-saver``)."""
    deterministic: bool = False
    """``--enable-deterministic-inference``: answers do not depend on what else is in the batch."""
    args: tuple[str, ...] = ()
    """Further options of ``sglang.launch_server``, as on its command line."""
    concurrency: Count = 64
    """Groups in flight at each replica."""
    start_timeout_s: Positive = 900.0
    request_timeout_s: Positive = 600.0
    """For one group, retries included; and for each call of a weight sync."""
    sync: Literal["tensor", "distributed", "disk"] = "tensor"
    """How new weights reach the servers: over CUDA IPC (by value on a CPU), broadcast, or as files both see."""
    lora_sync: Literal["merged", "adapter"] = "merged"
    """What is sent where ``policy.lora_rank`` trains adapters: all weights with the adapters multiplied in, or the
    adapters alone, which servers then apply themselves (``--enable-lora``, SGLang 0.5.22 on)."""
    bucket_mb: Count = 512
    """Largest piece of the weights held twice during a sync."""
    drift_alarm: Positive = 0.1
    """Mean difference of log-probabilities in nats, servers against trainer, above which a run stops."""

    def __post_init__(self) -> None:
        if self.gpus and len(self.gpus) != self.replicas * self.tensor_parallel:
            raise ValueError(
                f"gpus={list(self.gpus)}: {self.replicas} replicas of {self.tensor_parallel} GPUs need "
                f"{self.replicas * self.tensor_parallel}"
            )
        if self.colocated and self.sync == "distributed":
            raise ValueError(
                "sync='distributed' with colocated=true: NCCL takes one process a GPU; choose sync='tensor' or 'disk'"
            )
        if self.urls and self.router:
            raise ValueError("router=true is for servers we start; with urls, name the servers themselves")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RolloutConfig:
    engine: Literal["local", "sglang"] = "local"
    """``local``: in the trainer's process. ``sglang``: servers, as ``server`` says."""
    group_size: Count = 8
    temperature: Positive = 1.0
    top_p: Share = 1.0
    top_k: Annotated[int, NUMBER, Field(ge=-1)] = -1
    """Draw from so many likeliest tokens only; -1 or 0: from all."""
    max_new_tokens: Count = 512
    batch_sequences: Count = 256
    """Answers decoded side by side by the local engine."""
    batch_tokens: Count = 131_072
    """Tokens of these answers' prompts, padding included; where they are more, fewer answers are decoded at a time."""
    importance_correction: Literal["none", "truncate", "mask"] = "none"
    """Weighs each token by its probability at the trainer over that at the engine: ``truncate`` caps the weight at
    ``importance_max``, ``mask`` leaves tokens above it out. For engines whose numerics are not the trainer's."""
    importance_max: Positive = 2.0
    staleness: Annotated[Literal[0, 1], NUMBER] = 0
    """Steps by which answers may lag behind the weights they train. 1: the next step's answers are sampled while this
    one trains (one-step-off); needs ``importance_correction``, and servers on GPUs of their own to gain time."""
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        if self.staleness and self.importance_correction == "none":
            raise ValueError(
                "staleness=1 trains on answers of the weights before: set importance_correction='truncate' or 'mask'"
            )
        if self.staleness and self.server.colocated:
            raise ValueError("staleness=1 samples while it trains: not with server.colocated=true, which takes turns")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RewardConfig:
    mode: Literal["reference", "paper", "graph"] = "reference"
    weight_on: Literal["reward", "advantage"] = "advantage"
    """Where the difficulty weight acts. On the reward, division by the group's deviation cancels it exactly."""
    alpha: Real = 0.5
    """Weight of the detail reward; 0 leaves format and correctness."""
    map_weights: tuple[Real, Real, Real] = (1.0, 1.2, 1.5)
    """Difficulty weight of easy, middle and hard maps."""
    transfer_weight: Real = 0.5
    """Added to the difficulty weight of planning questions that need a transfer."""
    function: str | None = None
    """A reward of your own, ``module:function`` of (Problem, response), in place of format, correctness and detail.
    ``mode`` still says what is right."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StageConfig:
    name: str
    kind: Literal["sft", "rl"] = "rl"
    steps: Whole = 100
    """Steps of the stage; with ``advance_at`` the most it may take."""
    question_kinds: tuple[str, ...] = KINDS
    pools: Literal["uniform", "adaptive"] = "uniform"
    """``adaptive``: questions by kind, map level and transfers; those whose groups disagree most are drawn most."""
    maps_per_step: Whole = 0
    """Draw each batch from so few maps, whose pictures then stand once for all questions about them; 0: from any."""
    replay: Annotated[float, NUMBER, Field(ge=0, le=1)] = 0.0
    """Share of each batch drawn from ``replay_from`` instead of ``question_kinds`` (0..1)."""
    replay_from: Literal["all", "earlier"] = "all"
    """``all``: every kind of the data. ``earlier``: the kinds of the stages before this one."""
    advance_at: Share | None = None
    """Gate: the stage ends once this share of the answers to its own kinds is right (0..1)."""
    advance_window: Count = 10
    """Steps over which the gate averages."""
    min_steps: Whole = 0
    """The gate stays shut before so many steps."""
    learning_rate: NotNegative | None = None
    """Overrides ``train.learning_rate`` inside the stage."""
    group_size: Count | None = None
    """Overrides ``rollout.group_size`` inside the stage."""
    reward_mode: Literal["reference", "paper", "graph"] | None = None
    """Overrides ``reward.mode`` inside the stage; the next four likewise."""
    weight_on: Literal["reward", "advantage"] | None = None
    alpha: Real | None = None
    map_weights: tuple[Real, Real, Real] | None = None
    transfer_weight: Real | None = None
    checkpoint: str | None = None
    """Only for ``sft``: load these weights instead of training (``shipped``: the tiny warm start in the package)."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.question_kinds if kind not in KINDS]
        if unknown or not self.question_kinds:
            raise ValueError(f"question_kinds={list(self.question_kinds)}: choose from {', '.join(KINDS)}")
        if self.maps_per_step and (self.pools == "adaptive" or self.replay):
            raise ValueError(
                f"maps_per_step={self.maps_per_step}: 0, or so many maps; adaptive pools and replay draw from all maps"
            )
        if self.min_steps > self.steps:
            raise ValueError(f"min_steps={self.min_steps}: not more than steps={self.steps}")
        if self.checkpoint is not None and self.kind != "sft":
            raise ValueError("checkpoint is only for a stage of kind 'sft'")
        if self.kind == "sft" and (self.advance_at is not None or self.pools == "adaptive"):
            raise ValueError("advance_at and adaptive pools need sampled answers: only for a stage of kind 'rl'")


ORDERS: dict[str, tuple[tuple[str, tuple[str, ...], int], ...]] = {
    "paper": (
        ("true-false", ("TorF1", "TorF2"), 79),
        ("counting", ("Counting2", "Counting3"), 40),
        ("local-counting", ("Counting1",), 41),
        ("planning", ("planning",), 43),
    ),
    "coarse": (("plus", tuple(kind for kind in KINDS if kind != "planning"), 160), ("planning", ("planning",), 43)),
    "fine": (
        ("true-false-1", ("TorF1",), 42),
        ("true-false-2", ("TorF2",), 37),
        ("global-counting", ("Counting3",), 1),
        ("line-counting", ("Counting2",), 39),
        ("local-counting", ("Counting1",), 41),
        ("planning", ("planning",), 43),
    ),
}
"""Orders of the published code: (name, kinds, steps) of each stage. One pass over ReasonMap-Train is 203 updates of 16
questions; how they fall to the stages is estimated from the published counts of kinds."""


def ordered_stages(order: str, steps: int = 203) -> tuple[StageConfig, ...]:
    """The stages of one of ``ORDERS``, ``steps`` in all, shared out as there. Raises ConfigError for another name."""
    if order not in ORDERS:
        raise ConfigError(f"train.stages='{order}': a list of stages, or one of the orders {', '.join(ORDERS)}")
    parts = ORDERS[order]
    whole = sum(share for _, _, share in parts)
    ends = [round(steps * sum(share for _, _, share in parts[: i + 1]) / whole) for i in range(len(parts))]
    return tuple(
        StageConfig(name=name, question_kinds=kinds, steps=end - begin)
        for (name, kinds, _), begin, end in zip(parts, [0, *ends], ends, strict=False)
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    seed: Whole = 0
    stages: tuple[StageConfig, ...] = dataclasses.field(default_factory=lambda: ordered_stages("paper"))
    """In order. In a file also the name of one of ``ORDERS``, with ``train.steps`` for its length."""
    prompts_per_step: Count = 16
    updates_per_step: Count = 1
    """Updates of the weights on a step's answers, each on so many of its questions (mini-batches), in a stage of kind
    ``rl``. From 2 on the ratio is taken against the engine's log-probabilities, which ``clip_eps_low`` and
    ``clip_eps_high`` then bound, unless ``rollout.importance_correction`` weighs each token by it instead."""
    learning_rate: NotNegative = 1e-6
    warmup_steps: Whole = 0
    """Updates of linear warm-up at the start of the run's optimizer."""
    weight_decay: NotNegative = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0
    objective: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "reinforce"] = "grpo"
    clip_eps_low: NotNegative = 0.2
    clip_eps_high: NotNegative = 0.2
    """Bounds of the ratio, 1 - low to 1 + high. With one update a step it is 1: they do nothing."""
    entropy_coef: Real = 0.0
    kl_coef: NotNegative = 0.0
    """Weight of the divergence from the policy the run began with (under LoRA from the model without adapters)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Divide mean-centred rewards by the group's or the batch's standard deviation, or not at all (Dr.GRPO)."""
    advantage_baseline: Literal["group", "batch", "greedy"] = "group"
    """What is subtracted from a reward: its group's mean (GRPO), the batch's mean (REINFORCE++), or the reward of the
    greedy answer to the same question (ReMax). The last two go with ``advantage_scale`` ``batch`` or ``none``."""
    advantage_control: Literal["none", "zero", "shuffle"] = "none"
    """A control experiment: advantages set to zero, or shuffled within the batch. Learning must vanish."""
    skip_equal_groups: bool = True
    """Groups whose rewards are all equal give no gradient and are left out (they still count in the normaliser)."""
    on_bad_group: Literal["raise", "skip"] = "raise"
    """What answers do that cannot be trained on (none at all, a sampled image placeholder, a prompt that is not the
    trainer's, more tokens than a micro-batch takes): stop before the step, or be left out of it and counted."""
    max_tokens_per_micro_batch: Count = 16_384
    checkpoint_every: Count = 100
    """Steps between checkpoints; also one at each stage's end, and before each evaluation."""
    keep_checkpoints: Count = 2
    """The newest so many stay."""
    keep_best: Whole = 0
    """Beside them so many of the newest one's stage, those with the most right answers since the one before."""
    keep_answers_every: Whole = 0
    """Write the answers of each so many steps, with their rewards, to ``answers`` in the run folder; 0: none."""
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    """Also log each step there, beside TensorBoard. Each is an extra of the package."""
    threads: Whole = 0
    """CPU threads; 0 leaves torch's choice."""

    def __post_init__(self) -> None:
        if self.advantage_baseline != "group" and self.advantage_scale == "group":
            raise ValueError(
                f"advantage_baseline='{self.advantage_baseline}' goes with advantage_scale='batch' or 'none': the "
                "deviation of a group whose rewards are equal is 0"
            )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ParallelConfig:
    """How one model lies over the GPUs of a job; start several processes with ``torchrun``."""

    shard: Whole = 0
    """Ranks that share one copy of the weights (FSDP); a divisor of all ranks makes replicas (hybrid sharding): set it
    to the GPUs of one node. 0: all ranks share one copy."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of forward and backward; weights, gradient sums and optimizer stay in ``policy.dtype``. None: the same."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the block again in the backward pass."""
    offload: bool = False
    """Weights, gradients and optimizer rest in host memory."""
    compile: bool = False
    """Compile the decoder's blocks (torch.compile)."""
    timeout_seconds: Positive = 600.0
    """A collective that waits longer ends the job."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GuardConfig:
    """Updates that must not touch the weights: they are skipped, counted, and their batches written down. A loss or
    gradient that is no finite number always is one."""

    max_streak: Count = 3
    """The run stops after so many refused updates in a row."""
    max_grad_norm: NotNegative = 0.0
    """Refuse above this gradient norm (before clipping); 0: never."""
    max_kl: NotNegative = 0.0
    """Refuse above this divergence of the sampling policy from the trained one, nats per token; 0: never."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvalConfig:
    before: bool = True
    """Evaluate the warm start on the held-out maps before reinforcement learning."""
    every: Whole = 0
    """Evaluate after each so many steps too, and keep a checkpoint there; 0: only before and after."""
    text_only: bool = True
    """Evaluate the trained model once more with maps swapped between questions."""
    max_problems: Whole = 0
    """Evaluate the first so many problems of the test split; 0 for all."""
    samples: Whole = 24
    """Answers shown beside their maps in the run folder."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """Everything one run depends on; written to the run folder as ``config.toml``."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for stage in self.train.stages:
            size = stage.group_size or self.rollout.group_size
            if size == 1 and stage.kind == "rl" and stage.steps and self.train.advantage_baseline == "group":
                raise ValueError(
                    f"group_size=1 in stage '{stage.name}': one answer is its own group's mean and teaches nothing; "
                    "take at least 2, or train.advantage_baseline='batch' or 'greedy'"
                )
            replayed = round(self.train.prompts_per_step * stage.replay)
            if stage.steps and stage.replay not in (0, 1) and replayed in (0, self.train.prompts_per_step):
                raise ValueError(
                    f"replay={stage.replay:g} in stage '{stage.name}': of train.prompts_per_step="
                    f"{self.train.prompts_per_step} questions it is {replayed}; take 0, 1, or more questions a step"
                )
        updates = self.train.updates_per_step
        if updates > self.train.prompts_per_step:
            raise ValueError(
                f"train.updates_per_step={updates}: at most train.prompts_per_step={self.train.prompts_per_step}, a "
                "question each"
            )
        if updates > 1 and self.train.objective == "reinforce" and self.rollout.importance_correction == "none":
            raise ValueError(
                f"train.updates_per_step={updates} trains on answers of earlier weights, and objective='reinforce' has "
                "no ratio to them: set rollout.importance_correction='truncate' or 'mask'"
            )
