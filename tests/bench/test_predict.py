"""predict: a folder of images and a checkpoint -> one CSV row per image."""

import csv
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from bench.__main__ import app
from vitask.card import Task
from vitask.checkpoint import VITask
from vitask.data import load
from vitask.data.images import read_image
from vitask.errors import InputError
from vitask.exemplar import ExemplarConnector
from vitask.files import check_destination, digests, part_of
from vitask.recipes import POCKET, vanilla
from vitask.tsm import TSM, heads
from vitask.vlm import VLM

NAMES = ("octmnist", "breastmnist", "dermamnist")
PHANTOM = ["file", "trained_on", "answer", "generated", "error"]
OTHER = "skipped: 1 file(s) ending in .txt, which are not read as images\n"
DONE = (
    "1 image(s): 16 bits a channel are reduced to 8\n"
    "1 image(s): transparent parts are shown on white, as in a viewer\n"
)
SAID = OTHER + DONE  # about the fixture `images`


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """with: a TSM and a connector; without: neither; one: neither, and a single dataset."""
    root, vlm = tmp_path_factory.mktemp("models"), VLM.load("pocket")
    vlm.add_lora(rank=2, alpha=4, dropout=0.0)
    tasks = {name: Task.of(load(name, source="phantom")) for name in NAMES}
    tsm = TSM("test_resnet", heads([task.spec for task in tasks.values()]), 32).eval()
    connector = ExemplarConnector(tsm.feature_size("cls"), vlm.hidden_size).eval()
    VITask(vlm, POCKET, tasks, tsm=tsm, connector=connector).save_pretrained(root / "with")
    VITask(vlm, vanilla(POCKET), tasks).save_pretrained(root / "without")
    real = replace(tasks["octmnist"].spec, source="an archive")
    one = {"octmnist": replace(tasks["octmnist"], spec=real)}
    VITask(vlm, vanilla(POCKET), one).save_pretrained(root / "one")
    return root


@pytest.fixture
def images(tmp_path):
    """Five images of different modes, one of them in a subfolder, and a text file."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    (folder / "deep").mkdir(parents=True)
    colour = Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    colour.save(folder / "deep" / "one.PNG")
    colour.convert("RGBA").save(folder / "alpha.png")
    colour.quantize(16).save(folder / "palette.png", transparency=bytes(range(16)))
    colour.convert("L").save(folder / "grey.jpg")
    sixteen = rng.integers(0, 65536, (28, 28), dtype=np.uint16)
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture
def no_model(monkeypatch):
    """Makes every import of torch or of the model's class fail."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "vitask.checkpoint", None)


def predict(*words):
    return CliRunner().invoke(app, ["predict", *map(str, words)])


def table(text):
    return pd.read_csv(io.StringIO(text), keep_default_na=False)


def bomb(path):
    """A PNG of a few bytes that claims 40,000 x 40,000 pixels."""
    chunks = b""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + content))
        chunks += struct.pack(">I", len(content)) + kind + content + check
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


# Answers


def test_every_image_gets_a_row(models, images, tmp_path):
    output = tmp_path / "new" / "answers.csv"
    done = predict(models / "with", images, "--dataset", "octmnist", "--output", output)
    assert (done.exit_code, done.output) == (0, SAID)
    frame = table(output.read_text())
    answers = list(load("octmnist", source="phantom").spec.classes)
    assert list(frame) == [*PHANTOM, *answers]
    files = ["alpha.png", "deep/one.PNG", "grey.jpg", "palette.png", "sixteen.png"]
    assert frame.file.tolist() == files
    assert set(frame.trained_on) == {"PHANTOM data"}
    assert set(frame.error) == {""}
    np.testing.assert_allclose(frame[answers].sum(axis=1), 1, atol=1e-5)
    assert frame.answer.tolist() == frame[answers].idxmax(axis=1).tolist()
    assert [path.name for path in output.parent.iterdir()] == ["answers.csv"]


@pytest.mark.parametrize("exemplar", [True, False])
def test_the_rows_hold_the_model_predictions(models, images, exemplar):
    flag = "--exemplar" if exemplar else "--no-exemplar"
    done = predict(models / "with", images, "--dataset", "octmnist", flag)
    frame = table(done.stdout)
    model = VITask.from_pretrained(models / "with")
    seen = np.stack([read_image(images / file, 28, 1) for file in frame.file])
    texts = model.tasks["octmnist"].candidates.texts
    expected = model.predict("octmnist", seen, exemplar=exemplar)
    np.testing.assert_allclose(frame[list(texts)], expected, atol=1e-6)
    tokens = model.image_tokens(seen, exemplar=exemplar)
    assert frame.generated.tolist() == model.write("octmnist", tokens)


def test_the_exemplar_is_used_by_default(models, images):
    words = (models / "with", images, "--dataset", "octmnist")
    default = predict(*words).stdout
    assert default == predict(*words, "--exemplar").stdout
    assert default != predict(*words, "--no-exemplar").stdout
    words = (models / "without", *words[1:])
    assert predict(*words).stdout == predict(*words, "--no-exemplar").stdout


def test_a_single_dataset_needs_no_name_and_real_data_no_mark(models, images):
    done = predict(models / "one", images)
    assert done.exit_code == 0, done.output
    assert list(table(done.stdout))[:4] == ["file", "answer", "generated", "error"]


def test_probabilities_have_six_digits(models, images):
    rows = list(csv.reader(io.StringIO(predict(models / "one", images).stdout)))
    cells = [cell for row in rows[1:] for cell in row[4:]]
    assert cells
    assert all(len(cell) == 8 and cell[1] == "." for cell in cells)


def test_the_batch_size_does_not_change_answers(models, images, monkeypatch):
    batches, judge = [], VITask.image_tokens

    def counted(self, images, **options):
        batches.append(len(images))
        return judge(self, images, **options)

    monkeypatch.setattr(VITask, "image_tokens", counted)
    whole = table(predict(models / "one", images).stdout)
    split = table(predict(models / "one", images, "--batch-size", 2).stdout)
    assert batches == [5, 2, 2, 1]
    digits = list(whole)[4:]
    np.testing.assert_allclose(split[digits], whole[digits], atol=2e-6)
    pd.testing.assert_frame_equal(split.drop(columns=digits), whole.drop(columns=digits))


def test_rows_are_written_before_the_next_batch_is_scored(models, images, tmp_path, monkeypatch):
    part, lines, judge = part_of(tmp_path / "answers.csv"), [], VITask.image_tokens

    def counted(self, images, **options):
        lines.append(len(part.read_text().splitlines()))
        return judge(self, images, **options)

    monkeypatch.setattr(VITask, "image_tokens", counted)
    output = tmp_path / "answers.csv"
    predict(models / "one", images, "--batch-size", 2, "--output", output)
    assert lines[1:] == [3, 5]  # header and rows; the first header may still be in a buffer
    assert len(output.read_text().splitlines()) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stopped_run_keeps_the_old_file(models, images, tmp_path, monkeypatch, error):
    def stopped(*_, **__):
        raise error

    monkeypatch.setattr(VITask, "image_tokens", stopped)
    output = tmp_path / "answers.csv"
    output.write_text("old")
    done = predict(models / "one", images, "--output", output)
    assert done.exit_code == 1
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.csv", "images"]


@pytest.mark.parametrize("stop", ["interrupted", "File too large"])
def test_a_stopped_run_keeps_its_whole_batches(models, images, tmp_path, monkeypatch, stop):
    output, calls, judge = tmp_path / "answers.csv", [], VITask.image_tokens
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    output.write_text("old")

    def stopped(self, images, **options):
        calls.append(1)
        if len(calls) == 3 and stop == "interrupted":
            raise KeyboardInterrupt
        if len(calls) == 3:  # the system takes a few bytes of the third batch, and no more
            size = part_of(output).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, limits[1]))
        return judge(self, images, **options)

    with monkeypatch.context() as patched:
        patched.setattr(VITask, "image_tokens", stopped)
        try:
            done = predict(models / "one", images, "--batch-size", 2, "--output", output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.exit_code == 1
    assert output.read_text() == "old"
    assert f"the rows so far are in {part_of(output)}\n" in done.stderr
    assert stop in done.stderr
    assert "goes on" not in done.stderr
    assert "Traceback" not in done.stderr
    so_far = part_of(output).read_text()
    assert len(table(so_far)) == 4
    done = predict(models / "one", images, "--batch-size", 2, "--output", output)
    assert done.exit_code == 0, done.output
    assert output.read_text().startswith(so_far)
    assert not part_of(output).exists()


# Unreadable images


def test_an_unreadable_image_gets_a_row_with_its_error(models, images):
    (images / "a_zero.png").touch()
    (images / "b_text.png").write_bytes(b"no image")
    whole = (images / "deep" / "one.PNG").read_bytes()
    (images / "c_cut.png").write_bytes(whole[: len(whole) // 2])
    bomb(images / "d_bomb.png")
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(images / "e_real.tiff")
    (images / "f_gone.png").symlink_to(images / "nowhere")
    before = table(predict(models / "with", images / "deep", "--dataset", "octmnist").stdout)
    done = predict(models / "with", images, "--dataset", "octmnist", "--batch-size", 3)
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert done.stderr == SAID + "error: 6 image(s) could not be read; see the column error\n"
    frame = table(done.stdout)
    bad = frame[frame.error != ""]
    assert [name[0] for name in bad.file] == list("abcdef")
    assert (bad.drop(columns=["file", "error"]) == "").all(axis=None)
    good = frame[frame.error == ""]
    assert len(good) == 5
    one = good[good.file == "deep/one.PNG"].iloc[0]
    assert one.answer == before.answer[0]
    assert set(good.trained_on) == {"PHANTOM data"}


def test_a_folder_of_unreadable_images_still_gets_rows(models, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "zero.png").touch()
    done = predict(models / "one", tmp_path / "images", "--output", tmp_path / "answers.csv")
    assert done.exit_code == 1
    assert table((tmp_path / "answers.csv").read_text()).file.tolist() == ["zero.png"]


def test_hidden_files_are_skipped_and_counted_once(models, images):
    before = predict(models / "one", images)
    (images / ".thumbnails").mkdir()
    for name in ("._grey.jpg", ".thumbnails/grey.jpg", ".thumbnails/palette.jpg"):
        shutil.copy(images / "grey.jpg", images / name)
    done = predict(models / "one", images)
    assert (done.exit_code, done.stdout) == (0, before.stdout)
    assert done.stderr == "skipped: 3 hidden image file(s)\n" + SAID


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_what_the_reader_did_is_said_once(models, tmp_path, batch_size):
    exif = Image.Exif()
    exif[274] = 6
    for number in range(5):  # a batch of three grey images is not one in colour
        image = Image.fromarray(np.full((28, 28), 50 * number, dtype=np.uint8))
        image.save(tmp_path / f"{number}.png", exif=exif)
    done = predict(models / "one", tmp_path, "--batch-size", batch_size)
    assert done.exit_code == 0, done.output
    assert done.stderr == "5 image(s): turned as their EXIF says\n"
    assert len(table(done.stdout)) == 5


def test_any_file_name_can_be_written(models, tmp_path):
    (tmp_path / "images").mkdir()
    names = ['a, "b".png', "ä.png", b"\xff.png".decode(errors="surrogateescape")]
    for name in names:
        Image.new("L", (4, 4)).save(tmp_path / "images" / name)
    done = predict(models / "one", tmp_path / "images")
    assert done.exit_code == 0, done.output
    assert table(done.stdout).file.tolist() == [*names[:2], "\\xff.png"]


def test_another_locale_changes_no_name(models, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "images" / "été.png")
    (tmp_path / "images" / "à.png").touch()
    words = ["-m", "bench", "predict", models / "one", tmp_path / "images"]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    frame = table(done.stdout.decode())
    assert frame.file.tolist() == ["à.png", "été.png"]
    assert frame.error[0].startswith(f"{tmp_path / 'images' / 'à.png'} is not a readable image")


# The command line, checked before the model is loaded


@pytest.mark.parametrize(
    ("model", "words", "code", "message"),
    [
        (
            "with",
            [],
            2,
            "answers for octmnist, breastmnist and dermamnist: name one with --dataset",
        ),
        ("with", ["--dataset", "octmist"], 2, "not for 'octmist': name one with --dataset"),
        ("one", ["--dataset", "pathmnist"], 2, "answers for octmnist, not for 'pathmnist'"),
        ("one", ["--exemplar"], 2, "has no task-specific model: give --no-exemplar"),
        ("one", ["--batch-size", "0"], 2, "--batch-size"),
        ("one", ["--output", "{tmp}"], 1, "--output {tmp} cannot be written"),
        ("one", ["--output", "/dev/null"], 1, "--output /dev/null cannot be written"),
        ("one", ["--output", "{tmp}/notes.txt/a.csv"], 1, "notes.txt/a.csv cannot be written"),
        ("one", ["--output", "{tmp}/" + 300 * "a"], 1, "File name too long"),
        ("one", ["--output", "{tmp}/" + 249 * "a"], 1, "File name too long"),  # of its part
        ("one", ["--output", "{tmp}/new/" + 249 * "a"], 1, "File name too long"),
        ("one", ["--output", "/proc/x.csv"], 1, "--output /proc/x.csv cannot be written"),
    ],
)
def test_options_are_checked_first(models, images, tmp_path, no_model, model, words, code, message):
    (tmp_path / "notes.txt").touch()
    done = predict(models / model, images, *(word.format(tmp=tmp_path) for word in words))
    assert done.exit_code == code
    assert message.format(tmp=tmp_path) in done.output
    assert "Traceback" not in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "notes.txt"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("images/grey.jpg", "is one of the images"),
        ("images/link.PNG", "is one of the images"),
        ("answers.png", "is one of the images"),  # a link to an image
        ("one/new.csv", "is in the checkpoint"),
        ("one/vitask.json", "cannot be written: it is a file of the run or checkpoint"),
        ("other/vitask.json", "cannot be written: it is a file of the run or checkpoint"),
        ("loop.csv", "cannot be written"),
    ],
)
def test_images_and_checkpoints_are_not_replaced(
    models, images, tmp_path, no_model, output, message
):
    for name in ("one", "other"):
        shutil.copytree(models / "one", tmp_path / name)
    (tmp_path / "away").touch()
    (images / "link.PNG").symlink_to(tmp_path / "away")
    (tmp_path / "answers.png").symlink_to(images / "grey.jpg")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    before = sorted(tmp_path.rglob("*")), digests(images), digests(tmp_path / "one")
    done = predict(tmp_path / "one", images, "--output", f"{tmp_path}/{output}")
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output
    assert (sorted(tmp_path.rglob("*")), digests(images), digests(tmp_path / "one")) == before


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--output .* cannot be written: embedded null byte"):
        check_destination(tmp_path / "nul\0.csv", "--output")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"\xff", b'{"tasks": {"a": 1}}'])
def test_a_checkpoint_is_read_first(models, images, tmp_path, no_model, content):
    broken = tmp_path / "broken"
    broken.mkdir()
    if content is not None:
        (broken / "vitask.json").write_bytes(content)
    done = predict(broken, images)
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert f"{broken}" in done.output


def test_a_lost_exemplar_is_an_error(models, images, tmp_path, no_model):
    shutil.copytree(models / "with", tmp_path / "lost")
    (tmp_path / "lost" / "tsm.json").unlink()
    done = predict(tmp_path / "lost", images, "--dataset", "octmnist")
    assert done.exit_code == 2
    assert "--no-exemplar" in done.output


def test_another_format_is_refused(models, images, tmp_path):
    shutil.copytree(models / "one", tmp_path / "later")
    card = json.loads((models / "one" / "vitask.json").read_text())
    (tmp_path / "later" / "vitask.json").write_text(json.dumps(card | {"format": 4}))
    done = predict(tmp_path / "later", images, "--output", tmp_path / "answers.csv")
    assert done.exit_code == 1
    assert "has format 4" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "later"]


@pytest.mark.parametrize("names", [(), ("notes.txt",), (".hidden.png",)], ids=str)
def test_a_folder_without_images_is_named_first(models, tmp_path, no_model, names):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    done = predict(models / "one", folder)
    assert done.exit_code == 1
    assert f"error: no image in {folder}; expected files ending in .png" in done.output
    done = predict(models / "one", folder / "nowhere")
    assert done.exit_code == 1
    assert f"no folder {folder / 'nowhere'}" in done.output


def test_correct_arguments_load_the_model(models, images, no_model):
    """Without this, the tests above would pass even if a check came later."""
    assert isinstance(predict(models / "one", images).exception, ImportError)


def test_the_checks_do_not_import_torch():
    code = "import sys, bench.commands.predict; assert not {'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
