"""The plain three forwards of a VITask step: base, exemplar and negative branch, one row each.

The reference that faster implementations are tested against, and the way for methods that change
the prefix itself (`rep`).

    base      [before | image i          | after | response i]     p(y_i | v_i, x_i)
    exemplar  [before | image i exemplar | after | response i]     p(y_i | v_i, e_i, x_i)
    negative  [before | image j          | after | response i]     p(y_i | v_j, x_i)
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitask.exemplar import ExemplarConnector, image_and_exemplar
from vitask.vlm import VLM, Prompt


class BatchInputs(NamedTuple):
    """What one training step takes, one row a sample.

    prompts, responses: token ids, one each per row
    image:    (rows, image_tokens, hidden), or pixel values before `TuningStep` makes them tokens
    exemplar: TSM features (rows, features) or (rows, tokens, features); None without exemplar
    negative: int64 (rows,), the row whose image is this row's negative, -1 for none; None
        without CRT
    """

    prompts: Sequence[Prompt]
    responses: Sequence[tuple[int, ...]]
    image: Tensor
    exemplar: Tensor | None
    negative: Tensor | None


class BranchRows(NamedTuple):
    """Hidden states at the response positions only: the arguments of the joint loss.

    hidden:          (rows, hidden); row t predicts labels[t]
    labels:          int64 (rows,), token ids
    exemplar_hidden: (rows, hidden) or None
    negative_hidden: (negatives, hidden) or None
    negative_rows:   int64 (negatives,), the rows of `hidden` that have a negative, or None
    """

    hidden: Tensor
    labels: Tensor
    exemplar_hidden: Tensor | None
    negative_hidden: Tensor | None
    negative_rows: Tensor | None


def three_forwards(
    vlm: VLM, connector: ExemplarConnector | None, batch: BatchInputs, variant: str
) -> BranchRows:
    """One forward of the language model per branch; branches without inputs are left out."""
    hidden, labels, owner = response_hidden(vlm, batch.prompts, batch.image, batch.responses)
    exemplar_hidden = negative_hidden = negative_rows = None
    if batch.exemplar is not None and connector is not None:
        tokens = image_and_exemplar(batch.image, connector(batch.exemplar), variant)
        exemplar_hidden, _, _ = response_hidden(vlm, batch.prompts, tokens, batch.responses)
    if batch.negative is not None and bool((batch.negative >= 0).any()):
        rows = (batch.negative >= 0).nonzero()[:, 0]
        negative_hidden, _, _ = response_hidden(
            vlm,
            [batch.prompts[i] for i in rows.tolist()],
            batch.image[batch.negative[rows]],
            [batch.responses[i] for i in rows.tolist()],
        )
        negative_rows = torch.isin(owner, rows).nonzero()[:, 0]
    return BranchRows(hidden, labels, exemplar_hidden, negative_hidden, negative_rows)


def response_hidden(
    vlm: VLM,
    prompts: Sequence[Prompt],
    image_tokens: Float[Tensor, "batch image_tokens hidden"],
    responses: Sequence[tuple[int, ...]],
) -> tuple[Float[Tensor, "rows hidden"], Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Hidden states that predict each response token, the tokens, and the sample of each row.

    Rows are in sample order. Response token k after a prompt of P tokens is predicted at position
    P - 1 + k, so the last response token is not an input.
    """
    inputs = [[*response[:-1]] for response in responses]
    embeddings, lengths = prompt_embeddings(vlm, prompts, image_tokens, inputs)
    hidden = vlm.hidden(embeddings)
    owner = [i for i, response in enumerate(responses) for _ in response]
    position = [
        lengths[i] - 1 + k for i, response in enumerate(responses) for k in range(len(response))
    ]
    index = torch.tensor([owner, position], device=hidden.device)
    labels = torch.tensor([t for response in responses for t in response], device=hidden.device)
    return hidden[index[0], index[1]], labels, index[0]


def prompt_embeddings(
    vlm: VLM,
    prompts: Sequence[Prompt],
    image_tokens: Float[Tensor, "batch image_tokens hidden"],
    continuations: Sequence[Sequence[int]],
    *,
    padding: Literal["left", "right"] = "right",
) -> tuple[Float[Tensor, "batch tokens hidden"], list[int]]:
    """Embeddings of [before | image tokens | after | continuation], padded; prompt lengths."""
    count = image_tokens.shape[1]
    rows = [
        [*p.before, *([0] * count), *p.after, *c]
        for p, c in zip(prompts, continuations, strict=True)
    ]
    longest = max(map(len, rows))
    before = [longest - len(row) if padding == "left" else 0 for row in rows]
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, (row, skipped) in enumerate(zip(rows, before, strict=True)):
        ids[number, skipped : skipped + len(row)] = torch.tensor(row)
    embeddings = vlm.embed(ids.to(vlm.device))
    offsets = [skipped + len(p.before) for p, skipped in zip(prompts, before, strict=True)]
    start = torch.tensor(offsets, device=vlm.device)
    columns = start[:, None] + torch.arange(count, device=vlm.device)  # (batch, image_tokens)
    samples = torch.arange(len(rows), device=vlm.device)[:, None]
    image_tokens = image_tokens.to(vlm.device, embeddings.dtype)
    embeddings = embeddings.index_put((samples, columns), image_tokens)
    return embeddings, [len(p.before) + count + len(p.after) for p in prompts]
