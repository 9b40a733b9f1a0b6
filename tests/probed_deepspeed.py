"""The first step of each engine on a CPU, once for all forks: DeepSpeed tests which of its kernels can be compiled."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.ops

deepspeed.ops.__compatible_ops__  # noqa: B018  (the attribute is computed on first access)
