"""Rewards: what an answer is worth, and why."""

from rewardmap.rewards.rubric import RewardBatch, Rubric
from rewardmap.rewards.score import FAILURES
from rewardmap.rewards.scorer import Networks

__all__ = ["FAILURES", "Networks", "RewardBatch", "Rubric"]
