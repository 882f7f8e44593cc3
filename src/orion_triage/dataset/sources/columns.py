"""Which column of a table means what: the picture's file, its category, its position and the reason.

Our own name of a column comes first. Without it, one of its other names may take its place; two of them are refused,
because only the user knows which one is meant.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Our name -> the other names, in lower case, with _ for blanks, hyphens and dots. Left out on purpose: 'id' and 'title'
# (often no file), 'type' and 'target' (often no category of ours), 'comment' and 'notes' (often not about the picture).
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "file_name": (
        "file",
        "filename",
        "image",
        "frame",
        "picture",
        "path",
        "filepath",
        "file_path",
        "image_name",
        "image_path",
        "image_file",
    ),
    "category": ("label", "class", "priority"),
    "lon": ("longitude", "lng", "long"),
    "lat": ("latitude",),
    "reason": ("description", "caption", "rationale"),
    "morphology": (),
    "name": (),
    "split": (),
}
_NEEDED = ("file_name", "category")
_WEAK = {"file_name": ("name",), "category": ()}


@dataclass(frozen=True)
class Columns:
    """`found` in the table's order, `taken`: our name -> the table's, `faults`: (message, fix).

    `unclear`: our names of columns that are missing or that several columns can be.
    """

    found: tuple[str, ...]
    taken: Mapping[str, str]
    faults: list[tuple[str, str]] = field(default_factory=list)
    unclear: frozenset[str] = frozenset()
    fields: tuple[str, ...] = ()  # the mission's further fields

    @property
    def unused(self) -> list[str]:
        """The columns that nothing is taken from, in a table without faults."""
        return [column for column in self.found if column not in self.taken.values()] if not self.faults else []

    def renamed(self, cells: Mapping[str, str]) -> dict[str, str]:
        """A row's cells under our names; those of columns that are not used are left out, missing ones are empty."""
        return {ours: cells.get(self.taken.get(ours, ""), "") for ours in (*OTHER_NAMES, *self.fields)}


def choose(found: Sequence[str], fields: Sequence[str] = ()) -> Columns:
    """The columns that a table uses, by their names. Of `x` and `y`, only both together are a position.

    `fields` are the names of the mission's further fields: each needs its column, which is then no other name of ours.
    """
    of_fields = {name: [column for column in found if _plain(column) == name] for name in fields}
    every, found = found, [column for column in found if _plain(column) not in of_fields]
    taken: dict[str, str] = {}
    faults: list[tuple[str, str]] = []
    unclear: set[str] = set()
    for ours, others in OTHER_NAMES.items():
        exact = [column for column in found if _plain(column) == ours]
        candidates = exact or [column for column in found if _plain(column) in others]
        if len(candidates) > 1:
            named = f"{', '.join(candidates[:-1])} and {candidates[-1]}"
            fix = f"Rename the right one to {ours}: it then comes first."
            if exact:
                fix = "Delete or rename the others."
            faults.append((f"has the columns {named}: each of them can be {ours}", fix))
            unclear.add(ours)
        elif candidates:
            taken[ours] = candidates[0]
    if "file_name" not in unclear:
        _take_weak_names(found, taken)
    if missing := [ours for ours in _NEEDED if ours not in taken and ours not in unclear]:
        names = " and no column ".join(missing)
        ways = [f"Name the column {ours}, or {', '.join((*OTHER_NAMES[ours], *_WEAK[ours]))}." for ours in missing]
        fix = " ".join([*ways, "The first line is the header."])
        faults.append((f"has no column {names} (found: {listed(every)})", fix))
        unclear |= set(missing)
    if ("lon" in taken) != ("lat" in taken) and not unclear & {"lon", "lat"}:
        there, lacking = ("lon", "lat") if "lon" in taken else ("lat", "lon")
        faults.append((f"has the column {taken[there]}, but not {lacking}", f"Add the column {lacking}."))
        unclear |= {"lon", "lat"}
    for name, columns in of_fields.items():
        if len(columns) == 1:
            taken[name] = columns[0]
            continue
        unclear.add(name)
        if columns:
            faults.append((f"has the columns {listed(columns)}: each of them can be {name}", "Delete or rename one."))
        else:
            message = f"has no column {name}, a field of the mission (found: {listed(every)})"
            faults.append((message, f"Add the column {name}."))
    kept = {ours: taken[ours] for ours in (*OTHER_NAMES, *fields) if ours in taken}
    return Columns(tuple(every), kept, faults, frozenset(unclear), tuple(fields))


def _take_weak_names(found: Sequence[str], taken: dict[str, str]) -> None:
    """Names that mean something only if nothing better is there: name is the file, x and y are the position."""
    if "file_name" not in taken and "name" in taken:
        taken["file_name"] = taken.pop("name")
    by_name = {_plain(column): column for column in found}
    if "lon" not in taken and "lat" not in taken and {"x", "y"} <= set(by_name):
        taken |= {"lon": by_name["x"], "lat": by_name["y"]}


def _plain(column: str) -> str:
    return re.sub(r"[\s.-]+", "_", column.strip().lower())


def listed(names: Sequence[str]) -> str:
    """At most eight names, and how many more there are."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8])[:200] + more
