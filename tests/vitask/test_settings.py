"""Recipes as texts and TOML files: a written recipe is read again, every mistake is named."""

from dataclasses import replace

import pytest

from vitask.recipes import POCKET, RECIPES, Study
from vitask.settings import FIELDS, NONE, apply, parse, read, to_toml


def written(folder, text, name="mine"):
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


# Texts


def test_texts_become_values_of_the_fields_types():
    texts = ["lora_rank=4", "learning_rate = 1e-3", "exemplar=False", "train_limit=none"]
    found = parse([*texts, "val_limit=7", "vlm=a/b=c", "warmup=0"])
    assert found == {
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "exemplar": False,
        "train_limit": None,
        "val_limit": 7,
        "vlm": "a/b=c",
        "warmup": 0.0,
    }
    assert type(found["warmup"]) is float
    assert list(found)[:2] == ["lora_rank", "learning_rate"]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_text_of_every_field_is_its_value(recipe):
    texts = [f"{name}={getattr(recipe, name)}" for name in FIELDS]
    assert apply(RECIPES["paper"], parse(texts)) == replace(
        recipe, name="paper", sources=RECIPES["paper"].sources
    )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lora_rnak=4"], "no field 'lora_rnak'; did you mean lora_rank"),
        (["lora_rank"], "'lora_rank' is not a setting; expected field=value"),
        (["lora_rank=4", "lora_rank=8"], "lora_rank is given twice"),
        (["lora_rank=four"], "lora_rank is 'four'; expected an integer$"),
        (["lora_rank=4.5"], "lora_rank is '4.5'; expected an integer$"),
        (["lora_rank=none"], "lora_rank is 'none'; expected an integer$"),
        (["learning_rate=fast"], "learning_rate is 'fast'; expected a number$"),
        (["learning_rate=nan"], "learning_rate is 'nan'; expected a number$"),
        (["exemplar=1"], "exemplar is '1'; expected true or false$"),
        (["train_limit=all"], "train_limit is 'all'; expected an integer or none$"),
        (["name=mine"], "name cannot be set"),
        (["sources=phantom"], "sources cannot be set.*--datasets and --seeds"),
    ],
)
def test_a_wrong_text_is_named(texts, message):
    with pytest.raises(ValueError, match=message):
        parse(texts)


def test_the_recipes_rules_hold_for_settings_too():
    assert apply(POCKET, parse(["lora_rank=4"])) == replace(POCKET, lora_rank=4)
    with pytest.raises(ValueError, match="batch_size"):
        apply(POCKET, parse(["batch_size=6"]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_rnk": 4}, "no field 'lora_rnk'; did you mean lora_rank"),
        ({"lora_rank": "4"}, "lora_rank is '4'; expected an integer"),
        ({"lora_rank": True}, "lora_rank is True; expected an integer"),
        ({"learning_rate": None}, "learning_rate is None; expected a number"),
    ],
)
def test_settings_from_python_are_checked_as_those_from_texts(given, message):
    assert apply(POCKET, {"train_limit": None, "learning_rate": 1}).learning_rate == 1.0
    with pytest.raises(ValueError, match=message):
        apply(POCKET, given)


# Files


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_is_read_as_it_was_written(recipe, tmp_path):
    found, changed = read(written(tmp_path, to_toml(recipe)))
    assert found == replace(recipe, name="mine")
    assert changed == {}


def test_a_changed_recipe_is_read_as_it_was_written(tmp_path):
    phantom = replace(
        POCKET.sources["phantom"],
        seeds=(3, 4),
        samples=None,
        study=Study(datasets=("breastmnist",), train_limit=None),
    )
    recipe = replace(
        POCKET,
        name="another",
        vlm='a "quoted" \\ path\n',
        train_limit=None,
        corrupted_limit=7,
        learning_rate=1e-05,
        exemplar=False,
        rda_weight=0.0,
        sources={**POCKET.sources, "phantom": phantom},
    )
    found, changed = read(written(tmp_path, to_toml(recipe)))
    assert found == replace(recipe, name="mine")
    names = ("vlm", "train_limit", "corrupted_limit", "learning_rate", "exemplar", "rda_weight")
    assert changed == {name: getattr(recipe, name) for name in names}


def test_a_short_file_changes_its_fields_alone(tmp_path):
    text = """
        base = "pocket"
        lora_rank = 4
        warmup = 0
        batch_size = 16
        [sources.phantom]
        seeds = [1, 2]
        [sources.phantom.study]
        tsm_epochs = 3
    """
    found, changed = read(written(tmp_path, text))
    assert changed == {"lora_rank": 4, "warmup": 0.0}  # the batch size is the base's
    assert found.name == "mine"
    assert found.seeds("phantom") == (1, 2)
    assert found.study("phantom").tsm_epochs == 3
    assert found.study("phantom").train_limit == POCKET.study("phantom").train_limit
    assert found.sources["medmnist"] == POCKET.sources["medmnist"]


BASE = 'base = "pocket"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank = 4", "base is missing; expected one of pocket, paper"),
        ("base = 3", "base is missing"),
        ('base = "pockets"', "no recipe 'pockets'; did you mean pocket"),
        (BASE + "lora_rank = ", "malformed TOML .*Invalid value"),
        (BASE + "lora_rnak = 4", "no field 'lora_rnak'; did you mean lora_rank"),
        (BASE + 'name = "x"', "name cannot be set: a recipe has the name of its file"),
        (BASE + 'lora_rank = "4"', "lora_rank is '4'; expected an integer$"),
        (BASE + "lora_rank = true", "lora_rank is True; expected an integer$"),
        (BASE + "train_limit = 1.5", "train_limit is 1.5; expected an integer or none$"),
        (BASE + "train_limit = false", "train_limit is False; expected an integer or none$"),
        (BASE + "warmup = inf", "warmup is inf; expected a number$"),
        (BASE + "exemplar = 0", "exemplar is 0; expected true or false$"),
        (BASE + "batch_size = 6", "batch_size"),
        (BASE + "sources = 3", r"sources is 3; expected a table \[sources\]"),
        (BASE + "[sources.phantm]", "no field 'sources.phantm'; did you mean sources.phantom"),
        (BASE + "[sources.phantom]\nseed = [0]", "'sources.phantom.seed'; did you mean .*seeds"),
        (BASE + "[sources.phantom]\nseeds = 0", "seeds is 0; expected a list of integers$"),
        (BASE + "[sources.phantom]\nseeds = []", "seeds is empty"),
        (BASE + "[sources.phantom]\nseeds = [-1]", "seeds: -1 is not a seed; expected .* 0 to 42"),
        (BASE + "[sources.phantom.study]\nseeds = [4294967296]", "4294967296 is not a seed"),
        (BASE + "lora_rank = " + "[" * 10**5, "malformed TOML .nested too deeply"),
        (BASE + "lora_rank" + ".a" * 10**4 + " = 1", "malformed TOML .nested too deeply"),
        (BASE + '[sources.phantom]\nseeds = ["0"]', r"seeds\[0\] is '0'; expected an integer$"),
        (BASE + "[sources.phantom]\nsamples = [1, 2]", "samples is .*expected 3 integers or none$"),
        (BASE + "[sources.phantom]\nstudy = 1", r"study is 1; expected a table \[sources.phantom"),
        (BASE + "[sources.phantom.study]\nepochs = 1", "no field 'sources.phantom.study.epochs'"),
    ],
)
def test_a_wrong_file_is_named_with_its_mistake(text, message, tmp_path):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.toml: cannot be read \(No such file"):
        read(tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b'base = "\xff"')
    with pytest.raises(ValueError, match=r"latin\.toml: malformed TOML"):
        read(tmp_path / "latin.toml")


def test_none_is_a_comment_where_the_base_has_none_too():
    assert f'# train_limit = "{NONE}"' in to_toml(RECIPES["paper"])
    assert f'\ntrain_limit = "{NONE}"' in to_toml(replace(POCKET, train_limit=None))
