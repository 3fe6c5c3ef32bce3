"""Tables of labels, CSV or XLS, read as text: no value is guessed, none is dropped."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitask.errors import InputError, boundary, reason


@dataclass(frozen=True)
class Row:
    """A row of a table: the image's id and its other cells, without blanks around them."""

    table: Path
    number: int  # as a spreadsheet counts, with the header as 1
    id: str
    cells: dict[str, str]

    def __str__(self) -> str:
        return f"{self.table}, row {self.number}, image {self.id!r}"

    def whole(self, column: str, top: int) -> int:
        """A whole number from 0 to `top`, such as 3 or 3.0; InputError for any other cell."""
        text = self.cells[column]
        found = re.fullmatch(r"([0-9]{1,9})(\.0*)?", text)
        if found is None or int(found[1]) > top:
            raise InputError(
                f"{self}: {column} is {text!r}; expected a whole number from 0 to {top}: correct "
                "the table, or remove the row"
            )
        return int(found[1])


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a CSV or XLS file with these columns, the first of which holds the ids.

    Empty rows are left out. InputError for a missing column, a row without an id, and a row with
    more cells than the header.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; expected a table with {', '.join(columns)}")
    rows = _xls(path) if path.suffix.lower() == ".xls" else _csv(path)
    header = [cell.strip() for cell in rows[0]] if rows else []
    if lacking := [column for column in columns if column not in header]:
        raise InputError(f"{path} lacks the column(s) {lacking}; it has {header}")
    if twice := [column for column in columns if header.count(column) > 1]:
        raise InputError(f"{path} has the column(s) {twice} more than once; keep one of each")
    found = []
    for number, row in enumerate(rows[1:], start=2):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if any(cells[len(header) :]):
            raise InputError(
                f"{path}, row {number} has {len(cells)} cells, the header {len(header)}; a cell "
                "with a comma needs quotes"
            )
        named = dict.fromkeys(header, "") | dict(zip(header, cells, strict=False))
        if not named[columns[0]]:
            raise InputError(
                f"{path}, row {number}: {columns[0]} is empty; expected an image's id, or an empty "
                "row"
            )
        named = {column: named[column] for column in columns}
        found.append(Row(path, number, named[columns[0]], named))
    return found


def _csv(path: Path) -> list[list[str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as CSV UTF-8"
        ) from error
    with boundary(f"the table {path}", "save it as CSV UTF-8 with commas"):
        return list(csv.reader(io.StringIO(text, newline=""), strict=True))


def _xls(path: Path) -> list[list[str]]:
    """The first sheet. A cell that holds neither text nor a number is written with its kind."""
    try:
        import xlrd
    except ImportError as error:  # optional: only MESSIDOR needs it
        raise InputError(f"{path} cannot be read without xlrd: pip install xlrd") from error
    kinds = {
        xlrd.XL_CELL_DATE: "date",
        xlrd.XL_CELL_BOOLEAN: "boolean",
        xlrd.XL_CELL_ERROR: "error",
    }

    def text(cell: "xlrd.sheet.Cell") -> str:
        if cell.ctype == xlrd.XL_CELL_NUMBER:
            whole = float(cell.value).is_integer()
            return str(int(cell.value)) if whole else repr(cell.value)
        return f"{kinds[cell.ctype]} {cell.value}" if cell.ctype in kinds else str(cell.value)

    try:  # xlrd prints what it finds odd, and on a damaged file it raises almost anything
        sheet = xlrd.open_workbook(path, logfile=io.StringIO()).sheet_by_index(0)
        return [[text(cell) for cell in sheet.row(number)] for number in range(sheet.nrows)]
    except Exception as error:
        raise InputError(f"{path} is not an XLS file ({reason(error)})") from error
