"""Reading tables that people bring: CSV in its common dialects, and JSON lines.

Text is UTF-8; a byte order mark is passed over, and UTF-16 and UTF-32 are read if they have one. JSON lines end at
the character "\\n" only, because a string may contain U+2028 and other line separators. CSV is read by the csv module
with its own line ends, so that a cell in double quotes may contain line breaks.
"""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orion_triage.errors import OrionError
from orion_triage.safe.reading import LARGEST_TABLE_BYTES, read_bytes, shown

CsvRow = tuple[int, dict[str, str]]  # the line in which the row starts, and its cells
Faults = list[OrionError]  # one for each row that cannot be read

_MARKS = (  # UTF-32's first: UTF-16's mark is its beginning
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SEPARATORS = ",;\t|"
_SEPARATOR_LINE = re.compile(r'"?sep=([^"\r\n])"?[ \t]*(?:\r\n|\r|\n|$)', re.IGNORECASE)  # Excel's
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_AS_UTF8 = (
    "Save it as UTF-8 (in Excel: file type 'CSV UTF-8'), or convert it: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
)


def decoded(data: bytes, name: str) -> str:
    """The text of a table without its byte order mark; raises OrionError that names the line of a wrong byte."""
    marks = (one for one in _MARKS if data.startswith(one[0]))
    mark, encoding = next(marks, (codecs.BOM_UTF8, "utf-8"))
    data = data.removeprefix(mark)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise OrionError(
            f"{name}: line {line} is not {encoding[:6].upper().rstrip('-')}: byte 0x{data[error.start]:02x}.", _AS_UTF8
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise OrionError(
            f"{name}: line {line} has a NUL character: this is no text, or UTF-16 without a byte order mark.",
            "Save it as UTF-8.",
        )
    return text


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line of a JSONL file that is not blank, without a byte order mark.

    Raises FileNotFoundError, and OrionError for an unreadable file.
    """
    data = read_bytes(path, LARGEST_TABLE_BYTES)
    if any(data.startswith(mark) for mark, _ in _MARKS):
        data = decoded(data, str(path)).encode()
    for number, line in enumerate(data.split(b"\n"), start=1):
        text = line.removeprefix(codecs.BOM_UTF8)  # in any line: files with a mark may have been joined
        if text.strip():
            yield number, text


def json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """`numbered_lines` as text; raises OrionError that names the line that is not UTF-8."""
    for number, line in numbered_lines(path):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise OrionError(
                f"{path}: line {number} is not UTF-8: byte 0x{line[error.start]:02x}.", "Save it as UTF-8."
            ) from None


def read_csv(path: Path) -> list[CsvRow]:
    """`csv_rows` of a file; also raises FileNotFoundError."""
    return list(csv_rows(decoded(read_bytes(path, LARGEST_TABLE_BYTES), str(path)), str(path)))


def keep(fault: OrionError, faults: Faults | None) -> None:
    """Add the fault of a row to `faults`; raise it if nobody collects them."""
    if faults is None:
        raise fault
    faults.append(fault)


def csv_rows(text: str, name: str, faults: Faults | None = None) -> Iterator[CsvRow]:
    """The rows of a CSV text; every row has all named columns of the header, and cells are stripped.

    The separator is that of a first line `sep=X`, else the one of comma, semicolon, tab and | that gives the header
    the most columns. Empty rows, columns without a name (an index), and missing last cells are allowed. Raises
    OrionError for a column that appears twice, for a row that is longer than the header (with `faults`, it is added to
    them, and the row left out), and for wrong quotes, after which rows cannot be told apart.
    """
    before, separator = 0, ""
    if declared := _SEPARATOR_LINE.match(text):
        before, separator, text = 1, declared[1], text[declared.end() :]
    reader = _reader(text, separator or _separator(text))
    columns: list[str] = []
    line = 0
    try:
        for cells in reader:
            first, line = line + 1, reader.line_num
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if not columns:
                columns = cells
                repeated = [column for column, count in Counter(columns).items() if column and count > 1]
                if repeated:
                    raise OrionError(
                        f"{name}: the header has the column {shown(repeated[0])} twice.", "Delete one of them."
                    )
                continue
            if any(cells[len(columns) :]):
                long = OrionError(
                    f"{name}: line {first + before} has more cells than the header: {len(cells)} instead of "
                    f"{len(columns)}.",
                    "Put cells that contain the separator in double quotes, also numbers with a decimal comma.",
                )
                keep(long, faults)
                continue
            cells += [""] * (len(columns) - len(cells))
            yield first + before, {column: cell for column, cell in zip(columns, cells, strict=False) if column}
    except csv.Error as error:
        fault = "a double quote is opened and not closed" if "end of data" in str(error) else str(error)
        raise OrionError(
            f"{name}: line {line + before + 1}: not CSV: {fault}.",
            "Correct it: a cell with double quotes in it is put in double quotes, with each inner one written twice.",
        ) from None


def _reader(text: str, separator: str) -> Any:
    # strict: otherwise an unclosed quote takes in all further lines, and \" ends a cell in the middle.
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)


def _separator(text: str) -> str:
    def columns(separator: str) -> int:
        try:
            return next((len(cells) for cells in _reader(text, separator) if any(cells)), 0)
        except csv.Error:  # raised again, with its line, when the rows are read
            return 0

    return max(_SEPARATORS, key=columns)  # the first of equals


def number_of(text: str) -> float:
    """The number in a cell, with a decimal point or a decimal comma; raises ValueError.

    Not float(): it also takes 1_0, nan and inf, but neither 48,85 nor the minus sign U+2212 of word processors.
    """
    plain = text.strip().replace("\u2212", "-")
    if not _NUMBER.fullmatch(plain):
        raise ValueError(f"{shown(text)} is not a number")
    return float(plain.replace(",", "."))
