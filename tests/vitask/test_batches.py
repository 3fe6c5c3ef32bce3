"""Blocks, batches and negatives: every sample once in an epoch, every negative a true one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitask.batches import BLOCK, make_batches, make_blocks


@st.composite
def samples(draw):
    """Instructions with different numbers of samples, classes and imbalance."""
    instructions, responses = [], []
    for number in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 40))
        shares = draw(st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
        seed = draw(st.integers(0, 2**31))
        p = np.array(shares) / sum(shares)
        drawn = np.random.default_rng(seed).choice(len(p), size=count, p=p)
        instructions += [number] * count
        responses += (10 * number + drawn).tolist()
    return np.array(instructions), np.array(responses)


@given(samples(), st.integers(0, 2**31))
def test_every_sample_is_in_one_block_of_its_instruction(data, seed):
    instructions, responses = data
    blocks = make_blocks(instructions, responses, np.random.default_rng(seed))
    placed = np.concatenate([block.samples for block in blocks])
    assert sorted(placed) == list(range(len(instructions)))
    for block in blocks:
        assert len(block.samples) <= BLOCK
        assert len(set(instructions[block.samples])) == 1


@given(samples(), st.integers(0, 2**31))
def test_contrastive_blocks_are_whole_and_have_two_responses(data, seed):
    instructions, responses = data
    for block in make_blocks(instructions, responses, np.random.default_rng(seed)):
        if block.contrastive:
            assert len(block.samples) == BLOCK
            assert len(set(responses[block.samples])) >= 2


@given(samples(), st.integers(0, 2**31))
def test_as_many_blocks_are_contrastive_as_the_responses_allow(data, seed):
    instructions, responses = data
    blocks = make_blocks(instructions, responses, np.random.default_rng(seed))
    for instruction in set(instructions):
        mine = [b for b in blocks if instructions[b.samples[0]] == instruction]
        whole = [b for b in mine if len(b.samples) == BLOCK]
        inside = np.concatenate([b.samples for b in whole]) if whole else np.array([], dtype=int)
        counts = np.unique(responses[inside], return_counts=True)[1] if whole else np.array([0])
        others = counts.sum() - counts.max()
        assert sum(b.contrastive for b in whole) == min(len(whole), others)


@given(samples(), st.integers(0, 2**31), st.sampled_from([4, 8, 16]))
def test_negatives_have_the_same_instruction_and_another_response(data, seed, batch_size):
    instructions, responses = data
    batches = make_batches(instructions, responses, batch_size, np.random.default_rng(seed))
    assert sorted(np.concatenate([b.samples for b in batches])) == list(range(len(instructions)))
    for batch in batches:
        assert len(batch.samples) <= batch_size
        for row in np.flatnonzero(batch.negative >= 0):
            mine, other = batch.samples[row], batch.samples[batch.negative[row]]
            assert instructions[mine] == instructions[other]
            assert responses[mine] != responses[other]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_samples_without_splitting_a_block(processes):
    rng = np.random.default_rng(0)
    instructions, responses = np.repeat([0, 1], 50), rng.integers(0, 3, 100)
    per_process = [
        make_batches(
            instructions, responses, 16, np.random.default_rng(7), process=p, processes=processes
        )
        for p in range(processes)
    ]
    assert len({len(batches) for batches in per_process}) == 1
    everything = np.concatenate([b.samples for batches in per_process for b in batches])
    assert sorted(everything) == list(range(100))


def test_one_seed_one_order():
    rng = np.random.default_rng(0)
    instructions, responses = np.zeros(30, dtype=int), rng.integers(0, 3, 30)
    one, two, other = (
        make_batches(instructions, responses, 8, np.random.default_rng(s)) for s in (1, 1, 2)
    )
    orders = [
        np.concatenate([b.samples for b in batches]).tolist() for batches in (one, two, other)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_a_batch_too_small_for_the_processes_is_refused():
    with pytest.raises(ValueError, match="at least 8"):
        make_batches(np.zeros(8), np.arange(8), 4, np.random.default_rng(0), processes=2)
