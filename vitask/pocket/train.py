"""Pre-training of the pocket VLM: first the vision tower on facts, then the whole on answers.

Facts: linear heads predict every fact from the image tokens, which trains the vision tower and the
connector. Without this start, the loss of the answers stayed at their entropy for 250 steps.

Answers: each picture has several questions in one row that branches (`vitask/tree.py`),
[prefix image | question answer | question answer | ...]. A question attends to the image and to
itself only, so a picture is encoded once for all its questions. At first, every picture also has a
copying task, whose random tokens are most of the loss, and the heads still train. In the later
stages the heads are gone and few pictures have a copying task, so the model learns the questions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from kernels import IGNORE_INDEX, response_loss
from vitask.pocket.pictures import Pictures, draw
from vitask.pocket.questions import KINDS, LISTED, ORDINALS, Question, ask
from vitask.prompts import response
from vitask.tree import ROOT, Layout, Segment
from vitask.vlm import VLM, Prompt

FACT_STEPS = 400
# Stages of answering: steps, and a copying task with every n-th picture. Each stage has a warm-up
# and a cosine: restarts improved the kinds that are learnt last, shape and position.
ANSWERING_STAGES = ((500, 1), (300, 8), (250, 8))
STEPS = FACT_STEPS + sum(steps for steps, _ in ANSWERING_STAGES)
FACT_PICTURES = 128  # in a step of the facts
PICTURES = 48  # in a step of the answers
QUESTIONS = 4  # about a picture
LEARNING_RATE = 2e-3
WARMUP = 50  # steps


@dataclass(frozen=True)
class PictureBatch:
    """One step.

    images: uint8 (rows, 32, 32, 3)
    facts:  kind -> int64 (rows,), index of the true answer or IGNORE_INDEX
    layout: one row for each picture, with the image's tokens as "image"
    labels: int64 (rows, tokens), already shifted, IGNORE_INDEX where no answer is predicted
    """

    images: np.ndarray
    facts: dict[str, Tensor]
    layout: Layout
    labels: Tensor


def pretrain(vlm: VLM, steps: int, seed: int) -> Iterator[float]:
    """Train all of `vlm` in place; with fewer than STEPS it stops early on the same schedule.

    Yields the loss of each step: of the facts in nats, then in nats per response token.
    """
    vlm.model.train().requires_grad_(True)
    yield from islice(_stages(vlm, seed), steps)
    vlm.model.eval().requires_grad_(False)


def _stages(vlm: VLM, seed: int) -> Iterator[float]:
    heads = FactHeads(vlm, seed)
    yield from _learn_facts(vlm, heads, seed)
    start = FACT_STEPS
    for stage, (steps, copying_every) in enumerate(ANSWERING_STAGES):
        trained = heads if stage == 0 else None
        yield from _learn_answers(vlm, trained, seed, range(start, start + steps), copying_every)
        start += steps


def _learn_facts(vlm: VLM, heads: "FactHeads", seed: int) -> Iterator[float]:
    vision = nn.ModuleList(
        [vlm.model.model.vision_tower, vlm.model.model.multi_modal_projector, heads]
    )
    update = _Update(vision, FACT_STEPS)
    for step in range(FACT_STEPS):
        pictures = draw(FACT_PICTURES, np.random.default_rng([seed, step]))
        loss = heads(vlm.image_tokens(vlm.pixel_values(pictures.images)), settled(pictures))
        update(loss)
        yield float(loss.detach())


def _learn_answers(
    vlm: VLM, heads: "FactHeads | None", seed: int, steps: range, copying_every: int
) -> Iterator[float]:
    update = _Update(nn.ModuleList([vlm.model, heads] if heads else [vlm.model]), len(steps))
    for step in steps:
        batch = make_batch(vlm, np.random.default_rng([seed, step]), copying_every)
        features = vlm.image_tokens(vlm.pixel_values(batch.images))
        hidden = row_hidden(vlm, batch.layout, features)
        keep = batch.labels != IGNORE_INDEX
        loss = response_loss(vlm.logits(hidden[keep]), batch.labels[keep])
        update(loss + heads(features, batch.facts) if heads else loss)
        yield float(loss.detach())


class _Update:
    """One step of AdamW: warm-up and cosine, clipped gradients, weight decay on matrices only."""

    def __init__(self, module: nn.Module, steps: int) -> None:
        self._parameters = list(module.parameters())
        groups = [
            {"params": [p for p in self._parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in self._parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
        self._schedule = get_cosine_schedule_with_warmup(self._optimizer, WARMUP, steps)

    def __call__(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()


def settled(pictures: Pictures) -> dict[str, Tensor]:
    """Facts as labels, int64 (n,): IGNORE_INDEX if the picture does not settle them."""
    return {
        kind: torch.from_numpy(np.where(fact < 0, IGNORE_INDEX, fact))
        for kind, fact in pictures.facts.items()
    }


class FactHeads(nn.Module):
    """A linear head for each kind, on all image tokens; mean cross-entropy of the settled facts."""

    def __init__(self, vlm: VLM, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
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


def row_hidden(
    vlm: VLM, layout: Layout, features: Float[Tensor, "rows image_tokens hidden"]
) -> Float[Tensor, "rows tokens hidden"]:
    """Last hidden states of a batch's rows, with the image features at their places."""
    embeddings = layout.embeddings(vlm.embed, {"image": features})
    return vlm.hidden(embeddings, mask=layout.mask, positions=layout.positions)


def make_batch(vlm: VLM, rng: np.random.Generator, copying_every: int = 1) -> PictureBatch:
    """Pictures with random questions that they settle, every n-th with a copying task too."""
    pictures = draw(PICTURES, rng)
    rows = []
    for i in range(PICTURES):
        kinds = [kind for kind in KINDS if pictures.facts[kind][i] >= 0]
        chosen = rng.permutation(kinds)[:QUESTIONS]
        asked = [ask(str(kind), int(pictures.facts[kind][i]), rng) for kind in chosen]
        if i % copying_every == 0:
            asked.append(copying(vlm, rng))
        turns = [(vlm.prompt(q.instruction), vlm.response_ids(response(q.answer))) for q in asked]
        rows.append(turns)
    return collate(vlm, pictures.images, settled(pictures), rows)


def copying(vlm: VLM, rng: np.random.Generator) -> Question:
    """Two to four pseudo-words of one to three random tokens; one of them is the answer.

    It teaches the head every token of the vocabulary, so that later tuning can write words that no
    question about pictures has.
    """
    tokenizer = vlm.processor.tokenizer
    words: list[str] = []
    count = rng.integers(2, 5)
    while len(words) < count:
        ids = rng.integers(len(tokenizer), size=rng.integers(1, 4)).tolist()
        word = tokenizer.decode([i for i in ids if i not in vlm.special]).strip()
        if word and "\ufffd" not in word:  # a single byte of a longer character is not text
            words.append(word)
    chosen = int(rng.integers(count))
    text = LISTED.format(answers="; ".join(words)).strip() + f" Give the {ORDINALS[chosen]}."
    return Question("copying", text, words[chosen])


def collate(
    vlm: VLM,
    images: np.ndarray,
    facts: dict[str, Tensor],
    rows: Sequence[Sequence[tuple[Prompt, tuple[int, ...]]]],
) -> PictureBatch:
    """One row for each picture, with its questions as (prompt, response ids)."""
    places = vlm.processor.image_seq_length
    segments: list[list[Segment]] = []
    for turns in rows:
        row = [Segment(ROOT, turns[0][0].before), Segment(0, (0,) * places, "image")]
        for prompt, answer in turns:
            row += [Segment(1, prompt.after), Segment(len(row), answer[:-1])]
        segments.append(row)
    layout = Layout.of(segments)
    labels = torch.full_like(layout.ids, IGNORE_INDEX)
    for number, turns in enumerate(rows):
        for turn, (_, answer) in enumerate(turns):
            columns = layout.predicting(number, 2 * turn + 3, len(answer))
            labels[number, columns] = torch.tensor(answer)
    return PictureBatch(images, facts, layout, labels)
