"""Splits by subject."""

import pytest

from ngd_fast.artifacts.files import read_json
from ngd_fast.errors import UserError
from ngd_fast.teacher.splits import Split, fixed_split, kfold, leave_one_out, save_splits

SUBJECTS = [s for s in range(1, 24) for _ in range(3)]


@pytest.mark.parametrize("fraction", [0.0, 0.25])
@pytest.mark.parametrize("folds", [2, 7, 23])
def test_folds_are_disjoint_by_subject_and_cover_everybody_once(folds, fraction):
    splits = kfold(SUBJECTS, folds, validation_fraction=fraction, seed=1)
    assert sorted(s for split in splits for s in split.test) == list(range(1, 24))
    assert {len(split.test) for split in splits} <= {23 // folds, -(-23 // folds)}
    for split in splits:
        # Split itself refuses a subject on two sides; here: nobody is lost.
        assert sorted((*split.train, *split.validation, *split.test)) == list(range(1, 24))
        assert bool(split.validation) == bool(fraction)
    assert splits == kfold(SUBJECTS, folds, validation_fraction=fraction, seed=1)
    if folds == 7:
        assert splits != kfold(SUBJECTS, folds, validation_fraction=fraction, seed=2)


def test_leave_one_out_and_fixed():
    splits = leave_one_out(SUBJECTS, validation_fraction=0.2)
    assert [split.test for split in splits] == [(s,) for s in range(1, 24)]
    named = fixed_split(SUBJECTS, validation=[5, 2, 5])
    assert named.validation == (2, 5) and len(named.train) == 21 and named.test == ()
    drawn = fixed_split(SUBJECTS, fraction=0.25, seed=4)
    assert len(drawn.validation) == 6 and drawn == fixed_split(SUBJECTS, fraction=0.25, seed=4)
    assert len(fixed_split([1, 2], fraction=0.01).validation) == len(fixed_split([1, 2], fraction=0.99).train) == 1


def test_what_cannot_be_split_is_a_users_error():
    for call, message in (
        (lambda: fixed_split([3, 3, 3]), "needs at least 2"),
        (lambda: fixed_split([1, 2], validation=[7]), r"\[7\] have no labelled window"),
        (lambda: fixed_split([1, 2], validation=[1, 2]), "leave at least one"),
        (lambda: kfold([1, 2, 3], 4), "from 2 to"),
        (lambda: kfold([1, 2, 3], 1), "from 2 to"),
        (lambda: kfold([1, 2], 2, validation_fraction=0.5), "needs more subjects"),
        (lambda: leave_one_out([1]), "needs at least 2"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(ValueError, match="two sides"):
        Split("x", (1, 2), (2,))


def test_the_file_names_every_side_of_every_split(tmp_path):
    splits = kfold(SUBJECTS, 5, validation_fraction=0.2)
    save_splits(tmp_path / "splits.json", "5", splits)
    stored = read_json(tmp_path / "splits.json")
    assert stored["scheme"] == "5" and [Split(**split) for split in stored["splits"]] == splits
