"""Recipes: their sources and studies, JSON of this and earlier versions, refused values."""

import json
from dataclasses import asdict, replace

import pytest

from vitask.errors import InputError
from vitask.recipes import POCKET, RECIPES, SMALL, Recipe, Source, Study, recipe


def old_fields(recipe):
    """The JSON of a recipe before it had `sources`."""
    fields = json.loads(json.dumps(asdict(recipe)))
    for source, given in fields.pop("sources").items():
        samples = given.pop("samples")
        fields |= {f"{source}_{name}": value for name, value in given.items()}
        if samples is not None:
            fields[f"{source}_samples"] = samples
    return fields


@pytest.mark.parametrize("known", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("source", ["phantom", "medmnist"])
def test_json_of_this_and_of_earlier_versions_is_read(known, source):
    for one in (known, known.study(source)):
        assert Recipe.of_json(json.loads(json.dumps(asdict(one)))) == one
        assert Recipe.of_json(old_fields(one)) == one


def test_a_study_takes_its_own_datasets_seeds_and_sizes_from_its_source():
    study = POCKET.study("medmnist")
    size = POCKET.sources["medmnist"].study
    assert study.datasets("medmnist") == size.datasets
    assert study.seeds("medmnist") == size.seeds
    assert study.train_limit == size.train_limit
    assert (study.epochs, study.tsm_epochs) == (4, size.tsm_epochs)
    assert study.sources["phantom"] == POCKET.sources["phantom"]
    assert POCKET.study("phantom").samples("phantom") == POCKET.samples("phantom")
    assert study.study("medmnist") == study


def test_only_sources_that_draw_their_images_have_samples():
    assert POCKET.samples("phantom") == (200, 60, 100)
    assert POCKET.samples("medmnist") is None


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no data source 'phantm'.*phantom, medmnist"):
        POCKET.seeds("phantm")
    with pytest.raises(ValueError, match=r"no recipe 'pockt'; did you mean pocket"):
        recipe("pockt")


def test_equal_recipes_are_equal_keys():
    again = replace(POCKET, sources=dict(POCKET.sources))
    assert again == POCKET
    assert {POCKET: 1}[again] == 1
    assert replace(POCKET, sources={}) != POCKET


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "both"}, "variant is 'both'; expected one of cls, all, rep"),
        ({"batch_size": 6}, "batch_size is 6; expected a multiple of 4"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 4"),
        ({"train_limit": 0}, "train_limit is 0; expected at least 1"),
        ({"stage1_epochs": -1}, "stage1_epochs is -1; expected at least 0"),
        ({"stage1_epochs": 0, "stage2_epochs": 0}, "has no epochs"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a number above 0"),
        ({"tsm_learning_rate": float("inf")}, "tsm_learning_rate is inf"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; expected at least 0"),
        ({"crt_weight": -1.0}, "crt_weight is -1.0; expected at least 0"),
        ({"warmup": 1.5}, "warmup is 1.5; expected a share below 1"),
        ({"lora_dropout": float("nan")}, "lora_dropout"),
        ({"vlm": " "}, "vlm is ' '; expected a model's name or folder"),
        ({"learning_rate": 1e300}, "learning_rate is 1e.300; expected .* above 0 and below 10"),
        ({"crt_weight": 1e300}, "expected at least 0 and at most 1000000"),
        ({"lora_rank": 1 << 20000}, "lora_rank is an integer of 20001 bits; .* at most 65536"),
        ({"tsm_image_size": 5000}, "expected at least 1 and at most 4096"),
        ({"stage1_epochs": 10**7}, "expected at least 0 and at most 1000000"),
        ({"exemplar": False}, "rda_weight 1.0 without exemplar"),
    ],
    ids=range(19),
)
def test_values_that_cannot_be_run_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(POCKET, **change)


@pytest.mark.parametrize("seed", [-1, 2**32, 1 << 20000], ids=range(3))
def test_seeds_that_no_library_takes_are_refused(seed):
    for make in (lambda: Source((), (0, seed), SMALL), lambda: Study(datasets=(), seeds=(seed,))):
        with pytest.raises(InputError, match=r"is not a seed; expected .* from 0 to 4294967295"):
            make()
    Source((), (0, 2**32 - 1), SMALL)


def test_every_number_of_a_recipe_has_a_greatest_value():
    for name, value in asdict(POCKET).items():
        if type(value) in (int, float):
            with pytest.raises(InputError, match=name):
                replace(POCKET, **{"step": "three", name: type(value)(4 * 10**30)})
