"""What each method costs: parameters, training seconds and memory, images per second.

Seconds and memory are this machine's and differ from run to run. Seconds are those of the run that
trained the model, here or in a suite before; the frozen image features, which all share, are not
in them. Training of VITask includes its task-specific model's; images per second include every
model that an answer needs, from pixels to class scores.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    import numpy as np
    import torch

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
    "training_peak_mib": "Largest memory that training held beyond what was there before, MiB",
    "images_per_second": "Images per second, from pixels to class scores",
}
MEASURED = ("training_seconds", "training_peak_mib", "images_per_second")
ROUNDS = 5
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
    name, dataset = next(iter(context.evaluated.items()))
    found: dict[str, dict[str, float]] = {}
    changed: dict[str, dict[str, Any]] = {}
    answers: dict[str, Callable[[np.ndarray], Any]] = {}
    for method in METHODS:
        if method not in wanted:
            continue
        if method == "tsm":
            notes, total, trained = [specialist.note], own, own
            answers[method] = partial(specialist.model.log_probabilities, spec=dataset.spec)
        else:
            vitask = method.startswith("vitask")
            recipe = context.recipe if vitask else vanilla(context.recipe)
            kind = "vitask" if vitask else "vanilla"
            if kind not in models:
                models[kind] = work.tuned(recipe, specialist, name=kind)
            tuned = models[kind]
            model, exemplar = tuned.model, method == "vitask_with_ep"
            notes = [tuned.note, *([specialist.note] if vitask else [])]
            adapters = sum(
                p.numel() for n, p in model.vlm.adapter.named_parameters() if "lora_" in n
            )
            connector = 0 if model.connector is None else _count(model.connector)
            trained = adapters + connector + (own if vitask else 0)
            total = _count(model.vlm.adapter) + ((connector + own) if exemplar else 0)
            answers[method] = partial(model.predict, name, exemplar=exemplar)
        changed[method] = notes[0]["changed"]
        found[method] = {
            "parameters_trained": float(trained),
            "parameters_total": float(total),
            "training_seconds": sum(note["seconds"] for note in notes),
            "training_peak_mib": max(note["peak_mib"] for note in notes),
        }
    rates = _rates(answers, dataset.splits["test"].images[:IMAGES])
    for method, values in found.items():
        work.advance(SCORING, f"{method}, seed {seed}")
        values["images_per_second"] = rates[method]
        yield Outcome(
            method,
            [],
            {"changed": changed[method]},
            values={"all datasets": values},
            measured=MEASURED,
        )


def _count(module: "torch.nn.Module") -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _rates(
    answers: "dict[str, Callable[[np.ndarray], Any]]", images: "np.ndarray"
) -> dict[str, float]:
    """Images per second of each: the median of rounds in which all take their turn."""
    seconds: dict[str, list[float]] = {method: [] for method in answers}
    for number in range(ROUNDS + 1):
        for method, answer in answers.items():
            start = time.perf_counter()
            answer(images)
            if number > 0:  # the first warms up
                seconds[method].append(time.perf_counter() - start)
    return {method: len(images) / statistics.median(taken) for method, taken in seconds.items()}
