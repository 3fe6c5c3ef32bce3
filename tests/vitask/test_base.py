"""A base VLM loads whole or not at all: the error names the file and the tensors."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from vitask import base
from vitask.errors import InputError
from vitask.vlm import VLM

FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "base")


def edited(folder, **changes):
    """config.json with other fields; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def weights(folder, change):
    """The weights, changed in place by a function."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def refused(folder, match):
    """VLM.load refuses, and so does VLM.check, which loads nothing."""
    for refuse in (VLM.load, VLM.check):
        with pytest.raises(InputError, match=match):
            refuse(str(folder))


def answers(folder):
    vlm = VLM.load(str(folder))
    return vlm.image_features(IMAGES), vlm.prompt("What?"), vlm.response_ids("a cat")


def test_every_file_of_the_checkpoint_is_tried(tiny_checkpoint):
    assert sorted(path.name for path in tiny_checkpoint.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("how", ["cut", "empty", "gone", "noise"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_whole_is_named_or_makes_no_difference(
    folder, tiny_checkpoint, name, how
):
    path, content = folder / name, (folder / name).read_bytes()
    left = {"cut": content[: len(content) // 2], "empty": b"", "noise": b"\xff\x00" * 40}
    path.unlink() if how == "gone" else path.write_bytes(left[how])
    message, found = "", None
    try:
        found = answers(folder)
    except InputError as error:
        message = str(error)
    if found is None:
        assert str(folder) in message
        assert name in message or how == "gone"
    else:
        expected = answers(tiny_checkpoint)
        assert torch.equal(found[0], expected[0])
        assert found[1:] == expected[1:]
        assert (name, how) == ("generation_config.json", "gone")


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector", "layers.1.", "lm_head"])
def test_missing_and_renamed_tensors_are_named(folder, part):
    def rename(tensors):
        for name in [name for name in tensors if part in name]:
            tensors[f"old.{name}"] = tensors.pop(name)

    refused(weights(folder, rename), rf"missing tensor.*{part}.*unexpected tensor.*old\.")

    def drop(tensors):
        for name in [name for name in tensors if name.startswith("old.")]:
            del tensors[name]

    refused(weights(folder, drop), rf"missing tensor\(s\): .*{part}")


def test_a_tensor_of_another_shape_or_kind_is_named(folder):
    name = "multi_modal_projector.linear_2.bias"
    refused(
        weights(folder, lambda tensors: tensors.update({name: torch.zeros(3)})),
        r"linear_2\.bias is \[3\], expected \[32\]",
    )
    refused(
        weights(folder, lambda tensors: tensors.update({name: torch.zeros(32, dtype=torch.int8)})),
        r"model\.safetensors: multi_modal_projector\.linear_2\.bias .*I8",
    )


def test_values_that_are_not_finite_are_named(folder):
    name = "multi_modal_projector.linear_2.bias"
    weights(folder, lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(InputError, match=r"not finite: .*linear_2\.bias"):
        VLM.load(str(folder))


def test_tied_heads_and_shards_are_whole(folder, tiny_checkpoint):
    model = InternVLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100kB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(answers(folder)[0], answers(tiny_checkpoint)[0])
    shards[0].unlink()
    refused(folder, rf"model\.safetensors\.index\.json names {shards[0].name}")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    refused(folder, r"model\.safetensors\.index\.json names \.\./b")

    tied = folder.with_name("tied")
    shutil.copytree(tiny_checkpoint, tied)
    text = json.loads((tied / "config.json").read_text())["text_config"]
    edited(tied, tie_word_embeddings=True, text_config=text | {"tie_word_embeddings": True})
    weights(tied, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    vlm = VLM.load(str(tied))
    assert torch.equal(vlm.head, vlm.model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llava"}, r"config\.json has model_type 'llava'; expected 'internvl'"),
        ({"model_type": "internvl_chat"}, r"original layout.*-hf"),
        ({"model_type": None}, r"config\.json has model_type None"),
        ({"model_type": ["internvl"]}, r"config\.json has model_type \['internvl'\]"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"text_config": None}, r"config\.json do not fit: .*missing.*parameters described"),
        ({"vision_config": None}, r"config\.json do not fit: .*vision_tower"),
        ({"text_config": {"model_type": "nonsense"}}, r"config\.json cannot be used"),
        ({"text_config": 5}, r"config\.json cannot be used"),
        ({"vision_config": {"num_hidden_layers": 10**12}}, r"config\.json describes 10+ layers"),
    ],
    ids=str,
)
def test_what_config_describes_is_checked_before_anything_is_built(
    folder, monkeypatch, changes, match
):
    monkeypatch.setattr(base, "check_values", None)  # nothing gets that far
    refused(edited(folder, **changes), match)


def test_a_config_of_default_size_takes_no_memory(folder):
    (folder / "config.json").write_text('{"model_type": "internvl"}')
    with pytest.raises(InputError, match=r"12,\d{3},\d{3},\d{3} parameters described, 59,616 held"):
        VLM.load(str(folder))


def test_weights_that_do_not_fit_into_memory_are_refused(folder, monkeypatch):
    monkeypatch.setattr(base, "available", lambda device: 200_000)
    refused(folder, r"needs 0\.0 GiB of memory \(cpu\).*precision=bfloat16")
    VLM.check(str(folder), dtype=torch.bfloat16)


def test_only_safetensors_are_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "neither model.safetensors nor .*can run code")


def test_the_processor_of_another_checkpoint_is_refused(folder, tiny_checkpoint):
    pocket = base.POCKET
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pocket / name, folder / name)
    with pytest.raises(InputError, match=f"tokenizer or processor of {folder}"):
        VLM.load(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint / name, folder / name)
    shutil.copy(pocket / "processor_config.json", folder / "processor_config.json")
    with pytest.raises(InputError, match=f"processor of {folder} does not fit config.json"):
        VLM.load(str(folder))


@pytest.mark.parametrize(
    ("name", "match"),
    [("vitask.json", "a tuned checkpoint"), ("adapter_config.json", "adapters: merge them")],
)
def test_tuned_models_are_not_base_models(folder, name, match):
    (folder / name).write_text("{}")
    refused(folder, match)


def test_a_folder_without_config_and_a_file_are_refused(tmp_path):
    refused(tmp_path, r"has no config\.json")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file")


def test_the_pocket_model_is_whole():
    VLM.check("pocket")


BAD_PIXELS = {
    "mean text": {"image_mean": "x"},
    "mean of two": {"image_mean": [0.5, 0.5]},
    "mean not finite": {"image_mean": [float("nan")] * 3},
    "scale text": {"rescale_factor": "a"},
    "scale 0": {"rescale_factor": 0},
    "resample": {"resample": 99},
    "std 0": {"image_std": [0.0, 0.0, 0.0]},
    "one std 0": {"image_std": [0.5, 0.0, 0.5]},
    "no resizing": {"do_resize": False},
}


@pytest.mark.parametrize("case", BAD_PIXELS)
def test_a_processor_that_makes_no_usable_pixels_is_refused(folder, case):
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"] |= BAD_PIXELS[case]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"tokenizer or processor of {folder} cannot be used"):
        VLM.load(str(folder))
