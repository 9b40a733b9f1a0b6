"""Build a model that no rank ever holds in full: ZeRO 3 from the first module on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ecar_dist.config.run import RunConfig
from ecar_dist.runtime.deepspeed_config import deepspeed_config
from ecar_dist.runtime.engine import import_deepspeed
from ecar_dist.runtime.world import World


@contextlib.contextmanager
def sharded_build(config: RunConfig, world: World, precision: str) -> Iterator[None]:
    """In this context, with ZeRO 3, this rank keeps only its share of each registered submodule. Collective.

    A module gets its initial weights before its parent registers it; then they are cast to `precision`, and split over
    the ranks. So they are drawn on the CPU in fp32, and are bitwise equal to those of a model that is built in full.
    DeepSpeed's `zero.Init` as a context would draw them on the device, in the dtype of the forward pass.
    """
    if config.deepspeed.zero_stage < 3:
        yield
        return
    deepspeed = import_deepspeed(world)
    settings = deepspeed_config(config, world, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    first: list[Any] = []  # the first parameter that was split; it has DeepSpeed's settings for the others

    def split(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        # The parameters that are not split yet: the module's own, because its submodules were registered before it.
        whole = [one for one in module.parameters() if not hasattr(one, "ds_id")] if module else []
        for parameter in whole:
            parameter.data = parameter.data.to(dtype)
        if whole and first:
            first[0].convert_to_zero_parameters(param_list=whole)
        elif whole:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)
            first.append(whole[0])

    hook = register_module_module_registration_hook(split)
    try:
        yield
    finally:
        hook.remove()
