"""Images -> log-probability of every class's response, and generated text.

Primary: constrained scoring. All candidates stand behind one prompt in a single row,

    [prompt | candidate 1 | candidate 2 | ...]

each seeing the prompt and itself only, with positions restarted at the prompt's end: exact, and
the prompt is computed once. Class score = unnormalised sum of the log-probabilities of all
response tokens, the end-of-turn token included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitask.branches import prompt_embeddings
from vitask.vlm import VLM, Prompt


@dataclass(frozen=True)
class Prediction:
    """What a method says about one dataset's images.

    kind "candidates": log_probability (n, candidates), one per possible answer
    kind "labels":     log_probability (n, classes) of each label being present, for multi-label
                       methods that judge every label by itself
    generated: the greedily generated answers, None for methods that do not write
    """

    dataset: str
    kind: str
    log_probability: np.ndarray  # float64
    generated: list[str] | None = None


@torch.inference_mode()
def response_log_probabilities(
    vlm: VLM,
    prompt: Prompt,
    image_tokens: Float[Tensor, "images image_tokens hidden"],
    responses: Sequence[tuple[int, ...]],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """log p(response | prompt, image) of every response, float64 (images, responses), in nats."""
    inputs = [list(response[:-1]) for response in responses]
    length = len(prompt.before) + image_tokens.shape[1] + len(prompt.after)
    mask, positions = candidate_mask(length, [len(i) for i in inputs])
    mask, positions = mask.to(vlm.device), positions.to(vlm.device)
    row, token, owner = _scored(responses)
    scores = []
    for chunk in image_tokens.split(batch_size):
        flat = [t for i in inputs for t in i]
        embeddings, _ = prompt_embeddings(vlm, [prompt] * len(chunk), chunk, [flat] * len(chunk))
        hidden = vlm.hidden(
            embeddings, mask=mask[None, None], positions=positions.expand(len(chunk), -1)
        )
        used = hidden[:, length - 1 :]  # the prompt's last position, then the candidates' tokens
        # log-sum-exp once per position; a candidate's first token reads the shared position
        logits = vlm.logits(used.flatten(0, 1)).unflatten(0, used.shape[:2])
        log_p = logits[:, row, token].double() - logits.logsumexp(-1).double()[:, row]
        score = torch.zeros(len(chunk), len(responses), dtype=torch.float64, device=vlm.device)
        scores.append(score.index_add_(1, owner.to(vlm.device), log_p).cpu())
    return torch.cat(scores).numpy()


def candidate_mask(
    prompt: int, candidates: Sequence[int]
) -> tuple[Bool[Tensor, "tokens tokens"], Int[Tensor, "1 tokens"]]:
    """Mask (True: may look) and positions of [prompt | candidate 1 | ...] with these lengths."""
    segment = torch.cat(
        [torch.zeros(prompt, dtype=torch.long)]
        + [torch.full((n,), i) for i, n in enumerate(candidates, start=1)]
    )
    causal = torch.ones(len(segment), len(segment), dtype=torch.bool).tril()
    visible = (segment[None] == 0) | (segment[None] == segment[:, None])
    restarted = [torch.arange(prompt)] + [torch.arange(prompt, prompt + n) for n in candidates]
    return causal & visible, torch.cat(restarted)[None]


def _scored(responses: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """For every response token: the position that predicts it (0 is the prompt's last), the
    token, and its response."""
    row: list[int] = []
    token: list[int] = []
    owner: list[int] = []
    start = 1
    for number, response in enumerate(responses):
        row += [0, *range(start, start + len(response) - 1)]
        token += response
        owner += [number] * len(response)
        start += len(response) - 1
    return torch.tensor(row), torch.tensor(token), torch.tensor(owner)


@torch.inference_mode()
def generate(
    vlm: VLM,
    prompt: Prompt,
    image_tokens: Float[Tensor, "images image_tokens hidden"],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers. The rows of a batch share the prompt's length, so none is padded."""
    answers = []
    for chunk in image_tokens.split(batch_size):
        embeddings, _ = prompt_embeddings(vlm, [prompt] * len(chunk), chunk, [[]] * len(chunk))
        ids = vlm.model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=vlm.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=vlm.end_of_turn_id,
            pad_token_id=vlm.end_of_turn_id,
        )
        answers += [vlm.decode(row) for row in ids.tolist()]
    return answers
