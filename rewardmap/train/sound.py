"""Answers that must not reach the model are found before the step, and named by their problem's uid."""

from __future__ import annotations

from rewardmap.policy import Policy
from rewardmap.types import RolloutGroup


def fault_of(group: RolloutGroup, policy: Policy, max_tokens: int) -> str | None:
    """What is wrong with a group, named with its uid and a remedy; None where it can be trained on."""
    uid = group.problem.uid
    prompt = policy.encode(group.problem)
    same = group.prompt_token_ids == prompt.token_ids
    found = prompt.image_tokens if same else group.prompt_token_ids.count(policy.model.config.image_token_id)
    if found != prompt.image_tokens:
        grid = policy.image_info(group.problem.image).grid_thw
        return (
            f"{uid}: the engine's prompt holds {found} image tokens, the picture's grid {grid} makes "
            f"{prompt.image_tokens}; give engine and trainer the same processor settings (policy.min_pixels, "
            "policy.max_pixels)"
        )
    if not same:
        return (
            f"{uid}: the engine's prompt ({len(group.prompt_token_ids)} tokens) is not the trainer's "
            f"({len(prompt.token_ids)}); give both the same tokenizer and chat template"
        )
    for number, rollout in enumerate(group.rollouts):
        if not rollout.token_ids:
            return f"{uid}: answer {number} has no tokens; an engine returns at least the stop token"
        placeholders = set(policy.banned_token_ids).intersection(rollout.token_ids)
        if placeholders:
            return (
                f"{uid}: answer {number} holds the placeholder token {min(placeholders)}, for which there is no "
                "picture; the engine must ban it"
            )
        length = len(prompt.token_ids) + len(rollout.token_ids) - 1
        if length > max_tokens:
            return (
                f"{uid}: the prompt with answer {number} takes {length} tokens, over train.max_tokens_per_micro_batch="
                f"{max_tokens}; raise it, or lower policy.max_pixels or rollout.max_new_tokens"
            )
    return None
