"""One model, one order of samples, 4 steps on two ranks: every engine setting trains and refuses steps in the same way.

Accumulation is 2. In fp32 the settings differ only by the order of sums. In bf16 the losses of all steps stay within
BF16_LOSS of fp32's (1.0e-4 measured), and the weights within BF16_WEIGHTS in L2 (1.7e-3 measured): Adam scales
gradients that are nothing but rounding up to full steps.
"""

import json

import pytest

from ecar_dist.plan.memory import model_state
from ecar_dist.train.flags import Flags
from tests.conftest import free_port, write_yaml
from tests.fork_server import run_ranks
from tests.train.zero_matrix import BATCH, BF16, COMPILED, FP32, REFERENCE, SETTINGS, STEPS
from tests.train.zero_matrix_ranks import run_matrix

KINDS = ("weights", "ema", "ema1", "ema2")
SHARE_GRAPHS = ("zero 1, compiled", "zero 2, recompute, compiled")
FP32_TOLERANCE = 1e-6
BF16_LOSS, BF16_WEIGHTS = 3e-4, 5e-3


@pytest.fixture(scope="module")
def reports(make_tree, tmp_path_factory):
    """The reports of the ranks, by setting."""
    folder = tmp_path_factory.mktemp("matrix")
    tree = make_tree(folder) | {"flow": {"num_stages": 2}, "train": {"total_samples": STEPS * BATCH}}
    tree["sample"] = {"solver": "euler", "steps_per_stage": 2}
    tree["ema"] = {"half_life_samples": [40, 400], "rampup": 0.5, "sigma_rel": [0.1]}
    files = (str(write_yaml(tree, folder)), str(folder / "report.json"))
    ended = run_ranks(2, free_port(), *files, main=run_matrix, timeout=900)
    assert not any(one.returncode for one in ended), "".join(one.stdout + one.stderr for one in ended)
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("setting", FP32)
def test_fp32_losses_and_weights_are_those_without_zero(reports, setting):
    ours, reference = reports[setting][0], reports[REFERENCE][0]
    assert len(ours["losses"]) == STEPS
    assert ours["losses"] == pytest.approx(reference["losses"], rel=FP32_TOLERANCE)
    assert max(ours[kind] for kind in KINDS) < FP32_TOLERANCE


@pytest.mark.parametrize("setting", COMPILED)
def test_compiled_blocks_train_like_eager_ones(reports, setting):
    """One graph of the AR block and one of the velocity block, without a break, under every ZeRO stage.

    In fp32, stages 0 to 2 share the graphs that the first of them compiled.
    One step is equal to the bit (tests/runtime/test_compiler.py); after some steps a loss may differ in its last bits.
    """
    eager = setting.removesuffix(", compiled")
    for ours, theirs in zip(reports[setting], reports[eager], strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-7)
        assert ours["compiled"]
        assert (ours["graphs"], ours["breaks"]) == (0 if setting in SHARE_GRAPHS else 2, 0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_is_queued_without_a_read_of_the_host(reports, setting):
    """Except for bf16 without ZeRO, where DeepSpeed looks for gradients that are not finite, and for offload."""
    reads = [report["host reads"] for report in reports[setting]]
    reading = setting == "zero 0, bf16" or "offload" in setting or "together" in setting
    assert min(reads) > 0 if reading else reads == [0, 0]


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting not in COMPILED])
def test_losses_and_flags_of_a_step_are_one_sum_of_constant_size(reports, setting):
    """The loss of each of two stages, the number of replaced samples, and the flags.

    All other collectives are of gradients, of weights, and of the norm of the gradients: DeepSpeed's for up to two
    groups of parameters, or rank 0's if DeepSpeed computes none.
    """
    for report in reports[setting]:
        sums = [(kind, number) for name, kind, number in report["collectives"] if name == "allreduce_" and number < 100]
        assert [one for one in sums if one[1] > 1] == [("float64", 2 + 1 + len(Flags._fields))]
        assert sum(number == 1 for _, number in sums) <= 2


@pytest.mark.parametrize("setting", BF16)
def test_bf16_stays_within_its_bound(reports, setting):
    ours, reference = reports[setting][0], reports[REFERENCE][0]
    assert ours["losses"] == pytest.approx(reference["losses"], rel=BF16_LOSS)
    assert all(0 < ours[kind] < BF16_WEIGHTS for kind in KINDS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_sharded_averages_are_the_unsharded_ones(reports, setting):
    """Two half-lives and a power function, against float64 averages of the gathered weights."""
    assert all(report["sharded EMA against unsharded"] < 1e-6 for report in reports[setting])


@pytest.mark.parametrize("setting", SETTINGS)
def test_ranks_hold_every_weight_once_and_count_every_step(reports, setting):
    parameters = reports[REFERENCE][0]["elements"]
    held = [report["elements"] for report in reports[setting]]
    assert held == [parameters] * 2 if "zero 0" in setting else sum(held) == parameters
    assert all(report["adam steps"] == [STEPS] for report in reports[setting])


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_refused_step_leaves_nothing_behind(reports, setting):
    """Refused by the caller, for a loss that is NaN on one rank, or for too large a norm: bit for bit."""
    failed = [
        (rank, what)
        for rank, report in enumerate(reports[setting])
        for what, ok in report["refusals"].items()
        if not ok
    ]
    assert failed == []
    assert len(reports[setting][1]["refusals"]) == 14


@pytest.mark.parametrize("setting", SETTINGS)
def test_ranks_hold_their_copies_alike_to_the_bit(reports, setting):
    """So that a hash detects a rank that has drifted: in the full state, the weights, or what ZeRO-3 does not split."""
    parameters = reports[REFERENCE][0]["elements"]
    copies = {0: 4 if "bf16" in setting else 3, 1: 1, 2: 1, 3: 1}[int(setting[5])]
    split = any("persistence_threshold: 0" in override for override in SETTINGS[setting])
    for report in reports[setting]:
        assert report["replicas"] == {"elements": 0 if split else copies * parameters, "hashes": 1}


# Bytes per parameter in addition to the state of `plan`. ZeRO-3 does not split small weights, as all of these are.
# ZeRO-1 in fp32 has a full gradient in the backward pass, and only its share of it afterwards.
BESIDE = {"zero 1": -2, "zero 3": 4, "zero 3, bf16": 2}
NOT_COUNTED = ("offload", "together", "compiled")
COUNTED = [setting for setting in SETTINGS if not any(word in setting for word in NOT_COUNTED)]


@pytest.mark.parametrize("setting", COUNTED)
def test_between_backward_and_step_a_rank_holds_what_plan_counts(reports, setting):
    parameters = reports[REFERENCE][0]["elements"]
    state = model_state(parameters, 2, int(setting[5]), "bf16" if "bf16" in setting else "fp32")
    expected = state.total - state.ema + BESIDE.get(setting, 0) * parameters
    assert [report["state bytes"] for report in reports[setting]] == pytest.approx([expected] * 2, rel=0.03)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_preview_is_drawn_by_the_trained_model_which_trains_on_as_if_it_had_not(reports, setting):
    """In fp32 the samples are those of a second model with the EMA's weights, bit for bit."""
    parameters = reports[REFERENCE][0]["elements"]
    itemsize = 2 if "bf16" in setting else 4
    for report in reports[setting]:
        found = report["preview"]
        assert (found["back again"], found["goes on alike"]) == (True, True)
        assert found["drawn alike"] == (setting in FP32)
        assert found["difference"] < 0.1

    # Without ZeRO no byte is sent. Otherwise the rank that holds an element sends it once, plus padding: before
    # drawing, or with ZeRO-3 in each call of the network.
    sent = sum(report["preview"]["bytes for the EMA"] for report in reports[setting])
    split = any("persistence_threshold: 0" in override for override in SETTINGS[setting])
    if "zero 0" in setting or split:
        assert sent == 0
    else:
        assert parameters * itemsize <= sent < 1.05 * parameters * itemsize
    assert (sum(report["preview"]["bytes while drawn"] for report in reports[setting]) > 0) == ("zero 3" in setting)
