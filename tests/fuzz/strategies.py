"""Draws cases of each family: a command, the artefacts that it needs, and one to three changes of them."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from tests.fuzz.archives import TABLE_OPS, TAR_OPS, TENSOR_OPS
from tests.fuzz.artefacts import PRISTINE, RUN
from tests.fuzz.case import Case
from tests.fuzz.mutation import BYTE_OPS, KIND_OPS, LINE_OPS, TREE_OPS, Mutation
from tests.fuzz.nasty import FILES, KEYS, STRINGS, URLS, VALUES, YAML_VALUES
from tests.fuzz.words import BASES, OVERRIDDEN

CONFIGS = ("digits_cpu", "digits_mar", "imagenet256_xl")


def _place(number: int) -> tuple[tuple[int, ...], float]:
    """A place in a tree, and one in a file, from one uniform number: hypothesis itself prefers the first choices."""
    chance = random.Random(number)
    return tuple(chance.randrange(41) for _ in range(chance.randint(1, 5))), round(chance.random(), 3)


_PLACES = st.integers(0, 2**24 - 1).map(_place)
_JSON_VALUES = st.sampled_from(sorted({*VALUES} - {"very_long"}))
_YAML_NAMES = st.sampled_from(sorted({*VALUES, *YAML_VALUES} - {"very_long"}))


def mutations(
    files: st.SearchStrategy[str], ops: st.SearchStrategy[str], values: st.SearchStrategy[str], most: int = 3
):
    """One to `most` changes. `values`: for the nodes of a tree; keys and complete files have their own."""

    def one(op: str) -> st.SearchStrategy[Mutation]:
        own = {"content": _FOR_KIND, "line_junk": st.one_of(_FOR_KIND, values), "rename": _FOR_KEYS, "add": _FOR_KEYS}
        value = own.get(op, st.sampled_from(sorted(STRINGS)) if op in ("insert", "copy_as", "member_name") else values)
        return st.builds(
            lambda file, place, value: Mutation(file, op, place[0], value, place[1]), files, _PLACES, value
        )

    return st.lists(ops.flatmap(one), min_size=1, max_size=most).map(tuple)


def weighted(*groups: tuple[int, tuple[str, ...]]) -> st.SearchStrategy[str]:
    """A member of one group. Groups are drawn in proportion to their weights."""
    return st.sampled_from([group for weight, group in groups for _ in range(weight)]).flatmap(st.sampled_from)


_TREE = (12, TREE_OPS)
_BYTES = (2, BYTE_OPS)
_KIND = (2, KIND_OPS)
_FOR_KIND = st.sampled_from(sorted(FILES))
_FOR_KEYS = st.sampled_from(KEYS)


@st.composite
def configs(draw: st.DrawFn) -> Case:
    """Changes of a config: its tree, its text, its kind of file, and overrides."""
    verb = draw(st.sampled_from(("check",) * 8 + ("plan", "submit", "job", "list", "status", "sample")))
    words, file, needs = {
        "plan": (("ecar-dist", "plan", "config.yaml", "--world-size", "2", "--device", "H100"), "config.yaml", ()),
        "job": (("ecar-dist", "check", "config.yaml", "--job", "2", "4"), "config.yaml", ()),
        "submit": (
            ("ecar-dist", "submit", "config.yaml", "--nodes", "1", "--gpus-per-node", "0", "--dry-run"),
            "config.yaml",
            ("latents",),
        ),
        "list": (("ecar-dist", "checkpoint", "list", RUN), f"{RUN}/config.yaml", ("runs",)),
        "status": (("ecar-dist", "status", RUN), f"{RUN}/config.yaml", ("runs",)),
        "sample": (
            ("ecar-dist", "sample", RUN, "--count", "1", "--out", "out"),
            f"{RUN}/config.yaml",
            ("runs",),
        ),
        "check": (("ecar-dist", "check", "config.yaml"), "config.yaml", ()),
    }[verb]
    if file == "config.yaml":
        needs = (*needs, "config.yaml")
        if draw(st.integers(0, 4)) == 0:
            file = f"configs/{draw(st.sampled_from(CONFIGS))}.yaml"
            needs = (*needs, "configs")
            words = tuple(file if word == "config.yaml" else word for word in words)
        overrides = st.lists(st.builds("{}={}".format, _dotted(), _override_texts()), max_size=2)
        words = (*words, *draw(st.one_of(st.just([]), overrides)))
    ops = weighted((12, TREE_OPS), (2, BYTE_OPS), (1, KIND_OPS), (2, LINE_OPS))
    drawn = draw(mutations(st.just(file), ops, _YAML_NAMES))
    if any("=" in word for word in words) and draw(st.booleans()):
        drawn = ()
    return Case(words, needs, drawn)


def _dotted() -> st.SearchStrategy[str]:
    parts = st.sampled_from(
        (*OVERRIDDEN, *OVERRIDDEN, "run", "data", "nothing", "run.name.x", "", ".", "a..b", "x" * 999)
    )
    return st.one_of(parts, parts, parts, st.sampled_from(sorted(STRINGS)).map(STRINGS.__getitem__).map(_as_word))


def _override_texts() -> st.SearchStrategy[str]:
    known = [text for name, text in {**VALUES, **YAML_VALUES}.items() if name != "very_long"]
    return st.one_of(st.sampled_from(known), st.sampled_from(sorted(STRINGS)).map(STRINGS.__getitem__)).map(_as_word)


def _as_word(text: str) -> str:
    """As the system can pass it: no NUL, a limited length, invalid bytes as Python represents them."""
    return text.replace("\0", "").replace("\ud800", "\udcff")[:50_000]


TRAIN = ("ecar-dist", "train", "config.yaml")
CHECKPOINTS = f"{RUN}/checkpoints"
_CHECKPOINT_VERBS = (
    ("list",),
    ("verify",),
    ("inspect",),
    ("inspect", "--json"),
    ("inspect", "--step", "4"),
    ("diff",),
    ("export", "--out", "out"),
    ("sample",),
    ("train",),
)


@st.composite
def checkpoints(draw: st.DrawFn) -> Case:
    """A checkpoint's manifest, marker and fragments, in a folder or in a bucket."""
    bucket = draw(st.integers(0, 4)) == 0
    home = (
        "bucket/tiny/step-00000006-0123abcd" if bucket else f"{CHECKPOINTS}/step-0000000{draw(st.sampled_from('6664'))}"
    )
    verb, *rest = draw(st.sampled_from(_CHECKPOINT_VERBS))
    places = [RUN, f"{CHECKPOINTS}/step-00000004"] if verb == "diff" and not bucket else [RUN] * (1 + (verb == "diff"))
    words = ("ecar-dist", "checkpoint", verb, *places, *rest)
    needs = ("runs", "bucket") if bucket else ("runs",)
    if verb == "sample":
        words = ("ecar-dist", "sample", RUN, "--count", "1", "--out", "out")
    if verb == "train":
        words, needs = TRAIN, (*needs, "latents", "config.yaml")
    files = weighted(
        (6, ("checkpoint.json",)),
        (1, ("COMMITTED",)),
        (2, ("state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors")),
    ).map(lambda name: f"{home}/{name}")
    ops = weighted((12, TREE_OPS), (2, BYTE_OPS), (2, KIND_OPS), (1, TENSOR_OPS))
    drawn = draw(mutations(files, ops, _JSON_VALUES))
    return Case(words, needs, drawn, sealed=draw(st.integers(0, 3)) > 0, bucket=bucket)


@st.composite
def damaged(draw: st.DrawFn) -> Case:
    """Changed bytes that a hash covers: `verify` must report them."""
    words, files = draw(
        st.sampled_from(
            (
                (("ecar-dist", "checkpoint", "verify", RUN), PRISTINE.files(CHECKPOINTS)),
                (("ecar-data", "verify", "latents"), [f"latents/00000{n}.tar" for n in (0, 1)]),
                (
                    ("ecar-data", "verify", "images"),
                    [f"images/00000{n}.{e}" for n in (0, 1, 2) for e in ("tar", "npy")],
                ),
            )
        )
    )
    ops = st.sampled_from(("flip", "cut", "insert", "zero", "shift"))
    drawn = draw(mutations(st.sampled_from(files), ops, st.sampled_from(("space", "dot", "shell")), most=1))
    return Case(words, (words[-1].partition("/")[0],), drawn, damage=True)


_SETS = {
    "latents": (
        ("verify", "latents"),
        ("stats", "latents"),
        ("preview", "latents", "--out", "sheet.png"),
        ("push", "latents", "memory://pushed/set"),
    ),
    "images": (
        ("verify", "images"),
        ("push", "images", "memory://pushed/set"),
        ("encode", "images", "made", "--vae", "dct-f8", "--image-size", "16", "--decoder", "pil"),
        ("plan", "images", "made", "--vae", "dct-f8", "--image-size", "16", "--decoder", "pil"),
        ("shard", "images", "made"),
    ),
    "index": (
        ("verify", "index"),
        ("encode", "index", "made", "--vae", "dct-f8", "--image-size", "16", "--decoder", "pil"),
        ("shard", "index", "made"),
        ("push", "index", "memory://pushed/set"),
    ),
    "encoding": (
        ("status", "latents"),
        ("status", "latents", "--tasks", "2"),
        ("finalize", "latents"),
        (
            *("encode", "images", "latents", "--vae", "dct-f8", "--image-size", "16", "--decoder", "pil"),
            *("--samples-per-shard", "12"),
        ),
    ),
}


@st.composite
def sets(draw: st.DrawFn) -> Case:
    """The manifest of latents or images, the tables, the plan and the markers of an encoding."""
    kind = draw(st.sampled_from(sorted(_SETS)))
    words = ("ecar-data", *draw(st.sampled_from(_SETS[kind])))
    needs = {"index": ("index", "foreign.tar"), "encoding": ("latents", "images")}.get(kind, (kind,))
    ops = weighted((12, TREE_OPS), (1, BYTE_OPS), (2, KIND_OPS))
    files = {
        "latents": weighted((6, ("latents/manifest.json",)), (1, ("latents/000000.idx", "latents/000001.json"))),
        "images": weighted((3, ("images/manifest.json",)), (2, ("images/000000.npy", "images/000002.npy"))),
        "index": weighted((3, ("index/manifest.json",)), (2, ("index/000000.npy",))),
        "encoding": weighted((3, ("latents/plan.json",)), (3, ("latents/000000.json", "latents/000001.json"))),
    }[kind]
    if kind in ("images", "index"):
        ops = weighted((8, TREE_OPS), (1, BYTE_OPS), (2, KIND_OPS), (4, TABLE_OPS))
    drawn = draw(mutations(files, ops, _JSON_VALUES))
    return Case(words, needs, drawn, sealed=draw(st.integers(0, 3)) > 0)


@st.composite
def exports(draw: st.DrawFn) -> Case:
    files = weighted((4, ("export/config.json",)), (1, ("export/config.yaml", "export/model.safetensors")))
    ops = weighted((12, TREE_OPS), (2, BYTE_OPS), (2, KIND_OPS), (2, TENSOR_OPS))
    drawn = draw(mutations(files, ops, _JSON_VALUES))
    words = ("ecar-dist", "sample", "export", "--count", "1", "--out", "out")
    return Case(words, ("export",), drawn, sealed=draw(st.booleans()))


@st.composite
def autoencoders(draw: st.DrawFn) -> Case:
    files = weighted((4, ("vae/config.json",)), (1, ("vae/diffusion_pytorch_model.safetensors",)))
    ops = weighted((12, TREE_OPS), (2, BYTE_OPS), (2, KIND_OPS), (2, TENSOR_OPS))
    words = ("ecar-data", "encode", "images", "made", "--vae", "vae", "--image-size", "16", "--decoder", "pil")
    return Case(words, ("vae", "images"), draw(mutations(files, ops, _JSON_VALUES)))


def manifests() -> st.SearchStrategy[Case]:
    return st.one_of(
        checkpoints(), checkpoints(), checkpoints(), sets(), sets(), sets(), exports(), damaged(), autoencoders()
    )


_TARS = {
    "latents/000000.tar": (_SETS["latents"][0], _SETS["latents"][2], *_SETS["encoding"][2:]),
    "images/000000.tar": (_SETS["images"][0], _SETS["images"][2], _SETS["images"][4]),
    "jsons.tar": (
        ("shard", "jsons.tar", "made", "--label", "json:label"),
        ("index", "jsons.tar", "made", "--label", "json:label"),
    ),
    "foreign.tar": (("index", "foreign.tar", "made"), ("shard", "foreign.tar", "made"), _SETS["index"][1]),
}


@st.composite
def tars(draw: st.DrawFn) -> Case:
    """Headers, members and payloads of latent shards, of image shards, and of a tar of another program."""
    file = draw(st.sampled_from(sorted(_TARS)))
    words = ("ecar-data", *draw(st.sampled_from(_TARS[file])))
    needs = {
        "latents/000000.tar": ("latents", "images"),
        "foreign.tar": ("foreign.tar", "index"),
        "jsons.tar": ("jsons.tar",),
    }.get(file, ("images",))
    # a tar with 40 GiB of zeros is valid, but indexing it takes long
    kinds = tuple(op for op in KIND_OPS if op != "sparse" or "/" in file)
    ops = weighted((12, TAR_OPS), (2, BYTE_OPS), (1, kinds))
    values = st.one_of(st.sampled_from(sorted({*STRINGS} - {"very_long"})), _JSON_VALUES)
    drawn = draw(mutations(st.just(file), ops, values))
    return Case(words, needs, drawn, sealed=draw(st.integers(0, 2)) > 0)


_LOGS = (
    "metrics.jsonl",
    "lineage.json",
    "bad_steps.jsonl",
    "logs/substituted.rank-00000.jsonl",
    "logs/watchdog/0123abcd/rank-00000.json",
    "logs/watchdog/0123abcd/verdict.txt",
    "logs/job-12/exit-status",
    "logs/job-12/bad-nodes",
    "jobs/001/job",
    ".lock",
)


@st.composite
def logs(draw: st.DrawFn) -> Case:
    """Files that a run, its watchdog, its job and an encoding have written."""
    words = draw(
        st.sampled_from(
            (("ecar-dist", "status", RUN),) * 4
            + (("ecar-dist", "status", RUN, "--json"),) * 3
            + (("ecar-dist", "status", RUN, RUN), ("ecar-dist", "checkpoint", "list", RUN))
            + (("ecar-data", "status", "latents"), ("ecar-data", "finalize", "latents"), TRAIN)
        )
    )
    if words[0] == "ecar-data":
        files = st.sampled_from(("latents/errors.jsonl", "latents/000000.json"))
        needs: tuple[str, ...] = ("latents",)
    else:
        files = weighted((2, _LOGS[:3]), (1, _LOGS[3:])).map(lambda name: f"{RUN}/{name}")
        needs = ("runs", "latents", "config.yaml") if words == TRAIN else ("runs",)
    ops = weighted((8, TREE_OPS), (3, BYTE_OPS), (2, KIND_OPS), (4, LINE_OPS))
    return Case(words, needs, draw(mutations(files, ops, _JSON_VALUES)))


@st.composite
def words(draw: st.DrawFn) -> Case:
    """A valid command with some of its words changed."""
    base = draw(st.sampled_from(BASES))
    line = list(base.words)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(1, len(line)))
        _change_words(draw, line, place)
    return Case(tuple(line), base.needs)


def _change_words(draw: st.DrawFn, line: list[str], place: int) -> None:
    """Change the word at `place`, or add one there."""
    operation = draw(
        st.sampled_from(("value", "value", "value", "drop", "twice", "swap", "add", "flag", "joined", "cut"))
    )
    value = _as_word(
        draw(st.one_of(st.sampled_from(sorted(STRINGS)).map(STRINGS.__getitem__), st.sampled_from(_NUMBERS)))
    )
    if place >= len(line) or operation == "add":
        line.insert(place, value)
    elif operation == "value":
        line[place] = value
    elif operation == "drop":
        del line[place]
    elif operation == "twice":
        line.insert(place, line[place])
    elif operation == "swap":
        other = draw(st.integers(1, len(line) - 1))
        line[place], line[other] = line[other], line[place]
    elif operation == "flag":
        line.insert(place, draw(st.sampled_from(_FLAGS)))
    elif operation == "joined":
        line[place] = f"{line[place]}={value}"
    elif operation == "cut" and "://" not in line[place]:  # half a password is not recognised as one
        line[place] = line[place][: len(line[place]) // 2]


_NUMBERS = (
    "0",
    "-1",
    "1.5",
    "1e9",
    "99999999999999999999",
    "9" * 400,
    "nan",
    "inf",
    "0x10",
    "٣",
    "²",
    "1_000",
    "+1",
    "1,2",
    "0-3",
    ",",
)
_FLAGS = (
    "--json",
    "--out",
    "--seed",
    "--count",
    "--labels",
    "--dry-run",
    "--tasks",
    "--help",
    "--",
    "-",
    "--nodes=",
    "--=",
    "-h",
    *URLS,
)
