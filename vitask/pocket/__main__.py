"""`python -m vitask.pocket`: make the pocket VLM again, from a seed alone."""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitask.guard import refuse_hub_kernels
from vitask.pocket import POCKET, SEED

if TYPE_CHECKING:
    from vitask.vlm import VLM

HELD_OUT = (2000, 1)  # pictures, seed


def main() -> None:
    """Train, write a folder of transformers, and record the accuracy on held-out pictures."""
    parser = argparse.ArgumentParser(prog="python -m vitask.pocket", description=__doc__)
    parser.add_argument("--out", type=Path, default=POCKET, help="folder to write")
    parser.add_argument("--steps", type=int, default=None, help="stop after this number of steps")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--no-evaluation", action="store_true", help="only train")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the model in --out")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}; expected at least 1")
    refuse_hub_kernels()

    from vitask.vlm import VLM

    if arguments.evaluate:
        vlm = VLM.load(str(arguments.out))
        made = json.loads((arguments.out / "heldout.json").read_text("utf-8"))["made"]
    else:
        vlm, made = train(arguments.steps, arguments.seed)
        arguments.out.mkdir(parents=True, exist_ok=True)
        vlm.model.save_pretrained(arguments.out)
        vlm.processor.save_pretrained(arguments.out)
    weights = arguments.out / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    print(f"{weights}: sha256 {digest}")
    if arguments.no_evaluation:
        return
    card = held_out_card(vlm) | {"sha256": digest, "made": made}
    (arguments.out / "heldout.json").write_text(json.dumps(card, indent=1) + "\n", "utf-8")
    print(json.dumps(card, indent=1))


def train(steps: int | None, seed: int) -> "tuple[VLM, dict[str, Any]]":
    """A new model, and the settings and versions that made it."""
    import torch
    import transformers

    from vitask.pocket.model import make_model
    from vitask.pocket.tokenizer import make_processor
    from vitask.pocket.train import STEPS, pretrain
    from vitask.vlm import VLM

    steps = STEPS if steps is None else steps
    processor = make_processor()
    vlm = VLM(make_model(processor, seed), processor, "pocket")
    start, recent = time.perf_counter(), []
    for step, loss in enumerate(pretrain(vlm, steps, seed), start=1):
        recent.append(loss)
        if step % 50 == 0:
            mean, seconds = sum(recent) / len(recent), time.perf_counter() - start
            print(f"step {step} of {steps}: loss {mean:.3f}, {seconds:.0f} s", flush=True)
            recent.clear()
    return vlm, {
        "steps": steps,
        "seed": seed,
        "seconds": round(time.perf_counter() - start),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def held_out_card(vlm: "VLM") -> dict[str, Any]:
    """Accuracy by kind of question, with the right and with another picture, and by chance."""
    from vitask.pocket.evaluate import accuracy, chance

    right, wrong = accuracy(vlm, *HELD_OUT), accuracy(vlm, *HELD_OUT, shuffled=True)
    return {
        "how": "greedy generation, exact match of the whole answer, canonical wording",
        "pictures": HELD_OUT[0],
        "mean_accuracy": sum(right.values()) / len(right),
        "accuracy": right,
        "accuracy_images_shuffled": wrong,
        "chance": chance(*HELD_OUT),
        "parameters": sum(p.numel() for p in vlm.model.parameters()),
    }


if __name__ == "__main__":
    main()
