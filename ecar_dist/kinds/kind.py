"""What the program knows of one `model.kind`: its rules, its size and cost, and how it is built, trained and sampled.

`ecar-dist check` and `plan` use this room without torch, so no module here imports torch at its top. The methods that
build, train and sample import the rooms above inside the function: this room is where the parts are put together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from ecar_dist.flow.guidance import stage_guidance_scales
from ecar_dist.kinds.activations import Activations
from ecar_dist.kinds.flops import guidance_passes, velocity_calls, velocity_evaluations
from ecar_dist.kinds.parameters import ParameterCount

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ecar_dist.config.run import RunConfig
    from ecar_dist.sample.sampling_plan import SamplingPlan
    from ecar_dist.train.objective import Normalise, Objective


class Kind(ABC):
    """One value of `model.kind`; an instance is an entry of kinds/table.py.

    title: what a model card calls the model.
    parts: names of the two networks that `parameters` counts; "" for a part that the kind does not have.
    one_stage: True for a model of the full resolution alone; `flow.num_stages` must then be 1.
    feeds_states: True where the states of coarser stages are fed back to the network, with noise of std tau.
    averages: True where the network can learn average velocities (`flow.objective=mean_velocity`).
    compilable: True where sampling calls the network with few shapes of input (`ecar-dist sample --compile`).
    """

    title: str
    parts: tuple[str, str]
    one_stage: bool = False
    feeds_states: bool = False
    averages: bool = False
    compilable: bool = False

    def check(self, config: RunConfig) -> None:
        """Raises ValueError where the configuration does not suit this kind."""
        name = config.model.kind
        num_stages = config.flow.num_stages
        if self.one_stage and num_stages != 1:
            raise ValueError(f"model.kind={name} has one stage, got flow.num_stages={num_stages}; set it to 1")
        if config.flow.learns_mean_velocity and not self.averages:
            raise ValueError(
                f"model.kind={name} cannot learn average velocities; set flow.objective=velocity, or take "
                "model.kind=ecar, pyramid or dit"
            )

    # Size and cost, in closed form.

    @abstractmethod
    def parameters(self, config: RunConfig) -> ParameterCount:
        """Parameters of the model, equal to those of the module that `build_model` returns."""

    @abstractmethod
    def training_macs(self, config: RunConfig) -> int:
        """Multiply-adds of forward and backward for one image."""

    @abstractmethod
    def activations(self, config: RunConfig, precision: str) -> Activations:
        """What one image keeps for the backward pass; `precision` is "fp32" or "bf16"."""

    @abstractmethod
    def sampling_macs(self, config: RunConfig) -> int:
        """Multiply-adds to sample one image with the solver and the guidance of `config.sample`."""

    @abstractmethod
    def describe_calls(self, config: RunConfig) -> str:
        """How often sampling calls the network, as `ecar-dist plan` prints it."""

    # The parts themselves. Import them inside the method.

    @abstractmethod
    def build_model(self, config: RunConfig) -> nn.Module:
        """The network, on torch's default device, with weights drawn from torch's global generator."""

    @abstractmethod
    def objective(self, model: nn.Module, normalise: Normalise, config: RunConfig, precision: str) -> Objective:
        """The training loss around `model`; `precision` is "fp32" or "bf16"."""

    @abstractmethod
    def draw(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        """Sample: X^e_k of every stage, K of [B, C, h_k, w_k]. Labels and sample indices are int64 [B]."""

    @abstractmethod
    def velocities(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        """The network's output at inputs fixed by index and seed, K of [B, C, h_k, w_k]; verifies an export."""


class StagedKind(Kind):
    """A kind with a network of the `StagedModel` protocol (models/staged.py), which has a velocity in each stage."""

    compilable = True

    def stage_passes(self, config: RunConfig) -> list[int]:
        """Velocities that each stage evaluates for one guided velocity: 1 or 2."""
        return [guidance_passes(scale) for scale in self._scales(config)]

    def stage_evaluations(self, config: RunConfig) -> list[int]:
        """Velocities that each stage evaluates for one image, over all calls of the solver."""
        return [velocity_evaluations(config, stage, scale) for stage, scale in enumerate(self._scales(config))]

    def _scales(self, config: RunConfig) -> tuple[float, ...]:
        sample = config.sample
        return stage_guidance_scales(sample.guidance_scale, config.flow.num_stages, sample.guidance_ramp)

    def describe_calls(self, config: RunConfig) -> str:
        calls = velocity_calls(config)
        if len(set(calls)) > 1:
            return f"{', '.join(map(str, calls))} velocity calls in stages 0 to {len(calls) - 1}"
        where = f"in each of {len(calls)} stages" if len(calls) > 1 else "in one stage"
        return f"{calls[0]} velocity calls {where}"

    def objective(self, model: nn.Module, normalise: Normalise, config: RunConfig, precision: str) -> Objective:
        from ecar_dist.train.objective import FlowObjective, MeanVelocityObjective

        if config.flow.learns_mean_velocity:
            return MeanVelocityObjective(model, normalise, config, precision)
        return FlowObjective(model, normalise, config, precision)

    def draw(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        from ecar_dist.sample.staged import draw_stages

        return draw_stages(model, plan, labels, indices, seed)

    def velocities(
        self, model: Any, plan: SamplingPlan, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> list[torch.Tensor]:
        from ecar_dist.sample.staged import stage_velocities

        return stage_velocities(model, plan, labels, indices, seed)
