"""Tries the smallest model of each of timm's modules, and compares with the table of exceptions.

    python -m tests.vitask.timm_survey    all of them; an hour on two slow cores
    ... --slice 0/10       the first of every ten
    ... --models vgg11     these
    ... --smallest         writes timm_smallest.csv anew

It prints one line per model, size and kind of features, and lines of `timm_exceptions.csv` for
those that are refused.
"""

import argparse
import csv
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import timm
import torch

from vitask.backbone import FEATURES, check_alone
from vitask.errors import InputError
from vitask.tsm import TSM, Head, check_tsm

HERE = Path(__file__).parent
SIZES = (32, 224)
LARGEST = 140_000_000  # parameters of a model that is built with numbers and trained for a step
COSTLIEST = 60_000_000 * 224**2  # parameters times pixels of such a model
SPANS = {"a": Head(0, 3), "b": Head(3, 5)}
GIVEN = ""  # what is in the table for a kind of features that a model gives


def smallest() -> dict[str, int]:
    """Parameters of the smallest model of each module, as the file beside this one lists them."""
    with open(HERE / "timm_smallest.csv", newline="", encoding="utf-8") as file:
        return {row["model"]: int(row["parameters"]) for row in csv.DictReader(file)}


def exceptions() -> dict[tuple[str, int, str], str]:
    """By model, size and kind of features: words of the refusal. What is not listed is given."""
    with open(HERE / "timm_exceptions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {(row["model"], int(row["size"]), row["kind"]): row["refused"] for row in rows}


def built(model: str, size: int) -> bool:
    """Whether the model is small enough to be built with numbers and trained for a step here."""
    parameters = smallest().get(model, 0)
    return parameters <= LARGEST and parameters * size**2 <= COSTLIEST


def refusal(model: str, size: int, kind: str) -> str:
    """The message of our refusal, or `GIVEN`."""
    try:
        check_tsm(model, size, kind)
    except InputError as error:
        return str(error)
    return GIVEN


def difference(model: str, size: int, kind: str, message: str) -> str:
    """Where the message is not what the table says, else nothing."""
    expected = exceptions().get((model, size, kind), GIVEN)
    if bool(expected) != bool(message) or expected not in message:
        return (
            f"{model}, {size} pixels, {kind}: {message or 'given'}; expected {expected or 'given'}"
        )
    return ""


def use(model: str, size: int) -> str:
    """Whatever is wrong when a model that is not refused is built, asked, trained and stored."""
    torch.manual_seed(0)
    tsm = TSM(model, SPANS, size)
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    plain = timm.create_model(model, num_classes=5, **tsm.found.arguments)
    if not torch.equal(after, torch.random.get_rng_state()):
        return "the trial drew random numbers"
    state = tsm.backbone.state_dict()
    if any(not torch.equal(value, state[name]) for name, value in plain.state_dict().items()):
        return "the trial changed the first weights or statistics"
    del plain, state
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    tsm.train()
    optimizer = torch.optim.AdamW(tsm.parameters(), lr=1e-3)
    loss = torch.nn.functional.cross_entropy(tsm(tsm.pixels(images)), torch.tensor([0, 4]))
    loss.backward()
    optimizer.step()
    if not torch.isfinite(loss):
        return f"the loss is {float(loss)}"
    with tempfile.TemporaryDirectory() as folder:
        tsm.save(Path(folder))
        again = TSM.load(Path(folder))
    for kind in FEATURES if not isinstance(tsm.found.grid, str) else FEATURES[:1]:
        features, loaded = tsm.features(images, kind), again.features(images, kind)
        if features.shape[:: features.ndim - 1] != (2, tsm.feature_size(kind)):
            return f"{kind} has shape {tuple(features.shape)}, width {tsm.feature_size(kind)}"
        if not torch.equal(features, loaded):
            return f"{kind} differs after loading by {float((features - loaded).abs().max())}"
        if not torch.isfinite(features).all():
            return f"{kind} is not finite"
    return ""


def fails(model: str, size: int) -> str:
    """A refused model, tried with numbers: nothing if it does fail, else what it gives."""
    config = timm.get_pretrained_cfg(model)
    extra = {"img_size": size} if config is not None and config.fixed_input_size else {}
    try:
        backbone = timm.create_model(model, num_classes=5, **extra).eval()
        with torch.no_grad():
            given = backbone(torch.zeros(1, 3, size, size))
    except Exception:
        return ""
    return f"refused, but it gives {tuple(given.shape)}"


@contextmanager
def limited(seconds: int):
    def stop(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survey(models: list[str], sizes: list[int], seconds: int) -> int:
    """Prints a line for each; the number of faults."""
    faults = 0
    for model, size in product(models, sizes):
        start, lines, alone, fault = time.time(), [], "", ""
        try:
            with limited(seconds):
                messages = dict.fromkeys(FEATURES, refusal(model, size, "cls"))
                messages["all"] = messages["cls"] or refusal(model, size, "all")
                lines = [f"  {kind} {messages[kind] or 'given'}" for kind in FEATURES]
                lines += filter(None, (difference(model, size, k, messages[k]) for k in FEATURES))
                try:
                    check_alone(model, size)
                except InputError:
                    alone = "no batch of one"
                if built(model, size):
                    fault = (fails if messages["cls"] else use)(model, size)
                else:
                    alone += " not built"
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        faults += bool(fault)
        print(f"{model} {size} {time.time() - start:.0f} s {alone} {fault and 'FAULT ' + fault}")
        print(*lines, sep="\n", flush=True)
    return faults


def write_smallest() -> None:
    """Counts the parameters of all models, on the meta device; minutes."""
    rows = []
    for module in timm.list_modules():
        sizes = []
        for model in timm.list_models(module=module):
            with torch.device("meta"):
                made = timm.create_model(model)
            sizes.append((sum(value.numel() for value in made.parameters()), model))
        if sizes:
            rows.append((module, *reversed(min(sizes))))
    with open(HERE / "timm_smallest.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("module", "model", "parameters"), *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--slice", default="0/1")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES)
    parser.add_argument("--seconds", type=int, default=300, help="for one model at one size")
    parser.add_argument("--smallest", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smallest:
        write_smallest()
    else:
        first, every = map(int, options.slice.split("/"))
        models = options.models or list(smallest())[first::every]
        sys.exit(survey(models, options.sizes, options.seconds) > 0)
