"""Counts the parameters that a method trains, and those that an answer needs."""

from torch import nn

from vitask.checkpoint import VITask


def parameters(model: VITask | None, tsm: nn.Module, *, exemplar: bool) -> dict[str, float]:
    """Numbers of trained and of needed parameters. model: None for the TSM alone."""
    small = _count(tsm)
    if model is None:
        return {"parameters_trained": float(small), "parameters_total": float(small)}
    adapter = model.vlm.adapter
    lora = sum(p.numel() for name, p in adapter.named_parameters() if "lora_" in name)
    with_tsm = 0 if model.connector is None else _count(model.connector) + small
    return {
        "parameters_trained": float(lora + with_tsm),
        "parameters_total": float(_count(adapter) + (with_tsm if exemplar else 0)),
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
