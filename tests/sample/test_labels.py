"""Labels as a user writes them."""

import pytest

from ecar_dist.errors import ConfigError
from ecar_dist.sample.labels import ClassNames
from tests.sample.made_models import NAMES

CLASSES = ClassNames(10, NAMES)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("0", [0]),
        ("3,1,3", [3, 1, 3]),
        ("0-3", [0, 1, 2, 3]),
        ("5-5, 0-1", [5, 0, 1]),
        ("flags,faces", [0, 1]),
        ("FACES", [1]),
        ("Food, drink", [2]),  # a name with a comma
        ("flags,food, drink,7", [0, 2, 7]),
        ("2019", [3]),  # a number that is a name but not a class number
        ("none", [10]),
        ("none,über", [10, 8]),
    ],
)
def test_numbers_ranges_names_and_none(text, labels):
    assert CLASSES.parse(text) == labels


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flgs", "did you mean flags?"),
        ("FOOD", "did you mean Food, drink?"),
        ("10", "outside 0..9"),
        ("-1", "outside 0..9"),
        ("3-1", "give 1-3"),
        ("4-12", "outside 0..9"),
        ("twin", "classes 4, 5"),
        ("xyzxyz", "(flags, faces, "),
        ("", "10 classes"),
        ("1,,2", "10 classes"),
    ],
)
def test_unknown_labels(text, said):
    with pytest.raises(ConfigError) as raised:
        CLASSES.parse(text)
    assert said in str(raised.value)


def test_a_model_without_names():
    classes = ClassNames(10)
    assert classes.parse("1,4-5,none") == [1, 4, 5, 10]
    assert (classes.title(4), classes.title(10), classes.file_part(4), classes.file_part(10)) == (
        "4",
        "none",
        "class4",
        "none",
    )
    with pytest.raises(ConfigError) as raised:
        classes.parse("flags")
    assert "no class names" in str(raised.value)


def test_single_labels():
    assert [CLASSES.label(one) for one in (3, "faces", None, "none")] == [3, 1, 10, 10]
    with pytest.raises(ConfigError):
        CLASSES.label("0-3")


def test_names_of_files_are_plain():
    names = ClassNames(4, ["../../etc", "a b/ü", "0" * 300, "..."])
    assert [names.file_part(label) for label in range(4)] == [
        "class0-etc",
        "class1-a_b_u",
        f"class2-{'0' * 40}",
        "class3",
    ]
