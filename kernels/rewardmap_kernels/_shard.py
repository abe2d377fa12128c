"""A head whose vocabulary is split over ranks: what they exchange so that each can make its part of the gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .torch_rows import RowStatistics


class VocabShard:
    """This rank's slice of the vocabulary: rows [start, start + vocab) of the head, in rank order, all of one size."""

    def __init__(self, group: dist.ProcessGroup, vocab: int) -> None:
        self.group, self.vocab, self.size = group, vocab, dist.get_world_size(group)
        self.start = dist.get_rank(group) * vocab

    def local(self, targets: Tensor) -> Tensor:
        """Targets as indices into the slice; -1 where another rank has them."""
        index = targets.long() - self.start
        return torch.where((index >= 0) & (index < self.vocab), index, -1)

    def combine(self, found: RowStatistics, local: Tensor, keep: Tensor | None, nats_per_unit: float) -> RowStatistics:
        """Statistics over the whole vocabulary from those of the slice: one collective, 12 bytes per row and rank.

        A target that another rank has was read at index 0 here; that value is dropped.
        """
        lse = found.lse * nats_per_unit
        picked = torch.where(local >= 0, found.logprobs + lse, 0.0)
        mine = torch.stack([lse, picked, found.entropy])
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        each_lse, each_picked, each_entropy = torch.stack(everyone, 1).unbind(0)
        total = torch.logsumexp(each_lse, 0)
        share = torch.exp(each_lse - total)
        # H = sum over slices of share * (entropy within the slice - log share)
        logprobs, entropy = each_picked.sum(0) - total, (share * (each_entropy + total - each_lse)).sum(0)
        if keep is not None:
            logprobs, entropy = torch.where(keep, logprobs, 0.0), torch.where(keep, entropy, 0.0)
        return RowStatistics(total / nats_per_unit, logprobs, entropy)

    def add_up(self, d_hidden: Tensor | None) -> None:
        """Hidden gradients of all slices, summed in place."""
        if d_hidden is not None:
            dist.all_reduce(d_hidden, group=self.group)
