"""Sheets of pictures with names above the columns and next to the rows."""

import numpy as np

from ecar_dist.sample.pictures import LABEL_HEIGHT, MARGIN, _drawable, _fitted, labelled_grid

PICTURE = np.zeros((20, 30, 3), np.uint8)


def test_a_sheet_has_room_for_the_names():
    sheet = labelled_grid([[PICTURE] * 3] * 2, ["a", "b", "c"], scale=2)
    assert sheet.shape == (LABEL_HEIGHT + MARGIN + 2 * (40 + MARGIN), MARGIN + 3 * (60 + MARGIN), 3)
    wider = labelled_grid([[PICTURE] * 3] * 2, ["a", "b", "c"], ["one", "another"], scale=2)
    assert wider.shape[0] == sheet.shape[0]
    assert 20 < wider.shape[1] - sheet.shape[1] < 100
    assert not np.array_equal(sheet, labelled_grid([[PICTURE] * 3] * 2, ["", "", ""], scale=2))


def test_long_names_are_cut_and_every_letter_is_one_that_the_font_has():
    class Pen:
        def textlength(self, text):
            return 6 * len(text)

    assert _fitted(Pen(), "golden retriever", 60) == "golden re."
    assert _fitted(Pen(), "dog", 60) == "dog"
    assert len(_fitted(Pen(), "x" * 1000, 60)) == 10
    assert _drawable("Über façade 猫") == "Uber facade ?"
