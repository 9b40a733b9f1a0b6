"""Every setting is compared between ranks. The error says what differs, and on which ranks."""

import pytest

from ecar_dist.config.read import config_from_dict
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.run.drift import shared_settings
from ecar_dist.runtime.start import agreement
from ecar_dist.runtime.start.agreement import agree_on, decide_on_facts, differences, odd_ranks, source_version
from ecar_dist.runtime.start.roll_call import Answer
from tests.runtime.run.test_drift import MIXTURE, TREE, config
from tests.runtime.test_world import in_threads, worlds

NODES = ("n1", "n1", "n2", "n2")
# Found with a different value on rank 1: SILENT gives no error, MISLEADING ends in a hang with a wrong explanation.
SILENT = {
    "optim.learning_rate": 0.5,
    "run.seed": 1,
    "optim.weight_decay": 0.5,
    "ema.half_life_samples": [50],
    "flow.stage_weights": [0.5, 0.25, 0.25],
    "model.label_dropout": 0.5,
    "flow.context.tau": 0.4,
    "optim.clip_grad_norm": 0.5,
}
MISLEADING = {
    "batch.global_batch_size": 512,
    "train.total_samples": 20_000,
    "deepspeed.precision": "bf16",
    "deepspeed.zero_stage": 3,
    "run.name": "b",
}


@pytest.mark.parametrize(("key", "value"), (SILENT | MISLEADING).items())
def test_a_setting_of_one_rank_alone_is_named_with_both_values(key, value):
    *sections, name = key.split(".")
    tree = branch = {section: dict(content) for section, content in TREE.items()}
    for section in sections:
        branch = branch.setdefault(section, {})
    branch[name] = value
    ours, theirs = shared_settings(config()), shared_settings(config_from_dict(tree))
    (line,) = differences([ours, theirs], ["n1", "n2"]).split("; ")
    assert line == f"the ranks differ: {key}={ours[key]} on rank 0 on n1, {theirs[key]} on rank 1 on n2"


def test_every_knob_is_compared_unless_nodes_may_differ_in_it():
    shared = {knob.key for knob in RunConfig.knobs() if not knob.per_node}
    assert set(shared_settings(config())) == shared
    assert {"vae.path", "data.latents", "data.cache.dir", "data.prefetch"}.isdisjoint(shared)
    assert {"run.seed", "batch.micro_batch_size", "data.mixture", "checkpoint.dir"} <= shared


def test_the_same_data_may_lie_elsewhere_and_a_mixture_has_its_weights():
    elsewhere = {"vae": {"path": "/other"}, "data": {"latents": "/scratch/x", "cache": {"dir": "/scratch"}}}
    assert shared_settings(config(**elsewhere)) == shared_settings(config())
    mixed = {"latents": None, "mixture": [{"latents": "/scratch/x", "weight": 1}, {"latents": "z", "weight": 2}]}
    assert shared_settings(config(data=mixed)) == shared_settings(config(data=MIXTURE))
    mixed["mixture"][1]["weight"] = 3
    other, ours = shared_settings(config(data=mixed)), shared_settings(config(data=MIXTURE))
    assert {key for key in ours if ours[key] != other[key]} == {"data.mixture"}


def test_the_order_of_keys_in_a_raw_section_is_not_a_difference(tree):
    shared = []
    for raw in ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}):
        shared.append(shared_settings(config_from_dict({**tree, "deepspeed": {"raw": raw}})))
    assert shared[0] == shared[1]


def test_no_value_that_is_sent_has_a_credential():
    secret = config(checkpoint={"dir": "s3://user:hunter2@bucket/a?X-Amz-Signature=hunter2"})
    assert "hunter2" not in "".join(shared_settings(secret).values())


@pytest.mark.parametrize(
    ("values", "odd"), [("aaaa", []), ("aaba", [2]), ("abab", []), ("bacd", []), ("aabacc", []), ("baaca", [0, 3])]
)
def test_a_majority_decides_who_is_odd(values, odd):
    assert odd_ranks(values) == odd


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("1111", ""),
        ("1121", "rank 2 on n2 differs from the others: a=2 on rank 2 on n2, 1 elsewhere"),
        ("1122", "the ranks differ: a=1 on ranks 0, 1 on n1, 2 on ranks 2, 3 on n2"),
        ("1222", "rank 0 on n1 differs from the others: a=1 on rank 0 on n1, 2 elsewhere"),
    ],
)
def test_a_difference_names_ranks_nodes_and_values(values, said):
    assert differences([{"a": value} for value in values], NODES) == said


def test_a_line_about_many_differences_is_short():
    facts = [{f"k{number}": f"{rank}" * 1000 for number in range(50)} for rank in range(2)]
    said = differences(facts, NODES)
    assert said.endswith("; and 42 more")
    assert len(said) < 3000
    assert "\n" not in differences([{"a": "1\n2"}, {"a": "\x1b"}], NODES)


def test_a_fact_that_one_version_of_the_code_does_not_know_is_a_difference():
    assert "a=1 on rank 0 on n1, missing on rank 1 on n1" in differences([{"a": "1"}, {}], NODES)


def answer(rank, problem="", **facts):
    return Answer(rank, NODES[rank], problem, facts)


def test_a_silent_rank_is_the_fault_of_its_node_and_a_rank_without_a_config_is_not():
    given = {"seconds": 9, "nodes": NODES[:3], "fix": "fix it"}
    silent = decide_on_facts([answer(0, a="1"), answer(1, a="1"), None], **given)
    assert (silent.again, silent.bad_nodes) == (True, ("n2",))
    failed = decide_on_facts([answer(0, a="1"), answer(1, "unknown key"), answer(2, a="2")], **given)
    assert (failed.again, failed.bad_nodes) == (False, ())
    assert failed.problem == "rank 1 on n1, unlike rank 0: unknown key"
    assert decide_on_facts([answer(0, a="1"), answer(1, a="1")], **given).problem == ""


def test_all_ranks_end_and_only_the_first_says_why():
    def agree(world, value):
        agree_on(world, "facts", {"a": value}, "make them alike")

    raised = in_threads(*(lambda w=w: agree(w, f"{w.rank // 2}") for w in worlds(3)))
    assert [type(error) for error in raised] == [ConfigError, RemoteError, RemoteError]
    assert str(raised[0]).endswith("; make them alike")
    assert [error.again for error in raised[1:]] == [False, False]
    assert in_threads(*(lambda w=w: agree(w, "same") for w in worlds(3))) == [None] * 3


def test_the_source_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement.ecar_dist, "__file__", str(tmp_path / "__init__.py"))
    found = []
    for name, content in (("a.py", "1"), ("a.py", "2"), ("sub/b.py", ""), ("notes.txt", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        found.append(source_version())
    assert len(set(found)) == 3
    assert found[2] == found[3]


def test_files_of_an_editor_are_not_source(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement.ecar_dist, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "loop.py").write_text("1")
    before = source_version()
    (tmp_path / ".#loop.py").symlink_to("somebody@host.1234")
    (tmp_path / "._loop.py").write_bytes(b"\x00")
    (tmp_path / "gone.py").symlink_to("nowhere")
    assert source_version() == before
