"""The TSM: its shared head, losses over the classes of one dataset, features."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vitask.data import load, subset
from vitask.data.spec import DatasetSpec
from vitask.recipes import POCKET
from vitask.tsm import TSM, Head, augment, heads, task_loss, train_tsm


def spec(name, classes, task="multi-class", head=None):
    return DatasetSpec(
        name=name,
        task=task,
        classes=tuple(f"class {i}" for i in range(classes)),
        modality="test",
        n_channels=3,
        n_samples={"train": 1, "val": 1, "test": 1},
        license="none",
        source="test",
        head=head or name,
    )


SPECS = [spec("a", 3), spec("organ1", 4, head="organ"), spec("organ2", 4, head="organ")]


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)


def test_datasets_of_one_head_share_its_outputs():
    assert heads(SPECS) == {"a": Head(0, 3), "organ": Head(3, 7)}


def test_equal_class_names_elsewhere_are_not_shared():
    assert heads([spec("a", 2), spec("b", 2)]) == {"a": Head(0, 2), "b": Head(2, 4)}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("test_resnet", 1), ("test_vit", 4), ("test_convnext", 1), ("test_nfnet", 1)],
)
def test_any_timm_model_gives_pooled_and_patch_features(name, tokens, images):
    torch.manual_seed(0)
    model = TSM(name, heads(SPECS), 32)
    pooled, patches = model.features(images, "cls"), model.features(images, "all")
    assert pooled.shape == (3, model.feature_size("cls"))
    assert patches.shape[::2] == (3, model.feature_size("all"))
    assert patches.shape[1] >= tokens
    assert (pooled[0] != pooled[1]).any()


def test_cls_is_the_input_of_the_classifier(images):
    torch.manual_seed(0)
    model = TSM("test_vit", heads(SPECS), 32).eval()
    logits = model.backbone.get_classifier()(model.features(images, "cls"))
    torch.testing.assert_close(logits, model(model.pixels(images)))


def test_a_samples_loss_moves_only_its_own_datasets_outputs(images):
    torch.manual_seed(0)
    model = TSM("test_resnet", heads(SPECS), 32).eval()
    span = model.spans["organ"]
    logits = model(model.pixels(images))
    loss = task_loss(logits[:, span.start : span.stop], torch.tensor([0, 1, 2]), SPECS[1])
    (gradient,) = torch.autograd.grad(loss, model.backbone.get_classifier().bias)
    assert (gradient[:3] == 0).all()
    assert (gradient[3:] != 0).any()


def test_multi_label_probabilities_are_independent(images):
    many = spec("many", 5, "multi-label, binary-class")
    model = TSM("test_resnet", heads([many]), 32)
    log_p = model.log_probabilities(images, many)
    expected = model(model.pixels(images)).double().sigmoid().log()
    np.testing.assert_allclose(log_p, expected.detach().numpy(), rtol=1e-6)


def test_batch_1_and_batch_64_classify_alike(images):
    model = TSM("test_resnet", heads(SPECS), 32)
    one, many = (model.log_probabilities(images, SPECS[0], b) for b in (1, 64))
    np.testing.assert_allclose(one, many, atol=1e-5)


def test_saved_and_loaded_features_are_bit_equal(images, tmp_path):
    model = TSM("test_resnet", heads(SPECS), 32)
    model(model.pixels(images))  # moves the running statistics
    model.save(tmp_path)
    assert torch.equal(TSM.load(tmp_path).features(images), model.features(images))
    assert {p.name for p in tmp_path.iterdir()} == {"tsm.safetensors", "tsm.json"}


def test_augmentation_mirrors_and_shifts_only():
    pixels = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16).float()
    rng = np.random.default_rng(0)
    augmented = [augment(pixels, rng) for _ in range(20)]
    assert all(a.shape == pixels.shape for a in augmented)
    assert any((a != pixels).any() for a in augmented)
    inner = {float(a[0, 0, 8, 8]) for a in augmented}
    assert inner <= set(pixels[0, 0].flatten().tolist())


def test_an_unknown_timm_model_names_the_nearest():
    with pytest.raises(ValueError, match=r"no model 'resnet19'.*resnet"):
        TSM("resnet19", heads(SPECS), 32)


def test_one_image_more_than_whole_batches_trains():
    """Batch norm cannot take one image alone."""
    dataset = subset(load("breastmnist", source="phantom"), train=17, val=8)
    recipe = replace(POCKET, tsm_batch_size=16, tsm_epochs=1)
    _, curve = train_tsm({"breastmnist": dataset}, recipe, 0)
    assert len(curve) == 1
    assert np.isfinite(curve[0]["loss"])
