"""rewardmap: teach vision-language models to read maps by reinforcement learning."""

__version__ = "0.1.0"
