"""New low-rank adapters to the servers, a few MB, in place of all weights.

The weights that adapters belong to do not train: a server gets them once, by the routes of ``weight_sync``, and again
after it was started anew. At each push the adapter before is unloaded, the new one loaded under a name of its own, and
the server told to state that name as the version of its weights. SGLang computes prompts for each loaded adapter anew,
also for two of one name.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from rewardmap.config import ConfigError
from rewardmap.policy import Policy
from rewardmap.rollout.sglang_adapters import PREFIX, Adapters
from rewardmap.rollout.sglang_client import SGLangClient
from rewardmap.rollout.sglang_engine import Replica, SGLangEngine
from rewardmap.train.ranks import ALONE, Ranks
from rewardmap.train.weight_sync import WeightSync
from rewardmap.train.weights import Bucket, adapter_bucket

_BASE = "without adapter"
"""Version that a server states between the weights and its first adapter, or where one of them broke off."""


class AdapterSync(WeightSync):
    """Pushes a policy's adapters to the servers of an engine."""

    merged = False

    def __init__(
        self,
        policy: Policy,
        engine: SGLangEngine,
        folder: Path,
        adapters: Adapters,
        dtype: torch.dtype | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Arguments as of ``WeightSync``.

        Raises:
            ConfigError: other weights than the adapters train.
        """
        super().__init__(policy, engine, folder, dtype, ranks)
        beside = [name for name, one in policy.model.named_parameters() if one.requires_grad and ".lora_" not in name]
        if beside:
            raise ConfigError(
                f"rollout.server.lora_sync='adapter' sends adapters alone, and {beside[0]} trains beside them; freeze "
                "it, or set lora_sync='merged'"
            )
        self._peft = adapters.to_peft()
        self._prefix = f"{PREFIX}{uuid.uuid4().hex[:8]}-"  # of this run: a server of others may have met another one

    def adapter(self, version: int | str) -> str:
        return f"{self._prefix}{version}"

    def _attempt(self, version: int | str, replicas: Sequence[Replica]) -> Exception | None:
        """None on success. Every rank gathers what any of them needs, also after a failure."""
        bare, error = self._without_weights(replicas)
        if self._ranks.any(bool(bare)):
            error = super()._attempt(_BASE, bare) or error
        # GPU memory is handed over where that of all weights is. Other routes reach any machine, as does a value; files
        # do not do for servers of ours, which read none because their weights come from here.
        device = self._policy.device if self._config.sync == "tensor" else torch.device("cpu")
        bucket = adapter_bucket(self._policy.model, self._dtype, device)
        if error is not None or not replicas:
            return error
        try:
            self._load(self.adapter(version), replicas, bucket)
        except Exception as caught:
            self._do(replicas, self._abandon)
            return caught
        return None

    def _without_weights(self, replicas: Sequence[Replica]) -> tuple[list[Replica], Exception | None]:
        """Servers that lack what this run sends before its first adapter: they do not state an adapter of ours."""
        bare: list[Replica] = []
        try:
            for replica in replicas:
                model = self._engine.loop.run(self._call(replica.client, "/model_info", method="GET", admin=False))
                if not str(model["weight_version"]).startswith(self._prefix):
                    bare.append(replica)
        except Exception as error:
            return [], error
        return bare, None

    def _load(self, name: str, replicas: Sequence[Replica], bucket: Bucket) -> None:
        body = {"lora_name": name, "load_format": "flattened_bucket", "config_dict": self._peft}
        body_of = self._with_payloads(body, bucket, replicas)

        async def load(client: SGLangClient) -> None:
            await self._pause(client)
            known = await self._call(client, "/v1/models", method="GET", admin=False)
            for model in known["data"]:
                if model["id"].startswith(PREFIX):  # the one before; this one, after a failure; a run's that was killed
                    await self._call(client, "/unload_lora_adapter", {"lora_name": model["id"]})
            await self._call(client, "/load_lora_adapter_from_tensors", body_of(client))
            await self._call(client, "/update_weight_version", {"new_version": name, "abort_all_requests": False})
            await self._go_on(client, name)

        self._do(replicas, load)
