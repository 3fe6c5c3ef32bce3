"""What each method costs: parameters, training seconds and memory, images per second.

Seconds and memory are this machine's, of one process, and differ from run to run. Training of
VITask includes its task-specific model's; images per second include every model that an answer
needs, from pixels to class scores.
"""

import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    import torch

    from bench.work import Work
    from vitask.recipes import Recipe

STUDY = True
METHODS = {
    "tsm": "the task-specific model alone",
    "vanilla": "the VLM tuned with Van alone",
    "vitask_without_ep": "VITask, answering alone",
    "vitask_with_ep": "VITask, answering with the exemplar",
}
REFERENCE = None
PUBLISHED = None
PUBLISHED_NOTE = ""
TABLES = {
    "parameters_trained": "Parameters that are trained",
    "parameters_total": "Parameters that an answer needs",
    "training_seconds": "Seconds of training",
    "training_peak_mib": "Largest memory of the process during training, MiB",
    "images_per_second": "Images per second, from pixels to class scores",
}
MEASURED = ("training_seconds", "training_peak_mib", "images_per_second")
IMAGES = 128  # of the first dataset's test part, whose answers are timed


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units
    from vitask.recipes import vanilla

    tuning = tuning_units(recipe) + tuning_units(vanilla(recipe))
    return tuning + specialist_units(recipe) + SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import SCORING, Tuned, Work
    from vitask.recipes import vanilla

    work = Work(context, seed)
    specialist = work.specialist()
    own, models = _count(specialist.model), dict[str, Tuned]()
    for method in METHODS:
        if method not in wanted:
            continue
        if method == "tsm":
            notes, total, trained = [specialist.note], own, own
            rate = _rate(work, lambda name, images, spec=None: specialist.model.log_probabilities(
                images, work.everything[name].spec))  # fmt: skip
        else:
            vitask = method.startswith("vitask")
            recipe = context.recipe if vitask else vanilla(context.recipe)
            name = "vitask" if vitask else "vanilla"
            if name not in models:
                models[name] = work.tuned(recipe, specialist, name=name)
            tuned = models[name]
            model, exemplar = tuned.model, method == "vitask_with_ep"
            notes = [tuned.note, *([specialist.note] if vitask else [])]
            adapters = sum(
                p.numel() for n, p in model.vlm.adapter.named_parameters() if "lora_" in n
            )
            connector = 0 if model.connector is None else _count(model.connector)
            trained = adapters + connector + (own if vitask else 0)
            total = _count(model.vlm.adapter) + ((connector + own) if exemplar else 0)
            rate = _rate(work, lambda name, images, m=model, e=exemplar: m.predict(
                name, images, exemplar=e))  # fmt: skip
        values = {
            "parameters_trained": float(trained),
            "parameters_total": float(total),
            "training_seconds": sum(note["seconds"] for note in notes),
            "training_peak_mib": max(note["peak_mib"] for note in notes),
            "images_per_second": rate,
        }
        work.advance(SCORING, f"{method}, seed {seed}")
        yield Outcome(method, [], values={"all datasets": values}, measured=MEASURED)


def _count(module: "torch.nn.Module") -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _rate(work: "Work", answer: object) -> float:
    """Images per second, the better of two tries: the first warms up."""
    name, dataset = next(iter(work.context.evaluated.items()))
    images = dataset.splits["test"].images[:IMAGES]
    best = 0.0
    for _ in range(2):
        start = time.perf_counter()
        answer(name, images)  # type: ignore[operator]
        best = max(best, len(images) / (time.perf_counter() - start))
    return best
