"""A small folder of pictures with a table, right in every part: what a user's own folder may look like."""

import io
from pathlib import Path

from orion_triage.dataset.catalogue import Target, load_catalogue
from orion_triage.dataset.collect import csv_text
from orion_triage.errors import OrionError
from orion_triage.mission.mission import DONE, default_mission, listed
from orion_triage.safe.files import replaced_folder, write_bytes, write_text

TABLE = "labels.csv"
COLUMNS = ("file_name", "category", "lon", "lat", "reason")
# Four pictures a category, so that each split gets one; none of open water, which can be blank.
_MORPHOLOGIES = (
    "mega_port", "mega_airport", "energy_dam", "mega_mine_industry",
    "urban_grid", "suburb", "agriculture", "town",
    "coastline", "geological", "fractal_texture", "desert_ice_canopy",
)  # fmt: skip
_SEED = 7
_README = """An example of a dataset of your own: drawn pictures, and one table that says what they show.

pictures/   PNG, JPEG or TIFF of any size. The central square is scaled to 512x512 pixels.
labels.csv  one row per picture:
  file_name  the picture's path; the folder pictures/ may be left out
  category   {categories}
  lon, lat   degrees, longitude -180..180, latitude -90..90; both empty if unknown
  reason     one sentence: what the picture shows
  Three more columns are possible: split (train, val or test), morphology (a group that is divided evenly between the
  splits) and name (an id).

Replace the pictures and the rows by your own: some hundred, at least 60 of each rare category. Then:

  orion dataset check FOLDER   everything that is wrong, with the line
  orion run --dataset FOLDER   train, quantize and evaluate on it
"""


def write_example(folder: Path) -> int:
    """Draw the pictures and write them with the table and a README.txt, all or nothing; returns how many pictures.

    Raises OrionError for a folder that exists and is not empty, and for the working folder.
    """
    from orion_triage.dataset.sources.synthetic.draw import draw_tile, tile_seed

    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise OrionError(f"{folder} exists and is not an empty folder.", "Name a folder that does not exist yet.")
    if folder.resolve() == Path.cwd():
        raise OrionError(f"{folder} is the working folder.", "Name a folder that does not exist yet.")
    places = _places()
    with replaced_folder(folder.resolve()) as work:
        rows = []
        for place in places:
            data = io.BytesIO()
            draw_tile(place.morphology, tile_seed(_SEED, place.name)).image.save(data, "JPEG", quality=92)
            name = f"pictures/{place.name}.jpg"
            write_bytes(work / name, data.getvalue())
            where = place.coordinates
            cells = (name, place.category, where and where.lon, where and where.lat, place.reason)
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
        write_text(work / TABLE, csv_text(COLUMNS, rows))
        names = [f"{one.name} ({DONE[one.action]})" for one in default_mission().categories]
        write_text(work / "README.txt", _README.replace("{categories}", listed(names, "or")))
    return len(places)


def _places() -> list[Target]:
    """The first place of the shipped catalogue for each morphology."""
    first: dict[str, Target] = {}
    for target in load_catalogue():
        first.setdefault(target.morphology, target)
    return [first[morphology] for morphology in _MORPHOLOGIES]
