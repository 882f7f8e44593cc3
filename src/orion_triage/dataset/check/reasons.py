"""Faults of reasons: empty, too long, outside the flight grammar, or naming the answer or the place.

The short texts of a mission's further fields are checked against the grammar too.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from orion_triage.dataset.check.facts import Entry, Finding, Severity
from orion_triage.mission.fields import Value
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import Coordinates

_UNSAYABLE = re.compile(r"[^ !#-\[\]-~]")  # characters that the grammar of an answer does not allow in a reason
_PLAIN_ASCII = 'Write plain ASCII without " and \\.'
_WORD = re.compile(r"[^\W\d_]{3,}")
_DEGREES = re.compile(r"\d+\.\d+|\d+(?=\s?(?:°|degrees|[NSEW]\b))")


def reason_findings(entries: Sequence[Entry], mission: Mission) -> Iterator[Finding]:
    """The faults of the reasons: one finding per fault and reason, at its first line."""
    by_reason: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_reason[entry.record.verdict.reason].append(entry)
    places = {entry.image: where for entry in entries if (where := entry.record.coordinates)}
    small = {word for reason in by_reason for word in _WORD.findall(reason) if word.islower()}
    names = {PurePosixPath(entry.image).stem.partition("~")[0] for entry in entries}  # tiles of one place share a name
    in_names = Counter(word for name in names for word in _name_words(name))
    common = small | {word for word, count in in_names.items() if count > 1}
    for reason, (first, *others) in by_reason.items():
        more = f" ({len(others) + 1} lines)" if others else ""
        for severity, check, message, fix in _reason_faults(reason, mission):
            yield first.finding(severity, check, f"the reason {reason[:60]!r}{more} {message}", fix)
        for entry in (first, *others):
            if named := _named_place(entry, places.get(entry.image), common):
                message = f"the reason {reason[:60]!r}{more} names the place: {named!r}."
                fix = "Describe what the picture shows: without coordinates, the model cannot know the place."
                yield entry.finding("warning", "reason-names-place", message, fix)
                break
        mine = first.record.verdict.category
        for entry in (e for e in others if e.image != first.image and e.record.verdict.category != mine):
            message = f"the reason {reason[:60]!r} is {entry.record.verdict.category} here and {mine} in {first.place}."
            fix = "Describe in each reason what distinguishes the two pictures."
            yield entry.finding("warning", "reason-in-two-categories", message, fix)
            break
    for category in mission.names:
        said = [e for e in entries if e.split == "train" and e.record.verdict.category == category]
        if len({e.image for e in said}) > 1 and len({e.record.verdict.reason for e in said}) == 1:
            message = f"all {category} pictures of the train split have the same reason: the model will memorize it."
            yield said[0].finding("warning", "single-reason", message, "Describe what each picture shows.")


def text_findings(entries: Sequence[Entry], mission: Mission) -> Iterator[Finding]:
    """Short texts of further fields that the grammar of an answer cannot give: one finding per text."""
    for field in mission.fields:
        first: dict[Value, Entry] = {}
        for entry in entries if field.kind == "short text" else ():
            first.setdefault(dict(entry.record.verdict.fields)[field.name], entry)
        for text, entry in first.items():
            if not text:
                yield entry.finding("error", "field-empty", f"{field.name} is empty.", "Write what the field asks for.")
            if found := _unsayable(str(text)):
                yield entry.finding("warning", "field-characters", f"{field.name} {text!r} {found}", _PLAIN_ASCII)


def _unsayable(text: str) -> str:
    """The fault of a text with characters that the grammar of an answer does not allow; empty without."""
    odd = sorted(set(_UNSAYABLE.findall(text)))[:5]
    characters = " ".join(ascii(character) for character in odd)
    return f"has characters that the flight grammar does not allow: {characters}." if odd else ""


def _reason_faults(reason: str, mission: Mission) -> Iterator[tuple[Severity, str, str, str]]:
    if not reason.strip():
        yield "error", "reason-empty", "is empty.", "Write what the picture shows."
    if len(reason) > mission.longest_reason:
        message = f"has {len(reason)} characters; the flight grammar allows {mission.longest_reason}."
        yield "error", "reason-length", message, "Shorten it."
    if message := _unsayable(reason):
        yield "warning", "reason-characters", message, _PLAIN_ASCII
    names = "|".join(map(re.escape, mission.names))
    if found := re.search(rf"\b({names})\b", reason, re.IGNORECASE):
        yield "warning", "reason-names-answer", f"names an answer: {found[0]!r}.", "Use another word."


def _name_words(name: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(name)}


def _named_place(entry: Entry, where: Coordinates | None, common: set[str]) -> str | None:
    """A proper noun of the picture's file name, or one of its coordinates, in its reason; empty if there is none.

    A capitalized word inside a sentence is a proper noun. The first word is always capitalized: it counts if no other
    picture's name contains it and no reason has it in lower case ("Singapore's quays", but not "Energy works").
    """
    reason, words = entry.record.verdict.reason, _name_words(entry.record.name)
    for match in _WORD.finditer(reason):
        word = match[0]
        starts = not reason[: match.start()].strip() or bool(re.search(r"[.!?:]\W*$", reason[: match.start()]))
        known = entry.record.mission.named(word) or (starts and word.lower() in common)
        if word[0].isupper() and word.lower() in words and not known:
            return word
    for number in _DEGREES.findall(reason):
        decimals = len(number.partition(".")[2])
        if where and float(number) in (round(abs(where.lon), decimals), round(abs(where.lat), decimals)):
            return str(number)
    return None
