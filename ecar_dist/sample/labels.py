"""Labels as a user writes them: class numbers, ranges, class names and `none`. Does not import torch."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence

from ecar_dist.errors import ConfigError
from ecar_dist.storage.untrusted import printable

NONE = "none"  # the null label: a sample of the unconditional model
LONGEST_NAME = 40  # characters of a class name in a file name
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)
_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})", re.ASCII)


class ClassNames:
    """The labels 0..num_classes-1 of a model, their names if it knows them, and the null label num_classes."""

    def __init__(self, num_classes: int, names: Sequence[str] | None = None) -> None:
        self.num_classes = num_classes
        self.names = tuple(names) if names is not None else None

    def title(self, label: int) -> str:
        """The readable name of a label: that of its class, else its number; `none` for the null label."""
        if label == self.num_classes:
            return NONE
        return self.names[label] if self.names is not None else str(label)

    def file_part(self, label: int) -> str:
        """The label as a part of a file name, in ASCII: `class3`, `class3-flags`, `none`."""
        if label == self.num_classes:
            return NONE
        # Letters without their accents; other characters become an underscore.
        plain = unicodedata.normalize("NFKD", self.title(label)).encode("ascii", "ignore").decode()
        name = re.sub(r"[^A-Za-z0-9._]+", "_", plain).strip("._")[:LONGEST_NAME]
        return f"class{label}-{name}" if name and name != str(label) else f"class{label}"

    def parse(self, text: str) -> list[int]:
        """The labels in a list such as `flags,faces`, `0-3,7` or `none`. Raises ConfigError for an unknown one."""
        parts = text.split(",")
        labels: list[int] = []
        while parts:
            # A name may itself contain commas: take the longest match.
            length = next((n for n in range(len(parts), 1, -1) if self._named(",".join(parts[:n]))), 1)
            labels += self._labels_of(",".join(parts[:length]).strip())
            del parts[:length]
        return labels

    def label(self, label: int | str | None) -> int:
        """One label: its number, its name, or None for the null label. Raises ConfigError."""
        if label is None:
            return self.num_classes
        labels = self._labels_of(str(label).strip())
        if len(labels) != 1:
            raise ConfigError(f"label {printable(str(label), 60)} is a range; give one class")
        return labels[0]

    def _labels_of(self, word: str) -> list[int]:
        if word == NONE:
            return [self.num_classes]

        # A class number; else a class name, even if that is a number; else a range.
        if _NUMBER.fullmatch(word) and int(word) < self.num_classes:
            return [int(word)]
        if found := self._named(word):
            if len(found) > 1:
                raise ConfigError(
                    f"label {printable(word, 60)} is the name of classes {', '.join(map(str, found))}; give the number "
                    "of one of them"
                )
            return found
        if match := _RANGE.fullmatch(word):
            return self._range(int(match[1]), int(match[2]))
        raise ConfigError(self._unknown(word))

    def _named(self, word: str) -> list[int]:
        """The classes of this name; if there is none, those whose name differs only in case."""
        names = self.names or ()
        word = word.strip()
        exact = [label for label, name in enumerate(names) if name == word]
        return exact or [label for label, name in enumerate(names) if name.casefold() == word.casefold()]

    def _range(self, first: int, last: int) -> list[int]:
        if first > last:
            raise ConfigError(f"label range {first}-{last} runs backwards; give {last}-{first}")
        if last >= self.num_classes:
            raise ConfigError(f"label range {first}-{last} is outside 0..{self.num_classes - 1}; {self._known()}")
        return list(range(first, last + 1))

    def _unknown(self, word: str) -> str:
        shown = printable(word, 60)
        if _NUMBER.fullmatch(word) or re.fullmatch(r"-\d+", word):
            return f"label {shown} is outside 0..{self.num_classes - 1}; {self._known()}"
        if self.names is None:
            return f"label {shown!r} is not a class number, and this model has no class names; {self._known()}"
        close = difflib.get_close_matches(word.casefold()[:80], [name.casefold() for name in self.names], 1, 0.5)
        if close:
            return f"label {shown!r} is not known; did you mean {self.names[self._named(close[0])[0]]}?"
        return f"label {shown!r} is not known; {self._known()}"

    def _known(self) -> str:
        """What can be given instead."""
        given = f"give numbers, ranges such as 0-{min(3, self.num_classes - 1)}, or none"
        if self.names is None:
            return f"the model has {self.num_classes} classes: {given}"
        shown = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
        return f"the model has {self.num_classes} classes ({shown}): {given}"
