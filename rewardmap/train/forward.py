"""The model's pass over a packed forest, down to the hidden states of response rows."""

from __future__ import annotations

import torch

from rewardmap.policy import Policy
from rewardmap.train.forest import PackedForest
from rewardmap_kernels.tree_attention import tree_mask


def response_hidden(policy: Policy, forest: PackedForest) -> torch.Tensor:
    """Hidden states that predict the response tokens: [N, H], ready for the head. Prompt rows never meet the head."""
    device = policy.device
    embeds = policy.embed(forest.input_ids.to(device), policy.image_features(forest.images))
    out = policy.text_model(
        inputs_embeds=embeds[None],
        position_ids=forest.position_ids[:, None].to(device),
        attention_mask={"full_attention": None},  # a mapping tells transformers that masks are ours
        use_cache=False,
        tree_mask=tree_mask(forest.subtree_end.to(device)),
    )
    return out.last_hidden_state[0].index_select(0, forest.hidden_index.to(device))
