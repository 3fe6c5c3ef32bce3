"""Tuning, top to bottom: samples, two stages, one optimizer, the best epoch by validation.

Vanilla tuning is the same run on the same samples in the same order with the loss Van alone
(`vitask.recipes.vanilla`). The vision tower, the VLM's connector, the TSM and the head are frozen,
unless the recipe's `trained` says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import accelerate
import numpy as np
import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from kernels import VITaskLosses
from vitask.batches import Batch, make_batches
from vitask.branches import BatchInputs, three_forwards
from vitask.calibration import calibrate
from vitask.card import Task
from vitask.checkpoint import VITask
from vitask.data.spec import Dataset
from vitask.errors import Diverged, InputError
from vitask.exemplar import ExemplarConnector, feature_kind
from vitask.features import Features, Joined
from vitask.objective import Weights, joint_loss, stage_weights
from vitask.prompts import answer, instruction, response
from vitask.recipes import Recipe
from vitask.score import Prediction
from vitask.shared import shared_forward
from vitask.texts import check_texts
from vitask.tsm import TSM
from vitask.validation import OnEpoch, decide, ignore, macro_f1
from vitask.vlm import VLM, Prompt

Scores = dict[str, np.ndarray]  # dataset -> log-probabilities (images, candidates)
FORWARDS = {"shared": shared_forward, "three": three_forwards}  # recipe.step


@dataclass
class TrainingSet:
    """The train splits of all datasets, one after the other.

    instruction, response: int (samples,), indices into `prompts` and `responses`
    image, exemplar:       features (samples, ...); exemplar is None for vanilla tuning. If the
                           vision tower or the VLM's connector is trained, `image` is pixel values
    """

    prompts: list[Prompt]
    responses: list[tuple[int, ...]]
    instruction: np.ndarray
    response: np.ndarray
    image: Joined
    exemplar: Joined | None

    @classmethod
    def of(
        cls,
        vlm: VLM,
        datasets: Mapping[str, Dataset],
        image: Features,
        exemplar: Features | None,
        *,
        form: str = "complete",
    ) -> "TrainingSet":
        texts: dict[str, int] = {}
        instructions, responses = [], []
        for number, dataset in enumerate(datasets.values()):
            for label in dataset.splits["train"].labels:
                text = response(answer(dataset.spec, label))
                responses.append(texts.setdefault(text, len(texts)))
                instructions.append(number)
        return cls(
            prompts=[vlm.prompt(instruction(d.spec, form)) for d in datasets.values()],
            responses=[vlm.response_ids(text) for text in texts],
            instruction=np.array(instructions),
            response=np.array(responses),
            image=Joined([image(name, "train") for name in datasets]),
            exemplar=None
            if exemplar is None
            else Joined([exemplar(name, "train") for name in datasets]),
        )

    def rows(self, batch: Batch, device: torch.device, *, contrastive: bool) -> BatchInputs:
        """The inputs of a batch, on the device; without negatives unless `contrastive`."""
        return BatchInputs(
            prompts=[self.prompts[self.instruction[i]] for i in batch.samples],
            responses=[self.responses[self.response[i]] for i in batch.samples],
            image=self.image[batch.samples].to(device),
            exemplar=None if self.exemplar is None else self.exemplar[batch.samples].to(device),
            negative=torch.from_numpy(batch.negative).to(device) if contrastive else None,
        )


@dataclass
class Log:
    """How a tuning went, with one entry for each epoch.

    losses:     means over the epoch's steps, in nats per response token
    validation: macro-F1 of each dataset's val split and their "mean", without and with exemplar
    without_negative: number of samples without a negative, which CRT leaves out
    chosen:     the epoch, from 1, with the best mean validation; its weights are kept
    """

    losses: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, dict[str, float]]] = field(default_factory=list)
    without_negative: list[int] = field(default_factory=list)
    chosen: int = 0


class TuningStep(nn.Module):
    """BatchInputs -> losses: one module with everything that trains, for accelerate to wrap."""

    def __init__(self, vlm: VLM, connector: ExemplarConnector | None, recipe: Recipe) -> None:
        super().__init__()
        self.language_model = vlm.adapter  # registers the adapters' parameters
        self.connector = connector
        self._vlm, self._recipe = vlm, recipe

    def forward(self, batch: BatchInputs, weights: Weights) -> VITaskLosses:
        if self._recipe.trained != "adapters":
            batch = batch._replace(image=self._vlm.image_tokens(batch.image))
        rows = FORWARDS[self._recipe.step](self._vlm, self.connector, batch, self._recipe.variant)
        return joint_loss(self._vlm, rows, weights, detach_exemplar=self._recipe.detach_exemplar)


def tune(
    vlm: VLM,
    datasets: Mapping[str, Dataset],
    recipe: Recipe,
    seed: int,
    *,
    image: Features,
    tsm: TSM | None = None,
    exemplar: Features | None = None,
    on_epoch: OnEpoch = ignore,
) -> tuple[VITask, Log]:
    """Tune `vlm` in place on the train splits; keep the epoch that is best on the val splits.

    image, exemplar: features of the frozen VLM and of the TSM (with `recipe.exemplar`); where
        `recipe.trained` is more than the adapters, `image` holds `vlm.pixel_values`
    on_epoch: called after every epoch

    ValueError if the recipe needs a TSM and none is given; Diverged as soon as a loss is
    not a finite number.
    """
    if recipe.exemplar and (tsm is None or exemplar is None):
        raise InputError(
            f"recipe {recipe.name!r} tunes with exemplars; expected `tsm` and its features as "
            "`exemplar`"
        )
    accelerate.utils.set_seed(seed)
    ddp = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = accelerate.Accelerator(kwargs_handlers=[ddp])
    model = _untuned(vlm, datasets, recipe, tsm)
    vision = vlm.vision_modules(recipe.trained).requires_grad_(True)
    data = TrainingSet.of(
        vlm, datasets, image, exemplar if recipe.exemplar else None, form=recipe.instruction
    )
    epochs = [
        make_batches(
            data.instruction,
            data.response,
            recipe.batch_size,
            np.random.default_rng([seed, epoch]),
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        for epoch in range(recipe.epochs)
    ]
    step = TuningStep(vlm, model.connector, recipe)
    update = _Update(accelerator, step, vision, recipe, steps=sum(map(len, epochs)))

    log, best, chosen = Log(), _Best(step), dict[str, Scores]()
    for epoch, batches in enumerate(epochs):
        stage = 1 if epoch < recipe.stage1_epochs else 2
        weights = stage_weights(recipe, stage)
        if model.connector is not None:
            model.connector.requires_grad_(stage == 1)  # trained in stage 1 only
        vlm.adapter.train()
        sums: dict[str, float] = dict.fromkeys(VITaskLosses._fields, 0.0)
        for batch in batches:
            losses = update(
                data.rows(batch, accelerator.device, contrastive=weights.crt > 0), weights
            )
            for name, value in zip(VITaskLosses._fields, losses, strict=True):
                sums[name] += float(value.detach())
            if not np.isfinite(sums["total"]):
                raise Diverged(
                    f"the loss is {float(losses.total.detach())} in epoch {epoch + 1}; "
                    "lower the recipe's learning_rate"
                )
        vlm.adapter.eval()
        log.losses.append({name: value / len(batches) for name, value in sums.items()})
        log.without_negative.append(sum(int((b.negative < 0).sum()) for b in batches))
        val = score_val(model, datasets, image, exemplar)
        log.validation.append(macro_f1_by_mode(model, datasets, val))
        if best.offer(float(np.mean([v["mean"] for v in log.validation[-1].values()])), step):
            log.chosen, chosen = epoch + 1, val
        on_epoch("vitask" if recipe.exemplar else "vanilla", epoch + 1, recipe.epochs)
    best.restore(step)
    step.requires_grad_(False)
    _calibrate(model, datasets, chosen)
    return model, log


def _untuned(vlm: VLM, datasets: Mapping[str, Dataset], recipe: Recipe, tsm: TSM | None) -> VITask:
    """The model before its first step: new adapters, and a new connector with `recipe.exemplar`."""
    tasks = {name: Task.of(dataset) for name, dataset in datasets.items()}
    for task in tasks.values():  # before the VLM is changed
        check_texts(vlm, task.spec, task.candidates, recipe.instruction)
    vlm.add_lora(rank=recipe.lora_rank, alpha=recipe.lora_alpha, dropout=recipe.lora_dropout)
    connector = None
    if recipe.exemplar and tsm is not None:
        width = tsm.feature_size(feature_kind(recipe.variant))
        connector = ExemplarConnector(width, vlm.hidden_size).to(vlm.device)
    return VITask(vlm, recipe, tasks, tsm=tsm if recipe.exemplar else None, connector=connector)


class _Update:
    """One optimizer step: AdamW, one warm-up and cosine over both stages, clipped gradients."""

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        step: TuningStep,
        vision: nn.ModuleDict,
        recipe: Recipe,
        *,
        steps: int,
    ) -> None:
        whole = list(vision.parameters())
        apart = {id(p) for p in whole}
        self._trained = [p for p in step.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._trained if id(p) not in apart]}
        ]
        if whole:
            groups.append({"params": whole, "lr": recipe.vision_learning_rate})
        optimizer = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, round(recipe.warmup * steps), steps)
        # Otherwise accelerate steps the schedule once per process; `steps` are of this process.
        accelerator.step_scheduler_with_optimizer = False
        self._accelerator, self._max_norm = accelerator, recipe.max_grad_norm
        self._step, self._optimizer, self._schedule = accelerator.prepare(step, optimizer, schedule)

    def __call__(self, batch: BatchInputs, weights: Weights) -> VITaskLosses:
        losses = self._step(batch, weights)
        self._accelerator.backward(losses.total)
        self._accelerator.clip_grad_norm_(self._trained, self._max_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return losses


class _Best:
    """The trained parameters of the epoch that validates best, the first of equals."""

    def __init__(self, step: TuningStep) -> None:
        self._names = {n for n, p in step.named_parameters() if p.requires_grad}
        self._score = -1.0
        self._state: dict[str, Tensor] = {}

    def offer(self, score: float, step: TuningStep) -> bool:
        if score <= self._score:
            return False
        self._score = score
        self._state = {
            n: p.detach().clone() for n, p in step.named_parameters() if n in self._names
        }
        return True

    def restore(self, step: TuningStep) -> None:
        with torch.no_grad():
            for name, parameter in step.named_parameters():
                if name in self._state:
                    parameter.copy_(self._state[name])


def score_val(
    model: VITask,
    datasets: Mapping[str, Dataset],
    image: Features,
    exemplar: Features | None,
) -> dict[str, Scores]:
    """Log-probabilities of the candidates for the val splits, "without" and "with" exemplar.

    "with" only if the model has a connector.
    """
    if model.connector is None or exemplar is None:
        return {
            "without": {
                name: model.score(name, model.image_inputs(image(name, "val"))) for name in datasets
            }
        }
    found: dict[str, Scores] = {"without": {}, "with": {}}
    for name in datasets:
        tokens = model.image_inputs(image(name, "val"))
        both = model.score_both(name, tokens, exemplar(name, "val"))
        for mode, log_p in zip(found, both, strict=True):
            found[mode][name] = log_p
    return found


def macro_f1_by_mode(
    model: VITask, datasets: Mapping[str, Dataset], val: Mapping[str, Scores]
) -> dict[str, dict[str, float]]:
    """Macro-F1 of the val splits' scores: mode -> dataset, and their "mean"."""
    curves: dict[str, dict[str, float]] = {}
    for mode, scores in val.items():
        curves[mode] = {}
        for name, log_p in scores.items():
            task, labels = model.tasks[name], datasets[name].splits["val"].labels
            predicted = decide(task.spec, log_p, task.candidates)
            curves[mode][name] = macro_f1(task.spec, labels, predicted)
        curves[mode]["mean"] = float(np.mean(list(curves[mode].values())))
    return curves


def _calibrate(model: VITask, datasets: Mapping[str, Dataset], val: Mapping[str, Scores]) -> None:
    """Temperatures and thresholds of the chosen epoch, kept with the model's tasks."""
    for name, dataset in datasets.items():
        task = model.tasks[name]
        found = {
            mode: calibrate(Prediction(name, "candidates", scores[name]), dataset, task.candidates)
            for mode, scores in val.items()
        }
        model.tasks[name] = replace(task, calibration=found)
