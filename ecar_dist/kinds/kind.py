"""What the program knows about one `model.kind`: its rules, size and cost, and how it is built, trained and sampled.

`ecar-dist check` and `plan` use this package without torch, so no module here imports torch at the top. The methods
that build, train and sample import the higher packages inside the function: this package puts the parts together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ecar_dist.flow.guidance import stage_guidance_scales
from ecar_dist.kinds.activations import Activations
from ecar_dist.kinds.flops import guidance_passes, velocity_calls, velocity_evaluations
from ecar_dist.kinds.parameters import ParameterCount
from ecar_dist.kinds.presets import preset_of

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
    one_stage: True for a model with only the full resolution; `flow.num_stages` must then be 1.
    feeds_states: True where the states of coarser stages are fed back to the network, with noise of std tau.
    averages: True where a sample has one time in each stage, so that the network can learn average velocities
        (`flow.objective=mean_velocity`) and the times may follow a different distribution (`flow.times`).
    merges: True where tokens can be merged while sampling (`sample.merge_ratio`).
    needs_codebook: True where tokens are codes of a codebook stored next to the latents.
    compilable: True where sampling calls the network with few input shapes (`ecar-dist sample --compile`).
    widens: True where the network follows muP (`optim.mup`).
    """

    title: str
    parts: tuple[str, str]
    one_stage: bool = False
    feeds_states: bool = False
    averages: bool = False
    merges: bool = False
    needs_codebook: bool = False
    compilable: bool = False
    widens: bool = False

    def check(self, config: RunConfig) -> None:
        """Raises ValueError if the configuration does not suit this kind."""
        # What is trained.
        name = config.model.kind
        num_stages = config.flow.num_stages
        if self.one_stage and num_stages != 1:
            raise ValueError(f"model.kind={name} has one stage, got flow.num_stages={num_stages}; set it to 1")
        if self.needs_codebook and config.data.images is not None:
            raise ValueError(
                f"model.kind={name} needs the codebook of a set of latents, but the data are images; encode them and "
                "set data.latents"
            )
        if config.flow.learns_mean_velocity and not self.averages:
            raise ValueError(
                f"model.kind={name} cannot learn average velocities; set flow.objective=velocity, or use "
                "model.kind=ecar, pyramid or dit"
            )
        if config.flow.times != "uniform" and not self.averages:
            raise ValueError(
                f"model.kind={name} has uniform times, got flow.times={config.flow.times}; set flow.times=uniform, "
                "or use model.kind=ecar, pyramid or dit"
            )
        if config.optim.mup and not self.widens:
            raise ValueError(
                f"model.kind={name} does not follow muP; set optim.mup=false, or use model.kind=ecar, pyramid or dit"
            )
        preset_of(config)  # checks model.width

        # What is sampled.
        ratio = config.sample.merge_ratio
        if ratio and not self.merges:
            raise ValueError(f"model.kind={name} cannot merge tokens, got sample.merge_ratio={ratio:g}; set it to 0")
        if ratio and config.sample.guidance_scale in (0.0, 1.0):
            raise ValueError(
                f"sample.merge_ratio={ratio:g} needs guidance to rank tokens, got sample.guidance_scale="
                f"{config.sample.guidance_scale:g}; set sample.merge_ratio to 0, or use guidance"
            )

    # Size and cost, in closed form.

    @abstractmethod
    def parameters(self, config: RunConfig) -> ParameterCount:
        """Parameters of the model, equal to those of the module that `build_model` returns."""

    @abstractmethod
    def training_macs(self, config: RunConfig) -> int:
        """Multiply-adds of the forward and backward pass for one image."""

    @abstractmethod
    def activations(self, config: RunConfig, precision: str) -> Activations:
        """What one image keeps for the backward pass; `precision` is "fp32" or "bf16"."""

    @abstractmethod
    def sampling_macs(self, config: RunConfig) -> int:
        """Multiply-adds to sample one image with the solver and the guidance of `config.sample`."""

    @abstractmethod
    def serial_calls(self, config: RunConfig) -> int:
        """Network passes that run one after another while a batch is drawn, with or without guidance.

        For ECAR only the velocity calls: its AR transformer runs once per stage.
        """

    @abstractmethod
    def describe_calls(self, config: RunConfig) -> str:
        """How often sampling calls the network, as `ecar-dist plan` prints it."""

    # The parts themselves. Import them inside the method.

    def from_codebook(self, codes: torch.Tensor, residual_std: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Initial weights of a new run that come from its data's codebook, by name.

        codes: [V, c]. residual_std: std of what the codes leave out of a token, [1].
        """
        return {}

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
        """The network's output at inputs fixed by index and seed, K of [B, ...]; used to verify an export."""


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

    def serial_calls(self, config: RunConfig) -> int:
        return sum(velocity_calls(config))

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
