"""The paper's figure 3: is the true response likelier for the right image than for a wrong one?

For every test image, the mean probability of the true response's tokens (each given those before
it), once for the image itself and once for an image of another class of the same dataset. The
distributions are drawn; `overlap` is the mass that they share (0 apart, 1 alike; 50 bins), and
`ranking_auc` the probability that a right image stands above a wrong one.
"""

import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    from bench.record import Record
    from bench.work import Work
    from vitask.checkpoint import VITask
    from vitask.recipes import Recipe

STUDY = True
METHODS = {
    "untuned": "the VLM as it is",
    "vanilla": "Van alone",
    "crt": "Van + CRT",
}
REFERENCE = "vanilla"
PUBLISHED = None
PUBLISHED_NOTE = ""
TABLES = {
    "ranking_auc": "Probability that the right image stands above a wrong one",
    "overlap": "Overlap of the two distributions",
    "positive": "Mean token probability of the true response, right image",
    "negative": "The same, image of another class",
}
BINS = 50


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, tuning_units
    from vitask.recipes import vanilla

    plain = vanilla(recipe)
    crt = replace(plain, crt_weight=recipe.crt_weight)
    return tuning_units(plain) + tuning_units(crt) + SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import SCORING, Work
    from vitask.recipes import vanilla

    work, plain = Work(context, seed), vanilla(context.recipe)
    crt = replace(plain, crt_weight=context.recipe.crt_weight)
    for method, recipe in (("untuned", None), ("vanilla", plain), ("crt", crt)):
        if method not in wanted:
            continue
        model = work.untuned if recipe is None else work.tuned(recipe, name=method).model
        pairs = {name: _pairs(work, model, name) for name in context.evaluated}
        values = {name: _values(*sides) for name, sides in pairs.items()}
        kept = {name: [np.round(s, 5).tolist() for s in sides] for name, sides in pairs.items()}
        work.advance(SCORING, f"{method}, seed {seed}")
        yield Outcome(method, [], {"mean token probability": kept}, values)


def _pairs(work: "Work", model: "VITask", name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean token probability of each image's true response, for it and for a wrong image."""
    from vitask.prompts import answer, instruction, response

    dataset = work.everything[name]
    test = dataset.splits["test"]
    texts = [answer(dataset.spec, label) for label in test.labels]
    rng = np.random.default_rng(zlib.crc32(f"ranking/{name}".encode()))
    groups = {text: np.array([i for i, t in enumerate(texts) if t != text]) for text in set(texts)}
    wrong = [int(rng.choice(groups[text])) for text in texts]
    prompt = model.vlm.prompt(instruction(dataset.spec, model.recipe.instruction))
    ids = [model.vlm.response_ids(response(text)) for text in texts]
    image = work.image(name, "test")
    right = _mean_probability(model, prompt, image, ids)
    return right, _mean_probability(model, prompt, image[wrong], ids)


def _mean_probability(model: "VITask", prompt: Any, image: Any, ids: list[Any]) -> np.ndarray:
    import torch

    from vitask.branches import response_hidden

    found = []
    size = model.recipe.score_batch_size
    with torch.inference_mode():
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            hidden, labels, owner = response_hidden(
                model.vlm, [prompt] * len(part), image[start : start + size], part
            )
            p = model.vlm.logits(hidden).softmax(-1).gather(1, labels[:, None])[:, 0]
            total = torch.zeros(len(part), device=p.device).index_add_(0, owner, p)
            found.append(total / torch.bincount(owner))
    return torch.cat(found).double().cpu().numpy()


def _values(positive: np.ndarray, negative: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    edges = np.linspace(0, 1, BINS + 1)
    shares = [np.histogram(side, edges)[0] / len(side) for side in (positive, negative)]
    truth = np.repeat([1, 0], [len(positive), len(negative)])
    return {
        "ranking_auc": float(roc_auc_score(truth, np.concatenate([positive, negative]))),
        "overlap": float(np.minimum(*shares).sum()),
        "positive": float(positive.mean()),
        "negative": float(negative.mean()),
    }


def plots(records: "Sequence[Record]") -> dict[str, str]:
    """The distributions of the first seed, all datasets together, a panel a method."""
    from bench.figures import densities

    first = min(record.seed for record in records)
    panels = []
    for record in records:
        if record.seed == first:
            sides = record.extras["mean token probability"].values()
            positive, negative = ([v for pair in sides for v in pair[i]] for i in (0, 1))
            panels.append((record.method, positive, negative))
    phantom = any(card["source"] == "phantom" for card in records[0].data.values())
    title = f"Mean token probability of the true response{' — PHANTOM data' if phantom else ''}"
    return {"ranking.svg": densities(panels, title)}
