"""Answers to judge: sampled greedily from an engine, kept by content and taken up again, or read from a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardmap.files import write_text
from rewardmap.rollout.engine import RolloutEngine
from rewardmap.transit.assets import composed
from rewardmap.types import DataError, Problem, SamplingParams

Progress = Callable[[int, int], None]
"""Called with (problems done, problems in all)."""
SHOWN = 5
"""Uids that an error names; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. ``num_tokens`` with its stop token; None where a file does not say."""

    text: str
    num_tokens: int | None


class AnswerStore:
    """Answers kept in a file of JSON lines, found again by what they answer.

    The key of an answer is a digest of the model, the question, the picture's bytes and the sampling, so that a stopped
    evaluation goes on where it was, the same question is never asked twice, and changed weights are asked anew.
    """

    def __init__(self, path: Path, model: str) -> None:
        """
        Args:
            path: of the file; made when the first answer comes.
            model: what identifies the weights, such as ``digest_folder`` of a checkpoint, and how they are used.
        """
        self.path, self._model = path, model
        self._pictures: dict[str | bytes, str] = {}
        self._kept: dict[str, Answer] = {}
        if path.is_file():
            lines = path.read_bytes().split(b"\n")  # the last may end inside a character
            for number, line in enumerate(lines[:-1], 1):
                try:
                    row = json.loads(line)
                    self._kept[row["key"]] = Answer(row["text"], row["num_tokens"])
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise DataError(f"{path}, line {number}: not a kept answer; remove the file to ask anew") from None
            if lines[-1]:  # cut off by a kill
                write_text(path, b"".join(line + b"\n" for line in lines[:-1]).decode())

    def key(self, problem: Problem, sampling: SamplingParams) -> str:
        """Digest of all that decides a greedy answer. Raises DataError for a picture that cannot be read."""
        what = [self._model, problem.question, self._picture(problem), sampling.max_new_tokens]
        return hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()

    def get(self, key: str) -> Answer | None:
        """The answer kept under a key."""
        return self._kept.get(key)

    def add(self, keys: Sequence[str], uids: Sequence[str], answers: Sequence[Answer]) -> None:
        """Keep answers; they are on the disk when this returns."""
        rows = [
            {"key": key, "uid": uid, "text": answer.text, "num_tokens": answer.num_tokens}
            for key, uid, answer in zip(keys, uids, answers, strict=True)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._kept.update(zip(keys, answers, strict=True))

    def _picture(self, problem: Problem) -> str:
        if problem.image not in self._pictures:
            try:
                content = problem.image if isinstance(problem.image, bytes) else Path(problem.image).read_bytes()
            except OSError as error:
                raise DataError(f"{problem.uid}: {error.filename}: {error.strerror}") from None
            self._pictures[problem.image] = hashlib.blake2b(content, digest_size=16).hexdigest()
        return self._pictures[problem.image]


def digest_folder(checkpoint: Path) -> str:
    """Digest of a checkpoint's weights, settings and tokenizer: every file that ``transformers`` would read."""
    digest = hashlib.blake2b(digest_size=16)
    files = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.json"), *checkpoint.glob("*.jinja")]
    for path in sorted(files):
        if path.name.startswith(("checksums", "optimizer", "trainer")):
            continue
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def ask(
    engine: RolloutEngine,
    problems: Sequence[Problem],
    sampling: SamplingParams,
    store: AnswerStore | None = None,
    progress: Progress | None = None,
    batch: int = 256,
) -> list[Answer]:
    """Answer every problem once, greedily.

    Args:
        sampling: taken as it is but for the temperature, which is 0.
        store: where answers are looked for first, and kept after each batch.
        batch: problems handed to the engine at a time; ``progress`` is called after each batch.

    Raises:
        DataError: a picture that cannot be read.
    """
    greedy = dataclasses.replace(sampling, temperature=0.0)
    keys = [store.key(problem, greedy) if store else "" for problem in problems]
    answers = [store.get(key) if store else None for key in keys]
    missing = [index for index, answer in enumerate(answers) if answer is None]
    done = len(problems) - len(missing)
    if progress is not None and done:
        progress(done, len(problems))
    for start in range(0, len(missing), batch):
        chosen = missing[start : start + batch]
        groups = engine.generate([problems[index] for index in chosen], 1, greedy)
        fresh = [Answer(group.rollouts[0].text, len(group.rollouts[0].token_ids)) for group in groups]
        for index, answer in zip(chosen, fresh, strict=True):
            answers[index] = answer
        if store is not None:
            store.add([keys[index] for index in chosen], [problems[index].uid for index in chosen], fresh)
        if progress is not None:
            progress(done + start + len(chosen), len(problems))
    return [answer for answer in answers if answer is not None]


def read_responses(path: Path, problems: Sequence[Problem]) -> list[Answer]:
    """Answers from a file of JSON lines with ``uid``, ``response`` and, if known, ``num_tokens``; in the problems'
    order.

    An evaluation's own records can be read again this way.

    Raises:
        DataError: a broken line, or a file that does not answer exactly these questions; uids are named.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # answers may hold other line separators, unescaped
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    found: dict[str, Answer] = {}
    repeated: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        uid, answer = _response(line, f"{path}, line {number}")
        if uid in found:
            repeated.append(uid)
        found[uid] = answer
    asked = {problem.uid for problem in problems}
    complaints = [
        f"{len(uids)} {what}: {named(uids)}"
        for what, uids in (
            ("questions have no response", [problem.uid for problem in problems if problem.uid not in found]),
            ("responses answer no question of the split", [uid for uid in found if uid not in asked]),
            ("uids appear more than once", repeated),
        )
        if uids
    ]
    if complaints:
        raise DataError(f"{path} does not match the data: {'; '.join(complaints)}; check --data and --split")
    return [found[problem.uid] for problem in problems]


def named(uids: Sequence[str]) -> str:
    """The first few uids, and how many more there are."""
    shown = ", ".join(uids[:SHOWN])
    return f"{shown} and {len(uids) - SHOWN} more" if len(uids) > SHOWN else shown


def _response(line: str, where: str) -> tuple[str, Answer]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__}, not an object with 'uid' and 'response'")
    for name in ("uid", "response"):
        if not isinstance(row.get(name), str):
            raise DataError(f"{where}, field {name!r}: {row.get(name)!r} is not text")
    tokens = row.get("num_tokens")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 <= tokens < 1 << 31):
        raise DataError(f"{where}, field 'num_tokens': {tokens!r:.80} is not a number of tokens")
    # Half a surrogate pair, which JSON can hold, is no character and could not be written again.
    return row["uid"], Answer(composed(row["response"].encode("utf-8", "replace").decode()), tokens)
