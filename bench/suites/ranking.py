"""The paper's figure 3: do right images rank above wrong ones?

For every test image, the suite takes the mean probability of the true response's tokens (each
given those before it): once for the image itself, once for an image of another class of the same
dataset. The page draws both distributions. `overlap` is the mass that they share (0 apart, 1
alike; 50 bins), `ranking_auc` the probability that a right image ranks above a wrong one.
"""

import zlib
from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np

from bench.runs.work import Work
from bench.stats.items import Items, Values
from bench.stats.metrics import binary_auc
from bench.suite import Chart, Method, Metric, Outcome, Suite, Training
from vitask.checkpoint import VITask
from vitask.prompts import answer, instruction, response
from vitask.recipes import Recipe, vanilla
from vitask.score import mean_token_probability

BINS = 50


class Ranking(Suite):
    name = "ranking"
    scorings = 0.4  # no generated answers
    methods = (
        Method("untuned", "the VLM before tuning", "vanilla"),
        Method("vanilla", "Van alone"),
        Method("crt", "Van + CRT", "vanilla"),
    )
    metrics = (
        Metric(
            "ranking_auc",
            "Probability that the right image ranks above a wrong one",
            ranks=("positive", "negative"),
        ),
        Metric("overlap", "Overlap of the two distributions", lower_is_better=True, biased=True),
        Metric("positive", "Mean token probability of the true response, right image"),
        Metric("negative", "The same, image of another class", lower_is_better=True),
    )
    charts = (
        Chart("ranking.svg", "densities", title="Mean token probability of the true response"),
    )

    def models(self, recipe: Recipe) -> dict[str, Training]:
        plain = vanilla(recipe)
        crt = replace(plain, crt_weight=recipe.crt_weight)
        return {"vanilla": Training("vanilla", plain), "crt": Training("crt", crt)}

    def run(self, work: Work, wanted: Collection[str]) -> Iterator[Outcome]:
        models = self.models(work.recipe)
        for method in (m.name for m in self.methods):
            if method not in wanted:
                continue
            model, changed = work.untuned, {}
            if method in models:
                tuned = work.tuned(models[method])
                model, changed = tuned.model, tuned.note["changed"]
            items = {name: _items(work, model, name) for name in work.evaluated}
            work.scored(method)
            yield Outcome(method, [], {"changed": changed}, items=items)

    def measured(self, values: Values, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The numbers of the two distributions, an image's two values weighted alike."""
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


def _items(work: Work, model: VITask, name: str) -> Items:
    """Mean token probability of each image's true response, for it and for a wrong image."""
    dataset = work.everything[name]
    test = dataset.splits["test"]
    texts = [answer(dataset.spec, label) for label in test.labels]
    rng = np.random.default_rng(zlib.crc32(f"ranking/{name}".encode()))
    groups = {text: np.array([i for i, t in enumerate(texts) if t != text]) for text in set(texts)}
    wrong = [int(rng.choice(groups[text])) for text in texts]
    prompt = model.vlm.prompt(instruction(dataset.spec, model.recipe.instruction))
    ids = [model.vlm.response_ids(response(text)) for text in texts]
    image, size = work.image(name, "test"), model.recipe.score_batch_size
    values = {
        "positive": mean_token_probability(model.vlm, prompt, image, ids, size),
        "negative": mean_token_probability(model.vlm, prompt, image[wrong], ids, size),
    }
    return Items(values, test.groups)


SUITE = Ranking()
