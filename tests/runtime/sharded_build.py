"""The models that test_sharded_build.py builds: `section.key=value` overrides of one tiny config."""

DEPTH = 4  # blocks in each transformer

SETTINGS: dict[str, tuple[str, ...]] = {
    "ecar": (),
    "ecar, bf16": ("deepspeed.precision=bf16",),
    "ecar, offload": ("deepspeed.offload_optimizer=true", "deepspeed.offload_params=true"),
    "pyramid": ("model.kind=pyramid",),
    "mar": ("model.kind=mar", "flow.num_stages=1"),
    "par": ("model.kind=par", "flow.num_stages=1", "par.group=4", "model.codebook_size=64"),
    "hybrid": ("model.kind=hybrid", "flow.num_stages=1", "model.codebook_size=64"),
    "par_cont": ("model.kind=par_cont", "flow.num_stages=1"),
}
