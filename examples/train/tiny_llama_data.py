"""Prompts to train tiny-llama on: their mix, and the processes that write them."""

from __future__ import annotations

import multiprocessing as mp
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from accelkit.calibration.evaluation import tasks
from accelkit.calibration.evaluation.corpus import is_held_out, source_corpus

QUESTIONS = tasks.TASKS[:-1]  # the kinds of prompt that have answers
MIX = {
    "text": 0.20,
    "key_value": 0.16,
    "needle": 0.12,
    "multi_key": 0.13,
    "multi_value": 0.11,
    "variables": 0.14,
    "common_words": 0.14,
}
# From this fraction of the time on: {prompt length: share of the batches}.
STAGES: list[tuple[float, dict[int, float]]] = [
    (0.00, {512: 1.0}),
    (0.20, {512: 0.3, 2048: 0.7}),
    (0.38, {512: 0.1, 2048: 0.3, 8192: 0.6}),
    (0.60, {2048: 0.2, 8192: 0.45, 16384: 0.35}),
    (0.78, {2048: 0.1, 8192: 0.3, 16384: 0.3, 32768: 0.3}),
]
WEIGHTS = {"text": 1.0, "answer": 2.0, "other": 0.02}  # of the three kinds of token in the loss
OTHER, TEXT, ANSWER, IGNORED = 0, 1, 2, 3


@dataclass
class Batch:
    """`rows` prompts of one length: token ids, and the kind of each *next* token.

    ids, kinds: shape (rows, length).
    """

    ids: np.ndarray
    kinds: np.ndarray
    samples: list[tasks.Sample]


def read_corpus(held_out: bool, limit: int) -> str:
    """ASCII Python source of the standard library and the installed packages."""
    texts = [source_corpus(held_out, limit)]
    total = len(texts[0])
    root = Path(sysconfig.get_path("purelib"))
    for path in sorted(root.rglob("*.py")) if total < limit else ():
        name = path.relative_to(root).as_posix()
        if is_held_out(name) == held_out:
            texts.append(path.read_text("utf-8", "ignore").encode("ascii", "ignore").decode())
            total += len(texts[-1])
            if total >= limit:
                break
    return "".join(texts)[:limit]


def make_batch(names: list[str], length: int, seed: int, corpus: str) -> Batch:
    """One prompt for each task named, seeds counting up from `seed`."""
    samples = [tasks.make(t, length, seed + i, corpus) for i, t in enumerate(names)]
    ids = np.stack([s.ids for s in samples])
    kinds = np.full(ids.shape, OTHER, np.uint8)
    for row, sample in enumerate(samples):
        if sample.task not in ("key_value", "common_words"):
            kinds[row] = TEXT
        for start, end in sample.answers:
            kinds[row, start:end] = ANSWER
    kinds = np.roll(kinds, -1, axis=1)
    kinds[:, -1] = IGNORED
    return Batch(ids, kinds, samples)


Job = tuple[str, int, int, int]  # task, length, rows, first seed
_pool_corpus = ""  # the filler text of a pool's processes


def _set_pool_corpus(corpus: str) -> None:
    global _pool_corpus
    _pool_corpus = corpus


def run_job(job: Job) -> Batch:
    """The batch that a job describes, with this process's filler text."""
    task, length, rows, seed = job
    return make_batch([task] * rows, length, seed, _pool_corpus)


def produce(jobs: list[Job], corpus: str, workers: int) -> Iterator[Batch]:
    """Batches for the jobs, in order, made by a pool of forked processes."""
    with mp.get_context("fork").Pool(workers, _set_pool_corpus, (corpus,)) as pool:
        yield from pool.imap(run_job, jobs)


def work(number: int, tokens: int, stage: Any, out: Any, corpus: str) -> None:
    """A worker process: put training batches for the current stage into the queue `out`."""
    rng = np.random.default_rng(number)
    names, shares = list(MIX), np.array(list(MIX.values()))
    shares = shares / shares.sum()
    seed = (number + 1) * 1_000_000_000
    while True:
        lengths = STAGES[stage.value][1]
        length = int(rng.choice(list(lengths), p=list(lengths.values())))
        length = min(length, tokens)
        rows = tokens // length
        picked = [names[i] for i in rng.choice(len(names), rows, p=shares)]
        batch = make_batch(picked, length, seed, corpus)
        seed += rows
        out.put((batch.ids.astype(np.int16), batch.kinds))
