"""The optimizer of a stage, for the strategies that keep whole parameters or shards of them: one step over all groups, state by name.

Every group has one rule (train.optimizer): torch's AdamW, SGD with momentum, Adafactor, LARS, or Muon for matrices with AdamW for the
rest. A parameter's state is told by kind, under torch's own names, so checkpoints know neither the strategy nor the number of optimizers.
Ranks that hold all weights alike may share Muon's matrices (train.matrix_shares): of those that another rank steps this one has no state.
Beside it may stand the running average of the weights (`ema`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from terrace.models.tensor_files import Stretch
from terrace.models.weights import TensorSource, stretches_of
from terrace.recipe.schema import Stage
from terrace.train.lars import Lars
from terrace.train.matrix_shares import MatrixShares
from terrace.train.muon import Muon
from terrace.train.optimizer import ParameterGroup, Rate, Rule

Kind = Literal["weights", "exp_avg", "exp_avg_sq", "momentum_buffer", "row_var", "col_var", "variance", "average"]
OPTIMIZER_KINDS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq", "momentum_buffer", "row_var", "col_var", "variance")
MUON_RMS = "match_rms_adamw"  # its updates are scaled to the size of AdamW's, so that one learning rate serves both
Part = Callable[[Any], tuple[int, torch.Tensor]]  # of a (sharded) tensor: its first number here and this rank's numbers, flat


def kinds_of(rule: Rule, stage: Stage, dimensions: int) -> tuple[Kind, ...]:
    """The kinds of state that a parameter of so many dimensions has."""
    if rule == "adamw":
        return ("exp_avg", "exp_avg_sq")
    if rule == "adafactor":
        return ("row_var", "col_var") if dimensions > 1 else ("variance",)
    return ("momentum_buffer",) if rule == "muon" or stage.optimizer.momentum else ()


def torch_groups(groups: list[ParameterGroup], parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups as a torch optimizer takes them; their learning rates and decays are set before every step."""
    return [
        {"params": [parameters[name] for name in group.names], "lr": 0.0, "weight_decay": group.weight_decay}
        for group in groups
    ]


def set_rates(groups: Sequence[dict[str, Any]], rates: Sequence[Rate]) -> None:
    """Give each group of a torch optimizer its learning rate and weight decay."""
    for group, (rate, decay) in zip(groups, rates, strict=True):
        group["lr"], group["weight_decay"] = rate, decay


def torch_optimizer(rule: Rule, stage: Stage, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's optimizer of a rule."""
    options = stage.optimizer
    if rule == "adamw":
        return torch.optim.AdamW(groups, fused=True, betas=tuple(options.betas), eps=options.eps)
    if rule == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=options.momentum, nesterov=options.nesterov)
    if rule == "lars":
        return Lars(groups, options.momentum, options.trust)
    if rule == "adafactor":
        return torch.optim.Adafactor(groups, lr=0.0)
    return Muon(groups, lr=0.0, momentum=options.momentum or 0.95, nesterov=True, adjust_lr_fn=MUON_RMS)


def fill_parts(targets: Mapping[str, Any], source: TensorSource, part: Part) -> None:
    """This rank's part of every named tensor, from a source."""
    places = {name: part(tensor) for name, tensor in targets.items()}
    wanted = [Stretch(name, start, start + values.numel()) for name, (start, values) in places.items()]
    with torch.no_grad():
        for (_, values), found in zip(places.values(), stretches_of(source, wanted), strict=True):
            values.copy_(found)


class Optimizers:
    """The torch optimizers of a stage's groups, their state and the average of the weights."""

    def __init__(
        self, stage: Stage, groups: list[ParameterGroup], parameters: Mapping[str, Any], part: Part, shares: MatrixShares | None = None
    ) -> None:
        self._stage, self._parameters, self._part = stage, parameters, part
        self._rules = {name: group.rule for group in groups for name in group.names}
        self._shares = shares or MatrixShares(0, {})
        own = [replace(group, names=tuple(name for name in group.names if not self._shares.elsewhere(name))) for group in groups]
        made = torch_groups(own, parameters)
        self._groups: list[dict[str, Any]] = [{} for _ in groups]
        self._optimizers: dict[Rule, torch.optim.Optimizer] = {}
        for rule in dict.fromkeys(group.rule for group in groups):
            places = [place for place, group in enumerate(groups) if group.rule == rule]
            optimizer = self._optimizers[rule] = torch_optimizer(rule, stage, [made[place] for place in places])
            for place, group in zip(places, optimizer.param_groups, strict=True):
                self._groups[place] = group
        self._steps = dict.fromkeys(self._rules, 0)  # of rules whose state does not count them
        self._decay = stage.ema.decay if stage.ema is not None else None
        self._averages: dict[str, torch.Tensor] = {}
        self.restart_average()

    def step(self, rates: Sequence[Rate]) -> None:
        """One step; gradients are gone afterwards."""
        set_rates(self._groups, rates)
        for optimizer in self._optimizers.values():
            optimizer.step()
        for name in self._steps:
            self._steps[name] += self._parameters[name].grad is not None
        self.zero()
        self._shares.exchange(self._parameters)
        with torch.no_grad():
            for name, average in self._averages.items():
                average.lerp_(self._parameters[name].detach(), 1 - float(self._decay or 0.0))

    def zero(self) -> None:
        for name in self._rules:
            self._parameters[name].grad = None

    def tensors(self, kind: Kind) -> Iterator[tuple[str, Any]]:
        """(name, this rank's tensor) of the parameters that have state of the kind."""
        if kind == "average":
            yield from self._averages.items()
            return
        for name in self._rules:
            value = self._state(name).get(kind)
            if value is not None:
                yield name, value

    def steps(self) -> dict[str, int]:
        """Steps made, per parameter that made any."""
        counted = {name: self._count(name) for name in self._rules}
        return {name: count for name, count in counted.items() if count}

    def kinds(self, name: str) -> tuple[Kind, ...]:
        return kinds_of(self._rules[name], self._stage, self._parameters[name].dim())

    def load(self, source: Callable[[Kind], TensorSource], steps: dict[str, int]) -> None:
        """Replace the state of the parameters in `steps`; of each tensor only this rank's part is read."""
        states: dict[str, dict[str, Any]] = {}
        for name, count in steps.items():
            parameter, rule = self._parameters[name], self._rules[name]
            self._steps[name] = count
            if self._shares.elsewhere(name):
                continue
            state = states[name] = {}
            if rule == "adamw":
                state["step"] = torch.tensor(float(count), dtype=torch.float32, device=parameter.device)
            elif rule == "adafactor":
                state["step"] = torch.tensor(float(count), dtype=torch.float32)
            for kind in self.kinds(name):
                if rule == "adafactor" and kind != "variance":
                    state[kind] = source(kind)(name).to(parameter.device, torch.float32).clone()
                else:
                    state[kind] = torch.zeros_like(parameter.detach())
        for kind in OPTIMIZER_KINDS:
            wanted = {name: state[kind] for name, state in states.items() if kind in state and kind not in ("row_var", "col_var")}
            fill_parts(wanted, source(kind), self._part)
        for name, state in states.items():
            self._optimizers[self._rules[name]].state[self._parameters[name]] = state

    def restart_average(self) -> None:
        """The average begins at the weights as they are."""
        if self._decay is not None:
            self._averages = {name: self._parameters[name].detach().clone() for name in self._rules}

    def load_average(self, source: TensorSource) -> None:
        fill_parts(self._averages, source, self._part)

    def _state(self, name: str) -> dict[str, Any]:
        return self._optimizers[self._rules[name]].state.get(self._parameters[name]) or {}

    def _count(self, name: str) -> int:
        state = self._state(name)
        return int(state["step"]) if "step" in state else self._steps[name]
