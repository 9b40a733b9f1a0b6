"""Faster sampling draws the same samples."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime import cache_dir_utils

import ecar_dist.runtime.compiler as home
import ecar_dist.sample.fast as module
from ecar_dist.errors import ConfigError
from ecar_dist.models import layers
from ecar_dist.runtime.compiler import CACHE_VARIABLE, compiler_fault, private_cache
from ecar_dist.sample.fast import prepare, round_matrices
from ecar_dist.sample.generate import generate, generate_in_batches, velocities
from tests.sample.test_generate import INDICES, LABELS, SEED, make_plan
from tests.train.test_objective import make_config, make_model

CPU = torch.device("cpu")


def small(kind, num_stages):
    """A model of a few blocks, its plan without guidance at stage 0, and with it after that."""
    model = {"kind": kind, "preset": "T", "ar_depth": 1, "flow_depth": 1, "patch_size": 1}
    config = make_config(kind, num_stages=num_stages)
    config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    tau = 0.3 if kind == "ecar" else None
    return make_model(config).eval(), make_plan(num_stages, kind=kind, tau=tau, guidance_scale=2.0)


@pytest.fixture
def compiler():
    """Skips if nothing can be compiled, and leaves no compiled code behind."""
    if fault := compiler_fault(CPU):
        pytest.skip(f"COMPILED SAMPLING IS NOT TESTED HERE: {fault}")
    torch.compiler.reset()
    layers._position_table.cache_clear()  # a table that is first made while compiling must be a real one
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("error:Dynamo detected a call")  # positions that are traced instead of cached
@pytest.mark.parametrize(("kind", "num_stages", "graphs"), [("ecar", 2, 4), ("dit", 1, 1)])
def test_compiled_draws_what_the_model_draws_and_compiles_each_stage_once(kind, num_stages, graphs):
    """One graph per stage for the velocity, one for the token map; the second and the short last batch reuse them."""
    model, plan = small(kind, num_stages)
    compiled = prepare(model, plan, CPU, compiles=True)
    counters.clear()
    labels = torch.tensor([1, 7, 7, 0, 3])
    ours = list(generate_in_batches(compiled, plan, labels, SEED, batch_size=2, fill=True))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    theirs = list(generate_in_batches(model, plan, labels, SEED, batch_size=2))
    for batch, expected in zip(ours, theirs, strict=True):
        assert [stage.shape for stage in batch] == [stage.shape for stage in expected]
        for a, b in zip(batch, expected, strict=True):
            assert float(b.abs().max()) > 0.1
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_each_call_of_the_compiled_velocity_has_memory_of_its_own(monkeypatch):
    """A CUDA graph alone does not: each replay writes to the same memory, and Heun holds two velocities at once."""
    model, plan = small("dit", 1)
    plan = dataclasses.replace(plan, solver="heun", guidance_scale=1.0)
    expected = generate(model, plan, LABELS, INDICES, SEED)[-1]
    place = torch.empty(4, 4, 8, 8)
    monkeypatch.setattr(module, "compiler_fault", lambda device: None)
    replayed = lambda function: lambda *arguments, **more: place.copy_(function(*arguments, **more))  # noqa: E731
    monkeypatch.setattr(
        module, "compiled", lambda function, mode=None: replayed(function) if function == model.velocity else function
    )
    compiled = prepare(model, plan, CPU, compiles=True)
    assert torch.equal(generate(compiled, plan, LABELS, INDICES, SEED)[-1], expected)


def test_the_velocity_alone_is_a_cuda_graph_and_on_a_gpu_alone(monkeypatch):
    model, _ = small("ecar", 2)
    modes = []
    monkeypatch.setattr(module, "compiled", lambda function, mode=None: modes.append((function.__name__, mode)))
    for device in ("cpu", "cuda"):
        module.CompiledModel(model, torch.device(device))
    assert modes == [("begin_stage", None), ("velocity", None), ("begin_stage", None), ("velocity", "reduce-overhead")]


KINDS = [("ecar", 3), ("pyramid", 3), ("dit", 1), ("mar", 1), ("par", 1), ("hybrid", 1)]


@pytest.mark.parametrize(("kind", "num_stages"), KINDS)
def test_rounded_matrices_draw_the_same_bits_under_autocast(kind, num_stages):
    model, plan = small(kind, num_stages)
    plan = dataclasses.replace(plan, bf16=True)
    expected = generate(model, plan, LABELS, INDICES, SEED)
    in_fp32 = velocities(model, plan, LABELS, INDICES, SEED)
    rounded = copy.deepcopy(model)
    assert prepare(rounded, plan, CPU, compiles=False) is rounded
    for a, b in zip(generate(rounded, plan, LABELS, INDICES, SEED), expected, strict=True):
        assert torch.equal(a, b)
    linear = {p.dtype for m in rounded.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()}
    assert linear == {torch.bfloat16}
    assert any(p.dtype == torch.float32 for p in rounded.parameters())  # norms and embeddings
    assert any(
        not torch.equal(a, b)
        for a, b in zip(velocities(rounded, plan, LABELS, INDICES, SEED), in_fp32, strict=True)  # without autocast
    )


def test_in_fp32_nothing_is_rounded():
    model, plan = small("ecar", 2)
    assert prepare(model, plan, CPU, compiles=False) is model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    round_matrices(model)
    assert torch.bfloat16 in {parameter.dtype for parameter in model.parameters()}


def test_what_cannot_be_compiled_says_so(monkeypatch):
    model, plan = small("mar", 1)
    with pytest.raises(ConfigError, match=r"model\.kind=mar .*--compile"):
        prepare(model, plan, CPU, compiles=True)
    model, plan = small("ecar", 2)

    def refuse(*_, **__):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(home, "compiled", refuse)
    with pytest.raises(ConfigError, match=r"on cpu here \(no compiler and a long story\); leave --compile out"):
        prepare(model, plan, CPU, compiles=True)


def test_compiled_code_lies_in_a_folder_of_this_process_alone(tmp_path, monkeypatch):
    """The user's shared folder may contain libraries that a killed process left incomplete."""
    monkeypatch.setenv(CACHE_VARIABLE, default := cache_dir_utils.default_cache_dir())  # as torch leaves it
    with private_cache():
        own = Path(cache_dir_utils.cache_dir())
        assert own != Path(default)
        assert list(own.iterdir()) == []
        (own / "torn.so").write_bytes(b"\x7fELF")
    assert not own.exists()
    assert os.environ[CACHE_VARIABLE] == default
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with private_cache():
        assert cache_dir_utils.cache_dir() == str(tmp_path)
    assert tmp_path.exists()


def test_a_library_that_cannot_be_loaded_is_a_fault_with_its_name(monkeypatch):
    def load(function, mode=None):
        raise OSError("/tmp/x/torn.so: invalid ELF header")

    monkeypatch.setattr(home, "compiled", load)
    assert compiler_fault(CPU) == "/tmp/x/torn.so: invalid ELF header"
    monkeypatch.setenv(CACHE_VARIABLE, "/tmp/x")
    with pytest.raises(ConfigError, match=r"invalid ELF header\); leave --compile out, or empty /tmp/x$"):
        prepare(small("dit", 1)[0], small("dit", 1)[1], CPU, compiles=True)


def test_the_compiler_is_not_imported_before_it_is_needed():
    """It takes as long as the rest of torch, in every rank and in every command that draws."""
    code = "import sys, ecar_dist.sample.load, ecar_dist.train.start, ecar_dist.train.loop; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in imported
    assert not {"torch._dynamo", "torch._inductor", "deepspeed"} & set(imported)
