"""Any timm model: what it can give at a size is given, what it cannot is refused by name."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import vitask.backbone
import vitask.tsm
from tests.vitask.timm_survey import (
    SIZES,
    built,
    difference,
    exceptions,
    fails,
    refusal,
    smallest,
    use,
)
from vitask.backbone import FEATURES, Grid, _grid, check, tried
from vitask.data import load, subset
from vitask.errors import InputError
from vitask.recipes import POCKET
from vitask.tsm import TSM, Head, check_tsm, train_tsm

DIVERSE = (  # and quick, and between them every layout, and every kind of refusal
    ("test_resnet", 32),
    ("test_convnext", 32),
    ("test_nfnet", 32),
    ("test_mambaout", 32),  # channels last, with a hidden layer in its head
    ("test_vit", 224),
    ("vit_tiny_patch16_dinov3_qkvb", 32),  # five prefix tokens
    ("hiera_tiny_224", 32),  # tokens without prefix
    ("mobilenetv3_small_050", 32),
    ("vgg11", 32),
    ("pit_ti_224", 32),
    ("efficientvim_m1", 32),
    ("inception_v3", 32),
    ("efficientformer_l1", 32),
)


def known(name: str) -> bool:
    """Whether this release of timm has it; an older one has fewer."""
    return timm.is_model(name)


@pytest.mark.parametrize(("model", "size"), DIVERSE)
def test_the_table_of_exceptions_is_true_for_diverse_models(model, size, monkeypatch):
    if not known(model):
        pytest.skip(f"timm {timm.__version__} has no {model}")
    table, advice = exceptions(), "(the sizes that work)"  # to look for them takes seconds
    monkeypatch.setattr(vitask.backbone, "_advice", lambda *_: advice)
    for kind in FEATURES:
        expected, said = table.get((model, size, kind), ""), refusal(model, size, kind)
        assert bool(said) == bool(expected), said
        assert expected in said or advice in said


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # timm's own, in some model or other
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", smallest())
def test_every_module_of_timm(model, size):
    """What is given is of the right shape, trains and is stored; what is refused does fail."""
    if not known(model):
        pytest.skip(f"timm {timm.__version__} has no {model}")
    for kind in FEATURES:
        assert difference(model, size, kind, refusal(model, size, kind)) == ""
    if not built(model, size):
        pytest.skip("too large to be built here; its shapes are right")
    assert (fails if refusal(model, size, "cls") else use)(model, size) == ""


@pytest.mark.long
def test_every_module_of_timm_has_its_model():
    """A module that is missing: `python -m tests.vitask.timm_survey --smallest`."""
    modules = {timm.models.model_entrypoint(name).__module__ for name in smallest() if known(name)}
    with_models = {name for name in timm.list_modules() if timm.list_models(module=name)}
    assert {name.split(".")[-1] for name in modules} >= with_models


def test_the_table_names_models_of_the_list():
    assert {model for model, _, _ in exceptions()} <= set(smallest())


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_mambaout"])
def test_a_trial_leaves_no_trace(model):
    """The same first weights, statistics and random numbers; loaded features are bit-equal."""
    tried.cache_clear()
    assert use(model, 32) == ""


@pytest.mark.skipif(not known("test_coatnet"), reason="this release of timm is older")
def test_sizes_that_work_are_found_by_trying():
    with pytest.raises(InputError, match=r"'test_coatnet' cannot take images of 40 pixels \(.*\); "
                       r"use a multiple of 32 pixels, such as 32 or 64"):  # fmt: skip
        check("test_coatnet", 40)


def test_one_image_at_a_time_is_refused_before_training():
    check_tsm("test_convnext", 32, batch_size=1)  # layer norm
    check_tsm("test_resnet", 64, batch_size=1)
    with pytest.raises(InputError, match=r"test_resnet.*one image at a time.*tsm_batch_size"):
        check_tsm("test_resnet", 32, batch_size=1)
    data = {"breastmnist": subset(load("breastmnist", source="phantom"), train=8, val=4)}
    with pytest.raises(InputError, match="one image at a time"):
        train_tsm(data, replace(POCKET, tsm_batch_size=1), 0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf-hub:timm/resnet18.a1_in1k", "is an address; expected a name"),
        ("timm/resnet18", "is an address; expected a name"),
        ("resnet18.a9", r"no tag 'a9'; expected .*resnet18\.a1_in1k"),
        ("coatnet_0_224.a9", "knows no weights of 'coatnet_0_224'"),
        ("", "no model ''"),
    ],
)
def test_names_that_are_not_timms_are_refused(name, said):
    with pytest.raises(InputError, match=said):
        check_tsm(name, 32)


def test_a_tag_changes_nothing_without_weights():
    plain, tagged = check("resnet18", 32), check("resnet18.a1_in1k", 32)
    assert replace(tagged, name="resnet18") == plain


def test_pretrained_weights_that_do_not_exist_or_load_are_one_message():
    with pytest.raises(InputError, match=r"no pretrained weights.*tsm_pretrained=false"):
        check_tsm("coatnet_0_224", 32, pretrained=True)
    check_tsm("test_resnet", 32, pretrained=True)  # asks timm's list and not the network
    with pytest.raises(InputError, match=r"pretrained weights of .*test_resnet.*network.*false"):
        TSM("test_resnet", {"a": Head(0, 2)}, 32, pretrained=True)  # tests are offline


def test_unknown_kinds_are_refused():
    with pytest.raises(InputError, match="expected one of cls, all"):
        check_tsm("test_resnet", 32, "rep")


@pytest.mark.parametrize(
    ("shape", "model", "grid"),
    [
        ((1, 8, 2, 2), {}, Grid("channels_first", 0, 8)),
        ((1, 2, 2, 8), {}, Grid("channels_last", 0, 8)),
        ((1, 8, 8, 8), {}, Grid("channels_first", 0, 8)),
        ((1, 8, 8, 8), {"output_fmt": "NHWC"}, Grid("channels_last", 0, 8)),
        ((1, 6, 8), {"num_prefix_tokens": 2}, Grid("tokens", 2, 8)),
        ((1, 4, 8), {}, Grid("tokens", 0, 8)),
        ((1, 5, 8), {"cls_token": torch.zeros(1, 1, 8)}, Grid("tokens", 1, 8)),
        ((1, 4, 8), {"cls_token": torch.zeros(1, 1, 8)}, Grid("tokens", 0, 8)),
        ((1, 2, 8), {"cls_token": torch.zeros(1, 2, 8)}, "class tokens only"),
        ((1, 5, 8), {}, "not a square grid"),
        ((1, 8, 2, 3), {}, "not a square grid"),
        ((1, 8), {}, "not a square grid"),
    ],
)
def test_the_layout_of_a_map_follows_from_its_shape(shape, model, grid):
    module = nn.Module()
    for name, value in model.items():
        setattr(module, name, value)
    found = _grid(module, torch.zeros(shape))
    assert found == grid if isinstance(grid, Grid) else grid in found


class Odd(nn.Module):
    """A model of timm's kind; `oddity` says how it differs."""

    def __init__(self, oddity: str, num_classes: int = 1000, img_size: int | None = None) -> None:
        super().__init__()
        self.oddity = oddity
        self.head = nn.Linear(3, 1000 if oddity == "classes" else num_classes)
        self.pretrained_cfg = {"mean": (0.5,) if oddity == "colours" else None, "std": ()}

    def forward_features(self, images):
        return {"map": images} if self.oddity == "dict" else images

    def forward_head(self, maps, pre_logits: bool = False):
        maps = maps["map"] if self.oddity == "dict" else maps
        pooled = maps if self.oddity == "unpooled" else maps.mean((2, 3))
        return pooled if pre_logits else self.head(maps.mean((2, 3)))

    def forward(self, images):
        logits = self.forward_head(self.forward_features(images))
        return (logits, logits) if self.oddity == "tuple" and self.training else logits


@pytest.mark.parametrize(
    ("oddity", "said"),
    [
        ("classes", "it has 1000 outputs, whatever the number of classes"),
        ("colours", "it takes 1 colours; expected 3"),
        ("unpooled", r"its feature is \(1, 3, 32, 32\); expected \(1, width\)"),
        ("tuple", r"its output is a list of 2 .*; expected \(2, width\)"),
    ],
)
def test_odd_models_are_refused(oddity, said, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **options: Odd(oddity, **options))
    tried.cache_clear()
    with pytest.raises(InputError, match=said):
        check("test_resnet", 32)


def test_a_model_without_colours_takes_timms_and_a_dict_has_no_tokens(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **options: Odd("dict", **options))
    tried.cache_clear()
    model = TSM("test_resnet", {"a": Head(0, 2)}, 32)
    tried.cache_clear()
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    images = np.zeros((2, 32, 32), dtype=np.uint8)
    assert model.features(images).shape == (2, model.feature_size())
    for ask in (lambda: model.feature_size("all"), lambda: model.features(images, "all")):
        with pytest.raises(InputError, match=r"no features 'all'.*a dict.*use features 'cls'"):
            ask()


def test_the_best_epoch_is_what_a_model_with_cached_weights_returns(monkeypatch, tmp_path):
    """In older releases of timm, LeViT keeps what it computed until it is trained again."""
    validate, calls = vitask.tsm._validate, []

    def first_is_best(*given):
        calls.append(validate(*given) | {"mean": -0.1 * len(calls)})
        return calls[-1]

    monkeypatch.setattr(vitask.tsm, "_validate", first_is_best)
    dataset = subset(load("breastmnist", source="phantom"), train=8, val=4)
    model, _ = train_tsm(
        {"breastmnist": dataset}, replace(POCKET, tsm="levit_128s", tsm_epochs=2), 0
    )
    model.save(tmp_path)
    images = dataset.splits["val"].images
    assert torch.equal(model.features(images), TSM.load(tmp_path).features(images))


def test_tensors_under_two_names_are_saved(tmp_path):
    """As CoaT's are."""
    model = TSM("test_resnet", {"a": Head(0, 2)}, 32)
    model.backbone.again = model.backbone.conv1
    model.save(tmp_path)
    saved = load_file(tmp_path / "tsm.safetensors")
    first = next(name for name in saved if name.startswith("backbone.again"))
    assert torch.equal(saved[first], saved[first.replace("again", "conv1")])
