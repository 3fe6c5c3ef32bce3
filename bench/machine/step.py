"""A training step and the scoring of all classes: one forward for all branches against three.

A step is forward and backward with LoRA on precomputed image features. An image has 256 tokens
(pocket: 16), the instruction 40, the response 8; every row has an exemplar and a negative.
vanilla: this project's engine with response-only logits and Van alone. naive: three stock
forwards, logits at all positions, losses in eager PyTorch. three_forwards: response-only logits,
fused losses. shared_stage1, shared_stage2: the default, one forward for all branches;
shared_stage2_flex, on CUDA: with FlexAttention instead of SDPA with a dense mask.
Scoring takes 11 classes per image. score_batch1: a stock forward per image and class, logits at
all positions. score_batched: a forward per class, response-only. score_trie: one forward for all
classes.
ratio_to_vanilla is the median over rounds of a variant's time divided by vanilla's in the same
round; tokens counts those that the language model reads.
"""

from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.machine.speed import DTYPES, Clock, figure, interleaved, peak_mib
from bench.machine.tables import Aim, check
from bench.suite import MachineSuite, Measured
from kernels import IGNORE_INDEX, crt_loss, rda_loss, response_loss
from vitask.branches import (
    BatchInputs,
    BranchRows,
    prompt_embeddings,
    response_hidden,
    three_forwards,
)
from vitask.exemplar import ExemplarConnector
from vitask.objective import Weights, joint_loss
from vitask.score import Trie, response_log_probabilities
from vitask.shared import shared_forward
from vitask.untrained import Shape, random_vlm
from vitask.vlm import Prompt

COLUMNS = (
    "device", "dtype", "shape", "batch", "variant", "quantity", "value", "low", "high",
)  # fmt: skip
BEFORE, INSTRUCTION, RESPONSE, CLASSES = 4, 40, 8, 11  # tokens; classes
FEATURES = 192  # of the TSM
STAGE_1, STAGE_2 = Weights(1.0, 0.0), Weights(1.0, 1.0)

SHAPES = {
    "pocket": Shape("qwen2", 128, 384, 4, 4, 2, 1088, image_tokens=16),
    "mid": Shape("qwen2", 512, 1536, 8, 8, 4, 32_000),
    "InternVL2-2B": Shape("llama", 2048, 8192, 24, 16, 8, 92_553),
    "InternVL3-1B": Shape("qwen2", 896, 4864, 24, 14, 2, 151_674),
}
ON = {"cpu": (("pocket", 16), ("mid", 8)), "cuda": (
    ("pocket", 16), ("mid", 8), ("InternVL2-2B", 16), ("InternVL2-2B", 64),
    ("InternVL3-1B", 16), ("InternVL3-1B", 64),
)}  # fmt: skip


def measure(
    device: str, note: Callable[[str], None], trace: Path | None = None
) -> Iterator[Measured]:
    """Measures all variants at all shapes; yields the results so far after each shape.

    trace: file for a profile of the last shape's stage-2 step
    """
    dtype = DTYPES[device]
    rows: list[dict[str, Any]] = []
    notes: dict[str, Any] = {}
    for name, batch in ON[device]:
        note(f"step: {name}, batch {batch}")
        bench = Bench(SHAPES[name], batch, dtype, device)
        same = {"device": device, "dtype": str(dtype).removeprefix("torch."), "shape": name}
        rows += [same | {"batch": batch} | row for row in bench.rows()]
        notes[f"operations of shared_stage2, {name}, batch {batch}"] = bench.profile(trace)
        yield Measured(rows, {}, targets(rows), notes)


class Bench:
    """A model with random weights, a batch, and the variants of its step."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.device, self.batch = device, batch
        self.vlm = random_vlm(shape, dtype, device)
        self.vlm.add_lora(rank=16, alpha=32, dropout=0.0)
        self.connector = ExemplarConnector(FEATURES, shape.hidden).to(device, dtype)
        self.trained = [
            p for p in [*self.vlm.adapter.parameters(), *self.connector.parameters()]
            if p.requires_grad
        ]  # fmt: skip
        prompt = Prompt(before=self._ids(BEFORE), after=self._ids(INSTRUCTION))
        self.inputs = BatchInputs(
            prompts=[prompt] * batch,
            responses=[self._ids(RESPONSE) for _ in range(batch)],
            image=torch.randn(batch, shape.image_tokens, shape.hidden, device=device).to(dtype),
            exemplar=torch.randn(batch, FEATURES, device=device).to(dtype),
            negative=torch.arange(batch, device=device).roll(1),
        )
        self.classes = [self._ids(RESPONSE) for _ in range(CLASSES)]

    def _ids(self, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(len(self.vlm.head), (count,)).tolist())

    # Variants

    def variants(self) -> dict[str, Callable[[], object]]:
        stage_1 = self.inputs._replace(negative=None)
        alone = stage_1._replace(exemplar=None)
        variants = {
            "vanilla": lambda: self._step(three_forwards, alone, STAGE_1),
            "naive": self._naive,
            "three_forwards": lambda: self._step(three_forwards, self.inputs, STAGE_2),
            "shared_stage1": lambda: self._step(shared_forward, stage_1, STAGE_1),
            "shared_stage2": lambda: self._step(shared_forward, self.inputs, STAGE_2),
            "score_batch1": self._score_batch1,
            "score_batched": self._score_batched,
            "score_trie": self._score_trie,
        }
        if self.device == "cuda":
            variants["shared_stage2_flex"] = self._flex
        return variants

    def tokens(self) -> dict[str, int]:
        """How many tokens the language model reads in each variant."""
        image, prompt = self.inputs.image.shape[1] + BEFORE, INSTRUCTION + RESPONSE - 1
        three = 3 * (image + prompt) + 1
        stage_1 = image + 2 * prompt + 1
        nodes = len(Trie(self.classes).token) - 1
        per_image = {
            "vanilla": image + prompt,
            "naive": three + 3,  # stock code reads the whole response
            "three_forwards": three,
            "shared_stage1": stage_1,
            "shared_stage2": stage_1 + RESPONSE - 1,
            "shared_stage2_flex": stage_1 + RESPONSE - 1,
            "score_batch1": CLASSES * (image + prompt + 1),
            "score_batched": CLASSES * (image + prompt),
            "score_trie": image + INSTRUCTION + nodes,
        }
        return {name: count * self.batch for name, count in per_image.items()}

    def _step(
        self, forward: Callable[..., BranchRows], inputs: BatchInputs, weights: Weights
    ) -> None:
        rows = forward(self.vlm, self.connector, inputs, "cls")
        self._backward(joint_loss(self.vlm, rows, weights, detach_exemplar=True).total)

    def _flex(self) -> None:
        config = self.vlm.model.config.text_config
        config._attn_implementation = "flex_attention"
        self._step(shared_forward, self.inputs, STAGE_2)
        config._attn_implementation = "sdpa"

    def _backward(self, loss: Tensor) -> None:
        loss.backward()
        for parameter in self.trained:
            parameter.grad = None

    def _naive(self) -> None:
        """The plain way: three calls of the model, losses over all positions."""
        inputs, image = self.inputs, self.inputs.image
        exemplar = torch.cat([image, self.connector(inputs.exemplar)], dim=1)
        base, labels = self._stock(image)
        with_exemplar, exemplar_labels = self._stock(exemplar)
        negative, _ = self._stock(image[inputs.negative])
        keep = labels != IGNORE_INDEX
        teacher = with_exemplar[exemplar_labels != IGNORE_INDEX]
        loss = response_loss(base, labels) + response_loss(with_exemplar, exemplar_labels)
        loss = loss + rda_loss(base[keep], teacher, labels[keep])
        self._backward(loss + crt_loss(base, negative, labels))

    def _stock(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all positions (rows, vocab) in float32, and labels shifted by one."""
        inputs = self.inputs
        embeddings, lengths = prompt_embeddings(self.vlm, inputs.prompts, tokens, inputs.responses)
        logits = self.vlm.model(inputs_embeds=embeddings, use_cache=False).logits[:, :-1].float()
        labels = torch.full(logits.shape[:2], IGNORE_INDEX, device=logits.device)
        for row, (length, response) in enumerate(zip(lengths, inputs.responses, strict=True)):
            labels[row, length - 1 :] = torch.tensor(response)
        return logits.flatten(0, 1), labels.flatten()

    @torch.inference_mode()
    def _score_batch1(self) -> None:
        prompt, image = self.inputs.prompts[0], self.inputs.image
        for number in range(self.batch):
            for response in self.classes:
                embeddings, (length,) = prompt_embeddings(
                    self.vlm, [prompt], image[number : number + 1], [response]
                )
                logits = self.vlm.model(inputs_embeds=embeddings, use_cache=False).logits.float()
                log_p = logits[0, length - 1 : -1].log_softmax(-1)
                log_p[torch.arange(RESPONSE), list(response)].sum()

    @torch.inference_mode()
    def _score_batched(self) -> None:
        prompts = self.inputs.prompts
        for response in self.classes:
            hidden, labels, owner = response_hidden(
                self.vlm, prompts, self.inputs.image, [response] * self.batch
            )
            log_p = self.vlm.logits(hidden).log_softmax(-1).gather(1, labels[:, None])[:, 0]
            torch.zeros(self.batch, device=log_p.device).index_add_(0, owner, log_p)

    def _score_trie(self) -> None:
        response_log_probabilities(
            self.vlm, self.inputs.prompts[0], self.inputs.image, self.classes
        )

    # Figures

    def rows(self) -> Iterator[dict[str, Any]]:
        """Milliseconds, ratio to vanilla, tokens and peak memory of every variant."""
        variants, clock = self.variants(), Clock(self.device)
        calls = {name: partial(clock, step) for name, step in variants.items()}
        rounds = interleaved(calls, budget_seconds=60)
        times = {name: np.array(passes)[:, 0] for name, passes in rounds.items()}
        tokens = self.tokens()
        for name, values in times.items():
            for quantity, found in (
                ("milliseconds", values),
                ("ratio_to_vanilla", values / times["vanilla"]),
                ("tokens", tokens[name]),
                ("peak_mib", peak_mib(variants[name], self.device)),
            ):
                yield {"variant": name} | figure(quantity, found)

    def profile(self, trace: Path | None = None) -> list[str]:
        """The longest operations of a stage-2 step, each without those it calls. trace: file."""
        cuda = self.device == "cuda"
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
        step = self.variants()["shared_stage2"]
        with profile(activities=activities) as profiler:
            step()
        if trace is not None:
            profiler.export_chrome_trace(str(trace))
        self_time = attrgetter("self_device_time_total" if cuda else "self_cpu_time_total")
        events = sorted(profiler.key_averages(), key=self_time, reverse=True)
        whole = sum(map(self_time, events))
        return [f"{event.key} {self_time(event) / whole:.0%}" for event in events[:8]]


def targets(rows: list[dict[str, Any]]) -> list[tuple[str, str, bool | None]]:
    """Aims with their results."""
    ours, scoring = "shared_stage2", "score_trie"
    mid, pocket = ({"shape": name, "device": "cpu"} for name in ("mid", "pocket"))
    aims = [
        Aim("mid, CPU: stage 2 at most 1.3 × vanilla", ours, ("vanilla",), 1.3, mid, most=True),
        Aim("mid, CPU: 4 × faster than naive", ours, ("naive",), 4.0, mid),
        Aim("mid, CPU: 2.4 × faster than three forwards", ours, ("three_forwards",), 2.4, mid),
        Aim("mid, CPU: scoring 14 × batch 1", scoring, ("score_batch1",), 14.0, mid),
        Aim("mid, CPU: scoring 7 × batched", scoring, ("score_batched",), 7.0, mid),
        Aim("pocket: about 1.2 × three forwards", ours, ("three_forwards",), 1.2, pocket),
    ]
    for name, aim in (("InternVL2-2B", 2.6), ("InternVL3-1B", 3.2)):
        gpu = {"shape": name, "device": "cuda"}
        aims.append(Aim(f"{name}, GPU: {aim} × faster than naive", ours, ("naive",), aim, gpu))
        text = f"{name}, GPU: 0.25 of naive's peak memory"
        aims.append(Aim(text, ours, ("naive",), 0.25, gpu, "peak_mib", most=True))
    return check(aims, rows, "variant", "batch")


SUITE = MachineSuite(COLUMNS, __doc__ or "", measure)
