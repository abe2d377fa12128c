"""Evaluation as the benchmarks define it, with intervals and controls: of engines and of response files."""

from rewardmap.evaluate.answers import Answer, AnswerStore, ask, digest_folder, read_responses
from rewardmap.evaluate.controls import TextPrior, swap_maps, text_prior
from rewardmap.evaluate.judge import Judge
from rewardmap.evaluate.map_score import map_score
from rewardmap.evaluate.records import BENCHMARKS, DIRECT, GROUPS, METRICS, TRANSFER, Estimate, Evaluation, Record
from rewardmap.evaluate.weights import evaluation_weight

__all__ = [
    "BENCHMARKS",
    "DIRECT",
    "GROUPS",
    "METRICS",
    "TRANSFER",
    "Answer",
    "AnswerStore",
    "Estimate",
    "Evaluation",
    "Judge",
    "Record",
    "TextPrior",
    "ask",
    "digest_folder",
    "evaluation_weight",
    "map_score",
    "read_responses",
    "swap_maps",
    "text_prior",
]
