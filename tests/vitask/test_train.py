"""Tuning: trained and frozen modules in each stage, and one result for one seed."""

import json
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitask.branches import BatchInputs, three_forwards
from vitask.checkpoint import Task, VITask
from vitask.errors import InputError
from vitask.exemplar import ExemplarConnector, feature_kind
from vitask.features import Features
from vitask.objective import Weights, joint_loss, stage_weights
from vitask.recipes import POCKET, vanilla
from vitask.selfcheck import check_image_sensitivity
from vitask.train import TrainingSet, tune
from vitask.tsm import TSM, heads, train_tsm
from vitask.validation import ignore
from vitask.vlm import VLM

OLD_FIELDS = ("datasets", "seeds", "study")  # of every source, in checkpoints of format 1


@pytest.fixture(scope="module")
def recipe(tiny_checkpoint):
    return replace(
        POCKET,
        name="tiny",
        vlm=str(tiny_checkpoint),
        tsm="test_resnet",
        tsm_epochs=2,
        lora_rank=2,
        stage1_epochs=1,
        stage2_epochs=1,
        learning_rate=1e-3,
    )


@pytest.fixture(scope="module")
def tsm(tiny_datasets):
    torch.manual_seed(0)
    specs = [d.spec for d in tiny_datasets.values()]
    return TSM("test_resnet", heads(specs), 32).eval().requires_grad_(False)


def run(recipe, datasets, tsm, seed=0, on_epoch=ignore):
    vlm = VLM.load(recipe.vlm)
    kind = feature_kind(recipe.variant)
    return tune(
        vlm,
        datasets,
        recipe,
        seed,
        image=Features(datasets, vlm.image_features),
        tsm=tsm if recipe.exemplar else None,
        exemplar=Features(datasets, partial(tsm.features, kind=kind)) if recipe.exemplar else None,
        on_epoch=on_epoch,
    )


@pytest.fixture(scope="module")
def tuned(recipe, tiny_datasets, tsm):
    return run(recipe, tiny_datasets, tsm)


def scores(model, datasets):
    return {
        (name, exemplar): model.score(
            name, model.image_tokens(d.splits["test"].images, exemplar=exemplar)
        )
        for name, d in datasets.items()
        for exemplar in ((False, True) if model.connector is not None else (False,))
    }


def test_every_loss_is_logged_and_crt_enters_in_stage_2(tuned):
    _, log = tuned
    first, second = log.losses
    assert all(np.isfinite(list(losses.values())).all() for losses in log.losses)
    assert first["crt"] == 0
    assert second["crt"] > 0
    assert min(first["response"], first["exemplar"], first["rda"]) > 0
    assert first["total"] == pytest.approx(first["response"] + first["exemplar"] + first["rda"])
    assert second["total"] == pytest.approx(
        second["response"] + second["exemplar"] + second["rda"] + second["crt"]
    )


def test_validation_curves_are_logged_and_the_best_epoch_is_chosen(tuned):
    _, log = tuned
    means = [np.mean([mode["mean"] for mode in epoch.values()]) for epoch in log.validation]
    assert log.chosen == 1 + int(np.argmax(means))
    assert set(log.validation[0]) == {"without", "with"}
    assert set(log.validation[0]["with"]) == {"two", "five", "many", "mean"}


def test_one_seed_one_result(recipe, tiny_datasets, tsm, tuned):
    again, log = run(recipe, tiny_datasets, tsm)
    assert log == tuned[1]
    for key, value in scores(tuned[0], tiny_datasets).items():
        assert (scores(again, tiny_datasets)[key] == value).all()
    other, _ = run(recipe, tiny_datasets, tsm, seed=1)
    assert any(
        (scores(other, tiny_datasets)[key] != value).any()
        for key, value in scores(tuned[0], tiny_datasets).items()
    )


def test_only_adapters_and_connector_change(recipe, tiny_datasets, tsm, tuned):
    before = VLM.load(recipe.vlm).model.state_dict()
    after = tuned[0].vlm.model.state_dict()
    for name, value in before.items():
        place = name if name in after else name.replace(".weight", ".base_layer.weight")
        place = place if place in after else name.replace(".bias", ".base_layer.bias")
        assert torch.equal(after[place], value), name
    lora = [v for k, v in after.items() if "lora_B" in k]
    assert lora
    assert all(v.abs().sum() > 0 for v in lora)


def test_shared_and_three_forwards_train_alike(recipe, tiny_datasets, tsm):
    """The same run with either step: after an epoch only rounding differs."""
    small = replace(recipe, learning_rate=1e-4)
    logs = [run(replace(small, step=step), tiny_datasets, tsm)[1] for step in ("shared", "three")]
    for ours, theirs in zip(logs[0].losses, logs[1].losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_the_connector_stops_training_at_stage_2(recipe, tiny_datasets, tsm, monkeypatch):
    made = []

    class Watched(ExemplarConnector):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("vitask.train.ExemplarConnector", Watched)

    def after_each_epoch(stage2_epochs):
        stages = {"stage1_epochs": 2 - stage2_epochs, "stage2_epochs": stage2_epochs}
        states = []

        def watch(what, epoch, epochs):
            states.append({k: v.detach().clone() for k, v in made[-1].state_dict().items()})

        run(replace(recipe, **stages), tiny_datasets, tsm, on_epoch=watch)
        return [all(torch.equal(states[0][k], state[k]) for k in states[0]) for state in states]

    assert after_each_epoch(stage2_epochs=1) == [True, True]
    assert after_each_epoch(stage2_epochs=0) == [True, False]


@pytest.mark.parametrize(
    "change",
    [{"variant": "all"}, {"variant": "rep"}, {"detach_exemplar": False}, {"crt_weight": 0.0}],
    ids=str,
)
def test_every_variant_tunes_and_scores(recipe, tiny_datasets, tsm, change):
    model, log = run(replace(recipe, **change), tiny_datasets, tsm)
    assert len(log.losses) == 2
    assert all(np.isfinite(value).all() for value in scores(model, tiny_datasets).values())


@pytest.mark.parametrize(
    ("trained", "moves"),
    [
        ("connector", {"multi_modal_projector"}),
        ("vision", {"multi_modal_projector", "vision_tower"}),
    ],
)
def test_vision_modules_train_and_are_saved_and_loaded(
    recipe, tiny_datasets, tsm, tmp_path, trained, moves
):
    changed = replace(vanilla(recipe), trained=trained, step="three", vision_learning_rate=1e-2)
    vlm = VLM.load(recipe.vlm)
    before = {n: p.clone() for n, p in vlm.model.named_parameters()}
    pixels = Features(tiny_datasets, vlm.pixel_values)
    model, _ = tune(vlm, tiny_datasets, changed, 0, image=pixels)
    moved = {n for n, p in vlm.model.named_parameters() if n in before and (p != before[n]).any()}
    assert {n.split(".")[1] for n in moved} == moves
    model.save_pretrained(tmp_path / "vision")
    loaded = VITask.from_pretrained(tmp_path / "vision")
    images = tiny_datasets["two"].splits["test"].images
    assert (loaded.predict("two", images) == model.predict("two", images)).all()
    inputs = model.image_inputs(pixels("two", "test"))
    torch.testing.assert_close(inputs, model.vlm.image_features(images))


def test_trained_image_tokens_need_the_plain_forwards(recipe):
    with pytest.raises(ValueError, match=r"trains 'vision' with step 'shared'.*step='three'"):
        replace(recipe, trained="vision")


def test_vanilla_has_the_same_batches_and_no_exemplar(recipe, tiny_datasets, tsm, tuned):
    model, log = run(vanilla(recipe), tiny_datasets, tsm)
    assert model.connector is None
    assert log.without_negative == tuned[1].without_negative
    assert {name for epoch in log.losses for name, v in epoch.items() if v} == {"total", "response"}


def test_saved_and_loaded_scores_are_bit_equal(tuned, tiny_datasets, tmp_path):
    model, _ = tuned
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = VITask.from_pretrained(tmp_path / "checkpoint")
    assert loaded.recipe == model.recipe
    for key, value in scores(model, tiny_datasets).items():
        assert (scores(loaded, tiny_datasets)[key] == value).all()
    kinds = {path.suffix for path in (tmp_path / "checkpoint").rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jinja", ".md", ".txt"}


def test_probabilities_have_the_temperature_that_suits_the_val_split(
    tuned, tiny_datasets, tmp_path
):
    """The best on val, with and without exemplar; saved with the model; log-probabilities stay."""
    model, _ = tuned
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = VITask.from_pretrained(tmp_path / "checkpoint")
    for name, exemplar in product(("two", "five"), (False, True)):
        val = tiny_datasets[name].splits["val"]
        scores = model.score(name, model.image_tokens(val.images, exemplar=exemplar))
        p = loaded.predict(name, val.images, exemplar=exemplar)
        np.testing.assert_allclose(p, model.probability(name, scores, exemplar=exemplar))

        def loss(temperature, scores=scores, labels=val.labels):
            log_p = scores / temperature
            log_p = log_p - np.logaddexp.reduce(log_p, 1, keepdims=True)
            return -log_p[np.arange(len(labels)), labels].mean()

        found = loaded.temperature(name, exemplar=exemplar)
        assert loss(found) == pytest.approx(
            min(map(loss, np.exp(np.linspace(-3, 3, 301)))), abs=1e-4
        )
        assert (loaded.tasks[name].calibration["with"].threshold is not None) == (name == "two")
    untuned = VITask(
        VLM.load(model.recipe.vlm), model.recipe, {"two": Task.of(tiny_datasets["two"])}
    )
    assert untuned.temperature("two") == 1


def test_a_checkpoint_of_format_1_loads_and_a_newer_one_says_what_to_do(
    tuned, tiny_datasets, tmp_path
):
    model, _ = tuned
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    card = json.loads((folder / "vitask.json").read_text())
    assert card["format"] == 3
    sources = card["recipe"].pop("sources")
    old = {f"{s}_{k}": given[k] for s, given in sources.items() for k in OLD_FIELDS}
    card["recipe"] |= old | {"phantom_samples": sources["phantom"]["samples"]}
    (folder / "vitask.json").write_text(json.dumps(card | {"format": 1}))
    loaded = VITask.from_pretrained(folder)
    assert loaded.recipe == model.recipe
    images = tiny_datasets["two"].splits["test"].images
    assert (loaded.predict("two", images) == model.predict("two", images)).all()
    (folder / "vitask.json").write_text(json.dumps(card | {"format": 4}))
    with pytest.raises(ValueError, match=r"format 4; .*formats 1 to 3.*[Uu]pdate VITask"):
        VITask.from_pretrained(folder)


def test_saving_replaces_only_a_checkpoint(tuned, tmp_path):
    model, _ = tuned
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that are not a checkpoint"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_without_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*vitask\.json"):
        VITask.from_pretrained(tmp_path)


def test_plug_uses_the_other_tsm_through_the_same_connector(tuned, tiny_datasets):
    model, _ = tuned
    torch.manual_seed(5)
    other = TSM("test_resnet", model.tsm.spans, 32).eval()
    plugged = model.plug(other)
    images = tiny_datasets["two"].splits["test"].images
    assert plugged.connector is model.connector
    assert (plugged.predict("two", images) != model.predict("two", images)).any()
    same = plugged.predict("two", images, exemplar=False)
    assert (same == model.predict("two", images, exemplar=False)).all()
    with pytest.raises(ValueError, match="width 64"):
        model.plug(TSM("test_vit", model.tsm.spans, 32))


@pytest.fixture
def batch(recipe, tiny_datasets, tsm):
    """Model, connector and one batch; adapters and connector are random."""
    torch.manual_seed(0)
    vlm = VLM.load(recipe.vlm)
    vlm.add_lora(rank=2, alpha=4, dropout=0.0)
    with torch.no_grad():
        for name, parameter in vlm.adapter.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    connector = ExemplarConnector(tsm.feature_size(), vlm.hidden_size)
    data = TrainingSet.of(
        vlm,
        tiny_datasets,
        Features(tiny_datasets, vlm.image_features),
        Features(tiny_datasets, tsm.features),
    )
    at = [0, 1, 2, 31, 32]
    inputs = BatchInputs(
        prompts=[data.prompts[data.instruction[i]] for i in at],
        responses=[data.responses[data.response[i]] for i in at],
        image=data.image[at],
        exemplar=data.exemplar[at],
        negative=torch.tensor([1, -1, 0, 4, -1]),
    )
    return vlm, connector, inputs


def test_negative_branch_is_the_same_response_after_the_other_image(batch):
    vlm, connector, inputs = batch
    with torch.no_grad():
        done = three_forwards(vlm, connector, inputs, "cls")
        swapped = inputs._replace(image=inputs.image[[1, 1, 0, 4, 4]], negative=None)
        expected = three_forwards(vlm, None, swapped, "cls").hidden
    torch.testing.assert_close(done.negative_hidden, expected[done.negative_rows])
    counts = [
        len(r) if n >= 0 else 0 for r, n in zip(inputs.responses, inputs.negative, strict=True)
    ]
    assert len(done.negative_rows) == sum(counts)


def test_the_exemplar_branch_differs_and_the_base_branch_does_not_depend_on_it(batch):
    vlm, connector, inputs = batch
    with torch.no_grad():
        done = three_forwards(vlm, connector, inputs, "cls")
        alone = three_forwards(vlm, None, inputs._replace(exemplar=None), "cls")
    assert torch.equal(done.hidden, alone.hidden)
    assert (done.exemplar_hidden - done.hidden).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("weights", "detach", "reached"),
    [
        (Weights(rda=1.0, crt=0.0), True, False),
        (Weights(rda=1.0, crt=0.0), False, True),
    ],
    ids=["RDA", "RDA*"],
)
def test_rda_reaches_the_connector_only_without_detach(batch, weights, detach, reached):
    vlm, connector, inputs = batch
    done = three_forwards(vlm, connector, inputs, "cls")
    losses = joint_loss(vlm, done, weights, detach_exemplar=detach)
    only_ep = joint_loss(vlm, done, Weights(0.0, 0.0), detach_exemplar=detach)
    gradients = [
        torch.autograd.grad(total, connector.linear_2.weight, retain_graph=True)[0]
        for total in (losses.total, only_ep.total)
    ]
    assert (not torch.allclose(*gradients)) is reached


def test_stages_differ_by_crt_alone():
    assert stage_weights(POCKET, 1) == Weights(rda=1.0, crt=0.0)
    assert stage_weights(POCKET, 2) == Weights(rda=1.0, crt=1.0)


def test_tsm_learns_and_one_seed_gives_one_model(recipe, tiny_datasets):
    long = replace(recipe, tsm_epochs=8, tsm_learning_rate=3e-3)
    one, curve = train_tsm(tiny_datasets, long, 0)
    two, again = train_tsm(tiny_datasets, long, 0)
    assert curve == again
    assert len(curve) == 8
    assert curve[-1]["loss"] < curve[0]["loss"]
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_tsm_that_diverges_says_so(recipe, tiny_datasets):
    wild = replace(recipe, tsm_learning_rate=9.0, tsm_weight_decay=1e6, tsm_epochs=40)
    with pytest.raises(FloatingPointError, match="lower the recipe's tsm_learning_rate"):
        train_tsm(tiny_datasets, wild, 0)


def test_self_check_passes_on_images_and_stops_on_a_model_that_ignores_them(tuned, tiny_datasets):
    model, _ = tuned
    image = Features(tiny_datasets, model.vlm.image_features)
    ratios = check_image_sensitivity(model, tiny_datasets, image)
    assert min(ratios.values()) >= 100
    blind = Features(tiny_datasets, lambda images: model.vlm.image_features(images) * 0)
    with pytest.raises(InputError, match="do not reach the model"):
        check_image_sensitivity(model, tiny_datasets, blind)


def test_training_step_makes_logits_in_the_fused_operation_alone(batch, monkeypatch):
    from kernels import joint

    vlm, connector, inputs = batch
    calls, widths, inside = [], set(), []
    fused = joint._forward

    def watched(*inputs):
        inside.append(True)
        calls.append(len(inputs[0]))
        result = fused(*inputs)
        inside.pop()
        return result

    class Widths(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if not inside and isinstance(result, torch.Tensor) and result.ndim:
                widths.add(result.shape[-1])
            return result

    monkeypatch.setattr(joint, "_forward", watched)
    done = three_forwards(vlm, connector, inputs, "cls")
    with Widths():
        joint_loss(vlm, done, Weights(1.0, 1.0), detach_exemplar=True).total.backward()
    assert len(calls) == 1
    assert widths
    assert len(vlm.head) not in widths
