"""A head whose vocabulary is split over ranks: what they exchange so that each can make its part of the gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .torch_rows import RowStatistics


class VocabShard:
    """This rank's slice of the vocabulary: rows [start, start + vocab) of the head, in rank order, all of one size."""

    def __init__(self, group: dist.ProcessGroup, vocab: int) -> None:
        self.group, self.vocab, self.size = group, vocab, dist.get_world_size(group)
        self.start = dist.get_rank(group) * vocab

    @classmethod
    def of(cls, group_name: str, vocab: int) -> VocabShard:
        """By the group's name, which a custom operator can take."""
        resolve: Any = dist.distributed_c10d._resolve_process_group
        return cls(resolve(group_name), vocab)

    def local(self, targets: Tensor) -> Tensor:
        """Targets as indices into the slice; -1 where another rank has them."""
        index = targets.long() - self.start
        return torch.where((index >= 0) & (index < self.vocab), index, -1)

    def combine(
        self, found: RowStatistics, local: Tensor, keep: Tensor | None, nats_per_unit: float, total: Tensor | None,
        exponentials: Tensor | None,
    ) -> tuple[RowStatistics, Tensor | None]:  # fmt: skip
        """Statistics, and the total of this slice's exponentials, over the whole vocabulary: one collective, 12 bytes
        per row and rank. The exponentials' target column, minus the sum of the others, is completed in place.

        A target that another rank has was read at index 0 here; that value is dropped.
        """
        lse = found.lse * nats_per_unit
        picked = torch.where(local >= 0, found.logprobs + lse, 0.0)
        mine = torch.stack([lse, picked, found.entropy])
        everyone = mine.new_empty(self.size * 3, mine.shape[1])
        dist.all_gather_into_tensor(everyone, mine, group=self.group)
        each_lse, each_picked, each_entropy = everyone.view(self.size, 3, -1).unbind(1)
        whole = torch.logsumexp(each_lse, 0)
        share = torch.exp(each_lse - whole)
        # H = sum over slices of share * (entropy within the slice - log share)
        logprobs, entropy = each_picked.sum(0) - whole, (share * (each_entropy + whole - each_lse)).sum(0)
        if total is not None and exponentials is not None:
            others = total * torch.expm1(whole - lse)  # the sum over the other slices, on the scale of this one
            if keep is not None:
                others = torch.where(keep, others, 0.0)
            own = torch.where(local >= 0, -others, 0.0).to(exponentials.dtype)
            exponentials.scatter_add_(1, local.clamp(min=0)[:, None], own[:, None])
            total = total + others
        if keep is not None:
            logprobs, entropy = torch.where(keep, logprobs, 0.0), torch.where(keep, entropy, 0.0)
        return RowStatistics(whole / nats_per_unit, logprobs, entropy), total

    def add_up(self, d_hidden: Tensor | None) -> None:
        """Hidden gradients of all slices, summed in place."""
        if d_hidden is not None:
            dist.all_reduce(d_hidden, group=self.group)
