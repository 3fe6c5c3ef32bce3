"""Check that images reach the model, before anything is trained or scored."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from vitask.checkpoint import VITask
from vitask.data.spec import Dataset
from vitask.errors import InputError
from vitask.features import Features

IMAGES = 16  # of each dataset's val split
REQUIRED = 100.0  # times the batch noise


def check_image_sensitivity(
    model: VITask, datasets: Mapping[str, Dataset], image: Features
) -> dict[str, float]:
    """How far shuffled images move the candidates' log-probabilities, in units of batch noise.

    image: features of the frozen VLM

    Batch noise is the largest difference between scoring one by one and in one batch, and at
    least the float32 rounding of the scores. Returns the ratio for each dataset. InputError
    below 100: then the images do not reach the answers, and every later number is meaningless; and
    for fewer than two images, which cannot be shuffled.
    """
    single = VITask(model.vlm, replace(model.recipe, score_batch_size=1), model.tasks)
    batched = VITask(model.vlm, replace(model.recipe, score_batch_size=IMAGES), model.tasks)
    ratios = {}
    for name in datasets:
        tokens = image(name, "val")[:IMAGES]
        if len(tokens) < 2:
            raise InputError(
                f"{name}: {len(tokens)} validation image; the check that images reach the answers "
                "compares two or more: give more images, or a larger --limit"
            )
        scores = batched.score(name, tokens)
        rounding = np.abs(scores).max() * np.finfo(np.float32).eps
        noise = max(np.abs(single.score(name, tokens) - scores).max(), rounding)
        moved = np.abs(batched.score(name, tokens.roll(1, dims=0)) - scores).max()
        ratios[name] = float(moved / noise)
    for name, ratio in ratios.items():
        if ratio < REQUIRED:
            raise InputError(
                f"self-check failed on {name}: shuffled images move the log-probabilities of the "
                f"candidates by {ratio:.1f} times the batch noise, expected at least "
                f"{REQUIRED:.0f}; the images do not reach the model, so nothing was run: check "
                "the image token, the normalisation and the checkpoint"
            )
    return ratios
