"""Which rank computes which trees, in which micro-batch: ranks finish together, by a model of the cost.

Trees go whole to one rank, the costliest first to the rank with the least work, then moves and swaps take work from the
slowest rank while that helps. A tree is cut only when it exceeds the token budget of a micro-batch, never to even out
ranks: a cut computes its prefix twice. Inside a rank, micro-batches are filled the same way.

Under FSDP2 every micro-batch is a sequence of collectives that all ranks take part in, so every rank has the same
number of micro-batches; one without trees is empty here and becomes a filler in ``pack_forest``. Micro-batches run
costliest first, so that those that wait for each other are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rewardmap.families import head_dim
from rewardmap.train.trees import Tree, cut


@dataclass(frozen=True)
class CostModel:
    """FLOP of one training step's passes over a tree. The defaults count tokens."""

    token: float = 1.0
    """Linear layers of the decoder, per packed token."""
    pair: float = 0.0
    """Attention of the decoder, per visible pair."""
    row: float = 0.0
    """The head, per response token."""
    patch: float = 0.0
    """Linear layers of the vision tower, per patch before merging."""
    patch_pair: float = 0.0
    """Full attention of the vision tower, per pair of patches."""
    merge: int = 1
    """Patches per image token."""

    @classmethod
    def of(
        cls,
        config: Any,
        *,
        freeze_vision: bool,
        checkpointing: bool = False,
        adapters: bool = False,
        reference: bool = False,
    ) -> CostModel:
        """Counted from a transformers configuration (Qwen2.5-VL, Qwen3-VL, Qwen2, Qwen3).

        A backward is two forwards, recomputation one more, and a KL term's reference another. Under adapters, which
        are too small to count, the decoder's weights and the head take no gradient. A frozen tower's outputs are kept:
        it costs nothing.
        """
        text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", None)
        passes = 4.0 if checkpointing else 3.0  # of what trains
        through = passes + reference  # what all gradients go through
        heads, hidden, layers = text.num_attention_heads, text.hidden_size, text.num_hidden_layers
        dim = head_dim(text)
        projections = hidden * dim * 2 * (heads + text.num_key_value_heads)
        own: dict[str, Any] = {
            "token": (through - adapters) * 2 * layers * (projections + 3 * hidden * text.intermediate_size),
            "pair": through * 4 * layers * heads * dim,
            "row": (3.0 - adapters + reference) * 2 * hidden * text.vocab_size,
        }
        if vision is not None and not freeze_vision:
            gated = 3 if config.model_type == "qwen2_5_vl" else 2
            full = getattr(vision, "fullatt_block_indexes", None)
            width = vision.hidden_size
            own |= {
                "patch": passes * 2 * vision.depth * (4 * width**2 + gated * width * vision.intermediate_size),
                "patch_pair": passes * 4 * width * (vision.depth if full is None else len(full)),
                "merge": vision.spatial_merge_size**2,
            }
        return cls(**own)

    def flop(self, tokens: int, pairs: int, rows: int) -> float:
        """Of packed tokens, visible pairs of them and response rows; without the vision tower."""
        return self.token * tokens + self.pair * pairs + self.row * rows

    def tower(self, image_tokens: int) -> float:
        """Of the vision tower for one picture."""
        patches = image_tokens * self.merge
        return self.patch * patches + self.patch_pair * patches**2

    def __call__(self, tree: Tree) -> float:
        return self.flop(tree.tokens, tree.pairs, tree.rows) + self.tower(tree.image_tokens)


def balance(
    trees: Sequence[Tree], max_tokens: int, ranks: int = 1, cost: Callable[[Tree], float] | None = None
) -> list[list[list[Tree]]]:
    """Assign trees to ranks and micro-batches.

    Args:
        max_tokens: packed tokens of a micro-batch at most.
        cost: of one tree; None counts its tokens. Any unit.

    Returns:
        [rank][micro-batch] -> trees; every rank has the same number of micro-batches, of which only the last may be
        empty. The same on every machine: it depends on the arguments alone.

    Raises:
        ValueError: one prompt with one answer exceeds ``max_tokens``; the problem is named.
    """
    weigh = cost or CostModel()
    pieces = [piece for tree in trees for piece in cut(tree, max_tokens)]
    costs = [weigh(piece) for piece in pieces]
    sizes = [piece.tokens for piece in pieces]
    shares = _spread(range(len(pieces)), costs, ranks)
    filled = [_fill(share, sizes, max_tokens) for share in shares]
    count = max(map(len, filled))
    rows = [_into(share, costs, sizes, max_tokens, count) or own for share, own in zip(shares, filled, strict=True)]
    plan = []
    for bins in rows:
        bins = sorted(bins, key=lambda members: -sum(costs[index] for index in members))
        bins += [[] for _ in range(count - len(bins))]
        plan.append([[pieces[index] for index in sorted(members)] for members in bins])
    return plan


def _spread(items: Sequence[int], costs: Sequence[float], bins: int) -> list[list[int]]:
    """Longest processing time first (Graham, 1969), then moves and swaps out of the costliest bin."""
    shares: list[list[int]] = [[] for _ in range(bins)]
    loads = [0.0] * bins
    for index in sorted(items, key=lambda index: (-costs[index], index)):
        at = min(range(bins), key=loads.__getitem__)
        shares[at].append(index)
        loads[at] += costs[index]
    while _improve(shares, loads, costs):
        pass
    return shares


def _improve(shares: list[list[int]], loads: list[float], costs: Sequence[float]) -> bool:
    """One move or swap that makes the costliest bin cheaper without making another as costly; the best there is."""
    slow = max(range(len(loads)), key=loads.__getitem__)
    best, choice = loads[slow] * (1 - 1e-9), None
    for other in range(len(loads)):
        if other == slow:
            continue
        for mine in shares[slow]:
            for theirs in (None, *shares[other]):
                change = costs[mine] - (0.0 if theirs is None else costs[theirs])
                level = max(loads[slow] - change, loads[other] + change)
                if level < best:
                    best, choice = level, (other, mine, theirs, change)
    if choice is None:
        return False
    other, mine, theirs, change = choice
    shares[slow].remove(mine)
    shares[other].append(mine)
    if theirs is not None:
        shares[other].remove(theirs)
        shares[slow].append(theirs)
    loads[slow] -= change
    loads[other] += change
    return True


def _fill(items: Sequence[int], sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Few micro-batches: first fit by decreasing size."""
    bins: list[list[int]] = []
    used: list[int] = []
    for index in sorted(items, key=lambda index: (-sizes[index], index)):
        at = next((at for at, size in enumerate(used) if size + sizes[index] <= max_tokens), None)
        if at is None:
            bins.append([])
            used.append(0)
            at = len(bins) - 1
        bins[at].append(index)
        used[at] += sizes[index]
    return bins


def _into(
    items: Sequence[int], costs: Sequence[float], sizes: Sequence[int], max_tokens: int, count: int
) -> list[list[int]] | None:
    """At most ``count`` micro-batches of about equal cost; None when the greedy order finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads, used = [0.0] * count, [0] * count
    for index in sorted(items, key=lambda index: (-costs[index], index)):
        room = [at for at in range(count) if used[at] + sizes[index] <= max_tokens]
        if not room:
            return None
        at = min(room, key=loads.__getitem__)
        bins[at].append(index)
        loads[at] += costs[index]
        used[at] += sizes[index]
    return bins
