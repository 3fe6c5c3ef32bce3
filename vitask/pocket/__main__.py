"""`python -m vitask.pocket`: make the pocket VLM again, from a seed and nothing else."""

import argparse
import hashlib
import json
import time
from pathlib import Path

from vitask.pocket import POCKET, SEED, STEPS


def main() -> None:
    """Train, evaluate on held-out pictures, write a transformers folder."""
    parser = argparse.ArgumentParser(prog="python -m vitask.pocket", description=__doc__)
    parser.add_argument("--out", type=Path, default=POCKET, help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="stop after so many steps")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--no-evaluation", action="store_true", help="leave the held-out pictures out"
    )
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}; expected at least 1")

    import torch
    import transformers

    from vitask.pocket.evaluate import accuracy, chance
    from vitask.pocket.model import make_model
    from vitask.pocket.tokenizer import make_processor
    from vitask.pocket.train import pretrain
    from vitask.vlm import VLM

    processor = make_processor()
    vlm = VLM(make_model(processor, arguments.seed), processor, "pocket")
    start = time.perf_counter()
    losses = []
    for loss in pretrain(vlm, arguments.steps, arguments.seed, schedule_steps=STEPS):
        losses.append(loss)
        if len(losses) % 50 == 0:
            mean, seconds = sum(losses[-50:]) / 50, time.perf_counter() - start
            print(f"step {len(losses)} of {arguments.steps}: loss {mean:.3f}, {seconds:.0f} s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    vlm.model.save_pretrained(arguments.out)
    processor.save_pretrained(arguments.out)
    weights = arguments.out / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    print(f"{weights}: sha256 {digest}")
    if arguments.no_evaluation:
        return
    count, seed = 2000, 1
    card = {
        "how": "greedy generation, exact match of the whole answer, canonical wording",
        "pictures": count,
        "accuracy": accuracy(vlm, count, seed),
        "accuracy_images_shuffled": accuracy(vlm, count, seed, shuffled=True),
        "chance": chance(count, seed),
        "parameters": sum(p.numel() for p in vlm.model.parameters()),
        "steps": arguments.steps,
        "seed": arguments.seed,
        "seconds": round(time.perf_counter() - start),
        "threads": torch.get_num_threads(),
        "sha256": digest,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (arguments.out / "heldout.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
