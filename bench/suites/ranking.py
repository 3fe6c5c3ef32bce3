"""The paper's figure 3: is the true response likelier for the right image than for a wrong one?

For every test image, the mean probability of the true response's tokens (each given those before
it), once for the image itself and once for an image of another class of the same dataset. The
distributions are drawn; `overlap` is the mass that they share (0 apart, 1 alike; 50 bins), and
`ranking_auc` the probability that a right image stands above a wrong one.
"""

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    from bench.items import Items
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
RANKED = {"ranking_auc": ("positive", "negative")}
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
        items = {name: _items(work, model, name) for name in context.evaluated}
        work.advance(SCORING, f"{method}, seed {seed}")
        changed = {} if recipe is None else work.changed(recipe)
        yield Outcome(method, [], {"changed": changed}, items=items)


def _items(work: "Work", model: "VITask", name: str) -> "Items":
    """Mean token probability of each image's true response, for it and for a wrong image."""
    from bench.items import Items
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
    values = {
        "positive": _mean_probability(model, prompt, image, ids),
        "negative": _mean_probability(model, prompt, image[wrong], ids),
    }
    return Items(values, test.groups)


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


def measured(values: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of the two distributions, an image's two values weighted alike."""
    from bench.metrics import binary_auc

    positive, negative = values["positive"], values["negative"]
    total = weights.sum(1, keepdims=True)
    shares = []
    for side in (positive, negative):
        bins = np.minimum((side * BINS).astype(int), BINS - 1)
        shares.append(weights @ np.eye(BINS)[bins] / total)
    truth = np.repeat([True, False], [len(positive), len(negative)])
    both = np.hstack([weights, weights]).T
    return {
        "ranking_auc": binary_auc(np.concatenate([positive, negative]), truth, both),
        "overlap": np.minimum(*shares).sum(1),
        "positive": weights @ positive / total[:, 0],
        "negative": weights @ negative / total[:, 0],
    }


def plots(records: "Sequence[Record]") -> dict[str, str]:
    """The distributions of the first seed, all datasets together, a panel a method."""
    from bench.figures import densities

    first = min(record.seed for record in records)
    panels = []
    for record in records:
        if record.seed == first:
            sides = [card["values"] for card in record.items.values()]
            positive, negative = (
                [v for side in sides for v in side[name]] for name in ("positive", "negative")
            )
            panels.append((record.method, positive, negative))
    phantom = any(card["source"] == "phantom" for card in records[0].data.values())
    title = f"Mean token probability of the true response{' — PHANTOM data' if phantom else ''}"
    return {"ranking.svg": densities(panels, title)}
