"""Images -> log-probability of every class's response, and generated text.

Primary: constrained scoring. One forward scores every candidate of a batch of images, without and
with exemplar. The row holds the prompt once, and the candidates after it as a trie that holds
each distinct prefix once (`vitask/tree.py`):

    before  image ─┬─ after ── c ─┬─ a ── t ...
                   │              └─ o ── w ...
                   └─ exemplar  after ── c ─┬─ a ...

Class score = unnormalised sum of the log-probabilities of all response tokens, the end-of-turn
token included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitask.branches import prompt_embeddings, response_hidden
from vitask.tree import ROOT, Layout, Segment
from vitask.vlm import VLM, Prompt

LOGIT_BYTES = 64 * 2**20  # of one piece of logits; it is reduced before the next is made


@dataclass(frozen=True)
class Prediction:
    """A method's prediction for the images of one dataset.

    kind "candidates": log_probability float64 (n, candidates), in nats
    kind "labels":     log_probability float64 (n, classes) that each label is present, for
                       multi-label methods that judge every label separately
    generated: n greedily generated answers; None for methods that do not write
    """

    dataset: str
    kind: str
    log_probability: np.ndarray
    generated: list[str] | None = None


class Trie:
    """Responses as a tree of tokens: every distinct prefix is one node.

    parent: for each node, the node before it; node 0 is the root, the prompt's end
    token:  for each node, its token; -1 for the root
    way:    for each response, the nodes that predict its tokens, the root first
    """

    def __init__(self, responses: Sequence[tuple[int, ...]]) -> None:
        self.parent, self.token = [0], [-1]
        self.way: list[list[int]] = []
        known: dict[tuple[int, ...], int] = {(): 0}
        for response in responses:
            for end in range(1, len(response)):  # the last token is predicted, not an input
                if response[:end] not in known:
                    known[response[:end]] = len(self.parent)
                    self.parent.append(known[response[: end - 1]])
                    self.token.append(response[end - 1])
            self.way.append([known[response[:end]] for end in range(len(response))])

    def segments(self, at: int, root: int) -> list[Segment]:
        """The nodes except the root as segments number `at` and up, after the segment `root`."""
        return [
            Segment(root if parent == 0 else at + parent - 1, (token,))
            for parent, token in zip(self.parent[1:], self.token[1:], strict=True)
        ]


@torch.inference_mode()
def response_log_probabilities(
    vlm: VLM,
    prompt: Prompt,
    image_tokens: Float[Tensor, "images image_tokens hidden"],
    responses: Sequence[tuple[int, ...]],
    *,
    exemplar_tokens: Float[Tensor, "images exemplar_tokens hidden"] | None = None,
    batch_size: int = 64,
) -> Float[np.ndarray, "branches images responses"]:
    """log p(response | prompt, image) in nats, float64.

    Branch 0 is without exemplar. With `exemplar_tokens`, the same forward gives branch 1, with
    exemplar.
    """
    trie = Trie(responses)
    row, ends = _row(prompt, image_tokens.shape[1], trie, exemplar_tokens)
    layout = Layout.of([row], vlm.device)
    nodes = torch.tensor(
        [
            [layout.last(0, root), *(layout.starts[0][at] + i for i in range(len(trie.token) - 1))]
            for root, at in ends
        ],
        device=vlm.device,
    )  # fmt: skip  (branches, nodes): their columns
    scores = []
    for start in range(0, len(image_tokens), batch_size):
        part = slice(start, start + batch_size)
        features = {"image": image_tokens[part]}
        if exemplar_tokens is not None:
            features["exemplar"] = exemplar_tokens[part]
        embeddings = _embeddings(vlm, layout, features)
        hidden = vlm.hidden(
            embeddings, mask=layout.mask, positions=layout.positions.expand(len(embeddings), -1)
        )
        scores.append(_scores(vlm, hidden[:, nodes], trie, responses).cpu())
    return torch.cat(scores, dim=1).numpy()


def _row(
    prompt: Prompt, image_tokens: int, trie: Trie, exemplar_tokens: Tensor | None
) -> tuple[list[Segment], list[tuple[int, int]]]:
    """The row, and for each branch the segments of the trie's root and of its first node."""
    row = [
        Segment(ROOT, prompt.before),
        Segment(0, (0,) * image_tokens, "image"),
        Segment(1, prompt.after),
    ]
    row += trie.segments(3, 2)
    ends = [(2, 3)]
    if exemplar_tokens is not None:
        at = len(row)
        row += [
            Segment(1, (0,) * exemplar_tokens.shape[1], "exemplar"),
            Segment(at, prompt.after),
        ]
        row += trie.segments(at + 2, at + 1)
        ends.append((at + 1, at + 2))
    return row, ends


def _embeddings(vlm: VLM, layout: Layout, features: dict[str, Tensor]) -> Tensor:
    """The same row for every image of a batch, (images, tokens, hidden)."""
    images = len(features["image"])
    embeddings = vlm.embed(layout.ids).repeat(images, 1, 1)
    for name, (_, column) in layout.slots.items():
        embeddings[:, column] = features[name].to(embeddings.device, embeddings.dtype)
    return embeddings


def _scores(
    vlm: VLM,
    hidden: Float[Tensor, "images branches nodes hidden"],
    trie: Trie,
    responses: Sequence[tuple[int, ...]],
) -> Float[Tensor, "branches images responses"]:
    """Sums of log-probabilities along the ways; float64. Logits are made piece by piece."""
    images, branches, nodes, width = hidden.shape
    rows = hidden.reshape(-1, width)
    # (node, token) pairs of all responses: log p of the token at the node
    node = torch.tensor([n for way in trie.way for n in way], device=rows.device)
    token = torch.tensor([t for response in responses for t in response], device=rows.device)
    owner = torch.tensor([r for r, way in enumerate(trie.way) for _ in way], device=rows.device)
    tokens, place = token.unique(return_inverse=True)
    size = max(1, LOGIT_BYTES // (4 * len(vlm.head)))
    pieces = []
    for part in rows.split(size):
        logits = vlm.logits(part)
        log_z = logits.logsumexp(-1, keepdim=True).double()
        pieces.append(logits[:, tokens].double() - log_z)
    log_p = torch.cat(pieces).view(images, branches, nodes, len(tokens))
    along = log_p[:, :, node, place]  # (images, branches, response tokens)
    scores = along.new_zeros(images, branches, len(responses)).index_add_(2, owner, along)
    return scores.transpose(0, 1)


@torch.inference_mode()
def generate(
    vlm: VLM,
    prompts: Sequence[Prompt],
    image_tokens: Float[Tensor, "images image_tokens hidden"],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers, one prompt for each image; shorter prompts are padded on the left."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        chunk = prompts[part]
        embeddings, lengths = prompt_embeddings(
            vlm, chunk, image_tokens[part], [()] * len(chunk), padding="left"
        )
        columns = torch.arange(embeddings.shape[1], device=vlm.device)
        padding = embeddings.shape[1] - torch.tensor(lengths, device=vlm.device)
        ids = vlm.model.generate(
            inputs_embeds=embeddings,
            attention_mask=(columns >= padding[:, None]).long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=vlm.end_of_turn_id,
            pad_token_id=vlm.end_of_turn_id,
        )
        answers += [vlm.decode(row) for row in ids.tolist()]
    return answers


@torch.inference_mode()
def mean_token_probability(
    vlm: VLM,
    prompt: Prompt,
    image: Float[Tensor, "images tokens hidden"],
    responses: Sequence[tuple[int, ...]],
    batch_size: int = 64,
) -> np.ndarray:
    """float64 (images,): mean probability of a response's tokens, each given those before it."""
    found = []
    for start in range(0, len(responses), batch_size):
        batch = responses[start : start + batch_size]
        hidden, labels, owner = response_hidden(
            vlm, [prompt] * len(batch), image[start : start + batch_size], batch
        )
        p = vlm.logits(hidden).softmax(-1).gather(1, labels[:, None])[:, 0]
        total = torch.zeros(len(batch), device=p.device).index_add_(0, owner, p)
        found.append(total / torch.bincount(owner))
    return torch.cat(found).double().cpu().numpy()
