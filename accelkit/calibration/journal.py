"""The journal: one JSON line for each finished unit of calibration, written as it finishes.

A unit has a key and a value of plain data. Asked for a unit that it knows, the journal answers with
the stored value, durations included, so a calibration that is resumed takes the same decisions. The
first line names what the journal belongs to; a half-written last line of a killed run is dropped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from accelkit.errors import InvalidInputError

FORMAT = 5
"""Of the units' values; a journal of another one is refused."""


def holds_units(path: Path) -> bool:
    """Whether a file has lines behind a journal's first: work that would be lost with it."""
    try:
        return path.read_bytes().count(b"\n") > 1
    except OSError:  # there is none
        return False


class Journal:
    """Finished units by key.

    Args:
        path: the file; None keeps the units in memory only.
        belongs_to: what must agree for two runs to share units (model, settings, seed).
        resume: take up the units of an older file; otherwise the file is begun anew.
        compiled: seconds of this process that went into compiling kernels so far, which units hold
            apart: the next run on this machine does not pay them.

    Raises:
        InvalidInputError: the file cannot be written, is no journal, or belongs to another run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        belongs_to: Mapping[str, Any],
        resume: bool,
        compiled: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.header = _plain({"journal": FORMAT, **belongs_to})
        self.units: dict[str, dict[str, Any]] = {}
        self.compiled = compiled
        self._file: TextIO | None = None
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = []
            if resume and self.path.exists():
                lines = self.path.read_text("utf-8").splitlines(keepends=True)
            keep = self._read(lines)
            # The file is cut after its last whole line, then grows.
            self._file = self.path.open("r+" if keep else "w", encoding="utf-8")
            self._file.truncate(sum(len(line.encode()) for line in lines[:keep]))
            self._file.seek(0, os.SEEK_END)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(
                f"{self.path}: the journal cannot be read or written ({error}); choose another file"
            ) from error
        if not keep:
            self._write(self.header)

    def _read(self, lines: list[str]) -> int:
        """Take up the units of a file and return how many of its lines are whole."""
        for number, line in enumerate(lines):
            try:
                if not line.endswith("\n"):
                    raise ValueError("cut short")
                entry = json.loads(line)
                if number == 0:
                    self._compare(entry)
                else:
                    self.units[entry["unit"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                if number and number == len(lines) - 1:
                    return number
                if isinstance(error, InvalidInputError):
                    raise
                raise InvalidInputError(
                    f"{self.path}, line {number + 1}: not a journal of accelkit's ({error}); "
                    "choose another file, or calibrate without resume to begin anew"
                ) from error
        return len(lines)

    def _compare(self, found: Any) -> None:
        if not isinstance(found, dict) or "journal" not in found:
            raise ValueError("the first line is no header")
        keys = sorted(found.keys() | self.header.keys())
        differ = [k for k in keys if found.get(k) != self.header.get(k)]
        if differ:
            shown = "; ".join(
                f"{k}: {_short(found.get(k))} there, {_short(self.header.get(k))} now"
                for k in differ[:3]
            )
            raise InvalidInputError(
                f"{self.path}: this journal belongs to another calibration ({shown}); "
                "resume with the same model and settings, or calibrate without resume"
            )

    def unit(self, key: str, work: Callable[[], Any]) -> Any:
        """The unit's value: stored, or made by `work` now and stored with its duration."""
        if key in self.units:
            return self.units[key]["value"]
        begin, compiled = time.perf_counter(), self.compiled()
        value = work()
        return self.put(key, value, time.perf_counter() - begin, self.compiled() - compiled)

    def together(
        self, keys: Sequence[str], work: Callable[[list[int]], Sequence[Any]]
    ) -> list[Any]:
        """The values of several units: those that are missing are made at once by `work`, which
        gets their places in `keys`, and share its duration.
        """
        missing = [n for n, key in enumerate(keys) if key not in self.units]
        if missing:
            begin, compiled = time.perf_counter(), self.compiled()
            made = work(missing)
            seconds = (time.perf_counter() - begin) / len(missing)
            compiling = (self.compiled() - compiled) / len(missing)
            for n, value in zip(missing, made, strict=True):
                self.put(keys[n], value, seconds, compiling)
        return [self.units[key]["value"] for key in keys]

    def put(self, key: str, value: Any, seconds: float, compiling: float = 0.0) -> Any:
        """Store a finished unit, which took so long and compiled kernels for a part of it; returns
        its value as it will be read again.
        """
        took = {"seconds": round(seconds, 4), "compiling": round(compiling, 4)}
        entry = _plain({"unit": key, **took, "value": value})
        self.units[key] = entry
        self._write(entry)
        return entry["value"]

    def drop(self, key: str) -> None:
        """Forget a unit, so that it is made anew."""
        self.units.pop(key, None)

    def __contains__(self, key: str) -> bool:
        return key in self.units

    def __getitem__(self, key: str) -> Any:
        return self.units[key]["value"]

    def seconds(self, prefix: str | tuple[str, ...] = "") -> float:
        """Time spent on the units whose key begins so, compiling included."""
        return sum(u["seconds"] for k, u in self.units.items() if k.startswith(prefix))

    def compiling(self, prefix: str | tuple[str, ...] = "") -> float:
        """The part of `seconds` in which kernels were compiled."""
        return sum(u.get("compiling", 0.0) for k, u in self.units.items() if k.startswith(prefix))

    def close(self) -> None:
        """Close the file; the units stay readable."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, entry: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._file.flush()


def _plain(value: Any) -> Any:
    """What JSON gives back: a fresh unit must equal a resumed one."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
