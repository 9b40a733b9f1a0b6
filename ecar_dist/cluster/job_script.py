"""Job scripts from templates: adapted #SBATCH lines, exported variables, then the unchanged body of the template."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ecar_dist.errors import ConfigError
from ecar_dist.package_files import SLURM, package_folder
from ecar_dist.storage.untrusted import printable

SITE_FILE = "env.sh"
EXPORTS_TITLE = "# set by `ecar-dist submit`"  # the line above the exported variables
_DIRECTIVE = "#SBATCH "
_LONG_OPTION = re.compile(r"--([a-z][a-z-]*)(?:=(.*))?")

# Long options of sbatch by name, without "--". The value "" is a flag; None removes the option from the template.
Options = Mapping[str, str | None]


def find_scripts(given: Path | None) -> Path:
    """The folder of the job scripts: the given one, else slurm/ in the current folder, else the one in the package.

    Raises ConfigError if it does not contain train.sbatch and env.sh.
    """
    candidates = [given] if given else [Path("slurm"), package_folder(SLURM)]
    for folder in candidates:
        if all((folder / name).is_file() for name in ("train.sbatch", SITE_FILE)):
            return folder
    where = " or ".join(map(str, candidates))
    raise ConfigError(f"no train.sbatch and {SITE_FILE} in {where}; give their folder with --scripts DIR")


def parse_option(text: str) -> tuple[str, str]:
    """Name and value of a long option of sbatch. Raises ConfigError for anything else."""
    match = _LONG_OPTION.fullmatch(text)
    if match is None or not text.isprintable():
        raise ConfigError(f"--sbatch={printable(text)} is not a long option; give one such as --sbatch=--partition=gpu")
    return match[1], match[2] or ""


def require_printable(what: str, values: Iterable[str]) -> None:
    """Raises ConfigError for a value that must not be in a job script or in a command of Slurm. `what` names it.

    Quoting is enough for a shell. But a newline ends the comment in which sbatch looks for its options, even if it is
    quoted, and NUL cannot be written at all.
    """
    for value in values:
        if not value.isprintable():
            raise ConfigError(f"{what} {value!a} has a character that is not printable; choose a name without it")


def option_words(options: Options) -> list[str]:
    """The options as words of a command line, without those that are None. Raises as `require_printable`."""
    for name, value in options.items():
        require_printable(f"option --{name} of sbatch", [value or ""])
    return [f"--{name}={value}" if value else f"--{name}" for name, value in options.items() if value is not None]


def render(template: str, options: Options, exports: Mapping[str, str], arguments: Sequence[str]) -> str:
    """The template with `options`, `exports` and `arguments`.

    Args:
        template: text of the job script.
        options: replace those of the template; others are added after them.
        exports: environment variables, set before the body.
        arguments: come before those that the script is submitted with.

    Raises ConfigError as `require_printable`.
    """
    require_printable("argument of a job script", arguments)
    for name, value in exports.items():
        require_printable(f"variable {name} of a job script", [value])

    # sbatch reads its options up to the first command, so the part before the body ends with the last option.
    template_lines = template.splitlines()
    comments = itertools.takewhile(lambda line: line.startswith("#") or not line, template_lines)
    last = max((number for number, line in enumerate(comments) if line.startswith(_DIRECTIVE)), default=0)

    # The options.
    remaining = dict(options)
    lines: list[str] = []
    for line in template_lines[: last + 1]:
        lines += _replaced(line, remaining) if line.startswith(_DIRECTIVE) else [line]
    lines += [_directive(word) for word in option_words(remaining)]

    # The variables and arguments, then the body.
    exported = " ".join(f"{name}={shlex.quote(value)}" for name, value in exports.items())
    lines += ["", EXPORTS_TITLE, f"export {exported}", f'set -- {shlex.join(arguments)} "$@"', ""]
    return "\n".join([*lines, *template_lines[last + 1 :]]) + "\n"


def _replaced(line: str, remaining: dict[str, str | None]) -> list[str]:
    """A #SBATCH line as one line for each option. Options in `remaining` are taken from there instead."""
    words: list[str] = []
    for word in shlex.split(line.removeprefix(_DIRECTIVE), comments=True):
        name = word.removeprefix("--").partition("=")[0]
        if name in remaining:
            words += option_words({name: remaining.pop(name)})
        else:
            words.append(word)
    return [_directive(word) for word in words]


def _directive(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{_DIRECTIVE}{name}{equals}{shlex.quote(value) if equals else ''}"
