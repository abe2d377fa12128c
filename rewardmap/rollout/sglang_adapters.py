"""Low-rank adapters (LoRA) at SGLang servers, beside the weights they belong to: what a server must be started with,
whether one fits, and what an adapter is called there.

An adapter's name says which run sent it and of which version it is. Requests ask for it by that name, and the server
states the same name as the version of its weights, so that a reply proves what it was sampled with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewardmap.config import Config, ConfigError

PREFIX = "rewardmap-"
"""Of the names of all adapters that runs send."""
OLDEST = (0, 5, 22)
"""SGLang before it counts one user of an adapter too few after each request with n > 1, and then waits for ever when
the adapter is to go (sgl-project/sglang#36894). No call tells a server's count, so the version must."""
_NEEDS = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""SGLang computes these as one product with others, and finds an adapter by that of the other."""
_SERVED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Adapters:
    """What all adapters of a run have in common."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    """Names of the decoder's layers that have one."""

    @classmethod
    def of(cls, config: Config) -> Adapters | None:
        """Those that servers get; None where ``rollout.server.lora_sync`` is ``merged``.

        Raises:
            ConfigError: adapters alone would not make servers sample from the trainer's policy.
        """
        policy, server = config.policy, config.rollout.server
        if server.lora_sync == "merged":
            return None
        begin, remedy = "rollout.server.lora_sync='adapter' sends", "or set lora_sync='merged'"
        if not policy.lora_rank:
            raise ConfigError(f"{begin} low-rank adapters, and policy.lora_rank=0 trains none; give a rank, {remedy}")
        if not policy.freeze_vision:
            raise ConfigError(
                f"{begin} adapters alone, and policy.freeze_vision=false trains the vision tower's weights; freeze it, "
                f"{remedy}"
            )
        unknown = [target for target in policy.lora_targets if target not in _SERVED]
        if unknown:
            raise ConfigError(
                f"{begin} adapters, and SGLang serves none of '{unknown[0]}'; take policy.lora_targets from "
                f"{', '.join(_SERVED)}, {remedy}"
            )
        for target in policy.lora_targets:
            if _NEEDS.get(target, target) not in policy.lora_targets:
                raise ConfigError(
                    f"{begin} adapters, and SGLang serves one of '{target}' only together with '{_NEEDS[target]}'; add "
                    f"it to policy.lora_targets, {remedy}"
                )
        return cls(policy.lora_rank, policy.lora_alpha, policy.lora_targets)

    def options(self) -> list[str]:
        """Of ``sglang.launch_server``."""
        # Two slots: this run's adapter, and none for whoever asks without, as a check of health does.
        return [
            *("--enable-lora", "--max-lora-rank", str(self.rank), "--max-loras-per-batch", "2"),
            *("--lora-target-modules", *self.targets),
        ]

    def to_peft(self) -> dict[str, Any]:
        """An adapter's ``adapter_config.json``."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.targets),
            "bias": "none",
        }

    def check(self, url: str, server: Mapping[str, Any], version: tuple[int, ...]) -> None:
        """Whether a server takes them.

        Args:
            server: its ``/server_info``.
            version: of its SGLang.

        Raises:
            ConfigError: what is in the way, and what to start it with.
        """
        if version < OLDEST:
            raise ConfigError(
                f"{url}: SGLang {server['version']} hangs when an adapter goes that groups were sampled with; use "
                f"{'.'.join(map(str, OLDEST))} or newer, or set rollout.server.lora_sync='merged'"
            )
        found = set(server.get("lora_target_modules") or ())
        fits = server.get("max_lora_rank") is None or server["max_lora_rank"] >= self.rank
        if not (server.get("enable_lora") and fits and (found >= set(self.targets) or "all" in found)):
            raise ConfigError(f"{url} does not serve these adapters; start it with {' '.join(self.options())}")
