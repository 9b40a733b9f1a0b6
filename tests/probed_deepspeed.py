"""What each engine on a CPU does first, once for all forks: DeepSpeed tries which of its kernels can be compiled."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.ops

deepspeed.ops.__compatible_ops__  # noqa: B018  (the attribute is made when it is first asked for)
