"""Job scripts made from templates."""

import re
import subprocess

import pytest

from ecar_dist.cluster.job_script import find_scripts, option_words, parse_option, render
from ecar_dist.errors import ConfigError

TEMPLATE = """\
#!/usr/bin/env bash
# What it is for.
#SBATCH --nodes=1 --requeue
#SBATCH --gpus-per-node=8
#SBATCH --output='my logs/%x.log'
set -euo pipefail
#SBATCH of a comment in the body
printf '<%s>\\n' "$VENV" "$@"
"""


def directives(script):
    return [line for line in script.splitlines() if line.startswith("#SBATCH --")]


def test_options_are_replaced_where_they_stand_added_at_the_end_or_taken_away():
    script = render(TEMPLATE, {"time": "1:00", "nodes": "2-4", "gpus-per-node": None}, {"VENV": "v"}, [])
    assert directives(script) == [
        "#SBATCH --nodes=2-4",
        "#SBATCH --requeue",
        "#SBATCH --output='my logs/%x.log'",
        "#SBATCH --time=1:00",
    ]
    assert script.startswith("#!/usr/bin/env bash\n# What it is for.\n")


def test_the_body_stays_as_it_is_and_comes_last():
    body = TEMPLATE.partition("my logs/%x.log'\n")[2]
    assert render(TEMPLATE, {"nodes": "2"}, {"VENV": "v"}, []).endswith(body)


@pytest.mark.parametrize("text", ["a b", "it's", '"', "$HOME", "`id`", "$(id)", "a\\b", "*", "ü", "--x", "", "%j"])
def test_exports_and_arguments_reach_the_body_as_they_are(text, tmp_path):
    script = tmp_path / "job script"
    script.write_text(render(TEMPLATE, {}, {"VENV": text}, [text, "b"]))
    done = subprocess.run(["bash", str(script), "later"], capture_output=True, text=True, check=True)
    assert done.stdout == f"<{text}>\n<{text}>\n<b>\n<later>\n"


def test_options_as_words():
    assert option_words({"nodes": "2", "exclusive": "", "gpus": None}) == ["--nodes=2", "--exclusive"]
    assert parse_option("--comment=a=b c") == ("comment", "a=b c")
    assert parse_option("--exclusive") == ("exclusive", "")


@pytest.mark.parametrize("text", ["-pgpu", "partition=gpu", "--", "--x y", "--a=1\n#SBATCH --b"])
def test_what_is_no_long_option_is_refused(text):
    with pytest.raises(ConfigError, match=re.escape("--sbatch=")):
        parse_option(text)


def test_where_the_scripts_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (find_scripts(None) / "train.sbatch").is_file(), "next to the package"
    (tmp_path / "slurm").mkdir()
    for name in ("train.sbatch", "env.sh"):
        assert find_scripts(None).is_absolute(), "an incomplete folder does not count"
        (tmp_path / "slurm" / name).write_text("")
    assert str(find_scripts(None)) == "slurm"
    with pytest.raises(ConfigError, match=r"nowhere.*--scripts"):
        find_scripts(tmp_path.relative_to(tmp_path) / "nowhere")
