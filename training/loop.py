"""A training loop that can be killed at any moment and goes on with the same loss curve."""

import csv
import json
import math
import os
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one network is trained.

    Attributes:
        steps: number of optimiser steps.
        batch: images per step.
        lr: peak learning rate of AdamW (no weight decay): linear warm-up, then cosine decay to a tenth.
        warmup: steps of the linear warm-up.
        decay_steps: length of the cosine decay; a training shorter than it ends at a higher rate, a longer one repeats
            the schedule, warm-up included (restarts as Loshchilov & Hutter 2017's). 0: `steps`.
        beta2: decay of AdamW's second moments.
        ema: decay of the exponential moving average of the weights; 0 keeps the last weights.
        seed: seed of the weights, and with the step number, of every batch and its noise.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    decay_steps: int = 0
    beta2: float = 0.999
    ema: float = 0.0
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Learning rate of zero-based `step`."""
        length = self.decay_steps or self.steps
        since_start = step % length
        ramp = min(1.0, (since_start + 1) / self.warmup)
        return self.lr * ramp * (0.55 + 0.45 * math.cos(math.pi * since_start / length))


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a recipe's file, which may say only how it differs from its `base`, a whole one beside it."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    return (
        _changed(tomllib.loads(path.with_name(raw["base"]).read_text(encoding="utf-8")), raw) if "base" in raw else raw
    )


def _changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values that `changes` names, table by table."""
    return base | {
        key: _changed(base[key], value) if isinstance(value, dict) and key in base else value
        for key, value in changes.items()
    }


def device() -> torch.device:
    """Where the models are trained: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    model: nn.Module,
    loss_of_step: Callable[[torch.Generator], Tensor],
    schedule: Schedule,
    folder: Path,
    *,
    save_every: int = 500,
    snapshots: tuple[int, ...] = (),
    rates: Mapping[str, float] = MappingProxyType({}),
) -> nn.Module:
    """Train `model` and return it with its averaged weights.

    `rates`: for parts of the model, by name, what their learning rate is of that of the rest.

    The batch and the noise of step s come from a generator seeded by (seed, s) alone, so a resumed run sees what an
    uninterrupted one would (bitwise equal weights on the same device with as many threads). `folder` receives
    `checkpoint.safetensors` (weights, average, optimiser state, step; always replaced as a whole), `loss.csv`, after
    each step in `snapshots` `step-N.safetensors` with the average, and in the end `training.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = _groups(model, rates)
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, schedule.beta2), weight_decay=0.0)
    checkpoint = folder / "checkpoint.safetensors"
    done = _restore(checkpoint, model, average, optimizer) if checkpoint.exists() else 0
    log = folder / "loss.csv"
    logged = _truncate_log(log, done)
    model.train()
    rows: list[tuple[int, float, float]] = []
    started = time.perf_counter() - (float(logged[-1].split(",")[2]) if logged else 0.0)
    for step in range(done, schedule.steps):
        generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step) * group["rate"]
        loss = loss_of_step(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # a young average follows the weights (Karras et al. 2022 ramp up likewise), so early snapshots are usable
        decay = min(schedule.ema, (step + 1) / (step + 10)) if schedule.ema else 0.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name].lerp_(parameter, 1 - decay)
        rows.append((step + 1, loss.item(), time.perf_counter() - started))
        if step + 1 in snapshots:
            _save_atomically(average, folder / f"step-{step + 1}.safetensors")
        if (step + 1) % save_every == 0 or step + 1 == schedule.steps:
            with log.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows((s, f"{value:.6f}", f"{t:.1f}") for s, value, t in rows)
            mean = sum(value for _, value, _ in rows) / len(rows)
            print(f"{folder.name}: step {step + 1}/{schedule.steps}  loss {mean:.5f}  {rows[-1][2]:.0f} s", flush=True)
            rows.clear()
            _save_atomically(_state(model, average, optimizer, step + 1), checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(average[name])
    _write_record(model, schedule, folder)
    return model.eval()


def _groups(model: nn.Module, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """The optimiser's groups: the parameters in their order, apart where the rate changes."""
    groups: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        rate = next((factor for part, factor in rates.items() if name.startswith(f"{part}.")), 1.0)
        if not groups or groups[-1]["rate"] != rate:
            groups.append({"params": [], "rate": rate})
        groups[-1]["params"].append(parameter)
    return groups


def _state(
    model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int
) -> dict[str, Tensor]:
    state = {"step": torch.tensor(step)}
    state |= {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"average.{name}": tensor for name, tensor in average.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    return state


def _restore(path: Path, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    state = load_file(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    for name in average:
        average[name].copy_(state[f"average.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(state["step"])


def _save_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    partial = path.with_suffix(".partial")
    # copies, since safetensors refuses tensors that share memory (T5's embedding has two names)
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, partial)
    os.replace(partial, path)


def _truncate_log(path: Path, done: int) -> list[str]:
    """Drop the rows of the loss log past the checkpoint that the run goes on from, and return the others."""
    kept = path.read_text(encoding="utf-8").splitlines()[1 : done + 1] if path.exists() else []
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(["step,loss,seconds", *kept]) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return kept


def _write_record(model: nn.Module, schedule: Schedule, folder: Path) -> None:
    """Say in `training.json` what the finished training took; a later call does not overwrite it."""
    record = folder / "training.json"
    if record.exists():
        return
    with (folder / "loss.csv").open(encoding="utf-8") as file:
        rows = [(float(row["loss"]), float(row["seconds"])) for row in csv.DictReader(file)]
    last = [loss for loss, _ in rows[-100:]]
    place = next(model.parameters()).device
    facts = {
        "steps": schedule.steps,
        "batch": schedule.batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(rows[-1][1]),
        "mean_loss_of_last_100_steps": round(sum(last) / len(last), 6),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    record.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
