"""A tuned model loads as it was saved or not at all, and saving never loses another file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vitask.conftest import write_tiny_checkpoint
from vitask import files
from vitask.card import Task, read_card
from vitask.checkpoint import VITask
from vitask.errors import Damaged, InputError
from vitask.exemplar import ExemplarConnector
from vitask.features import Features
from vitask.recipes import POCKET, vanilla
from vitask.train import tune
from vitask.tsm import TSM, heads
from vitask.vlm import VLM

NAMES = (
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "connector.safetensors",
    "processor/chat_template.jinja",
    "processor/processor_config.json",
    "processor/tokenizer.json",
    "processor/tokenizer_config.json",
    "tsm.json",
    "tsm.safetensors",
    "vision.safetensors",
    "vitask.json",
)
TENSORS = tuple(name for name in NAMES if name.endswith(".safetensors"))
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), dtype=np.uint8)


def model(base, datasets, seed=0):
    """A model with every part; adapters, connector and TSM are random."""
    torch.manual_seed(seed)
    vlm = VLM.load(str(base))
    vlm.add_lora(rank=2, alpha=4, dropout=0.0)
    with torch.no_grad():
        for name, parameter in vlm.adapter.named_parameters():
            if "lora_" in name or "multi_modal_projector" in name:
                parameter.normal_(0, 0.2)
    tasks = {name: Task.of(dataset) for name, dataset in datasets.items()}
    tsm = TSM("test_resnet", heads([task.spec for task in tasks.values()]), 32).eval()
    connector = ExemplarConnector(tsm.feature_size(), vlm.hidden_size).eval()
    recipe = replace(POCKET, vlm=str(base), tsm="test_resnet", trained="connector", step="three")
    return VITask(vlm, recipe, tasks, tsm=tsm, connector=connector)


@pytest.fixture(scope="module")
def saved(tiny_checkpoint, tiny_datasets, tmp_path_factory):
    """Two checkpoints of the same form, and the first model's answers."""
    root = tmp_path_factory.mktemp("saved")
    for seed, name in enumerate(("one", "other")):
        made = model(tiny_checkpoint, tiny_datasets, seed)
        made.save_pretrained(root / name)
        if seed == 0:
            expected = made.predict("two", IMAGES)
    return root / "one", root / "other", expected


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "checkpoint")


def earlier(folder, number=2):
    """The checkpoint as earlier versions wrote it, without digests."""
    for name, gone in (
        ("vitask.json", {"base", "files", "sha256"}),
        ("tsm.json", {"files", "sha256"}),
    ):
        card = json.loads((folder / name).read_text())
        card = {key: value for key, value in card.items() if key not in gone}
        if name == "vitask.json":
            card["format"] = number
        (folder / name).write_text(json.dumps(card))
    return folder


def test_every_file_of_a_checkpoint_is_tried(saved):
    assert sorted(files.digests(saved[0])) == sorted(NAMES)


def test_a_copy_answers_alike_in_every_format(saved, folder):
    assert (VITask.from_pretrained(folder).predict("two", IMAGES) == saved[2]).all()
    assert (VITask.from_pretrained(earlier(folder)).predict("two", IMAGES) == saved[2]).all()


@pytest.mark.parametrize("how", ["cut", "flipped", "longer", "gone", "exchanged"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_not_the_saved_one_is_named(saved, folder, name, how):
    path, content = folder / name, (saved[0] / name).read_bytes()
    middle = len(content) // 2
    if how == "gone":
        path.unlink()
    elif how == "exchanged":
        path.write_bytes((saved[1] / name).read_bytes())
        if path.read_bytes() == content:
            return  # equal in both
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        made = {"cut": content[:middle], "flipped": flipped, "longer": content + b"x"}
        path.write_bytes(made[how])
    if (name, how) == ("vitask.json", "exchanged"):  # it names all files of the other
        name = "adapter_model.safetensors"
    with pytest.raises(InputError, match=rf"{folder}.*{Path(name).name}"):
        VITask.from_pretrained(folder)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("processor")])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_without_digests_a_file_that_is_not_whole_is_named(folder, name, how):
    path = earlier(folder) / name
    content = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(content[: len(content) // 2])
    if name.endswith("README.md"):
        VITask.from_pretrained(folder)
        return
    with pytest.raises(InputError, match=rf"{folder}.*{path.name}"):
        VITask.from_pretrained(folder)


@pytest.mark.parametrize("how", ["missing", "unexpected", "shape", "dtype"])
@pytest.mark.parametrize("name", TENSORS)
def test_without_digests_tensors_that_do_not_fit_are_named(folder, name, how):
    path = earlier(folder) / name
    tensors = load_file(path)
    last = sorted(tensors)[-1]
    changed = {
        "missing": {key: value for key, value in tensors.items() if key != last},
        "unexpected": tensors | {"strange": torch.zeros(3)},
        "shape": tensors | {last: torch.zeros(7, 7, 7, dtype=tensors[last].dtype)},
        "dtype": tensors | {last: tensors[last].to(torch.float16)},
    }
    save_file(changed[how], path)
    named = "strange" if how == "unexpected" else last.replace(".", r"\.")
    with pytest.raises(Damaged, match=rf"{path}.*{named}"):
        VITask.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("vitask.json", {"recipe": None}, "recipe is None"),
        ("vitask.json", {"recipe": {}}, "recipe.*phantom_datasets"),
        ("vitask.json", {"tasks": [1]}, r"tasks is \[1\]"),
        ("vitask.json", {"tasks": {"two": 5}}, r"tasks\.two"),
        ("vitask.json", {"format": "2"}, "format is '2'; expected an integer"),
        ("tsm.json", {"name": 5}, "name is 5; expected a text"),
        ("tsm.json", {"name": "test_resnett"}, "no model 'test_resnett'"),
        ("tsm.json", {"size": "32"}, "size is '32'; expected an integer"),
        ("tsm.json", {"heads": {"two": 1}}, "heads"),
        ("tsm.json", {"heads": {"two": [2, 1]}}, r"heads.*two is \[2, 1\]"),
        ("tsm.json", {"heads": {}}, r"tsm\.json"),
        ("adapter/adapter_config.json", {"r": True}, "r is True; expected an integer"),
        ("adapter/adapter_config.json", {"r": 0}, "r is 0"),
        ("adapter/adapter_config.json", {"r": 3}, r"lora_A.*expected"),
        ("adapter/adapter_config.json", {"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ("adapter/adapter_config.json", {"use_rslora": True}, "use_rslora is True"),
        ("adapter/adapter_config.json", {"init_lora_weights": "pissa"}, "init_lora_weights"),
        ("adapter/adapter_config.json", {"target_modules": ["q_proj"]}, "target_modules"),
        ("adapter/adapter_config.json", {"newer": {"a": 1}}, "newer"),
    ],
)
def test_without_digests_a_wrong_field_is_named_with_its_file(folder, name, change, match):
    path = earlier(folder) / name
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | change))
    with pytest.raises(Damaged, match=rf"{folder}.*{match}"):
        VITask.from_pretrained(folder)
    for field in change.keys() & fields.keys() - {"use_rslora", "init_lora_weights"}:
        path.write_text(json.dumps({k: v for k, v in fields.items() if k != field}))
        with pytest.raises(Damaged, match=rf"{folder}.*{field}"):
            VITask.from_pretrained(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", "1e-3"), ("lora_rank", 2.5), ("vlm", 5), ("exemplar", 1), ("strange", 1)],
)
def test_a_recipe_field_of_another_type_is_named(folder, field, value):
    path = earlier(folder) / "vitask.json"
    card = json.loads(path.read_text())
    card["recipe"][field] = value
    path.write_text(json.dumps(card))
    with pytest.raises(Damaged, match=rf"vitask\.json: recipe.*{field}"):
        read_card(folder)


def test_the_tsm_of_another_width_is_refused(folder):
    made = TSM("test_vit", TSM.load(earlier(folder)).spans, 32)
    made.save(folder)
    with pytest.raises(Damaged, match=r"connector\.safetensors takes features of width"):
        VITask.from_pretrained(folder)


def test_a_base_model_that_changed_is_named(tiny_datasets, tmp_path):
    base = write_tiny_checkpoint(tmp_path / "base", seed=1)
    model(base, tiny_datasets).save_pretrained(tmp_path / "tuned")
    VITask.from_pretrained(tmp_path / "tuned")
    write_tiny_checkpoint(base, seed=2)
    with pytest.raises(InputError, match=rf"base VLM .* has changed.*model\.safetensors in {base}"):
        VITask.from_pretrained(tmp_path / "tuned")


# A VLM is tuned once


def test_the_first_models_answers_never_change(tiny_checkpoint, tiny_datasets, saved):
    recipe = replace(
        vanilla(POCKET), vlm=str(tiny_checkpoint), stage1_epochs=1, stage2_epochs=0,
        learning_rate=1e-2,
    )  # fmt: skip
    data = {"two": tiny_datasets["two"]}
    vlm = VLM.load(recipe.vlm)
    image = Features(data, vlm.image_features)
    first, _ = tune(vlm, data, recipe, 0, image=image)
    expected = first.predict("two", IMAGES)
    again = VLM(vlm.model, vlm.processor, vlm.name)
    for spend in (
        lambda: tune(vlm, data, recipe, 1, image=image),
        lambda: tune(again, data, recipe, 1, image=image),
        lambda: vlm.add_lora(rank=2, alpha=4, dropout=0.0),
        lambda: vlm.load_adapter(saved[0] / "adapter"),
        lambda: again.load_adapter(saved[0] / "adapter"),
    ):
        with pytest.raises(InputError, match="load a fresh VLM"):
            spend()
        assert (first.predict("two", IMAGES) == expected).all()


def test_adapters_of_peft_are_refused(tiny_checkpoint):
    config = peft.LoraConfig(target_modules=["q_proj"])
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for settings in (config, prompts):
        vlm = VLM.load(str(tiny_checkpoint))
        theirs = peft.get_peft_model(vlm.model, settings)
        if settings is prompts:  # it leaves the model itself as it was
            vlm = VLM(theirs, vlm.processor, vlm.name)
        with pytest.raises(InputError, match="already has adapters"):
            vlm.add_lora(rank=2, alpha=4, dropout=0.0)


def test_a_vlm_stays_spent_when_its_adapters_are_taken_off(saved):
    vlm = VITask.from_pretrained(saved[0]).vlm  # its connector was trained as well
    plain = VLM(vlm.adapter.unload(), vlm.processor, vlm.name)
    with pytest.raises(InputError, match="load a fresh VLM"):
        plain.add_lora(rank=2, alpha=4, dropout=0.0)


# Saving


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("name", ["notes.txt", ".git/config", "adapter/mine.bin", "empty/"])
def test_a_folder_with_other_files_is_refused_and_kept(saved, folder, number, name):
    if number == 2:
        earlier(folder)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if name.endswith("/") else path.write_text("years of work")
    before = files.digests(folder)
    with pytest.raises(InputError, match=rf"not a checkpoint \({name.split('/')[0]}"):
        VITask.from_pretrained(saved[1]).save_pretrained(folder)
    assert files.digests(folder) == before
    assert path.exists()
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("number", [2, 3])
def test_an_earlier_checkpoint_is_replaced_with_its_note(saved, folder, number):
    if number == 2:
        earlier(folder)
    (folder / "training.json").write_text("{}")
    VITask.from_pretrained(saved[1]).save_pretrained(folder)
    assert files.digests(folder) == files.digests(saved[1])
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]


def test_links_are_not_followed(saved, folder, tmp_path):
    other = VITask.from_pretrained(saved[1])
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(InputError, match="link is a link or a file"):
        other.save_pretrained(tmp_path / "link")
    shutil.move(folder / "adapter", tmp_path / "elsewhere")
    (folder / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"not a checkpoint \(adapter\)"):
        other.save_pretrained(folder)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 3


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("step", range(3))
def test_a_failure_at_any_step_leaves_a_whole_checkpoint(
    saved, folder, monkeypatch, exchange, step
):
    other, replaced, calls = VITask.from_pretrained(saved[1]), os.replace, []

    def failing(*paths):
        if str(folder) in map(str, paths) and len(calls) == step:
            raise OSError(28, "No space left on device")
        calls.append(str(folder) in map(str, paths))
        replaced(*paths)

    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    monkeypatch.setattr(os, "replace", failing)
    with suppress(InputError):
        other.save_pretrained(folder)
    monkeypatch.undo()
    assert files.digests(folder) in (files.digests(saved[0]), files.digests(saved[1]))


KILLED = """
import sys, itertools
from pathlib import Path
from shutil import copytree
from vitask.files import part_folder, put_folder
place, sources = Path(sys.argv[1]), sys.argv[2:]
print("ready", flush=True)
for source in itertools.cycle(sources):
    new = part_folder(place.parent, place.name)
    copytree(source, new, dirs_exist_ok=True)
    put_folder(new, place)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(saved, folder):
    for seed in range(4):
        command = [sys.executable, "-c", KILLED, folder, *saved[:2]]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline()
            time.sleep(0.03 + 0.017 * seed)
            process.send_signal(signal.SIGKILL)
        assert files.digests(folder) in (files.digests(saved[0]), files.digests(saved[1]))


def test_a_model_without_adapters_is_not_saved(tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match="not tuned"):
        VITask(VLM.load(str(tiny_checkpoint)), POCKET, {}).save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tsm.json", "tsm.safetensors"])
def test_the_files_of_a_tsm_belong_together(saved, tmp_path, name):
    one, other = (TSM.load(path) for path in saved[:2])
    one.save(tmp_path)
    assert torch.equal(TSM.load(tmp_path).features(IMAGES), one.features(IMAGES))
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, tmp_path / name)
    with pytest.raises(Damaged, match=rf"{tmp_path}/tsm\.safetensors is not the file"):
        TSM.load(tmp_path)
