"""Known findings, one case each, so that the suite always covers them.

The number is that of the finding. Each test checks the status, and the property of all cases.
"""

import json
import struct

import pytest

from tests.fuzz.artefacts import PRISTINE, RUN
from tests.fuzz.case import Case, problems
from tests.fuzz.ledger import again
from tests.fuzz.mutation import Mutation
from tests.fuzz.nasty import URLS

NEWEST = f"{RUN}/checkpoints/step-00000006"
IN_BUCKET = "bucket/tiny/step-00000006-0123abcd/checkpoint.json"
STATE = f"{NEWEST}/state-00001-of-00002.safetensors"
TRAIN = ("ecar-dist", "train", "config.yaml")
TO_TRAIN = ("runs", "latents", "config.yaml")
CHECK = ("ecar-dist", "check", "config.yaml")
READERS = {
    "list": ("ecar-dist", "checkpoint", "list", RUN),
    "verify": ("ecar-dist", "checkpoint", "verify", RUN),
    "inspect": ("ecar-dist", "checkpoint", "inspect", RUN),
    "json": ("ecar-dist", "checkpoint", "inspect", RUN, "--json"),
    "diff": ("ecar-dist", "checkpoint", "diff", RUN, f"{RUN}/checkpoints/step-00000004"),
    "export": ("ecar-dist", "checkpoint", "export", RUN, "--out", "out"),
    "sample": ("ecar-dist", "sample", RUN, "--count", "1", "--out", "out"),
    "train": TRAIN,
}
REFUSED, TAKEN = (1,), (0,)


@pytest.fixture
def keeps(runner):
    """Run a case; fails for a broken property, and for a status that the case does not name."""

    def run(case):
        outcome = runner.run(case)
        found = list(problems(case, outcome))
        assert not found, f"{found[0]}\n{again(case)}\n{outcome.stderr[-2000:]}"
        return outcome

    return run


def of_run(*mutations, words=READERS["verify"], **options):
    needs = TO_TRAIN if words[1] == "train" else ("runs",)
    return Case(words, needs, mutations, **options)


@pytest.mark.parametrize("name", ["up", "up_one", "absolute", "dots", "file_url", "newline", "nul"])
@pytest.mark.parametrize("verb", ["verify", "sample", "inspect"])
def test_b2_a_name_in_a_checkpoint_of_a_bucket_stays_in_it(keeps, verb, name):
    renamed = Mutation(IN_BUCKET, "replace", ("files", 0, "name"), name)
    keeps(Case(READERS[verb], ("runs", "bucket"), (renamed,), sealed=True, bucket=True, statuses=REFUSED))


@pytest.mark.parametrize("name", ["up", "up_one", "absolute", "dots", "file_url"])
@pytest.mark.parametrize("kind", ["latents", "images", "index"])
def test_b2_a_name_in_a_manifest_of_a_data_set_stays_in_it(keeps, kind, name):
    needs = (kind, "foreign.tar") if kind == "index" else (kind,)
    keys = ("name",) if kind == "latents" else ("name", "table")
    for key in keys:
        renamed = Mutation(f"{kind}/manifest.json", "replace", ("shards", 0, key), name)
        for verb in (("verify",), ("push", "memory://pushed/set")):
            words = ("ecar-data", verb[0], kind, *verb[1:])
            keeps(Case(words, needs, (renamed,), sealed=True, statuses=REFUSED))


@pytest.mark.parametrize("value", ["newline", "return", "escape", "nul"])
@pytest.mark.parametrize("where", [("run", "dir"), ("vae", "path"), ("data", "latents")])
def test_b3_what_is_not_printable_reaches_no_job_script(keeps, where, value):
    words = ("ecar-dist", "submit", "config.yaml", "--nodes", "1", "--gpus-per-node", "0", "--ranks-per-node", "1")
    added = Mutation("config.yaml", "replace", where[:1], "=" + json.dumps({"path": "x", "kind": "dct"}))
    changed = Mutation("config.yaml", "replace", where, value)
    mutations = (added, changed) if where[0] == "vae" else (changed,)
    case = Case((*words, "--after", "1", "--dry-run"), ("config.yaml",), mutations)
    said = keeps(case).stdout
    assert "touch" not in said
    if where[0] == "run":
        keeps(Case(case.words, case.needs, mutations, statuses=REFUSED))


def _fragments():
    """Keys of the second rank's file that do not begin at 0."""
    content = (PRISTINE.root / STATE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return [key for key in json.loads(content[8 : 8 + length]) if key.startswith("master:") and key[-2:] != ":0"]


@pytest.mark.parametrize("verb", ["export", "sample", "train"])
@pytest.mark.parametrize("lie", ["overlap", "type", "shape", "name"])
def test_b5_fragments_that_are_not_the_parameters(keeps, verb, lie):
    key = _fragments()[0]
    kind, name, start = key.split(":")
    mutation = {
        "overlap": Mutation(STATE, "rename", (key,), f'="{kind}:{name}:0"'),
        "type": Mutation(STATE, "replace", (key, "dtype"), '="I32"'),
        "shape": Mutation(STATE, "wrap", (key, "shape"), at=0.0),
        "name": Mutation(STATE, "rename", (key,), f'="{kind}:{start}"'),
    }[lie]
    older = [
        Mutation(f"{RUN}/checkpoints/step-0000000{step}/COMMITTED", "missing") for step in (2, 4)
    ]  # otherwise one of them is used instead
    keeps(of_run(mutation, *older, words=READERS[verb], sealed=True, statuses=REFUSED))


@pytest.mark.parametrize("value", ["ten_30", "minus_one", "nan", "half", "true", "number_word", "none"])
@pytest.mark.parametrize("key", ["samples_seen", "step"])
def test_b5_progress_that_no_run_can_have(keeps, key, value):
    changed = Mutation(f"{NEWEST}/checkpoint.json", "replace", ("progress", key), value)
    keeps(of_run(changed, sealed=True, statuses=REFUSED))


@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_steps.jsonl", "lineage.json"])
@pytest.mark.parametrize(
    "damage",
    [
        Mutation("", "insert", at=0.4, value="surrogate"),
        Mutation("", "flip", (7,), at=0.3),
        Mutation("", "cut", at=0.7),
        Mutation("", "line_junk", value="=[1]", at=0.5),
        Mutation("", "content", value="nothing"),
        Mutation("", "content", value="deep"),
        Mutation("", "replace", (0, 0), "none"),
        Mutation("", "pipe"),
    ],
    ids=lambda damage: f"{damage.op}-{damage.value}",
)
def test_b6_a_log_never_stops_a_run(keeps, name, damage):
    changed = Mutation(f"{RUN}/{name}", damage.op, damage.where, damage.value, damage.at)
    keeps(of_run(changed, words=TRAIN, statuses=TAKEN))
    keeps(Case(("ecar-dist", "status", RUN), ("runs",), (changed,), statuses=TAKEN))


@pytest.mark.parametrize("name", [".bak", "-milestone", "~", "x", ".tmp", " copy"])
@pytest.mark.parametrize("verb", ["list", "verify", "train"])
def test_b7_a_copy_beside_a_checkpoint_stops_nothing(keeps, verb, name):
    copied = Mutation(f"{NEWEST}/checkpoint.json", "copy_as", (1,), name)
    keeps(of_run(copied, words=READERS[verb], statuses=TAKEN))


HOSTILE = {
    "date": "train.total_samples=2024-13-45",
    "int": "run.name=!!int abc",
    "float": 'run.name=!!float ""',
    "time": "train.total_samples=!!timestamp soon",
    "400 digits": "train.total_samples=" + "9" * 400,
    "5000 digits": "train.total_samples=" + "9" * 5000,
    "number for a section": "deepspeed.raw={zero_optimization: 5}",
    "flag for a section": "deepspeed.raw={bf16: true}",
    "nested": "deepspeed.raw=" + "[" * 3000 + "]" * 3000,
    "nested dicts": "deepspeed.raw=" + "{a: " * 900 + "1" + "}" * 900,
    "key with a newline": 'deepspeed={"a\\nb": 1}',
    "key with ESC": 'deepspeed={"\\e[2J": 1}',
    "escape out of range": 'run.name="\\UFFFFFFFF"',
    "itself": "deepspeed.raw=&a {a: *a}",
    "bomb": "deepspeed.raw={a: &a [x,x,x,x,x,x,x,x,x,x], b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a], "
    "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b], d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c], "
    "e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d], f: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e], "
    "g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f,*f], h: [*g,*g,*g,*g,*g,*g,*g,*g,*g,*g]}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_b8_a_hostile_value_is_one_line(keeps, name):
    keeps(Case((*CHECK, HOSTILE[name]), ("config.yaml",), statuses=REFUSED))
    dotted, _, text = HOSTILE[name].partition("=")
    section, _, field = dotted.partition(".")
    added = f"={{{field}: {text}}}" if field else f"={text}"
    keeps(Case(CHECK, ("config.yaml",), (Mutation("config.yaml", "replace", (section,), added),), statuses=REFUSED))


@pytest.mark.parametrize("kind", ["pipe", "folder", "sparse", "device", "loop", "missing", "socket"])
@pytest.mark.parametrize("words", [CHECK, TRAIN], ids=["check", "train"])
def test_b8_a_config_that_is_no_file_is_one_line(keeps, words, kind):
    keeps(Case(words, ("config.yaml",), (Mutation("config.yaml", kind, (1,)),), statuses=REFUSED))


@pytest.mark.parametrize("kind", ["deep_yaml", "deep_block", "long_line", "many_lines", "digits", "nul_bytes", "utf16"])
def test_b8_a_config_of_odd_text_is_one_line(keeps, kind):
    keeps(Case(CHECK, ("config.yaml",), (Mutation("config.yaml", "content", value=kind),), statuses=REFUSED))


HOLDERS = ("data.latents", "data.train_images", "data.heldout_images", "data.cache.dir", "checkpoint.dir", "run.dir")
OTHERS = ("run.name", "vae.path", "data.num_classes", "data.unknown", "deepspeed.raw.x")


@pytest.mark.parametrize("key", [*HOLDERS, *OTHERS])
def test_b9_no_secret_of_a_url_is_printed(keeps, key):
    for url in URLS.values():
        keeps(Case((*CHECK, f"{key}={url}"), ("config.yaml",)))


@pytest.mark.parametrize("url", URLS)
def test_b9_no_secret_of_a_key_or_a_word_is_printed(keeps, url):
    keeps(Case((*CHECK, f"{URLS[url]}=1"), ("config.yaml",), statuses=(1, 2)))
    keeps(Case(("ecar-data", "status", "missing", URLS[url])))


@pytest.mark.parametrize("kind", ["pipe", "sparse", "device", "folder", "loop"])
@pytest.mark.parametrize("file", ["COMMITTED", "checkpoint.json", "state-00000-of-00002.safetensors"])
@pytest.mark.parametrize("verb", ["list", "inspect", "train"])
def test_b10_no_file_of_a_checkpoint_hangs_a_reader(keeps, verb, file, kind):
    keeps(of_run(Mutation(f"{NEWEST}/{file}", kind, (1,)), words=READERS[verb], statuses=TAKEN))


def _fields():
    return sorted(json.loads((PRISTINE.root / NEWEST / "checkpoint.json").read_bytes()))


FIELDS = [
    "averages",
    "averages_since",
    "files",
    "identity",
    "notes",
    "progress",
    "run",
    "schema",
    "shapes",
    "world_size",
]


def test_b11_the_fields_are_those_of_a_manifest():
    assert set(FIELDS) <= set(_fields())


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize("field", [*FIELDS, "zero_stage"])
def test_b11_a_manifest_without_a_field_is_one_line(keeps, field, verb):
    keeps(of_run(Mutation(f"{NEWEST}/checkpoint.json", "delete", (field,)), words=READERS[verb], sealed=True))


@pytest.mark.parametrize("value", ["none", "zero", "list", "dict", "list_of_none", "word", "digits_400"])
@pytest.mark.parametrize("field", [*FIELDS, "zero_stage"])
def test_b11_a_manifest_with_an_odd_field_is_one_line(keeps, field, value):
    changed = Mutation(f"{NEWEST}/checkpoint.json", "replace", (field,), value)
    for verb in ("list", "diff"):  # each of the others reads in the same way as one of these
        keeps(of_run(changed, words=READERS[verb], sealed=True))


def test_b12_a_checkpoint_under_the_name_of_another_step(keeps):
    copied = Mutation(f"{NEWEST}/checkpoint.json", "copy_as", (1, 1, 1), "step")
    keeps(of_run(copied, statuses=REFUSED))
    resumed = keeps(of_run(copied, words=TRAIN, statuses=TAKEN))
    assert "resuming at step 6" in resumed.stdout


@pytest.mark.parametrize("word", ["off", "1", "null", "2024-01-01", "1e3", "0x1f", "yes"])
def test_b21_a_word_of_yaml_is_a_word_where_a_word_is_wanted(keeps, word):
    assert keeps(Case((*CHECK, f"run.name={word}"), ("config.yaml",))).status in (0, 1)
