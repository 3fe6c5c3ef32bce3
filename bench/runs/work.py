"""One seed of one suite: models trained once, frozen features, predictions for test images.

A model is kept under `checkpoints/` and found again by its ingredients (recipe, data, seed,
versions, code), never by its name: suites that need the same model train it once.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench.runs.ingredients import model_ingredients
from bench.runs.keys import key
from bench.runs.models import kept
from bench.suite import Outcome, Suite, Training
from vitask.calibration import calibrate
from vitask.card import Task
from vitask.checkpoint import VITask
from vitask.data.spec import Dataset
from vitask.data.subset import fraction
from vitask.decision import rounded
from vitask.errors import InputError
from vitask.exemplar import feature_kind
from vitask.features import Features
from vitask.recipes import Recipe, vanilla
from vitask.score import Prediction
from vitask.selfcheck import check_image_sensitivity
from vitask.train import tune
from vitask.tsm import TSM, check_tsm, train_tsm
from vitask.vlm import VLM

if TYPE_CHECKING:
    from bench.runs.progress import Advancing

# Costs in samples of vanilla tuning, measured with the pocket recipe.
TSM_SAMPLE, VITASK_SAMPLE, SCORED_IMAGE = 0.07, 1.9, 0.8


@dataclass(frozen=True)
class TrainedTSM:
    """A trained task-specific model and the note on its training."""

    model: TSM
    note: dict[str, Any]


@dataclass(frozen=True)
class Tuned:
    """A tuned VLM and the note on its tuning. `exemplar`: features of its TSM, None for vanilla."""

    model: VITask
    note: dict[str, Any]
    exemplar: Features | None


@dataclass
class Work:
    """What a suite works with. Every training advances the progress by its epochs.

    datasets: what is trained on; evaluated: what is scored (often the same)
    cache:    shared by all seeds and suites of a run
    prefix:   of the models' names; scorings: of the suite
    """

    suite: str
    recipe: Recipe
    datasets: dict[str, Dataset]
    evaluated: dict[str, Dataset]
    seed: int
    folder: Path
    versions: dict[str, str]
    progress: "Advancing"
    cache: dict[Any, Any] = field(default_factory=dict)
    prefix: str = ""
    scorings: float = 1.0
    _used: set[str] = field(default_factory=set)  # keys of models
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")

    # Models

    def vlm(self) -> VLM:
        """A fresh VLM: tuning changes it in place."""
        recipe = self.recipe
        dtype = getattr(torch, recipe.precision)
        return VLM.load(recipe.vlm, dtype=dtype, device=self.device, attention=recipe.attention)

    @cached_property
    def untuned(self) -> VITask:
        """The VLM before tuning, with the instructions of all datasets."""
        return VITask(self.vlm(), vanilla(self.recipe), self.tasks)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Instruction and candidates of each dataset."""
        return {name: Task.of(dataset) for name, dataset in self.everything.items()}

    def check_texts(self) -> None:
        """ValueError, before anything is trained, for a text that the VLM cannot carry."""
        assert self.untuned.tasks  # made from the VLM and all tasks, so checked there

    @property
    def everything(self) -> dict[str, Dataset]:
        """Datasets that are trained on or tested on."""
        return {**self.datasets, **self.evaluated}

    @property
    def image(self) -> Features:
        """The frozen VLM's image features."""
        return self._checked_features[0]

    @property
    def self_check(self) -> dict[str, int]:
        """How far shuffled images move the scores, in multiples of batch noise, per dataset."""
        return self._checked_features[1]

    @cached_property
    def _checked_features(self) -> tuple[Features, dict[str, int]]:
        """Features, after the check that images reach the scores; cached for all seeds."""
        images = {name: dataset.identity() for name, dataset in self.everything.items()}
        place = ("image", self.recipe.vlm, *self.datasets, key(images))
        if place not in self.cache:
            image = self.features(self.untuned.vlm.image_features)
            self.progress.note("self-check: do the images reach the answers?")
            ratios = check_image_sensitivity(self.untuned, self.datasets, image)
            self.cache[place] = image, {name: round(r) for name, r in ratios.items()}
        return self.cache[place]

    def tsm(
        self,
        training: Training,
        datasets: Mapping[str, Dataset] | None = None,
        *,
        planned: bool = True,
    ) -> TrainedTSM:
        """The task-specific model of the suite's datasets, or of others; trained or found.

        planned: whether the suite's `models` name it, so that the time left counts it
        """
        recipe, datasets = training.recipe, datasets or self.datasets
        cost = TSM_SAMPLE * images_of(self.datasets) * training.share * planned

        def train() -> tuple[TSM, Any]:
            self.check_texts()
            on_epoch = self._on_epoch(cost, training)
            model, curve = train_tsm(datasets, recipe, self.seed, on_epoch=on_epoch)
            found = {}
            for name, dataset in datasets.items():
                val = classified(model, name, dataset.splits["val"].images, dataset)
                found[name] = asdict(calibrate(val, dataset, Task.of(dataset).candidates))
            return model, {"validation": curve, "calibration": found}

        def save(model: TSM, folder: Path) -> None:
            folder.mkdir()
            model.save(folder)

        def load(folder: Path) -> TSM:
            return TSM.load(folder).to(self.device)

        ingredients = model_ingredients("vitask.tsm", recipe, datasets, self.seed, self.versions)
        model, note = self._kept(training, ingredients, lambda: train, save, load)
        if note.pop("found"):
            self._skip(cost * recipe.tsm_epochs, training)
        return TrainedTSM(model, note)

    def tuned(
        self,
        training: Training,
        tsm: TrainedTSM | None = None,
        datasets: Mapping[str, Dataset] | None = None,
    ) -> Tuned:
        """The VLM tuned on the suite's datasets, or on others; with a TSM if its recipe has EP."""
        recipe, datasets = training.recipe, datasets or self.datasets
        exemplar = in_training = None
        if not recipe.exemplar:
            tsm = None
        elif tsm is None:
            raise InputError(f"{training.name} is tuned with exemplars; expected its trained TSM")
        else:
            exemplar = self.exemplar(tsm.model, training)
            in_training = self.exemplar(tsm.model, training, datasets)
        cost = sample_cost(recipe) * images_of(self.datasets) * training.share  # as planned

        def prepare() -> Callable[[], tuple[VITask, Any]]:
            vlm = self.vlm()
            shared = datasets is self.datasets and recipe.trained == "adapters"
            image = self.image if shared else self.image_inputs(vlm, recipe, datasets)
            for name, split in product(datasets, ("train", "val")):
                image(name, split)
            return lambda: train(vlm, image)

        def train(vlm: VLM, image: Features) -> tuple[VITask, Any]:
            model, log = tune(
                vlm, datasets, recipe, self.seed, image=image, exemplar=in_training,
                tsm=None if tsm is None else tsm.model, on_epoch=self._on_epoch(cost, training),
            )  # fmt: skip
            return model, asdict(log)

        load = partial(VITask.from_pretrained, device=self.device)
        ingredients = model_ingredients(
            "vitask.train", recipe, datasets, self.seed, self.versions,
            tsm_key=None if tsm is None else tsm.note["key"], exemplar=training.exemplar,
        )  # fmt: skip
        model, note = self._kept(training, ingredients, prepare, VITask.save_pretrained, load)
        if note.pop("found"):
            self._skip(cost * recipe.epochs, training)
        # Its candidates are the scored datasets': these may differ from those it was tuned on.
        tasks = {
            name: replace(task, calibration=model.tasks[name].calibration)
            if name in model.tasks
            else task
            for name, task in self.tasks.items()
        }
        asked = VITask(model.vlm, model.recipe, tasks, tsm=model.tsm, connector=model.connector)
        return Tuned(asked, note, exemplar)

    def exemplar(
        self, tsm: TSM, training: Training, datasets: Mapping[str, Dataset] | None = None
    ) -> Features:
        """A TSM's features, as the connector takes them; zeros for a constant exemplar."""
        if training.exemplar == "constant":
            width = tsm.feature_size()
            return self.features(lambda images: torch.zeros(len(images), width), datasets)
        kind = feature_kind(training.recipe.variant)
        return self.features(partial(tsm.features, kind=kind), datasets)

    def features(
        self,
        compute: Callable[[np.ndarray], torch.Tensor],
        datasets: Mapping[str, Dataset] | None = None,
    ) -> Features:
        """Features of all images, in memory or on disk."""
        memory, folder = self.recipe.feature_memory_mib, self.folder
        return Features(datasets or self.everything, compute, memory_mib=memory, folder=folder)

    def image_inputs(
        self, vlm: VLM, recipe: Recipe, datasets: Mapping[str, Dataset] | None = None
    ) -> Features:
        """The images as tuning takes them: features, or pixels where vision is trained."""
        compute = vlm.image_features if recipe.trained == "adapters" else vlm.pixel_values
        return Features(datasets or self.everything, compute)

    def changed(self, recipe: Recipe) -> dict[str, Any]:
        """How a model's recipe differs from the suite's."""
        own = asdict(self.recipe)
        return {name: value for name, value in asdict(recipe).items() if value != own[name]}

    def _kept(
        self, training: Training, ingredients: dict[str, Any], prepare: Any, save: Any, load: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The model of these ingredients, trained now or before, and its note."""
        place = self.folder / "checkpoints"
        model, note = kept(
            place, f"{self.prefix}{training.name}-seed{self.seed}", key(ingredients), self.suite,
            prepare, save, load, say=self.progress.note,
        )  # fmt: skip
        note["found"] = note["found"] and note["key"] not in self._used  # counted once
        self._used.add(note["key"])
        return model, note | {"changed": self.changed(training.recipe)}

    # Predictions for the test splits

    def predict(
        self, model: VITask, exemplar: Features | None = None, *, write: bool = True
    ) -> list[Prediction]:
        """Constrained scores and generated answers for every test image of every dataset."""
        return self._predictions(model, (exemplar,), write)[0]

    def by_model(self, suite: Suite, wanted: Collection[str]) -> Iterator[Outcome]:
        """The wanted methods that a model of the suite answers, model by model.

        A model that answers without and with its exemplar does both in one pass, even where one
        is wanted: a run that continues gives the same bits.
        """
        models = suite.models(self.recipe)
        for name, training in models.items():
            methods = {m.exemplar: m.name for m in suite.methods if m.model == name}
            if not set(methods.values()) & set(wanted):
                continue
            datasets = fraction(self.datasets, training.share)
            if training.kind == "tsm":
                tsm = self.tsm(training, datasets)
                thresholds = {n: c["threshold"] for n, c in tsm.note["log"]["calibration"].items()}
                yield self.outcome(methods[False], self.classify(tsm.model), tsm.note, thresholds)
                continue
            teacher = self.tsm(models[training.tsm], datasets) if training.recipe.exemplar else None
            tuned = self.tuned(training, teacher, datasets)
            ways = [tuned.exemplar if exemplar else None for exemplar in sorted(methods)]
            found = self._predictions(tuned.model, ways, suite.writes)
            for exemplar, predictions in zip(sorted(methods), found, strict=True):
                if methods[exemplar] in wanted:
                    mode = "with" if exemplar else "without"
                    tasks = tuned.model.tasks
                    fitted = {n: t.calibration[mode] for n, t in tasks.items() if t.calibration}
                    thresholds = {name: one.threshold for name, one in fitted.items()}
                    yield self.outcome(methods[exemplar], predictions, tuned.note, thresholds)

    def _predictions(
        self, model: VITask, ways: Sequence[Features | None], write: bool
    ) -> list[list[Prediction]]:
        """For each way, without (None) or with these exemplar features: all datasets."""
        image = self.image
        if model.recipe.trained != "adapters":
            image = self.image_inputs(model.vlm, model.recipe)
        done: list[list[Prediction]] = [[] for _ in ways]
        for name in self.evaluated:
            inputs = model.image_inputs(image(name, "test"))
            features = [None if way is None else way(name, "test") for way in ways]
            tokens = [model.tokens(inputs, one) for one in features]
            if len(ways) == 2 and features[0] is None and features[1] is not None:
                scores = [*model.score_both(name, inputs, features[1])]
            else:
                scores = [model.score(name, one) for one in tokens]
            for way, (log_p, one) in enumerate(zip(scores, tokens, strict=True)):
                written = model.write(name, one) if write else None
                done[way].append(Prediction(name, "candidates", log_p, written))
        return done

    def classify(self, tsm: TSM, split: str = "test") -> list[Prediction]:
        """The task-specific model's predictions for a split of every scored dataset."""
        return [
            classified(tsm, name, dataset.splits[split].images, dataset)
            for name, dataset in self.evaluated.items()
        ]

    def outcome(
        self,
        method: str,
        predictions: list[Prediction],
        note: "dict[str, Any] | None" = None,
        thresholds: Mapping[str, float | None] | None = None,
    ) -> Outcome:
        """A method's predictions as an outcome, with the note on its model.

        thresholds: of two-class datasets, chosen on their val splits; see `Calibration`
        """
        self.scored(method)
        extras = {} if note is None else {"tuning": note["log"], "changed": note["changed"]}
        known = {
            name: value
            for name, value in (thresholds or {}).items()
            if value is not None and name in self.evaluated
        }
        return Outcome(method, [rounded(p) for p in predictions], extras, thresholds=known)

    # Progress

    def scored(self, method: str) -> None:
        """A method has answered all test images."""
        cost = SCORED_IMAGE * images_of(self.evaluated, ("test",)) * self.scorings
        self.progress.advance(cost, f"{self.suite}: {method}, seed {self.seed}")

    def _skip(self, units: float, training: Training) -> None:
        text = f"{self.suite}: {training.name}, seed {self.seed}: found"
        self.progress.skip(units, text)

    def _on_epoch(self, cost: float, training: Training) -> Any:
        def on_epoch(what: str, epoch: int, epochs: int) -> None:
            where = f"{training.name}, seed {self.seed}, epoch {epoch} of {epochs}"
            self.progress.advance(cost, f"{self.suite}: {where}", finished=epoch == epochs)

        return on_epoch


def check_models(models: Mapping[str, Training], images: int, checked: set[Any]) -> None:
    """InputError for a base VLM or TSM that cannot be used, before anything is trained.

    models: of a suite, by its names; images: all training images; checked: what earlier suites
    asked, so that nothing is tried twice
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for training in models.values():
        recipe, kind = training.recipe, "cls"
        if training.kind == "vlm":
            vlm = (recipe.vlm, recipe.precision)
            if vlm not in checked:
                VLM.check(recipe.vlm, dtype=getattr(torch, recipe.precision), device=device)
                checked.add(vlm)
            if not recipe.exemplar or training.tsm not in models:
                continue
            kind, recipe = feature_kind(recipe.variant), models[training.tsm].recipe
        size, pretrained, batch = (
            recipe.tsm_image_size,
            recipe.tsm_pretrained,
            recipe.tsm_batch_size,
        )
        tsm = (recipe.tsm, size, kind, pretrained, min(batch, images) == 1)
        if tsm not in checked:
            check_tsm(
                recipe.tsm, size, kind, pretrained=pretrained, batch_size=batch, images=images
            )
            checked.add(tsm)


def classified(tsm: TSM, name: str, images: np.ndarray, dataset: Dataset) -> Prediction:
    """A task-specific model's prediction for some images of a dataset."""
    log_p = tsm.log_probabilities(images, dataset.spec)
    return Prediction(name, "labels" if dataset.spec.multi_label else "candidates", log_p)


def images_of(datasets: Mapping[str, Dataset], splits: Sequence[str] = ("train",)) -> int:
    return sum(len(dataset.splits[split]) for dataset in datasets.values() for split in splits)


def sample_cost(recipe: Recipe) -> float:
    """One epoch's cost of a sample."""
    return VITASK_SAMPLE if recipe.exemplar or recipe.crt_weight else 1.0


def training_units(training: Training, images: int) -> float:
    """The whole cost of a training."""
    recipe = training.recipe
    if training.kind == "tsm":
        return TSM_SAMPLE * recipe.tsm_epochs * images * training.share
    return sample_cost(recipe) * recipe.epochs * images * training.share
