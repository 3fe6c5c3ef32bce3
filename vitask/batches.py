"""Blocks, batches and negatives: which samples share a training step.

A block is 4 samples of one instruction with at least 2 different responses, so that every sample
finds a negative image in its batch (contrastive response tuning, eq. 5). All methods use this
sampler: vanilla tuning and VITask see the samples in the same order.
"""

from dataclasses import dataclass

import numpy as np

from vitask.errors import InputError

BLOCK = 4


@dataclass(frozen=True)
class Block:
    """samples: int (1 to 4,), their numbers; contrastive: whether CRT applies to them."""

    samples: np.ndarray
    contrastive: bool


@dataclass(frozen=True)
class Batch:
    """One training step.

    samples:  int (rows,), sample numbers
    negative: int (rows,), for each row the *row* of this batch whose image is its negative, -1
        for none
    """

    samples: np.ndarray
    negative: np.ndarray


def make_blocks(
    instructions: np.ndarray, responses: np.ndarray, rng: np.random.Generator
) -> list[Block]:
    """Blocks that hold every sample exactly once.

    instructions, responses: int (samples,)

    Uniform blocks trade a sample with a block that can spare one. Blocks that stay uniform, and
    the last samples of an instruction, are without CRT.
    """
    blocks: list[Block] = []
    for instruction in np.unique(instructions):
        order = rng.permutation(np.flatnonzero(instructions == instruction))
        whole = order[: len(order) // BLOCK * BLOCK].reshape(-1, BLOCK)
        _mend(whole, responses)
        different = (responses[whole] != responses[whole[:, :1]]).any(axis=1)
        blocks += [Block(row, bool(ok)) for row, ok in zip(whole, different, strict=True)]
        if rest := list(order[whole.size :]):
            blocks.append(Block(np.array(rest), False))
    return blocks


def make_batches(
    instructions: np.ndarray,
    responses: np.ndarray,
    batch_size: int,
    rng: np.random.Generator,
    *,
    process: int = 0,
    processes: int = 1,
) -> list[Batch]:
    """One epoch's batches of this process; blocks are never split over processes.

    `batch_size` counts the samples of all processes. Every process draws the same blocks from
    `rng` and takes its share of each step, so all have the same number of steps. ValueError for a
    batch size that leaves a process without a block.
    """
    blocks = make_blocks(instructions, responses, rng)
    blocks = [blocks[i] for i in rng.permutation(len(blocks))]
    per_step = batch_size // BLOCK
    if per_step < processes:
        raise InputError(
            f"batch_size is {batch_size}, which gives {per_step} blocks for {processes} processes; "
            f"expected at least {BLOCK * processes}"
        )
    steps = [blocks[i : i + per_step] for i in range(0, len(blocks), per_step)]
    if len(steps) > 1 and len(steps[-1]) < processes:  # too few for one each: join the last two
        steps[-2:] = [steps[-2] + steps[-1]]
    batches = [[_batch(s[p::processes], instructions, responses, rng) for p in range(processes)]
               for s in steps]  # fmt: skip
    return [step[process] for step in batches]


def _batch(
    blocks: list[Block], instructions: np.ndarray, responses: np.ndarray, rng: np.random.Generator
) -> Batch:
    samples = np.concatenate([block.samples for block in blocks])
    contrastive = np.concatenate([np.full(len(b.samples), b.contrastive) for b in blocks])
    same = instructions[samples][:, None] == instructions[samples][None]
    other = responses[samples][:, None] != responses[samples][None]
    allowed = same & other  # (rows, rows): whether image j may be the negative of row i
    negative = np.full(len(samples), -1)
    for row in np.flatnonzero(contrastive):
        negative[row] = rng.choice(np.flatnonzero(allowed[row]))
    return Batch(samples, negative)


def _mend(blocks: np.ndarray, responses: np.ndarray) -> None:
    """Swap samples between rows of `blocks` (n, 4), in place, until few rows are uniform."""
    answers = responses[blocks]  # (blocks, 4)
    for row in np.flatnonzero((answers == answers[:, :1]).all(axis=1)):
        answers = responses[blocks]
        same = answers[row, 0]
        if (answers[row] != same).any():  # mended as another row's partner
            continue
        spare = np.flatnonzero((answers != same).sum(axis=1) >= 2)  # keeps one after the swap
        if spare.size == 0:
            return
        # the block with most other answers gives one; ties go to the first, so no draw is needed
        partner = spare[np.argmax((answers[spare] != same).sum(axis=1))]
        give = np.flatnonzero(answers[partner] != same)[0]
        blocks[row, 0], blocks[partner, give] = blocks[partner, give], blocks[row, 0]
