"""The journal: units are done once, a killed run is taken up, another run's journal is refused."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from accelkit.calibration.journal import FORMAT, Journal
from accelkit.errors import InvalidInputError

HEADER = {"model": "a", "seed": 0}


def test_units_are_done_once(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    done: list[int] = []

    def work() -> dict:
        done.append(1)
        return {"x": (0.1, 2), "n": float(1 / 3)}

    book = Journal(path, HEADER, resume=False)
    first = book.unit("u", work)
    assert first == {"x": [0.1, 2], "n": 1 / 3}
    assert book.unit("u", work) == first
    book.close()
    again = Journal(path, HEADER, resume=True)
    assert again.unit("u", work) == first
    assert done == [1]
    assert again.seconds("u") == book.seconds("u")


def test_units_made_together_share_their_time_and_are_kept_apart(tmp_path) -> None:
    book = Journal(tmp_path / "journal.jsonl", HEADER, resume=False)
    book.put("b", "known", 1.0)
    asked: list[list[int]] = []

    def work(places: list[int]) -> list[str]:
        asked.append(places)
        return [f"made {n}" for n in places]

    found = book.together(["a", "b", "c"], work)
    assert found == ["made 0", "known", "made 2"]
    assert book.together(["c", "a"], work) == ["made 2", "made 0"]
    assert asked == [[0, 2]]
    assert book.seconds("a") == book.seconds("c")


def test_every_unit_is_on_disk_when_it_is_done(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    book = Journal(path, HEADER, resume=False)
    book.unit("u", lambda: 1)
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["unit"] == "u"


def test_half_a_line_is_dropped(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    book = Journal(path, HEADER, resume=False)
    book.unit("a", lambda: 1)
    book.unit("b", lambda: 2)
    book.close()
    text = path.read_text()
    path.write_text(text[:-7])
    again = Journal(path, HEADER, resume=True)
    assert "a" in again
    assert "b" not in again
    again.unit("b", lambda: 3)
    again.close()
    assert Journal(path, HEADER, resume=True)["b"] == 3


def test_a_line_without_its_end_is_dropped(tmp_path) -> None:
    """It may be whole by chance; another one behind it would spoil both."""
    path = tmp_path / "journal.jsonl"
    with closing(Journal(path, HEADER, resume=False)) as book:
        book.unit("a", lambda: 1)
    path.write_text(path.read_text().rstrip("\n"))
    with closing(Journal(path, HEADER, resume=True)) as book:
        book.unit("a", lambda: 1)
        book.unit("b", lambda: 2)
    with closing(Journal(path, HEADER, resume=True)) as book:
        assert (book["a"], book["b"]) == (1, 2)


def test_another_run_is_refused(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, HEADER, resume=False).close()
    with pytest.raises(InvalidInputError, match="seed: 0 there, 1 now"):
        Journal(path, {**HEADER, "seed": 1}, resume=True)
    Journal(path, {**HEADER, "seed": 1}, resume=False).close()


def test_a_journal_of_another_format_is_refused(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"journal": 1, "model": "a", "seed": 0}\n')
    with pytest.raises(InvalidInputError, match=f"journal: 1 there, {FORMAT} now"):
        Journal(path, HEADER, resume=True)


@pytest.mark.parametrize(
    "text", ["hello\n", '{"a": 1}\n', '{"journal": 3, "model": "a", "seed": 0}\nx\ny\n']
)
def test_no_journal(tmp_path, text: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match="journal"):
        Journal(path, HEADER, resume=True)


def test_cannot_be_written(tmp_path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read or written"):
        Journal(tmp_path, HEADER, resume=False)


def test_in_memory() -> None:
    book = Journal(None, HEADER, resume=False)
    assert book.unit("u", lambda: [1]) == [1]
    assert "u" in book


def test_compiling_is_held_apart(tmp_path) -> None:
    path, spent = tmp_path / "journal.jsonl", 0.0

    def work() -> None:
        nonlocal spent
        spent += 2.5

    book = Journal(path, HEADER, resume=False, compiled=lambda: spent)
    book.unit("fit", work)
    book.unit("screen/a", lambda: None)
    book.close()
    again = Journal(path, HEADER, resume=True)
    assert (again.compiling("fit"), again.compiling("screen/"), again.compiling()) == (2.5, 0, 2.5)
