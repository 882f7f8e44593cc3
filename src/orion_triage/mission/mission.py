"""The mission file: what a team looks for, what happens to each kind of frame, and how the model is asked.

A mission has two to eight categories. `orion.toml` is the published mission and the default.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib import resources
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from orion_triage.safe.reading import shown

Action = Literal["send", "store", "drop"]
ACTIONS: tuple[Action, ...] = get_args(Action)
FEWEST, MOST = 2, 8  # categories
DONE = {"send": "sent", "store": "stored", "drop": "dropped"}

COORDINATES, CATEGORIES, LONGITUDE, LATITUDE = "{coordinates}", "{categories}", "{longitude}", "{latitude}"
FIELDS = "{fields}"
# The tokenizer reads these as the end of a turn, an image or a thought, not as text.
CONTROL = re.compile(r"<\|[^<>|]*\|>|<image>|</?think>")
PLAIN = r"[ !#-\[\]-~]"  # one character of a text: printable ASCII without quote and backslash; GBNF and Python

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4000)]


Place = tuple[str | int, ...]  # of a key in a file: ("categories", 1, "name")
Fault = tuple[Place, str]  # and what is wrong there


class MistakesError(ValueError):
    """Mistakes that no single key shows."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(sentence for _, sentence in faults))
        self.faults = faults


class Strict(BaseModel):
    """A frozen model; unknown keys, nan and inf are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Category(Strict):
    """One kind of frame: its name is the model's answer, the name of its folder in a dataset, and its label in tables.

    `definition` are the words of the prompt. `value` is what a frame is worth on the ground, and `prior` its share of
    the frames in orbit; they change no answer. `reason` stands for the reason of frames that were labelled without one.
    `conflict` is the category whose coordinates a frame gets under condition D. `colour` (#rrggbb) is for reports.
    """

    name: Name
    definition: Text
    action: Action
    value: NonNegativeFloat = 0.0
    prior: NonNegativeFloat = 0.0
    reason: str = ""
    conflict: str = ""
    colour: Annotated[str, StringConstraints(pattern=r"^#[0-9a-fA-F]{6}$")] | None = None


FieldKind = Literal["yes/no", "choice", "whole number", "short text"]
# Key of a field in the mission file -> the kind that has it.
KIND_OF_KEY: dict[str, FieldKind] = {
    "choices": "choice", "from": "whole number", "to": "whole number", "longest": "short text",
}  # fmt: skip
_KEYS_OF_RULE = ("when", "then", "probability")
MOST_FIELDS, MOST_CHOICES, LONGEST_CHOICE, LARGEST_NUMBER = 8, 16, 32, 1_000_000
# Keys of every answer, and columns of tables that have another meaning.
RESERVED = (
    "reason", "category", "name", "file_name", "lon", "lat", "split", "morphology",
    "source", "metres_per_pixel", "captured_at", "licence",
)  # fmt: skip

_Number = Annotated[int, Field(strict=True, ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]


class FieldOfAnswer(Strict):
    """A further field of the answer: its `name` is the key in the answer and the column of tables.

    `definition` are the words of the prompt. `choices` are those of a choice, `from_` (in files: from) and `to` the
    bounds of a whole number, both included, and `longest` the most characters of a short text; the other kinds have
    them not.

    A yes/no or a choice can have a rule: a frame whose value is `when` with at least this `probability` is decided as
    the category `then`, whatever the scores of the categories.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    kind: FieldKind
    definition: Text
    choices: tuple[str, ...] = ()
    from_: _Number | None = Field(None, alias="from")
    to: _Number | None = None
    longest: Annotated[int, Field(strict=True, ge=1, le=200)] | None = None
    when: str = ""
    then: str = ""
    probability: Annotated[float, Field(gt=0, le=1)] = 0.5

    @model_serializer(mode="wrap")
    def _as_in_files(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The keys of the mission file: of the field's kind, without those of other kinds and of a rule it has not."""
        found = {key.rstrip("_"): value for key, value in dump(self).items()}
        absent = () if self.when else _KEYS_OF_RULE
        return {
            key: value
            for key, value in found.items()
            if KIND_OF_KEY.get(key, self.kind) == self.kind and key not in absent
        }

    @property
    def words(self) -> tuple[str, ...]:
        """The values of a field that has few: yes and no, or its choices; empty for numbers and texts."""
        return ("yes", "no") if self.kind == "yes/no" else self.choices


class Mission(Strict):
    """The mission; empty `costs`, `blank`, `keys`, and a category's `reason` and `conflict` are derived.

    So is `reasons_for`, unless it is given, if only as an empty list.

    `costs` has one row per category and the columns sent, stored and dropped. `blank` is the category of a blank frame,
    `unparsable` that of an answer without a verdict (empty: the frame is kept, and counted as without a verdict).
    """

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
    places: str = ""  # the catalogue of places, relative to the mission's file
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=20_000)]
    coordinates: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    # Where the image stands. After the text, the text is the same for every frame without coordinates.
    image: Literal["before the text", "after the text"] = "before the text"
    # The order of the keys in the answer. The reason first makes the model reason before it decides.
    keys: tuple[str, ...] = ()
    longest_reason: Annotated[int, Field(ge=20, le=1000)] = 160
    # Verdict first (--verdict-only): the categories of whose frames a reason is written afterwards.
    reasons_for: tuple[str, ...] | None = None
    blank: str = ""
    unparsable: str = ""
    costs: tuple[tuple[float, float, float], ...] = ()
    categories: tuple[Category, ...]
    fields: tuple[FieldOfAnswer, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _lists_of_all_categories(cls, given: Any) -> Any:
        """`values` and `prior` as lists in the order of the categories, as settings and earlier versions write them.

        Without categories, the rest is that of the default mission.
        """
        if not isinstance(given, dict):
            return given
        lists = {key: given[key] for key in ("values", "prior") if key in given}
        rest = {key: value for key, value in given.items() if key not in lists}
        if "categories" not in rest and "prompt" not in rest:
            rest = default_mission().model_dump() | rest
        for plural, key in (("values", "value"), ("prior", "prior")):
            numbers, categories = lists.get(plural), rest.get("categories")
            if numbers is None or not isinstance(categories, list | tuple):
                continue
            if not isinstance(numbers, list | tuple) or len(numbers) != len(categories):
                raise ValueError(f"{plural} needs one number for each of the {len(categories)} categories")
            rest["categories"] = [
                {**(one if isinstance(one, Mapping) else dict(one)), key: number}
                for one, number in zip(categories, numbers, strict=True)
            ]
        return rest

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if faults := mistakes(self):
            raise MistakesError(faults)
        derived = {
            "keys": self.keys or ("reason", *(field.name for field in self.fields), "category"),
            "reasons_for": self.that("send") if self.reasons_for is None else self.reasons_for,
            "blank": self.blank or next((c.name for c in self.categories if c.action == "drop"), ""),
            "costs": self.costs or tuple(_costs(category) for category in self.categories),
            "categories": tuple(
                category.model_copy(
                    update={
                        "reason": category.reason or _shortened(category.definition, self.longest_reason),
                        "conflict": category.conflict or _conflict(category, self.categories),
                    }
                )
                for category in self.categories
            ),
        }
        for key, value in derived.items():
            object.__setattr__(self, key, value)
        return self

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the categories, in the file's order."""
        return tuple(category.name for category in self.categories)

    @cached_property
    def actions(self) -> dict[str, Action]:
        return {category.name: category.action for category in self.categories}

    @property
    def values(self) -> tuple[float, ...]:
        """What a frame of each category is worth on the ground."""
        return tuple(category.value for category in self.categories)

    @property
    def prior(self) -> tuple[float, ...]:
        """The share of each category in orbit."""
        return tuple(category.prior for category in self.categories)

    def of(self, name: str) -> Category:
        return self.categories[self.names.index(name)]

    def named(self, text: str) -> str | None:
        """The category whose name this is in upper or lower case, or None."""
        return next((name for name in self.names if name.casefold() == text.strip().casefold()), None)

    def that(self, *actions: Action) -> tuple[str, ...]:
        """The categories with one of these actions."""
        return tuple(name for name in self.names if self.actions[name] in actions)

    def kept(self, name: str | None) -> bool:
        """Whether a frame of this category is valuable: sent or stored, not dropped."""
        return name is not None and self.actions[name] != "drop"


def listed(names: Sequence[str], last: str = "and") -> str:
    """Names in prose: "HIGH", "HIGH and MEDIUM", "A, B and C"."""
    return f"{', '.join(names[:-1])} {last} {names[-1]}" if len(names) > 1 else "".join(names)


def what_happens(mission: Mission) -> str:
    """One sentence: "HIGH frames are sent now, MEDIUM frames are stored, LOW frames are deleted on board."."""
    done = {"send": "sent now", "store": "stored", "drop": "deleted on board"}
    parts = [f"{listed(names)} frames are {done[action]}" for action in ACTIONS if (names := mission.that(action))]
    return f"{', '.join(parts)}."


# On white and on black, each pair told apart from the others also without red and green.
_PALETTE = (
    ("#a84605", "#f2a468"), ("#1558c0", "#79acff"), ("#66707f", "#98a4b3"), ("#7b2d8b", "#d59be2"),
    ("#00695c", "#66c7b9"), ("#8a6d00", "#e3c34f"), ("#b0155a", "#f58ab8"), ("#3d4f00", "#b5cc61"),
)  # fmt: skip


def colours(mission: Mission) -> list[tuple[str, str]]:
    """The colour of each category on a light and on a dark page; one of the mission's own is made lighter there."""
    found = []
    for category, pair in zip(mission.categories, _PALETTE, strict=False):
        own = category.colour
        found.append((own, f"color-mix(in srgb, {own} 55%, white)") if own else pair)
    return found


def _shortened(text: str, most: int) -> str:
    """The first words of a text, in printable ASCII, as the grammar of an answer allows them."""
    plain = " ".join(re.sub(r"[^ !#-\[\]-~]", " ", text).split())
    return plain if len(plain) <= most else plain[: most - 1].rsplit(" ", 1)[0].rstrip(",;:") + "."


def _costs(category: Category) -> tuple[float, float, float]:
    """What it costs to send, store and drop a frame of this category, in units of one frame sent for nothing.

    Nothing if it is what the category wants. A frame that is dropped loses its value, one that is stored instead of
    sent a fifth of it, and storing one for nothing takes a fifth of sending it.
    """
    store = 0.2 * category.value if category.action == "send" else 0.2
    every = {"send": 1.0, "store": store, "drop": max(category.value, 0.2)}
    return tuple(0.0 if action == category.action else every[action] for action in ACTIONS)  # type: ignore[return-value]


def _conflict(category: Category, every: Sequence[Category]) -> str:
    """The category that differs most in value, and among equal ones in action; the first of several."""
    return max(
        (other for other in every if other is not category),
        key=lambda other: (abs(other.value - category.value), other.action != category.action),
    ).name


def mistakes(mission: Mission) -> list[Fault]:
    """What is wrong with a mission whose keys and types are right: (place in the file, sentence)."""
    found: list[Fault] = []
    for text, key, needed in (
        (mission.prompt, "prompt", (COORDINATES, CATEGORIES)),
        (mission.coordinates, "coordinates", (LONGITUDE, LATITUDE)),
    ):
        for placeholder in needed:
            if (times := text.count(placeholder)) != 1:
                found.append(((key,), f"{key} has {placeholder} {times} times; write it once"))
    if mission.coordinates.find(LONGITUDE) > mission.coordinates.find(LATITUDE) >= 0:
        found.append((("coordinates",), f"write {LONGITUDE} before {LATITUDE}"))
    found += _mistakes_of_fields(mission)
    names = [category.name for category in mission.categories]
    if not FEWEST <= len(names) <= MOST:
        found.append((("categories",), f"there are {len(names)} categories; write {FEWEST} to {MOST}"))
        return found
    for key, name in (("blank", mission.blank), ("unparsable", mission.unparsable)):
        if name and name not in names:
            found.append(((key,), f"{key} is {shown(name)}, which is no category{nearest(name, names)}"))
    for place, name in enumerate(mission.reasons_for or ()):
        if name not in names:
            found.append(
                (("reasons_for", place), f"reasons_for has {shown(name)}, which is no category{nearest(name, names)}")
            )
    if mission.costs and len(mission.costs) != len(names):
        found.append(
            (("costs",), f"costs has {len(mission.costs)} rows; write one for each of {len(names)} categories")
        )
    if not math.isclose(total := sum(category.prior for category in mission.categories), 1, abs_tol=1e-6):
        found.append((("categories", 0, "prior"), f"the priors sum to {total:g}; write shares that sum to 1"))
    if not any(category.value for category in mission.categories):
        found.append((("categories", 0, "value"), "no category has a value above 0"))
    for index, category in enumerate(mission.categories):
        found += [(("categories", index, key), text) for key, text in _mistakes_of(category, index, mission)]
    for key, text in [("prompt", mission.prompt), ("coordinates", mission.coordinates)]:
        if control := CONTROL.search(text):
            found.append(((key,), f"{key} contains the control token {control[0]}; remove it"))
    return found


def _mistakes_of(category: Category, index: int, mission: Mission) -> list[tuple[str, str]]:
    found = []
    others = [other.name for place, other in enumerate(mission.categories) if place != index]
    if twin := next((o for o in others[:index] if o.casefold() == category.name.casefold()), None):
        found.append(("name", f"the category {category.name} is there twice (as {twin}); give them different names"))
    if category.conflict and category.conflict not in others:
        near = nearest(category.conflict, others)
        found.append(("conflict", f"conflict of {category.name} is {category.conflict!r}, no other category{near}"))
    for key, text in (("definition", category.definition), ("reason", category.reason)):
        if fault := _fault_of_line(text):
            found.append((key, f"the {key} of {category.name} {fault}"))
        words = set(re.findall(r"[A-Za-z0-9_-]+", text))
        if other := next((o for o in others if o in words), None):
            found.append((key, f"the {key} of {category.name} names {other}; describe what is seen instead"))
    if len(category.reason) > mission.longest_reason:
        found.append(("reason", f"the reason of {category.name} has more than {mission.longest_reason} characters"))
    return found


def _fault_of_line(text: str) -> str:
    """What is wrong with a text that the prompt or an answer has on one line; empty if nothing is."""
    if control := CONTROL.search(text):
        return f"contains the control token {control[0]}; remove it"
    if placeholder := next((p for p in (COORDINATES, CATEGORIES, FIELDS) if p in text), None):
        return f"contains the placeholder {placeholder}; remove it"
    if "\n" in text.strip("\n") or not text.replace("\n", " ").isprintable():
        return "is not one line of printable text"
    return ""


def _mistakes_of_fields(mission: Mission) -> list[Fault]:
    names = [field.name for field in mission.fields]
    found: list[Fault] = []
    if len(names) > MOST_FIELDS:
        found.append((("fields", MOST_FIELDS, "name"), f"there are {len(names)} fields; write at most {MOST_FIELDS}"))
    times = mission.prompt.count(FIELDS)
    if names and times != 1:
        found.append((("prompt",), f"prompt has {FIELDS} {times} times; write it once, because there are [[fields]]"))
    if times and not names:
        found.append((("prompt",), f"prompt has {FIELDS}, but there are no [[fields]]; remove it"))
    wanted = ["reason", *names, "category"]
    for key in dict.fromkeys(mission.keys):
        if key not in wanted:
            found.append((("keys",), f"keys has {shown(key)}, which is no key of the answer{nearest(key, wanted)}"))
        elif mission.keys.count(key) > 1:
            found.append((("keys",), f"keys has {key} twice; write each key once"))
    if mission.keys and (missing := [name for name in wanted if name not in mission.keys]):
        found.append((("keys",), f"keys leaves out {listed(missing)}; list every key of the answer"))
    for index, field in enumerate(mission.fields):
        if field.name in RESERVED:
            found.append((("fields", index, "name"), f"the name {field.name} has another meaning; choose another one"))
        if field.name in names[:index]:
            found.append((("fields", index, "name"), f"the field {field.name} is there twice; rename one"))
        if fault := _fault_of_line(field.definition):
            found.append((("fields", index, "definition"), f"the definition of {field.name} {fault}"))
        found += [(("fields", index, key), text) for key, text in _mistakes_of_kind(field)]
        found += [(("fields", index, key), text) for key, text in _mistakes_of_rule(field, mission.names)]
    return found


def _mistakes_of_rule(field: FieldOfAnswer, names: Sequence[str]) -> list[tuple[str, str]]:
    """What is wrong with `when`, `then` and `probability`: (key, sentence)."""
    given = [key for key in _KEYS_OF_RULE if key in field.model_fields_set]
    if not given:
        return []
    if field.kind not in ("yes/no", "choice"):
        return [(given[0], f"{given[0]} is not for the field {field.name}, a {field.kind}; remove it")]
    absent = [key for key in ("when", "then") if not getattr(field, key)]
    found = [(given[0], f"the rule of {field.name} has no {key}; write when and then, or neither") for key in absent]
    if field.when and field.when not in field.words:
        near = nearest(field.when, field.words)
        found.append(("when", f"when of {field.name} is {shown(field.when)}, which is no value of it{near}"))
    if field.then and field.then not in names:
        near = nearest(field.then, names)
        found.append(("then", f"then of {field.name} is {shown(field.then)}, which is no category{near}"))
    return found


def _mistakes_of_kind(field: FieldOfAnswer) -> list[tuple[str, str]]:
    """What is wrong with `choices`, `from`, `to` and `longest`: (key, sentence)."""
    given = {"choices": field.choices or None, "from": field.from_, "to": field.to, "longest": field.longest}
    found = [
        (key, f"{key} is not for the field {field.name}, a {field.kind}; remove it")
        for key, value in given.items()
        if value is not None and KIND_OF_KEY[key] != field.kind
    ]
    found += [
        (key, f"{key} of {field.name} is missing: a {field.kind} needs it")
        for key, kind in KIND_OF_KEY.items()
        if kind == field.kind and given[key] is None and key != "choices"
    ]
    if field.kind == "choice" and not 2 <= len(field.choices) <= MOST_CHOICES:
        many = f"{field.name} has {len(field.choices)} choices; write 2 to {MOST_CHOICES}"
        found.append(("choices", many))
    if field.kind == "whole number" and field.from_ is not None and field.to is not None and field.from_ > field.to:
        found.append(("to", f"{field.name} goes from {field.from_} to {field.to}; write the smaller number as from"))
    for index, choice in enumerate(field.choices):
        if not choice or len(choice) > LONGEST_CHOICE or choice != choice.strip():
            text = f"is empty, longer than {LONGEST_CHOICE} characters, or has blanks around it"
        elif not re.fullmatch(f"{PLAIN}+", choice):
            text = "has a quote, a backslash, or a character that is not printable ASCII"
        elif control := CONTROL.search(choice):
            text = f"contains the control token {control[0]}"
        elif choice.casefold() in [one.casefold() for one in field.choices[:index]]:
            text = "is there twice"
        else:
            continue
        found.append(("choices", f"the choice {shown(choice)} of {field.name} {text}; correct it"))
    return found


def nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.casefold(), [k.casefold() for k in known], 1)
    original = next((k for k in known if close and k.casefold() == close[0]), None)
    return f"; did you mean {original}?" if original else f" (there are {', '.join(known)})"


@cache
def default_mission() -> Mission:
    """The published mission."""
    text = (resources.files("orion_triage.mission") / "orion.toml").read_text(encoding="utf-8")
    return Mission.model_validate(tomllib.loads(text))
