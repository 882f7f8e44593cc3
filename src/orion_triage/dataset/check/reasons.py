"""What a reason must not be: empty, too long, beyond the flight grammar, or one that names the answer or the place."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from orion_triage.dataset.check.facts import Entry, Finding, Severity
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import CATEGORIES, LONGEST_REASON

_UNSAYABLE = re.compile(r"[^ !#-\[\]-~]")  # outside triage.GRAMMAR's reason
_ANSWER = re.compile(rf"\b({'|'.join(CATEGORIES)})\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{3,}")
_DEGREES = re.compile(r"\d+\.\d+|\d+(?=\s?(?:°|degrees|[NSEW]\b))")


def reason_findings(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Faults of the reasons: one finding a reason, at its first line."""
    by_reason: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_reason[entry.record.verdict.reason].append(entry)
    places = {entry.image: where for entry in entries if (where := entry.record.coordinates)}
    small = {word for reason in by_reason for word in _WORD.findall(reason) if word.islower()}
    names = {PurePosixPath(entry.image).stem.partition("~")[0] for entry in entries}  # several tiles of a place: one
    in_names = Counter(word for name in names for word in _name_words(name))
    common = small | {word for word, count in in_names.items() if count > 1}
    for reason, (first, *others) in by_reason.items():
        more = f" ({len(others) + 1} lines)" if others else ""
        for severity, check, message, fix in _reason_faults(reason):
            yield first.finding(severity, check, f"the reason {reason[:60]!r}{more} {message}", fix)
        for entry in (first, *others):
            if named := _named_place(entry, places.get(entry.image), common):
                message = f"the reason {reason[:60]!r}{more} gives the place away: {named!r}."
                fix = "Say what the picture shows: without coordinates nothing in it tells the place."
                yield entry.finding("warning", "reason-names-place", message, fix)
                break
        mine = first.record.verdict.category
        for entry in (e for e in others if e.image != first.image and e.record.verdict.category != mine):
            message = f"the reason {reason[:60]!r} means {entry.record.verdict.category} here, {mine} in {first.place}."
            fix = "Say in each what tells the two apart."
            yield entry.finding("warning", "reason-in-two-categories", message, fix)
            break
    for category in CATEGORIES:
        said = [e for e in entries if e.split == "train" and e.record.verdict.category == category]
        if len({e.image for e in said}) > 1 and len({e.record.verdict.reason for e in said}) == 1:
            message = f"every {category} picture of the train split has one reason: it will be recited, not seen."
            yield said[0].finding("warning", "single-reason", message, "Vary the reasons by what the pictures show.")


def _reason_faults(reason: str) -> Iterator[tuple[Severity, str, str, str]]:
    if not reason.strip():
        yield "error", "reason-empty", "is empty.", "Write what the picture shows."
    if len(reason) > LONGEST_REASON:
        message = f"has {len(reason)} characters, more than the {LONGEST_REASON} that the flight grammar can say."
        yield "error", "reason-length", message, "Shorten it."
    if odd := sorted(set(_UNSAYABLE.findall(reason))):
        characters = " ".join(ascii(character) for character in odd[:5])
        message = f"has characters that the flight grammar cannot say: {characters}."
        yield "warning", "reason-characters", message, 'Write plain ASCII without " and \\.'
    if found := _ANSWER.search(reason):
        yield "warning", "reason-names-answer", f"names an answer: {found[0]!r}.", "Use another word."


def _name_words(name: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(name)}


def _named_place(entry: Entry, where: Coordinates | None, common: set[str]) -> str | None:
    """A proper noun of the picture's file name, or a number that is one of its coordinates, in its reason.

    A capital within a sentence marks a proper noun. At its start every word has one: there a word counts that no
    other picture's name has and no reason writes small ("Singapore's quays", but not "Energy works").
    """
    reason, words = entry.record.verdict.reason, _name_words(entry.record.name)
    for match in _WORD.finditer(reason):
        word = match[0]
        starts = not reason[: match.start()].strip() or bool(re.search(r"[.!?:]\W*$", reason[: match.start()]))
        known = word.upper() in CATEGORIES or (starts and word.lower() in common)
        if word[0].isupper() and word.lower() in words and not known:
            return word
    for number in _DEGREES.findall(reason):
        decimals = len(number.partition(".")[2])
        if where and float(number) in (round(abs(where.lon), decimals), round(abs(where.lat), decimals)):
            return str(number)
    return None
