"""No command prints, logs or stores a secret of a URL, whatever its form.

One file may contain it: config.yaml of the run, which the run needs to continue. Only its owner can read it.
"""

import contextlib
import http.server
import io
import stat
import threading

import pytest

from data_tools.cli import main as ecar_data
from ecar_dist.cli import main
from ecar_dist.config.read import config_from_dict, load_config, shown_config
from ecar_dist.config.run import RunConfig
from ecar_dist.storage.redaction import redact, redact_text, redact_tree, scrub
from tests.conftest import write_yaml
from tests.fork_server import run_forked

SECRET = "S3cr3tW0rd"
FORMS = {
    "user and password": "s3://AKIAUSER:S3cr3tW0rd@bucket/a",
    "user and password of https": "https://user:S3cr3tW0rd@HOST/a",
    "user alone": "https://S3cr3tW0rd@HOST/a",
    "a slash in the password": "s3://AKIAUSER:x/S3cr3tW0rd@bucket/a",
    "an at sign in the password": "https://user:x@S3cr3tW0rd@HOST/a",
    "a quote in the password": "https://user:x'\"S3cr3tW0rd]@HOST/a",
    "a space in the password": "https://user:x S3cr3tW0rd@HOST/a",
    "without a host": "s3://AKIAUSER:S3cr3tW0rd",
    "percent-encoded user": "s3://AKIAUSER%3AS3cr3tW0rd%40bucket/a",
    "a signature": "https://HOST/a?X-Amz-Algorithm=x&X-Amz-Signature=S3cr3tW0rd",
    "sig": "https://HOST/a?sv=1&sig=S3cr3tW0rd",
    "token": "https://HOST/a?token=S3cr3tW0rd",
    "mixed case": "HTTPS://HOST/a?ToKeN=S3cr3tW0rd",
    "a bare query": "https://HOST/a?S3cr3tW0rd",
    "percent-encoded query": "https://HOST/a%3FX-Amz-Signature%3DS3cr3tW0rd",
    "fragment": "https://HOST/a#access_token=S3cr3tW0rd",
    "path parameter": "https://HOST/a;sig=S3cr3tW0rd",
    "chained": "simplecache::s3://AKIAUSER:S3cr3tW0rd@bucket/a",
    "several": "s3://bucket/a,s3://AKIAUSER:S3cr3tW0rd@bucket/b",
}
KEYS = ("data.latents", "data.images", "data.mixture", "data.cache.dir", "data.heldout_images", "data.train_images")
KEYS += ("vae.path", "checkpoint.dir", "run.dir", "deepspeed.raw")
TORCH_FREE = ("check", "plan", "submit")


@pytest.fixture(scope="module")
def host():
    """A server that refuses every request and repeats it in its answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = f"no {self.path} for {self.headers.get('Authorization')}".encode()
            self.send_response(403, f"no {self.path}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_PUT = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def place(tree, key, url):
    """The config with `url` as the value of `key`."""
    tree = {name: dict(section) for name, section in tree.items()}
    section, *path = key.split(".")
    if key in ("data.images", "data.mixture"):
        del tree["data"]["latents"]
    if key == "data.mixture":
        tree["data"]["mixture"] = [{"latents": url, "weight": 1.0}]
    elif key == "data.cache.dir":
        tree["data"]["cache"] = {"dir": url}
    elif key == "deepspeed.raw":
        tree["deepspeed"]["raw"] = {"monitor": {"api_key": SECRET, "where": [url]}}
    else:
        tree.setdefault(section, {})[path[0]] = url
    return tree


def said_by(*words, program=main):
    """What a command prints, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        program(list(map(str, words)))
    return out.getvalue() + err.getvalue()


def arguments(command):
    return ["--nodes", "1", "--gpus-per-node", "0", "--ranks-per-node", "1", "--dry-run"] if command == "submit" else []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", KEYS)
def test_what_needs_no_torch_prints_no_secret(make_tree, tmp_path, form, key, host):
    url = FORMS[form].replace("HOST", host)
    config = write_yaml(place(make_tree(tmp_path), key, url), tmp_path)
    for command in TORCH_FREE:
        said = said_by(command, config, *arguments(command))
        assert said
        assert SECRET not in said, said
    plain = write_yaml(make_tree(tmp_path), tmp_path)
    assigned = f"{key}=[{{latents: '{url}', weight: x}}]" if key == "data.mixture" else f"{key}={url}"
    emptied = ["data.latents="] if key in ("data.images", "data.mixture") else []
    for override in (assigned, assigned.replace("=", "x=", 1), url, f"train.total_samples={url}", f"{url}=1"):
        for command in TORCH_FREE:
            said = said_by(command, plain, *emptied, override, *arguments(command))
            assert said
            assert SECRET not in said, said


@pytest.mark.parametrize("form", FORMS)
def test_a_config_that_breaks_a_rule_is_refused_without_its_secrets(make_tree, tmp_path, form):
    tree = make_tree(tmp_path)
    for change in (
        {"run": {"name": FORMS[form]}},
        {"data": {**tree["data"], "num_classes": FORMS[form]}},
        {"data": {**tree["data"], FORMS[form]: 1}},
        {"data": [FORMS[form]]},
        {FORMS[form]: 1},
        {"model": {"kind": FORMS[form]}},
        {"flow": {"ends": [FORMS[form]]}},
    ):
        said = said_by("check", write_yaml(tree | change, tmp_path))
        assert said.startswith("ecar-dist: ")
        assert SECRET not in said
    (tmp_path / "broken.yaml").write_text(f"a: {FORMS[form]}\n  b: [{FORMS[form]}\n")
    assert SECRET not in said_by("check", tmp_path / "broken.yaml")
    assert SECRET not in said_by("check", FORMS[form])


WHERE_A_FOLDER_BELONGS = [
    (main, ("sample", "URL", "--labels", "0", "--count", "1", "--out", "OUT")),
    (main, ("preview", "URL")),
    (main, ("evaluate", "URL")),
    (main, ("status", "URL")),
    (main, ("checkpoint", "list", "URL")),
    (main, ("checkpoint", "inspect", "URL")),
    (main, ("checkpoint", "verify", "URL")),
    (main, ("checkpoint", "diff", "URL", "URL")),
    (main, ("checkpoint", "export", "URL", "--out", "OUT")),
    (main, ("drill", "all", "URL")),
    (main, ("tensorboard", "URL")),
    (main, ("check", "URL", "--nope=URL")),
    (main, ("plan", "CONFIG", "--device", "URL")),
    (main, ("URL",)),
    (ecar_data, ("shard", "URL", "URL")),
    (ecar_data, ("index", "s3://URL", "URL")),
    (ecar_data, ("encode", "OUT", "OUT", "--vae", "URL", "--image-size", "32")),
    (ecar_data, ("encode", "OUT", "URL", "--vae", "dct-f8", "--image-size", "32")),
    (ecar_data, ("finalize", "URL")),
    (ecar_data, ("verify", "URL")),
    (ecar_data, ("stats", "URL")),
    (ecar_data, ("preview", "URL", "--out", "OUT")),
    (ecar_data, ("train-vae", "OUT", "URL")),
]


@pytest.mark.parametrize("form", FORMS)
def test_a_url_where_a_folder_belongs_is_not_repeated_with_its_secrets(form, tmp_path, write_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, url = str(write_config()), FORMS[form].replace("HOST", "127.0.0.1:1")
    for program, words in WHERE_A_FOLDER_BELONGS:
        given = [word.replace("CONFIG", config).replace("OUT", "out").replace("URL", url) for word in words]
        said = said_by(*given, program=program)
        assert said
        assert SECRET not in said, said
    assert not [path for path in tmp_path.rglob("*") if SECRET in str(path)]


@pytest.mark.parametrize("form", FORMS)
def test_training_that_cannot_begin_names_no_secret(make_tree, tmp_path, form, host):
    url = FORMS[form].replace("HOST", host)
    for key in ("data.latents", "data.images", "checkpoint.dir"):
        config = write_yaml(place(make_tree(tmp_path), key, url), tmp_path)
        for command in ("train", "preflight"):
            done = run_forked(command, str(config), timeout=100)
            said = done.stdout + done.stderr
            assert done.returncode != 0 or command == "preflight"
            assert SECRET not in said, said
    assert SECRET.encode() not in left_in(tmp_path)


def left_in(folder):
    """The content of all files in the folder, except the configs."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"]
    return b"".join(path.read_bytes() for path in files)


def test_a_whole_run_leaves_no_secret(make_tree, tmp_path, digits, monkeypatch):
    tree = make_tree(tmp_path)
    tree["log"]["tensorboard"] = True
    tree["train"]["total_samples"] = 32
    forms = list(FORMS.values())
    tree["vae"]["path"] = forms[0]
    tree["data"] |= {"train_images": forms[5], "heldout_images": forms[9]}
    said = ""
    for changes in ([], ["train.total_samples=48", f"vae.path={forms[8]}", f"data.heldout_images={forms[14]}"]):
        done = run_forked("train", str(write_yaml(tree, tmp_path)), *changes)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    run = tmp_path / "runs/tiny"
    assert "config on resume: vae.path" in said
    for words in (
        ("status", run),
        ("status", run, "--json"),
        ("status", tmp_path / "runs"),
        ("checkpoint", "list", run),
        ("checkpoint", "inspect", run),
        ("checkpoint", "inspect", run, "--json"),
        ("checkpoint", "verify", run),
        ("checkpoint", "diff", run, run),
        ("checkpoint", "export", run, "--out", tmp_path / "export"),
        ("sample", run, "--labels", "0", "--count", "1", "--out", tmp_path / "samples"),
        ("evaluate", run),
    ):
        printed = said_by(*words)
        assert printed
        said += printed
    assert SECRET not in said
    assert (tmp_path / "export/config.yaml").exists()
    left = left_in(tmp_path)
    assert len(left) > 10_000
    assert SECRET.encode() not in left
    assert SECRET not in (tmp_path / "export/config.yaml").read_text()
    assert SECRET in (run / "config.yaml").read_text()
    assert stat.S_IMODE((run / "config.yaml").stat().st_mode) == 0o600
    assert load_config(run / "config.yaml").vae.path == forms[8]


@pytest.mark.parametrize("form", FORMS)
def test_redaction_of_each_form(form):
    assert SECRET not in redact(FORMS[form])
    assert SECRET not in str(redact_tree({"a": [{"b": FORMS[form]}]}))
    assert redact(redact(FORMS[form])) == redact(FORMS[form])


def test_no_key_of_ours_is_taken_for_a_secret(tree):
    config = config_from_dict(tree)
    assert redact_tree(config.model_dump(mode="json")) == config.model_dump(mode="json")
    assert load_from(shown_config(config)) == config
    assert redact_text("flow.token_draws=4") == "flow.token_draws=4"
    assert {"api_key", "token", "aws_secret_access_key"} <= {
        name
        for name, value in redact_tree(dict.fromkeys(["api_key", "token", "aws_secret_access_key"], "x")).items()
        if value == "***"
    }


def load_from(text):
    import yaml

    return RunConfig.model_validate(yaml.safe_load(text))


def test_a_secret_of_the_environment_is_hidden_and_a_path_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    monkeypatch.setenv("SHARED_CREDENTIALS_FILE", str(tmp_path))
    assert redact_text(f"{SECRET} in {tmp_path}") == f"*** in {tmp_path}"
    assert redact_tree([SECRET, str(tmp_path)]) == ["***", str(tmp_path)]


def test_a_bearer_is_hidden_in_foreign_words():
    assert SECRET not in scrub(f"Authorization: Bearer {SECRET}")
