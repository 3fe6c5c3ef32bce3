"""What suites are made of: models trained once, frozen features, predictions for test images.

A model is kept under `checkpoints/` and found again by what made it (recipe, seed, data, sources,
versions), never by its name: two suites that need the same model train it once.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product
from typing import TYPE_CHECKING, Any

from bench.checkpoints import kept
from bench.record import content_key
from bench.suites import Context, Outcome
from vitask.checkpoint import Task, VITask
from vitask.data.spec import PARTS
from vitask.features import Features
from vitask.prompts import instruction
from vitask.recipes import Recipe, vanilla
from vitask.score import Prediction
from vitask.selfcheck import check_image_sensitivity
from vitask.train import tune
from vitask.tsm import TSM, train_tsm
from vitask.vlm import VLM

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vitask.data.spec import Dataset

# Costs relative to one epoch of vanilla tuning, measured with the pocket recipe.
TSM_EPOCH, VITASK_EPOCH, SCORING = 0.25, 2.0, 1.0
TSM_FIELDS = ("source_size", "phantom_samples", "train_limit", "val_limit")  # and all of "tsm..."


@dataclass(frozen=True)
class Specialist:
    """A trained TSM and how its training went."""

    model: TSM
    note: dict[str, Any]


@dataclass(frozen=True)
class Tuned:
    """A tuned VLM and how its tuning went. `exemplar`: features of its TSM, None for vanilla."""

    model: VITask
    note: dict[str, Any]
    exemplar: Features | None


class Work:
    """One seed of one suite. Every training advances the suite's progress by its epochs."""

    def __init__(self, context: Context, seed: int) -> None:
        self.context, self.seed = context, seed
        self.recipe, self.datasets = context.recipe, context.datasets

    # Models

    def vlm(self) -> VLM:
        """A VLM as it is, of one's own: tuning changes it in place."""
        import torch

        return VLM.load(
            self.recipe.vlm,
            dtype=getattr(torch, self.recipe.precision),
            device=self.context.device,
            attention=self.recipe.attention,
        )

    @cached_property
    def untuned(self) -> VITask:
        """The VLM as it is, asked the instructions of all datasets."""
        return VITask(self.vlm(), vanilla(self.recipe), self.tasks)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """What is asked about all datasets, and what can be answered."""
        return {name: Task.of(dataset) for name, dataset in self.everything.items()}

    @property
    def everything(self) -> "dict[str, Dataset]":
        """Datasets that are trained on or tested on."""
        return {**self.datasets, **self.context.evaluated}

    @property
    def image(self) -> Features:
        """The frozen VLM's image features."""
        return self._looked_at[0]

    @property
    def self_check(self) -> dict[str, int]:
        """How far shuffled images move the answers, in batch noises, per dataset."""
        return self._looked_at[1]

    @cached_property
    def _looked_at(self) -> tuple[Features, dict[str, int]]:
        """Features, once it is known that the images reach the answers; kept for all seeds."""
        images = {name: _images(dataset, PARTS) for name, dataset in self.everything.items()}
        key = ("image", self.recipe.vlm, *self.datasets, content_key(images))
        if key not in self.context.cache:
            image = self.kept(self.untuned.vlm.image_features)
            self.context.progress.note("self-check: do the images reach the answers?")
            ratios = check_image_sensitivity(self.untuned, self.datasets, image)
            self.context.cache[key] = image, {name: round(r) for name, r in ratios.items()}
        return self.context.cache[key]

    def specialist(
        self,
        recipe: Recipe | None = None,
        datasets: "Mapping[str, Dataset] | None" = None,
        *,
        name: str = "tsm",
        planned: bool = True,
    ) -> Specialist:
        """A task-specific model of all the suite's datasets, or of others, trained or found.

        planned: whether its epochs count in the suite's `units`
        """
        recipe, datasets = recipe or self.recipe, datasets or self.datasets

        def train() -> tuple[TSM, Any]:
            cost = TSM_EPOCH if planned else 0.0
            return train_tsm(datasets, recipe, self.seed, on_epoch=self._on_epoch(cost))

        def save(model: TSM, folder: Any) -> None:
            folder.mkdir()
            model.save(folder)

        def load(folder: Any) -> TSM:
            return TSM.load(folder).to(self.context.device)

        fields = {k: v for k, v in asdict(recipe).items() if k in TSM_FIELDS or k.startswith("tsm")}
        model, note = self._kept(name, fields, datasets, (lambda: train, save, load))
        if note.pop("found"):
            units = TSM_EPOCH * recipe.tsm_epochs if planned else 0.0
            self.skip(units, f"{name}, seed {self.seed}: there already")
        note["changed"] = self.changed(recipe)
        return Specialist(model, note)

    def tuned(
        self,
        recipe: Recipe | None = None,
        specialist: Specialist | None = None,
        *,
        name: str,
        exemplar: Features | None = None,
        datasets: "Mapping[str, Dataset] | None" = None,
    ) -> Tuned:
        """The VLM tuned by a recipe, with a TSM if the recipe has exemplars.

        exemplar: features in the place of the TSM's own, which `name` has to say
        datasets: what is trained on, if not the suite's
        """
        recipe, datasets = recipe or self.recipe, datasets or self.datasets
        if recipe.exemplar:
            specialist = specialist or self.specialist()
            taught = exemplar or self.exemplar(specialist.model, recipe, datasets)
            exemplar = exemplar or self.exemplar(specialist.model, recipe)
        else:
            specialist = exemplar = taught = None
        cost = epoch_cost(recipe)

        def prepare() -> Callable[[], tuple[VITask, Any]]:
            vlm = self.vlm()
            whole = datasets is self.datasets and recipe.trained == "adapters"
            image = self.image if whole else self.shown(vlm, recipe, datasets)
            for name, part in product(datasets, ("train", "val")):
                image(name, part)
            return lambda: train(vlm, image)

        def train(vlm: VLM, image: Features) -> tuple[VITask, Any]:
            model, log = tune(
                vlm,
                datasets,
                recipe,
                self.seed,
                image=image,
                tsm=None if specialist is None else specialist.model,
                exemplar=taught,
                on_epoch=self._on_epoch(cost, name),
            )
            return model, asdict(log)

        load = partial(VITask.from_pretrained, device=self.context.device)
        fields = {k: v for k, v in asdict(recipe).items() if k != "name"} | {"as": name}
        if specialist is not None:
            fields |= {"tsm_key": specialist.note["key"]}
        model, note = self._kept(name, fields, datasets, (prepare, VITask.save_pretrained, load))
        note["changed"] = self.changed(recipe)
        if note.pop("found"):
            self.skip(cost * recipe.epochs, f"{name}, seed {self.seed}: there already")
        # It answers among what the scored sets admit: these may be others than it was tuned on.
        asked = VITask(
            model.vlm, model.recipe, self.tasks, tsm=model.tsm, connector=model.connector
        )
        return Tuned(asked, note, exemplar)

    def exemplar(
        self,
        tsm: TSM,
        recipe: Recipe | None = None,
        datasets: "Mapping[str, Dataset] | None" = None,
    ) -> Features:
        """A TSM's features, as a recipe's connector takes them."""
        kind = "cls" if (recipe or self.recipe).variant == "cls" else "all"
        return self.kept(partial(tsm.features, kind=kind), datasets)

    def kept(
        self,
        compute: "Callable[[np.ndarray], Tensor]",
        datasets: "Mapping[str, Dataset] | None" = None,
    ) -> Features:
        """Features of all images, in memory or on disk."""
        return Features(
            datasets or self.everything,
            compute,
            memory_mib=self.recipe.feature_memory_mib,
            folder=self.context.folder,
        )

    def shown(
        self, vlm: VLM, recipe: Recipe, datasets: "Mapping[str, Dataset] | None" = None
    ) -> Features:
        """What tuning is shown of the images: features, or pixels where vision trains."""
        compute = vlm.image_features if recipe.trained == "adapters" else vlm.pixel_values
        return Features(datasets or self.everything, compute)

    def changed(self, recipe: Recipe) -> dict[str, Any]:
        """What a model's recipe has in other ways than the suite's."""
        own = asdict(self.recipe)
        return {name: value for name, value in asdict(recipe).items() if value != own[name]}

    def _kept(
        self, name: str, fields: dict[str, Any], datasets: "Mapping[str, Dataset]", how: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The model of these fields on these data, made now or before."""
        identity = self.context.identity | {
            "recipe": fields,
            "seed": self.seed,
            "data": {name: _data(dataset) for name, dataset in datasets.items()},
        }
        folder = self.context.checkpoints / f"{self.context.prefix}{name}-seed{self.seed}"
        return kept(folder, content_key(identity), self.context.suite, *how)

    # Predictions for the test parts

    def predict(
        self, model: VITask, exemplar: Features | None = None, *, write: bool = True
    ) -> list[Prediction]:
        """Constrained scores and generated answers for every test image of every dataset."""
        return self._predictions(model, (exemplar,), write)[0]

    def both_ways(
        self,
        tuned: Tuned,
        methods: tuple[str, str],
        wanted: Collection[str],
        *,
        write: bool = True,
    ) -> Iterator[Outcome]:
        """The wanted ones of two methods, one model answering without and with its exemplar.

        One pass scores both, also where one is wanted: a run that continues gives the same bits.
        """
        found = self._predictions(tuned.model, (None, tuned.exemplar), write)
        for method, predictions in zip(methods, found, strict=True):
            if method in wanted:
                yield self.answers(method, predictions, tuned.note)

    def _predictions(
        self, model: VITask, ways: Sequence[Features | None], write: bool
    ) -> list[list[Prediction]]:
        """For each way, without (None) or with these exemplar features: all datasets."""
        image = self.image
        if model.recipe.trained != "adapters":
            image = self.shown(model.vlm, model.recipe)
        done: list[list[Prediction]] = [[] for _ in ways]
        for name in self.context.evaluated:
            seen = model.seen(image(name, "test"))
            features = [None if way is None else way(name, "test") for way in ways]
            tokens = [model.tokens(seen, one) for one in features]
            if len(ways) == 2 and features[0] is None and features[1] is not None:
                scores = [*model.score_both(name, seen, features[1])]
            else:
                scores = [model.score(name, one) for one in tokens]
            for way, (log_p, one) in enumerate(zip(scores, tokens, strict=True)):
                written = model.write(name, one) if write else None
                done[way].append(Prediction(name, "candidates", log_p, written))
        return done

    def classify(self, tsm: TSM) -> list[Prediction]:
        """The task-specific model's own answers."""
        done = []
        for name, dataset in self.context.evaluated.items():
            log_p = tsm.log_probabilities(dataset.splits["test"].images, dataset.spec)
            kind = "labels" if dataset.spec.multi_label else "candidates"
            done.append(Prediction(name, kind, log_p))
        return done

    def answers(
        self, method: str, predictions: list[Prediction], note: "dict[str, Any] | None" = None
    ) -> Outcome:
        """A method's predictions as an outcome, with how its model came about."""
        self.advance(SCORING, f"{method}, seed {self.seed}")
        extras = {} if note is None else {"tuning": note["log"], "changed": note["changed"]}
        return Outcome(method, predictions, extras)

    # Progress

    def advance(self, units: float, text: str) -> None:
        self.context.progress.advance(units, f"{self.context.suite}: {text}")

    def skip(self, units: float, text: str) -> None:
        self.context.progress.skip(units, f"{self.context.suite}: {text}")

    def _on_epoch(self, cost: float, name: str = "task-specific model") -> Any:
        def on_epoch(what: str, epoch: int, epochs: int) -> None:
            self.advance(cost, f"{name}, seed {self.seed}, epoch {epoch} of {epochs}")

        return on_epoch


def _data(dataset: "Dataset") -> list[Any]:
    """What decides a model of what it was trained on."""
    return [*_images(dataset, ("train", "val")), instruction(dataset.spec)]


def _images(dataset: "Dataset", parts: Sequence[str]) -> list[Any]:
    """Which images these are, not only how many: limits draw others as they follow each other."""
    ids = {part: dataset.splits[part].ids.tolist() for part in parts}
    return [dataset.source, dataset.size, dataset.md5, content_key(ids)]


def epoch_cost(recipe: Recipe) -> float:
    """One epoch of a tuning, in epochs of vanilla tuning."""
    return VITASK_EPOCH if recipe.exemplar or recipe.crt_weight else 1.0


def tuning_units(recipe: Recipe) -> float:
    return recipe.epochs * epoch_cost(recipe)


def specialist_units(recipe: Recipe) -> float:
    return recipe.tsm_epochs * TSM_EPOCH
