"""A job script from its template: other #SBATCH lines, some exported variables, and the body as it is."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ecar_dist.errors import ConfigError
from ecar_dist.storage.untrusted import printable

SITE_FILE = "env.sh"
_DIRECTIVE = "#SBATCH "
_LONG_OPTION = re.compile(r"--([a-z][a-z-]*)(?:=(.*))?")

Options = Mapping[str, str | None]  # of sbatch, by long name; "" is a flag, None takes the template's away


def find_scripts(given: Path | None) -> Path:
    """The folder of the job scripts: the given one, else slurm/ here, else slurm/ beside the package.

    Raises ConfigError where it holds no train.sbatch and env.sh.
    """
    places = [given] if given else [Path("slurm"), Path(__file__).parents[2] / "slurm"]
    for place in places:
        if all((place / name).is_file() for name in ("train.sbatch", SITE_FILE)):
            return place
    where = " or ".join(map(str, places))
    raise ConfigError(
        f"no train.sbatch and {SITE_FILE} in {where}; give the folder of the job scripts as --scripts DIR"
    )


def parse_option(text: str) -> tuple[str, str]:
    """Name and value of one long option of sbatch. Raises ConfigError for anything else."""
    match = _LONG_OPTION.fullmatch(text)
    if match is None or not text.isprintable():
        raise ConfigError(f"--sbatch={printable(text)} is not a long option; give one such as --sbatch=--partition=gpu")
    return match[1], match[2] or ""


def require_printable(what: str, values: Iterable[str]) -> None:
    """Raises ConfigError, saying `what` they are, for a value that no script and no command of Slurm may be given.

    Quoting holds against a shell, but a newline ends the comment in which sbatch looks for its options, whatever stands
    around it; and NUL cannot be written at all.
    """
    for value in values:
        if not value.isprintable():
            raise ConfigError(f"{what} {value!a} has a character that is not printable; choose a name without it")


def option_words(options: Options) -> list[str]:
    """The options as words of a command line; those taken away are none. Raises ConfigError as `require_printable`."""
    for name, value in options.items():
        require_printable(f"option --{name} of sbatch", [value or ""])
    return [f"--{name}={value}" if value else f"--{name}" for name, value in options.items() if value is not None]


def render(template: str, options: Options, exports: Mapping[str, str], arguments: Sequence[str]) -> str:
    """The template with `options` in place of its own or after them, then `exports` and `arguments`, then its body.

    Arguments that the script is submitted with come after these. Raises ConfigError as `require_printable`.
    """
    require_printable("argument of a job script", arguments)
    for name, value in exports.items():
        require_printable(f"variable {name} of a job script", [value])
    head, body = _split(template)
    left = dict(options)
    lines: list[str] = []
    for line in head:
        lines += [_directive(word) for word in _merged(line, left)] if line.startswith(_DIRECTIVE) else [line]
    lines += [_directive(word) for word in option_words(left)]
    exported = " ".join(f"{name}={shlex.quote(value)}" for name, value in exports.items())
    lines += [
        "",
        "# what `ecar-dist submit` was told",
        f"export {exported}",
        f'set -- {shlex.join(arguments)} "$@"',
        "",
    ]
    return "\n".join([*lines, *body]) + "\n"


def _split(template: str) -> tuple[list[str], list[str]]:
    """The lines up to the last #SBATCH line that sbatch heeds, which is before the first command, and the others."""
    lines = template.splitlines()
    heeded = itertools.takewhile(lambda numbered: numbered[1].startswith("#") or not numbered[1], enumerate(lines))
    last = max((number for number, line in heeded if line.startswith(_DIRECTIVE)), default=0)
    return lines[: last + 1], lines[last + 1 :]


def _merged(line: str, left: dict[str, str | None]) -> list[str]:
    """The options of one #SBATCH line; those in `left` are taken from there."""
    words: list[str] = []
    for word in shlex.split(line.removeprefix(_DIRECTIVE), comments=True):
        name = word.removeprefix("--").partition("=")[0]
        words += option_words({name: left.pop(name)}) if name in left else [word]
    return words


def _directive(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{_DIRECTIVE}{name}{equals}{shlex.quote(value) if equals else ''}"
