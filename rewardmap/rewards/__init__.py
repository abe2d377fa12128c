"""Rewards: what an answer is worth, and why."""

from rewardmap.rewards.rubric import RewardBatch, Rubric
from rewardmap.rewards.score import FAILURES

__all__ = ["FAILURES", "RewardBatch", "Rubric"]
