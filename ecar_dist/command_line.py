"""What all commands share: arguments, tables, and how a command ends: one line on stderr and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import locale
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from ecar_dist.errors import EcarError, FruitlessError, NodeError
from ecar_dist.storage.redaction import redact_text
from ecar_dist.storage.untrusted import printable

EX_TEMPFAIL = 75  # stopped early, nothing lost: run the same command again
EX_FRUITLESS = 93  # failed repeatedly without progress: do not requeue
EX_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
LARGEST_COUNT = 2**31 - 1  # for a number on the command line: it fits the integers of every library
LONGEST_LINE = 4_000  # characters of an error message: a command to repeat may contain several paths
EXAMPLES_TITLE = "examples:\n"
EX_BROKEN_PIPE = 141  # 128 + SIGPIPE: the command may not have finished

_STATUSES: dict[type[BaseException], int] = {
    FruitlessError: EX_FRUITLESS,
    NodeError: EX_TEMPFAIL,
    KeyboardInterrupt: EX_INTERRUPTED,
    BrokenPipeError: EX_BROKEN_PIPE,
}

AddCommand = Callable[[str, Any, str], argparse.ArgumentParser]  # (name, what it runs, help) -> its parser


def positive(text: str) -> int:
    """A whole number from 1 to LARGEST_COUNT, for argparse."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
    if not 1 <= number <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(
            f"{printable(redact_text(text), 30)} is not a whole number from 1 to {LARGEST_COUNT:,}"
        )
    return number


def not_negative(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{printable(redact_text(text), 30)} is not a finite number of at least 0")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{printable(redact_text(text), 30)} is not a finite number above 0")
    return value


def counted(number: int, thing: str) -> str:
    """`1 rank`, `1,200 ranks`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """The two largest units: 3d04h, 1h02m, 1m35s; below a minute 7s. A negative time is 0s."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def columns(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """The rows of a table as lines with aligned columns; the columns in `left` are aligned to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


class _Help(argparse.HelpFormatter):
    """Adds the default to the help text of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.option_strings and action.nargs != 0 and action.default not in (None, argparse.SUPPRESS, "", [])
        return f"{action.help} (default: %(default)s)" if shown else action.help

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Lines that are commands are not wrapped, so that they can be copied."""
        return text if text.startswith(EXAMPLES_TITLE) else super()._fill_text(text, width, indent)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors do not repeat secrets in URLs. Its subcommands have parsers of this class."""

    def __init__(self, *, formatter_class: Any = _Help, **settings: Any) -> None:
        super().__init__(formatter_class=formatter_class, **settings)

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


class _PrintCompletion(argparse.Action):
    """Print the shell completion for all commands, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        import shtab

        print(shtab.complete(parser, values))
        parser.exit()


def finish_parser(parser: argparse.ArgumentParser, examples: Mapping[str, Sequence[str]]) -> None:
    """Add `--print-completion` to a program, and the examples of each command to the end of its help."""
    shells = ("bash", "zsh", "tcsh")
    help = "print the completion for bash, zsh or tcsh, to be evaluated by the shell (default: none)"
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=shells,
        metavar="SHELL",
        default=argparse.SUPPRESS,  # it is not an argument of a command
        help=help,
    )
    _add_examples(parser, examples)


def _add_examples(parser: argparse.ArgumentParser, examples: Mapping[str, Sequence[str]]) -> None:
    if parser.prog in examples:
        parser.epilog = EXAMPLES_TITLE + "\n".join(f"  {line}" for line in examples[parser.prog])
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _add_examples(below, examples)


def say(text: str) -> None:
    """Print a line to the log of a long job. A closed pipe or a full disk does not end the job."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def prepare_process() -> None:
    """Called first by the console scripts: makes threads sleep while they wait, files UTF-8 and standard streams open.

    By default, OpenMP threads spin while they wait. On a machine with other work, they then take many times the CPU
    time of one thread, and are slower (docs/training.md). The library reads the variable when torch is imported.

    Libraries read their files in the encoding of the locale, which is ASCII under `LC_ALL=C` with PYTHONUTF8=0. In that
    case the process replaces itself with the same command in Python's UTF-8 mode. A standard stream that the shell has
    closed (`>&-`) becomes /dev/null. Otherwise the next file that is opened would get its number, and receive the
    printed output.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    other_locale = not sys.flags.utf8_mode and locale.getencoding().lower() not in ("utf-8", "utf8")
    if other_locale and os.environ.get("PYTHONUTF8") != "1":  # if it is set, Python was told to ignore it (-I, -E)
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, os.fdopen(handle, "w" if number else "r"))


def run_command(program: str, action: Callable[[], int]) -> int:
    """Run a command; returns its exit status. An error that a user can fix is one line; ECAR_TRACEBACK=1 shows more."""
    os.umask(os.umask(0o077) | 0o002)  # whatever the shell allows, files are not writable by others
    try:
        return action()
    except BrokenPipeError as closed:
        # The reader (head, less) has ended. What is still buffered must not be flushed into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status_of(closed)
    except (EcarError, OSError) as error:
        if os.environ.get("ECAR_TRACEBACK"):
            raise
        print(f"{program}: {error_line(error)}", file=sys.stderr)
        return status_of(error)
    except KeyboardInterrupt as interrupt:
        print(f"{program}: interrupted; run the same command again to continue", file=sys.stderr)
        return status_of(interrupt)


def error_line(error: EcarError | OSError) -> str:
    """The line that is printed for an error."""
    return one_line(str(error) if isinstance(error, EcarError) else _sentence(error))


def one_line(said: str) -> str:
    """A message on one line of limited length, without secrets: a path may be a URL with a password."""
    line = printable(redact_text(said), len(said))
    # cut in the middle, because the fix is at the end
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 500]} ... {line[-480:]}"


def status_of(error: BaseException) -> int:
    """The exit status of a command that ends with this error; 1 unless it has its own, as in Python itself."""
    return next((status for kind, status in _STATUSES.items() if isinstance(error, kind)), 1)


def _sentence(error: OSError) -> str:
    """The system's error message, with the fix for the most frequent errors."""
    fix = {
        errno.ENOSPC: "free space there, or give another folder",
        errno.EDQUOT: "free space there, or give another folder",
        errno.EROFS: "give a folder that can be written",
        errno.EACCES: "check its permissions, or give another folder",
        errno.ENOTDIR: "give a folder",
        errno.EEXIST: "give another name",
        errno.EMFILE: "raise `ulimit -n`",
    }.get(error.errno or 0, "ECAR_TRACEBACK=1 shows where it happened")
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}; {fix}"
