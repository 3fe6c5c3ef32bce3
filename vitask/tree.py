"""Rows that branch: several sequences in one row, with their shared prefixes once.

A row is a list of segments. Each continues another segment, its parent. A token attends to the
segments on the path from the row's start to its segment, and to the tokens before it there; its
position is counted along that path. So a causal model computes for each path exactly the result
for that sequence alone:

    mask[t, s] = (segment of s is an ancestor of segment of t, or the same) and s <= t

Pure tensor code, independent of any model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ROOT = -1  # parent of a row's first segment
SLACK = 1.5  # a row is padded to at most this many times its length


class Segment(NamedTuple):
    """Tokens that continue another segment.

    parent: number of an earlier segment in the row, or ROOT
    ids:    token ids; zeros where features are filled in
    filled: name of the features at this place, "" for tokens
    """

    parent: int
    ids: tuple[int, ...]
    filled: str = ""


@dataclass(frozen=True)
class Layout:
    """Rows of segments as tensors, padded on the right.

    ids, positions: int64 (rows, tokens)
    mask:   bool (rows, 1, tokens, tokens), True where a token may attend; padding attends to
            padding
    slots:  name of features -> int64 (2, n), row and column of each of their tokens, in row order
    starts: for every row, the first column of each segment
    rows:   the segments
    """

    ids: Int[Tensor, "rows tokens"]
    positions: Int[Tensor, "rows tokens"]
    mask: Bool[Tensor, "rows 1 tokens tokens"]
    slots: Mapping[str, Int[Tensor, "2 slots"]]
    starts: Sequence[Sequence[int]]
    rows: Sequence[Sequence[Segment]]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Segment]], device: torch.device | str = "cpu") -> "Layout":
        longest = max(map(length, rows))
        ids, positions, starts = [], [], []
        filled: dict[str, list[tuple[int, int]]] = {}
        for number, row in enumerate(rows):
            start: list[int] = []
            tokens: list[int] = []
            places: list[int] = []
            for segment in row:
                start.append(len(tokens))
                depth = 0 if segment.parent == ROOT else depth_after(row, segment.parent)
                places += range(depth, depth + len(segment.ids))
                if segment.filled:
                    columns = range(len(tokens), len(tokens) + len(segment.ids))
                    filled.setdefault(segment.filled, []).extend((number, c) for c in columns)
                tokens += segment.ids
            padding = [0] * (longest - len(tokens))
            ids.append(tokens + padding)
            positions.append(places + padding)
            starts.append(start)
        mask = torch.stack([_mask(row, longest) for row in rows])[:, None]
        slots = {name: torch.tensor(where).T.to(device) for name, where in filled.items()}
        return cls(
            torch.tensor(ids).to(device),
            torch.tensor(positions).to(device),
            mask.to(device),
            slots,
            starts,
            rows,
        )

    def embeddings(
        self,
        embed: Callable[[Tensor], Tensor],
        features: Mapping[str, Tensor],
    ) -> Float[Tensor, "rows tokens hidden"]:
        """Token embeddings with the features, each (rows, tokens, hidden), at their places."""
        embeddings = embed(self.ids)
        for name, (row, column) in self.slots.items():
            values = features[name].flatten(0, 1).to(embeddings.device, embeddings.dtype)
            embeddings = embeddings.index_put((row, column), values)
        return embeddings

    def last(self, row: int, segment: int) -> int:
        """Column of the last token on the path to the end of a segment."""
        while not self.rows[row][segment].ids:
            segment = self.rows[row][segment].parent
        return self.starts[row][segment] + len(self.rows[row][segment].ids) - 1

    def predicting(self, row: int, segment: int, tokens: int) -> list[int]:
        """Columns that predict a segment's tokens and one more: `tokens` in all.

        The token before the segment predicts its first token; the last is not an input.
        """
        start = self.starts[row][segment]
        before = self.last(row, self.rows[row][segment].parent)
        return [before, *range(start, start + tokens - 1)]


def length(row: Sequence[Segment]) -> int:
    """Number of tokens in a row."""
    return sum(len(segment.ids) for segment in row)


def depth_after(row: Sequence[Segment], segment: int) -> int:
    """Number of tokens on the path from the row's start to the end of a segment."""
    depth = 0
    while segment != ROOT:
        depth += len(row[segment].ids)
        segment = row[segment].parent
    return depth


def _mask(row: Sequence[Segment], tokens: int) -> Bool[Tensor, "tokens tokens"]:
    """[t, s]: token t may attend to s; padding up to `tokens` is a segment without ancestors."""
    count = len(row)
    ancestors = torch.eye(count + 1, dtype=torch.bool)
    for number, segment in enumerate(row):
        assert segment.parent < number, "a segment comes after its parent"
        if segment.parent != ROOT:
            ancestors[number] |= ancestors[segment.parent]
    lengths = torch.tensor([*(len(segment.ids) for segment in row), tokens - length(row)])
    pairs = ancestors.repeat_interleave(lengths, 0).repeat_interleave(lengths, 1)
    return pairs.tril_()


def buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the rows to compute together: the longest of each group is at most SLACK times
    as long as the shortest."""
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        if found and lengths[found[-1][0]] <= SLACK * lengths[row]:
            found[-1].append(row)
        else:
            found.append([row])
    return found
