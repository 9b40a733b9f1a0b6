"""Compiled blocks compute what eager ones do; tests/train/test_zero_matrix.py trains them under ZeRO."""

import pytest
import torch
from torch._dynamo.utils import counters

from ecar_dist.runtime.compiler import compile_blocks, compiler_fault, repeated_blocks
from ecar_dist.runtime.engine import Engine
from ecar_dist.sample.preview import StripPreview
from tests.train.test_objective import batch, make_config, make_model, objective

KINDS = [("ecar", 3), ("mar", 1), ("par", 1)]  # pyramid and dit have the velocity block of ecar


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step(config, model, precision="fp32"):
    """Loss of each stage and all gradients of one micro-batch."""
    loss, per_stage, _ = objective(config, model, precision)(*batch(range(6)))
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return per_stage, found


def recomputing(config):
    return config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": True})})


# Precision and recomputation affect all kinds in the same way; ECAR represents them here.
CASES = [("fp32", "plain", KINDS), ("bf16", "recompute", KINDS[:1])]


@pytest.mark.parametrize(("precision", "activations", "kinds"), CASES)
def test_losses_and_gradients_are_those_of_the_eager_blocks_to_the_bit(precision, activations, kinds):
    """As one graph for each kind of block, without a graph break."""
    for kind, num_stages in kinds:
        torch._dynamo.reset()
        counters.clear()
        config = make_config(kind, num_stages=num_stages)
        if activations == "recompute":
            config = recomputing(config)
        model = make_model(config)
        if precision == "bf16":
            model.bfloat16()  # as DeepSpeed does
        losses, gradients = step(config, model, precision)
        compile_blocks(model, "aot_eager")
        found, compiled_gradients = step(config, model, precision)
        assert torch.equal(found, losses)
        assert gradients.keys() == compiled_gradients.keys()
        assert all(torch.equal(gradients[name], compiled_gradients[name]) for name in gradients)

        # ecar: the AR block, and the velocity block; mar: the trunk's block, and the head's
        assert counters["stats"]["unique_graphs"] == {"ecar": 2, "mar": 2, "par": 1}[kind]
        assert not counters["graph_break"]


def test_a_preview_runs_the_blocks_as_they_are():
    """They were compiled for the shapes of training, and a sampler uses other shapes."""
    config = make_config("ecar", num_stages=2)
    model, preview = make_model(config), StripPreview(config, None, torch.device("cpu"))
    expected = preview.draw(model)
    compile_blocks(model, "aot_eager")
    engine = object.__new__(Engine)
    engine._model, engine._optimizer, engine._adam, engine.partitions, engine.zero_stage = model, None, None, [], 0
    with engine.weights_of([]) as drawing:
        assert all(map(torch.equal, preview.draw(drawing), expected))
    assert not counters["stats"]
    step(config, model)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_block_that_cannot_be_one_graph_is_an_error():
    config = make_config("dit", num_stages=1)
    model = make_model(config)
    for block in repeated_blocks(model):
        block.mlp.forward = lambda x: x if x.sum() > 0 else -x
    compile_blocks(model, "aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step(config, model)


def test_inductor_is_within_rounding_of_eager():
    if fault := compiler_fault(torch.device("cpu")):
        pytest.skip(fault)
    config = make_config("dit", num_stages=1)
    model = make_model(config)
    losses, gradients = step(config, model)
    compile_blocks(model)
    found, compiled_gradients = step(config, model)
    torch.testing.assert_close(found, losses, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        assert float((compiled_gradients[name] - gradient).norm() / gradient.norm()) < 1e-6, name
