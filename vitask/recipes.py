"""Every named experiment is a Python value here, derived from another with `replace`.

A recipe and a seed decide a result on given data; every record holds `asdict(recipe)`. The names
of the fields follow the paper (arXiv 2410.06456).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from vitask.data import medmnist, phantom
from vitask.errors import InputError
from vitask.prompts import FORMS

MANY = 10**9  # more images, and more memory, than there are
SIDE = 65536  # of a matrix or a batch
RANGES: dict[str, tuple[float, float]] = {  # fields, their least and their greatest values
    "train_limit": (1, MANY),
    "val_limit": (1, MANY),
    "corrupted_limit": (1, MANY),
    "lora_rank": (1, SIDE),
    "tsm_image_size": (1, 4096),
    "tsm_epochs": (1, 10**6),
    "tsm_batch_size": (1, SIDE),
    "stage1_epochs": (0, 10**6),
    "stage2_epochs": (0, 10**6),
    "feature_memory_mib": (0, MANY),
    "batch_size": (4, SIDE),
    "score_batch_size": (1, SIDE),
    "lora_alpha": (1, SIDE),
    "weight_decay": (0, 10**6),
    "tsm_weight_decay": (0, 10**6),
    "rda_weight": (0, 10**6),
    "crt_weight": (0, 10**6),
    "warmup": (0, 1),
    "lora_dropout": (0, 1),
}
POSITIVE = {  # fields above 0, and what they are below
    "learning_rate": 10,
    "tsm_learning_rate": 10,
    "vision_learning_rate": 10,
    "max_grad_norm": MANY,
}
BELOW_ONE = ("warmup", "lora_dropout")
TOP_SEED = 2**32 - 1  # the greatest that numpy and scikit-learn take


def _one_of(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{field} is {value!r}; expected one of {', '.join(map(str, allowed))}")


def check_seeds(what: str, seeds: Iterable[object]) -> None:
    """InputError unless every seed is a whole number from 0 to TOP_SEED; `what` names them."""
    for seed in seeds:
        if not isinstance(seed, Integral) or not 0 <= int(seed) <= TOP_SEED:
            raise InputError(
                f"{what}: {_shown(seed)} is not a seed; expected whole numbers from 0 to {TOP_SEED}"
            )


def _shown(value: object) -> str:
    """A value for a message; Python does not write integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The size of the experiments that train many models: fewer datasets, images and epochs."""

    datasets: tuple[str, ...]
    train_limit: int | None = None  # images of each dataset, stratified by class; None: all
    stage1_epochs: int = 1
    stage2_epochs: int = 1
    tsm_epochs: int = 30
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        check_seeds("seeds of a study", self.seeds)


SMALL = Study(datasets=("dermamnist", "retinamnist", "breastmnist"))


@dataclass(frozen=True)
class Source:
    """A recipe's datasets and seeds on one source of data.

    datasets, seeds: names and random seeds, except in studies
    study:   datasets, seeds and sizes of studies
    samples: images drawn for train, val and test of each dataset; None where they come from files
    """

    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    study: Study
    samples: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        check_seeds("seeds", self.seeds)


def _sources() -> dict[str, Source]:
    return {
        "phantom": Source(medmnist.NAMES, (0,), SMALL, phantom.SIZES),
        "medmnist": Source(medmnist.NAMES, (0,), SMALL),
    }


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment, from data to scores."""

    name: str

    # Data: datasets and seeds by source, and how many images are used.
    sources: Mapping[str, Source] = field(default_factory=_sources, hash=False)
    source_size: int = 28  # pixels: 28, 64, 128 or 224; never mixed in one table
    train_limit: int | None = None  # images of each dataset, stratified by class; None: all
    val_limit: int | None = None
    corrupted_limit: int | None = 200  # test images of each dataset to corrupt

    # Vision language model: "pocket", a folder, or a name on the hub.
    vlm: str = "pocket"
    precision: str = "float32"  # float32 | bfloat16
    attention: str = "sdpa"  # sdpa | flex_attention (of the language model, on CUDA only)
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0  # more than 0 only with step="three"

    # Task-specific model: any timm name.
    tsm: str = "resnet18"
    tsm_pretrained: bool = False
    tsm_image_size: int = 32
    tsm_epochs: int = 30
    tsm_batch_size: int = 64
    tsm_learning_rate: float = 1e-3
    tsm_weight_decay: float = 0.05

    # Method.
    instruction: str = "complete"  # one of prompts.FORMS, in training and in scoring
    # adapters | connector: and the VLM's connector | vision: and the vision tower too
    trained: str = "adapters"
    variant: str = "cls"  # exemplar tokens: cls | all | rep
    exemplar: bool = True  # False: without the loss EP and the exemplar connector
    rda_weight: float = 1.0  # alpha
    crt_weight: float = 1.0  # beta, in stage 2
    detach_exemplar: bool = True  # False: the paper's RDA*
    stage1_epochs: int = 1
    stage2_epochs: int = 1
    step: str = "shared"  # shared: one forward for all branches | three: one each
    feature_memory_mib: int = 4096  # features beyond it go to disk, memory-mapped

    # Optimisation of the VLM.
    learning_rate: float = 4e-5
    vision_learning_rate: float = 1e-4  # of modules trained whole, without adapters
    batch_size: int = 16
    weight_decay: float = 0.01
    warmup: float = 0.03  # share of all steps
    max_grad_norm: float = 1.0

    # Scoring.
    score_batch_size: int = 64

    def __post_init__(self) -> None:
        _one_of("variant", self.variant, ("cls", "all", "rep"))
        _one_of("precision", self.precision, ("float32", "bfloat16"))
        _one_of("attention", self.attention, ("sdpa", "flex_attention"))
        _one_of("instruction", self.instruction, tuple(FORMS))
        _one_of("trained", self.trained, ("adapters", "connector", "vision"))
        _one_of("step", self.step, ("shared", "three"))
        _one_of("source_size", self.source_size, medmnist.SIZES)
        if self.rda_weight and not self.exemplar:
            raise InputError(
                f"recipe {self.name!r} has rda_weight {self.rda_weight} without exemplar; "
                "RDA aligns with the exemplar branch: set exemplar=True or rda_weight=0"
            )
        if self.lora_dropout and self.step == "shared":
            raise InputError(
                f"recipe {self.name!r} has lora_dropout {self.lora_dropout} with step 'shared'; "
                "in one forward, all branches would drop the same values, so the result would "
                "differ from three forwards: set lora_dropout=0 or step='three'"
            )
        if self.trained != "adapters" and self.step == "shared":
            raise InputError(
                f"recipe {self.name!r} trains {self.trained!r} with step 'shared'; trained image "
                "tokens need a forward for each branch: set step='three'"
            )
        self._check_ranges()
        for name in ("vlm", "tsm"):
            if not (value := getattr(self, name)).strip():
                raise InputError(f"{name} is {value!r}; expected a model's name or folder")
        if self.epochs == 0:
            raise InputError(
                f"recipe {self.name!r} has no epochs; expected at least 1 in one of the stages"
            )
        if self.batch_size % 4:
            raise InputError(
                f"batch_size is {self.batch_size}; expected a multiple of 4, because batches are "
                "made of blocks of 4 samples (vitask/batches.py)"
            )

    def _check_ranges(self) -> None:
        """InputError for a number that no training could use; the message says the range."""
        for name in BELOW_ONE:
            if (value := getattr(self, name)) >= 1:
                raise InputError(f"{name} is {_shown(value)}; expected a share below 1")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:  # nor NaN
                raise InputError(
                    f"{name} is {_shown(value)}; expected at least {least} and at most {most}"
                )
        for name, bound in POSITIVE.items():
            if not 0 < (value := getattr(self, name)) < bound:
                raise InputError(
                    f"{name} is {_shown(value)}; expected a number above 0 and below {bound}"
                )

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> "Recipe":
        """The recipe whose `asdict` this or an earlier version wrote as JSON.

        Instead of `sources`, earlier versions had `phantom_datasets`, `medmnist_datasets`, and so
        on for seeds and study, and `phantom_samples`.
        """
        known = dict(fields)
        if "sources" not in known:
            known["sources"] = {
                source: {
                    name: known.pop(f"{source}_{name}") for name in ("datasets", "seeds", "study")
                }
                for source in ("phantom", "medmnist")
            }
            known["sources"]["phantom"]["samples"] = known.pop("phantom_samples")
        sources = {name: _source_of_json(source) for name, source in known["sources"].items()}
        return cls(**(_tuples(known) | {"sources": sources}))

    @property
    def epochs(self) -> int:
        """Epochs of both stages together; vanilla tuning takes the same number."""
        return self.stage1_epochs + self.stage2_epochs

    def datasets(self, source: str) -> tuple[str, ...]:
        """Names of the datasets taken from a source, "phantom" or "medmnist"."""
        return self._source(source).datasets

    def seeds(self, source: str) -> tuple[int, ...]:
        """The seeds that are run by default."""
        return self._source(source).seeds

    def samples(self, source: str) -> tuple[int, int, int] | None:
        """Images drawn for train, val and test of each dataset; None if they come from files."""
        return self._source(source).samples

    def study(self, source: str) -> "Recipe":
        """The same experiment at the size of its study on this source."""
        given = self._source(source)
        size = given.study
        smaller = replace(given, datasets=size.datasets, seeds=size.seeds)
        return replace(
            self,
            sources={**self.sources, source: smaller},
            train_limit=size.train_limit,
            stage1_epochs=size.stage1_epochs,
            stage2_epochs=size.stage2_epochs,
            tsm_epochs=size.tsm_epochs,
        )

    def _source(self, name: str) -> Source:
        if name not in self.sources:
            raise InputError(
                f"recipe {self.name!r} has no data source {name!r}; "
                f"expected one of {', '.join(self.sources)}"
            )
        return self.sources[name]


def _source_of_json(fields: Mapping[str, Any]) -> Source:
    study = Study(**_tuples(fields["study"]))
    return Source(**(_tuples(fields) | {"study": study}))


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with tuples again: JSON has lists only."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def vanilla(recipe: Recipe) -> Recipe:
    """Plain instruction tuning, Van alone (eq. 1), on the same samples for the same epochs."""
    return replace(recipe, exemplar=False, rda_weight=0.0, crt_weight=0.0)


POCKET = Recipe(
    name="pocket",
    sources={
        "phantom": Source(
            datasets=medmnist.NAMES,
            seeds=(0,),
            study=replace(SMALL, train_limit=96, tsm_epochs=10),
            samples=phantom.SIZES,
        ),
        "medmnist": Source(
            datasets=("breastmnist", "retinamnist", "pneumoniamnist", "ham10000", "pbc_blood"),
            seeds=(0, 1, 2),
            study=Study(  # all suites: about 140 minutes a seed on one core
                datasets=("breastmnist", "retinamnist", "pneumoniamnist", "ham10000"),
                train_limit=400,
                stage1_epochs=2,
                stage2_epochs=2,
                seeds=(0, 1, 2),
            ),
        ),
    },
    tsm="test_resnet",  # better on validation data than ResNet-18 at 32 pixels, and faster
    tsm_learning_rate=3e-3,
    train_limit=500,
    val_limit=200,
    stage1_epochs=2,
    stage2_epochs=2,
    learning_rate=3e-3,  # better than 1e-3 on validation data, for vanilla tuning and for VITask
)

PAPER = Recipe(
    name="paper",
    source_size=224,
    vlm="OpenGVLab/InternVL2_5-2B-MPO-hf",  # InternVL2-2B has no native checkpoint
    precision="bfloat16",
    tsm="vit_base_patch16_224.augreg_in21k",
    tsm_pretrained=True,
    tsm_image_size=224,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        POCKET,
        PAPER,
        replace(PAPER, name="internvl3_1b", vlm="OpenGVLab/InternVL3-1B-hf"),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError names the nearest."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES) or list(RECIPES)
        raise InputError(f"no recipe {name!r}; did you mean {' or '.join(near)}?")
    return RECIPES[name]
