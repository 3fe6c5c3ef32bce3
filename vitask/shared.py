"""All branches of a VITask step in one forward, which computes their shared prefix once.

    row i   before  image i ─┬─ after i ─┬─ response i                       base
                             │           └─ response k, for every k whose
                             │              negative image is image i        negative of k
                             └─ exemplar i  after i  response i              exemplar

The negative of a sample is another sample's image with the same instruction, so it continues that
sample's base branch. Hidden states and gradients equal those of `vitask.branches`, as long as
there is no LoRA dropout and the exemplar follows the image. The variant `rep` replaces the image,
so its exemplar branch is computed separately.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vitask.branches import BatchInputs, BranchRows, response_hidden, three_forwards
from vitask.exemplar import ExemplarConnector, image_and_exemplar
from vitask.tree import ROOT, Layout, Segment, buckets, length
from vitask.vlm import VLM

AFTER, RESPONSE = 2, 3  # numbers of segments, in every row
EXEMPLAR_RESPONSE = 6  # with exemplar; the responses of hosted negatives follow


def shared_forward(
    vlm: VLM, connector: ExemplarConnector | None, batch: BatchInputs, variant: str
) -> BranchRows:
    """The rows of `three_forwards` from one forward of the language model per length bucket."""
    exemplar = None
    if batch.exemplar is not None and connector is not None:
        exemplar = connector(batch.exemplar)
    negatives = [] if batch.negative is None else batch.negative.tolist()
    hosted = {k: host for k, host in enumerate(negatives) if host >= 0}
    if not hosted and (exemplar is None or variant == "rep"):
        return three_forwards(vlm, connector, batch, variant)  # nothing to share

    apart = variant == "rep" and exemplar is not None
    inside = None if apart else exemplar
    rows, places = _rows(batch, hosted, 0 if inside is None else inside.shape[1])
    hidden = _forward(vlm, rows, places, batch.image, inside)
    labels = torch.tensor([t for r in batch.responses for t in r], device=hidden.device)
    base = len(labels)
    with_exemplar = base if inside is not None else 0
    exemplar_hidden = hidden[base : base + base] if with_exemplar else None
    if apart:
        tokens = image_and_exemplar(batch.image, exemplar, variant)
        exemplar_hidden, _, _ = response_hidden(vlm, batch.prompts, tokens, batch.responses)
    negative_hidden = negative_rows = None
    if hosted:
        negative_hidden = hidden[base + with_exemplar :]
        owner = [i for i, response in enumerate(batch.responses) for _ in response]
        contrasted = [row for row, sample in enumerate(owner) if sample in hosted]
        negative_rows = torch.tensor(contrasted, device=hidden.device)
    return BranchRows(hidden[:base], labels, exemplar_hidden, negative_hidden, negative_rows)


class _Place(NamedTuple):
    """The place of a response: its row, its segment, its number of tokens."""

    row: int
    segment: int
    tokens: int


def _rows(
    batch: BatchInputs, hosted: dict[int, int], exemplar_tokens: int
) -> tuple[list[list[Segment]], list[_Place]]:
    """One row for each sample; places of all base, exemplar and negative responses, in order."""
    image_tokens = batch.image.shape[1]
    rows, base, exemplar = [], [], []
    for i, (prompt, response) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        row = [
            Segment(ROOT, prompt.before),
            Segment(0, (0,) * image_tokens, "image"),
            Segment(1, prompt.after),
            Segment(AFTER, response[:-1]),
        ]
        base.append(_Place(i, RESPONSE, len(response)))
        if exemplar_tokens:
            row += [
                Segment(1, (0,) * exemplar_tokens, "exemplar"),
                Segment(4, prompt.after),
                Segment(5, response[:-1]),
            ]
            exemplar.append(_Place(i, EXEMPLAR_RESPONSE, len(response)))
        rows.append(row)
    negative = []
    for k, host in hosted.items():
        assert batch.prompts[k] == batch.prompts[host], "negatives share the instruction"
        response = batch.responses[k]
        rows[host].append(Segment(AFTER, response[:-1]))
        negative.append(_Place(host, len(rows[host]) - 1, len(response)))
    return rows, [*base, *exemplar, *negative]


def _forward(
    vlm: VLM,
    rows: list[list[Segment]],
    places: list[_Place],
    image: Tensor,
    exemplar: Tensor | None,
) -> Tensor:
    """Hidden states that predict the tokens of all places, (tokens, hidden), in order."""
    first = [0]
    for place in places:
        first.append(first[-1] + place.tokens)
    found: list[Tensor] = []
    order: list[int] = []
    for bucket in buckets([length(row) for row in rows]):
        layout = Layout.of([rows[i] for i in bucket], vlm.device)
        features = {"image": image[bucket]}
        if exemplar is not None:
            features["exemplar"] = exemplar[bucket]
        hidden = vlm.hidden(
            layout.embeddings(vlm.embed, features), mask=layout.mask, positions=layout.positions
        )
        inside = {row: number for number, row in enumerate(bucket)}
        at_row: list[int] = []
        at_column: list[int] = []
        for number, place in enumerate(places):
            if place.row in inside:
                row = inside[place.row]
                columns = layout.predicting(row, place.segment, place.tokens)
                at_row += [row] * place.tokens
                at_column += columns
                order += range(first[number], first[number + 1])
        found.append(hidden[at_row, at_column])
    inverse = torch.tensor(order, device=vlm.device).argsort()
    return torch.cat(found)[inverse]
