"""Pre-training of the pocket VLM: pictures, several questions each, one row a picture.

A row is [prefix image | question answer | question answer | ...]; every question sees the image
and itself only, so a picture is encoded once for all its questions.

Beside the answers, linear heads read every fact off the image tokens. They give the vision tower
a signal from the first step on, long before the language model has learnt to look (without them
the loss stayed at the answers' entropy for 200 steps), and are thrown away at the end.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from kernels import IGNORE_INDEX, response_loss
from vitask.pocket.pictures import draw
from vitask.pocket.questions import KINDS, LISTED, ORDINALS, Question, ask
from vitask.prompts import response
from vitask.vlm import VLM

PICTURES = 48  # a step
QUESTIONS = 4  # a picture, and one task of copying
LEARNING_RATE = 2e-3
WARMUP = 100  # steps


@dataclass(frozen=True)
class Batch:
    """One step. mask: bool (rows, 1, tokens, tokens); labels: (rows, tokens), already shifted.

    facts: kind -> (rows,), index of the true answer or IGNORE_INDEX
    """

    images: np.ndarray
    facts: dict[str, Tensor]
    ids: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor


def pretrain(
    vlm: VLM, steps: int, seed: int, *, schedule_steps: int | None = None
) -> Iterator[float]:
    """Train all of `vlm` in place; gives the loss of every step in nats per response token.

    schedule_steps: steps of the learning rate's schedule, by default `steps`.
    """
    model = vlm.model.train().requires_grad_(True)
    facts = FactHeads(vlm)
    trained = [*model.parameters(), *facts.parameters()]
    decayed = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, schedule_steps or steps)
    for step in range(steps):
        batch = make_batch(vlm, np.random.default_rng([seed, step]))
        embeddings = vlm.embed(batch.ids)
        features = model.model.get_image_features(vlm.pixel_values(batch.images)).pooler_output
        place = (batch.ids == vlm.processor.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(place, features)
        hidden = vlm.hidden(embeddings, mask=batch.mask, positions=batch.positions)
        keep = batch.labels != IGNORE_INDEX
        loss = response_loss(vlm.logits(hidden[keep]), batch.labels[keep])
        (loss + facts(features, batch.facts)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield float(loss.detach())
    model.eval().requires_grad_(False)


class FactHeads(nn.Module):
    """One linear head a kind, over all image tokens; mean cross-entropy of the settled facts."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        width = vlm.processor.image_seq_length * vlm.hidden_size
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({k: nn.Linear(width, len(a)) for k, a in KINDS.items()})

    def forward(self, features: Tensor, facts: dict[str, Tensor]) -> Tensor:
        flat = self.norm(features.flatten(1))
        losses = [
            functional.cross_entropy(head(flat), facts[kind], ignore_index=IGNORE_INDEX)
            for kind, head in self.heads.items()
        ]
        return torch.stack(losses).mean()


def make_batch(vlm: VLM, rng: np.random.Generator) -> Batch:
    """Pictures with random questions that they settle, each with one task of copying."""
    pictures = draw(PICTURES, rng)
    image = [vlm.processor.image_token_id] * vlm.processor.image_seq_length
    rows = []
    for i in range(PICTURES):
        kinds = [kind for kind in KINDS if pictures.facts[kind][i] >= 0]
        chosen = rng.permutation(kinds)[:QUESTIONS]
        asked = [ask(str(kind), int(pictures.facts[kind][i]), rng) for kind in chosen]
        asked.append(copying(vlm, rng))
        turns = [(vlm.prompt(q.instruction), vlm.response_ids(response(q.answer))) for q in asked]
        before = turns[0][0].before
        rows.append(([*before, *image], [(list(p.after), list(r)) for p, r in turns]))
    facts = {
        kind: torch.from_numpy(np.where(fact < 0, IGNORE_INDEX, fact))
        for kind, fact in pictures.facts.items()
    }
    return collate(pictures.images, facts, rows, vlm.processor.tokenizer.pad_token_id)


def copying(vlm: VLM, rng: np.random.Generator) -> Question:
    """Two to four pseudo-words of one to three random tokens; one of them is the answer."""
    tokenizer = vlm.processor.tokenizer
    special = set(tokenizer.all_special_ids)
    words: list[str] = []
    count = rng.integers(2, 5)
    while len(words) < count:
        ids = rng.integers(len(tokenizer), size=rng.integers(1, 4)).tolist()
        word = tokenizer.decode([i for i in ids if i not in special]).strip()
        if word and "\ufffd" not in word:  # a lone byte of a longer character is no text
            words.append(word)
    chosen = int(rng.integers(count))
    text = LISTED.format(answers="; ".join(words)).strip() + f" Give the {ORDINALS[chosen]}."
    return Question("copying", text, words[chosen])


def collate(
    images: np.ndarray,
    facts: dict[str, Tensor],
    rows: list[tuple[list[int], list[tuple[list[int], list[int]]]]],
    pad: int,
) -> Batch:
    """(prefix ids, [(question ids, answer ids), ...]) of every picture -> one padded batch."""
    longest = max(
        len(prefix) + sum(len(q) + len(a) - 1 for q, a in turns) for prefix, turns in rows
    )
    shape = (len(rows), longest)
    ids = np.full(shape, pad)
    positions = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX)
    segment = np.full(shape, -1)  # 0: the shared prefix, 1..: questions, -1: padding
    for row, (prefix, turns) in enumerate(rows):
        end = len(prefix)
        ids[row, :end], positions[row, :end], segment[row, :end] = prefix, np.arange(end), 0
        for number, (question, answer) in enumerate(turns, start=1):
            start, tokens = end, question + answer[:-1]
            end = start + len(tokens)
            ids[row, start:end] = tokens
            positions[row, start:end] = len(prefix) + np.arange(len(tokens))
            segment[row, start:end] = number
            labels[row, end - len(answer) : end] = answer
    mine = torch.from_numpy(segment)
    seen = (mine[:, None] == 0) | (mine[:, None] == mine[:, :, None])
    mask = seen & torch.ones(longest, longest, dtype=torch.bool).tril()
    return Batch(
        images,
        facts,
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        mask[:, None],
        torch.from_numpy(labels),
    )
