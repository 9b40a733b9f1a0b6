from functools import partial

import pytest
import torch

from ecar_dist.errors import ConfigError, DataError, NodeError
from ecar_dist.runtime.peers import RemoteError
from ecar_dist.runtime.placement import Placement, job_nodes
from ecar_dist.runtime.start.rendezvous import decide_on_devices
from ecar_dist.runtime.start.roll_call import Answer, Decision, decide, describe, hold_roll_call, rank_list
from ecar_dist.runtime.world import World
from tests.runtime.test_world import in_threads, worlds

NODES = ("n1", "n1", "n2", "n2")


def answers(*problems, nodes=NODES):
    """The answers of ranks on `nodes`; None if a rank is silent."""
    return [
        None if problem is None else Answer(rank, node, problem)
        for rank, (node, problem) in enumerate(zip(nodes, problems, strict=True))
    ]


@pytest.mark.parametrize(
    ("problems", "came", "expected"),
    [
        (("", "", "", ""), (), Decision(NODES)),
        (
            ("", "", "", "no disk"),
            (),
            Decision(
                NODES,
                ("n2",),
                "node n2 failed the preflight: no disk; run the same command again without it",
                again=True,
            ),
        ),
        (("", "", "no disk", "no GPU"), NODES, "node n2 failed the preflight: no disk; run"),  # a node's first problem
        (
            ("", "no disk", "no disk", ""),
            (),
            Decision(NODES, problem="node n1: no disk", culprit=1),
        ),  # no node is fit: each has one of the two failing ranks
        (("no data",) * 4, (), Decision(NODES, problem="node n1: no data", culprit=0)),
        (
            ("", None, "", None),
            (),
            Decision(
                ("n1", "", "n2", ""),
                (),
                "ranks 1, 3 did not join within 9 s (joined: 0 on n1; 2 on n2)",
                again=True,
            ),
        ),
        (("", "", "", None), NODES, "node n2 failed the preflight: no answer within 9 s; run"),
        (
            ("no disk", "", None, ""),
            NODES,
            "2 of 2 nodes failed the preflight (n1: no disk; n2: no answer within 9 s)",
        ),
    ],
)
def test_nodes_are_at_fault_not_ranks(problems, came, expected):
    decision = decide(answers(*problems), seconds=9, nodes_by_rank=came)
    if isinstance(expected, Decision):
        assert decision == expected
    else:
        assert decision.problem.startswith(expected)
        assert decision.again


def test_several_bad_nodes_are_named_each_with_its_reason(monkeypatch):
    monkeypatch.setenv("ECAR_JOB_LOGS", "/somewhere")
    decision = decide(answers("", "a", "b", "", nodes=("n1", "n2", "n3", "n4")), seconds=9)
    assert decision.bad_nodes == ("n2", "n3")
    assert decision.problem == "nodes n2, n3 failed the preflight: n2: a; n3: b; the job continues without them"


def test_what_fails_on_most_nodes_is_not_the_fault_of_a_node():
    nodes = tuple(f"n{number}" for number in range(20))
    decision = decide(answers("", *["no data"] * 19, nodes=nodes), seconds=9)
    assert decision == Decision(nodes, problem="node n1: no data", culprit=1)
    decision = decide(
        answers("", *[None] * 19, nodes=nodes), seconds=9, nodes_by_rank=nodes
    )  # the fault is n0's: nobody can reach it
    assert decision.problem.startswith("19 of 20 nodes failed the preflight (n1: no answer within 9 s; n2: ")
    assert decision.problem.endswith("; ...)")
    assert (decision.again, decision.bad_nodes) == (True, ())


def test_the_job_script_knows_the_nodes_of_ranks_that_never_came(monkeypatch):
    monkeypatch.delenv("ECAR_JOB_NODES", raising=False)
    assert job_nodes(4) == ()
    monkeypatch.setenv("ECAR_JOB_NODES", "n1,n2")
    assert job_nodes(4) == NODES
    came = [Answer(rank, "n1", facts={"device": "cpu"}) for rank in range(2)]
    decision = decide_on_devices([*came, None, None], seconds=9)
    assert decision.bad_nodes == ("n2",)
    assert decision.problem.startswith("node n2 failed the preflight: no answer within 9 s; ")


def held(world, problem="", error=None, decision=None):
    rule = (lambda _: decision) if decision else lambda found: decide(found, seconds=30)
    answer = Answer(world.rank, f"n{world.rank + 1}", problem)
    return hold_roll_call(world, "test", answer, rule, seconds=30, error=error)


def test_an_unfit_node_ends_all_ranks_and_only_the_first_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("ECAR_JOB_LOGS", str(tmp_path))
    first, second = worlds(2)
    raised = in_threads(lambda: held(first), lambda: held(second, "no disk", OSError("no disk")))
    assert [type(error) for error in raised] == [NodeError, RemoteError]
    assert str(raised[0]) == "node n2 failed the preflight: no disk; the job continues without it"
    assert raised[1].again  # status 75 there too
    assert (tmp_path / "bad-nodes").read_text() == "n2\n"


def test_what_fails_everywhere_is_raised_by_the_first_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("ECAR_JOB_LOGS", str(tmp_path))
    first, second = worlds(2)
    mine, theirs = DataError("no manifest"), DataError("no manifest")
    raised = in_threads(*(lambda w=w, e=e: held(w, str(e), e) for w, e in ((first, mine), (second, theirs))))
    assert raised[0] is mine
    assert (type(raised[1]), raised[1].again) == (RemoteError, False)
    assert not (tmp_path / "bad-nodes").exists()
    alone = World(Placement(), torch.device("cpu"))
    with pytest.raises(DataError, match="no manifest"):
        held(alone, "no manifest", mine)


def test_what_only_the_answers_of_others_show_is_raised_too():
    answers = [Answer(rank, "n1", facts={"device": kind}) for rank, kind in enumerate(("cuda", "cpu"))]
    rule = partial(decide_on_devices, seconds=30)
    raised = in_threads(
        *(lambda w=w: hold_roll_call(w, "rendezvous", answers[w.rank], rule, seconds=30) for w in worlds(2))
    )
    assert [type(error) for error in raised] == [RemoteError, ConfigError]
    assert str(raised[1]) == "node n1: it has no GPU that torch can use, others have"


def test_all_is_well():
    assert [decision.nodes for decision in in_threads(*(lambda w=w: held(w) for w in worlds(3)))] == [
        ("n1", "n2", "n3")
    ] * 3


def test_what_a_person_must_fix_is_not_a_reason_to_run_again():
    first, second = worlds(2)
    decision = Decision(NODES, problem="different torch")
    raised = in_threads(*(lambda w=w: held(w, decision=decision) for w in (first, second)))
    assert [type(error) for error in raised] == [ConfigError, RemoteError]
    assert not raised[1].again


def test_ranks_and_errors_in_a_sentence():
    assert rank_list([3]) == "3"
    assert rank_list([5, 1, 2, 3, 9, 8]) == "1-3, 5, 8, 9"
    assert describe(OSError(5, "Input/output error", "/data")) == "/data: Input/output error"
    assert describe(DataError("two\nlines")) == "two"
    assert describe(RuntimeError("CUDA error")) == "RuntimeError: CUDA error"
    assert describe(RuntimeError()) == "RuntimeError: RuntimeError"


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"rank": 1, "node": "n", "problem": "", "facts": {"a": NaN}}'])
def test_an_answer_of_another_version_ends_all_ranks(text):
    first, second = worlds(2)
    raised = in_threads(lambda: held(first), lambda: second.roll_call("test", text, 30, str))
    assert isinstance(raised[0], ConfigError)
    assert "rank 1" in str(raised[0])
    first, second = worlds(2)
    raised = in_threads(lambda: first.roll_call("test", "", 30, lambda _: text), lambda: held(second))
    assert isinstance(raised[1], ConfigError)


def test_a_file_name_that_is_not_utf_8_is_a_readable_answer():
    first, second = worlds(2)
    raised = in_threads(lambda: held(first), lambda: held(second, "no \udcff.tar"))
    assert str(raised[0]).startswith("node n2 failed the preflight: no ?.tar")
