"""The DeepSpeed engine, and a plain view of this rank's part of the model. The only module that imports deepspeed.

In every ZeRO stage a rank's share is a list of flat fp32 partitions (the master weights), and `fragments` maps slices
of parameters to their places in the partitions. The EMA and the checkpoints use only that view.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ecar_dist.command_line import duration, say
from ecar_dist.config.run import RunConfig
from ecar_dist.runtime.compiler import compile_blocks, repeated_blocks
from ecar_dist.runtime.deepspeed_config import deepspeed_config
from ecar_dist.runtime.optimizer import ADAM_MOMENTS, GuardedAdamW, Judgement, PendingStatus
from ecar_dist.runtime.world import World

LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`, at `offset` in flat partition `partition`."""

    name: str
    start: int
    numel: int
    partition: int
    offset: int

    def of(self, partitions: Sequence[torch.Tensor]) -> torch.Tensor:
        """The view of this fragment in a list of flat tensors laid out like the master partitions."""
        return partitions[self.partition].view(-1).narrow(0, self.offset, self.numel)


class Engine:
    """A module trained by DeepSpeed: forward, backward, step, and access to the sharded state.

    `objective` is the module whose forward returns the loss; `model` is the part of it whose parameters are trained.
    `is_good(loss, grad_norm)` decides whether a step moves the weights: both arguments and the result are scalar
    tensors on the device, and the same on all ranks.
    """

    def __init__(
        self,
        objective: nn.Module,
        model: nn.Module,
        parameter_groups: list[dict[str, Any]],
        config: RunConfig,
        world: World,
        precision: str,
        is_good: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        backend: str | None = None,
    ) -> None:
        """`backend`: torch.compile's backend for the blocks of the model; None: they are not compiled."""
        deepspeed = import_deepspeed(world)

        # ZeRO-3 gathers the weights of a compiled block in one go: a gather inside the block would break its graph.
        if backend is not None and config.deepspeed.zero_stage == 3:
            deepspeed.utils.set_z3_leaf_modules(
                model, sorted({type(block) for block in repeated_blocks(model)}, key=str)
            )

        # DeepSpeed wraps the module and its optimizer.
        self.world = world
        self.zero_stage = config.deepspeed.zero_stage
        optim = config.optim
        self._adam = GuardedAdamW(parameter_groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=objective, optimizer=self._adam, config=deepspeed_config(config, world, precision)
        )

        if backend is not None:
            compile_blocks(model, backend)
        self._compiles_next = backend is not None

        # From here on the optimizer asks for a judgement before each step.
        self._is_good = is_good
        self._max_norm = optim.clip_grad_norm
        self._sums = torch.zeros(1)
        self._judgement: Judgement | None = None
        self._status: PendingStatus | None = None
        self._replicated_norm = torch.zeros(())
        self._adam.judge = self._judge

        # The view of this rank's part.
        self.objective = objective
        self._model = model
        self._parameters = dict(model.named_parameters())
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}
        self.partitions = self._master_partitions()
        self.fragments = self._find_fragments()

    def __call__(self, *inputs: torch.Tensor) -> Any:
        if not self._compiles_next:
            return self._engine(*inputs)

        # The first call compiles, which takes minutes for a large model.
        began = time.monotonic()
        outputs = self._engine(*inputs)
        self._compiles_next = False
        if self.world.is_first:
            say(f"the blocks of the model were compiled in {duration(time.monotonic() - began)}")
        return outputs

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self, sums: torch.Tensor) -> PendingStatus | None:
        """End a micro-batch; after the last one of a global batch, move the weights if the step is good.

        `sums` (float64, [n]) contains the losses of the global batch, summed over ranks, and other finite numbers that
        the caller wants to read with them. The total is finite only if every loss is, so `is_good` gets it as the loss.
        Before the last micro-batch `sums` is not read, and the result is None. On a GPU nothing here waits for the
        device: the step is judged on the device.

        A refused step changes no weight and no moment, and its gradients are dropped. Adam's step counter still
        advances, because it counts the steps of the run.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None

        # The gradients are already averaged over ranks. All ranks use rank 0's norm, so they judge the same number.
        if self._keeps_no_norm:
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            self._replicated_norm = self.world.sum(norm * self.world.is_first)

        # DeepSpeed calls the optimizer, which calls `_judge`.
        self._sums = sums
        self._judgement = None
        self._status = None
        self._engine.step()
        if self._status is not None:
            return self._status

        # In bf16 without ZeRO, DeepSpeed reads the gradients on the host, and drops the step if they are not finite.
        for partition in self.partitions:
            self._adam.state_of(partition)["step"] += 1
        return PendingStatus(torch.cat([sums, sums.new_tensor([math.inf, 0.0])]))

    def _judge(self) -> Judgement:
        """Judge the current step, on the device. ZeRO-3 asks once per sub-group, and gets the same answer each time.

        A norm above LARGEST_NORM counts as inf: its square overflows fp32, and all stages but ZeRO-3 sum squares in it.
        """
        if self._judgement is not None:
            return self._judgement

        # DeepSpeed reports -1 or inf if a gradient is not finite.
        reported = self._replicated_norm if self._keeps_no_norm else self._optimizer._global_grad_norm
        found = torch.as_tensor(reported).reshape(())
        norm = found.to(self._sums.device, torch.float64)
        norm = norm.masked_fill((norm < 0) | (norm > LARGEST_NORM), math.inf)
        good = self._is_good(self._sums.sum(), norm)

        # Gradients with a larger norm than `optim.clip_grad_norm` are scaled down to it.
        clip = ((found + 1e-6) / self._max_norm).clamp(min=1.0) if self._max_norm > 0 else None
        self._judgement = Judgement(good, clip)

        # Start the transfer to the host, ahead of the update.
        self._status = PendingStatus(torch.cat([self._sums, torch.stack([norm, good.double()])]))
        return self._judgement

    @property
    def _keeps_no_norm(self) -> bool:
        """Whether DeepSpeed computes no gradient norm: without ZeRO, in fp32."""
        return self._optimizer is self._adam

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of all parameter groups, times a group's `rate` if it has one."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all of the state (ZeRO stage 0)."""
        return self.zero_stage == 0

    @property
    def splits_weights(self) -> bool:
        """Whether no rank holds all of the weights that the forward pass reads (ZeRO stage 3)."""
        return self.zero_stage == 3

    def replicas(self) -> list[torch.Tensor]:
        """The tensors that every rank holds in full, bitwise equal between steps. Views, not copies.

        ZeRO 0: weights as the forward pass reads them, master weights, moments. ZeRO 1 and 2: the first of these, which
        each step gathers from the ranks' shares. ZeRO 3: the small parameters that it does not split; none before the
        first step of a new run.
        """
        read = [parameter.data for parameter in self._parameters.values() if self._is_whole(parameter)]
        if not self.replicated:
            return read
        # In fp32, the forward pass reads the master weights themselves.
        masters = [] if self._keeps_no_norm else self.partitions
        return [*read, *masters, *(flat for name in ADAM_MOMENTS for flat in self.moments(name))]

    def _is_whole(self, parameter: Any) -> bool:
        # ZeRO-3 keeps small parameters in full once it has gathered them.
        if self.zero_stage < 3:
            return True
        return parameter.ds_persist and parameter.numel() == parameter.ds_numel

    def moments(self, name: str) -> list[torch.Tensor]:
        """AdamW's `exp_avg` or `exp_avg_sq`, laid out like `partitions`; zeros before the first step."""
        return [self._adam.state_of(partition)[name] for partition in self.partitions]

    def set_optimizer_step(self, step: int) -> None:
        for partition in self.partitions:
            self._adam.state_of(partition)["step"].fill_(step)

    @contextlib.contextmanager
    def weights_of(self, partitions: Sequence[torch.Tensor]) -> Iterator[nn.Module]:
        """The model with `partitions` (an EMA's) as its weights; afterwards its own are restored bitwise. Collective.

        No second model is built: the fp32 master weights are swapped with `partitions`, and the model's weights are
        rewritten from them. In ZeRO 3 all ranks have to run the model, because each holds a part of it. Its blocks run
        uncompiled, because they were compiled for the shapes of training. After an error the model is unusable.
        """
        self._exchange(partitions)
        with self.own_weights() as model:
            yield model
        self._exchange(partitions)

    @contextlib.contextmanager
    def own_weights(self) -> Iterator[nn.Module]:
        """The model with its own weights, to be run outside a training step; see `weights_of`."""
        with torch.compiler.set_stance("force_eager"):
            yield self._model

    def _exchange(self, partitions: Sequence[torch.Tensor]) -> None:
        for master, other in zip(self.partitions, partitions, strict=True):
            master.data, other.data = other.data, master.data
        self.publish_master_weights()

    @torch.no_grad()
    def publish_master_weights(self) -> None:
        """Copy the fp32 master weights into the (bf16, maybe sharded) parameters that the forward pass reads.

        Collective. A rank receives the same data as in each step: in ZeRO 1 and 2 the shares of the other ranks in the
        dtype of the forward pass, in ZeRO 3 the small parameters that are not split.
        """
        # ZeRO 1 and 2.
        if self.zero_stage in (1, 2):
            self._optimizer.update_lp_params()
            return

        # ZeRO 0 and 3: this rank has the masters of everything it holds. In fp32, ZeRO 0 reads the masters themselves.
        for fragment in () if self._keeps_no_norm else self.fragments:
            parameter: Any = self._parameters[fragment.name]
            held = parameter.data if self.zero_stage == 0 else parameter.ds_tensor.data
            held.view(-1).narrow(0, 0, fragment.numel).copy_(fragment.of(self.partitions))

        # ZeRO 3 keeps small parameters in full, and gathers them again after each step.
        if self.zero_stage == 3 and (small := self._optimizer.persistent_parameters):
            small[0].partition(small)
            small[0].all_gather(small)

    def _master_partitions(self) -> list[torch.Tensor]:
        # Each of DeepSpeed's optimizers has its own name for the partitions; without ZeRO, in fp32, they are the
        # parameters.
        optimizer = self._optimizer
        for attribute in (
            "single_partition_of_fp32_groups",  # ZeRO 1 and 2
            "fp32_groups_flat_partition",  # ZeRO 1 in bf16
            "fp32_partitioned_groups_flat",  # ZeRO 3
        ):
            if hasattr(optimizer, attribute):
                return list(getattr(optimizer, attribute))
        return [parameter for group in self._adam.param_groups for parameter in group["params"]]

    def _find_fragments(self) -> list[Fragment]:
        if self.zero_stage == 0:
            return self._replicated_fragments()
        find = self._zero3_fragment if self.zero_stage == 3 else self._zero12_fragment
        found = (find(name, parameter) for name, parameter in self._parameters.items())
        return [fragment for fragment in found if fragment is not None and fragment.numel > 0]

    def _replicated_fragments(self) -> list[Fragment]:
        """ZeRO 0: one partition for each parameter, in the optimizer's order; in bf16 it is an fp32 copy."""
        # DeepSpeed's bf16 optimizer lists the parameters as well as their copies; in fp32 they are the partitions.
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        trained = getattr(self._optimizer, "fp16_groups", None) or [self.partitions]
        in_order = [parameter for group in trained for parameter in group]
        return [Fragment(names[id(p)], 0, p.numel(), index, 0) for index, p in enumerate(in_order)]

    @staticmethod
    def _zero12_fragment(name: str, parameter: Any) -> Fragment | None:
        mapping = parameter._hp_mapping
        if mapping is None:  # this rank has no element of the parameter
            return None
        source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(name, source.start, target.numel, mapping.param_group_index, target.start)

    def _zero3_fragment(self, name: str, parameter: Any) -> Fragment | None:
        # Every rank has an equal part of each parameter; the last one is padded.
        optimizer: Any = self._optimizer
        partition, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = padded * self.world.rank
        return Fragment(name, start, min(padded, parameter.ds_numel - start), partition, int(offset))


def import_deepspeed(world: World) -> Any:
    """Import DeepSpeed, with little output, for this rank's device."""
    # DeepSpeed looks for its accelerator, and prints a lot, while it is imported.
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's older calls
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    deepspeed.utils.logger.setLevel(logging.WARNING)

    # The shared-memory collective is compiled at first start, and a process killed during the build leaves a lock on
    # which every later start waits forever. Only inference uses it, so it is disabled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    # DeepSpeed would read the gradient norm on the host to decide whether to drop a step; the guarded optimizer decides
    # that on the device.
    for module in (bf16_optimizer, stage3, stage_1_and_2):
        module.is_invalid_grad_norm = lambda norm: False

    # DeepSpeed knows the optimizers it supports by their exact type. The arithmetic of this one is AdamW's.
    if GuardedAdamW not in deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS:
        deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.append(GuardedAdamW)
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
    return deepspeed
