"""Camera commands: write a camera file to start from, check and preview one, and estimate one from frames."""

import io
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import JsonOption, SetOption, messages, output, progress_bar

camera_app = typer.Typer(add_completion=False, no_args_is_help=True)
app.add_typer(
    camera_app,
    name="camera",
    rich_help_panel="Pipeline",
    help="Describe the camera that flies: write, check, preview or estimate a camera file.",
    epilog="Example: orion camera new camera.toml\n\nExample: orion camera fit my-frames --like runs/tiny/dataset",
)
CameraArgument = Annotated[str, typer.Argument(metavar="CAMERA", help="Camera file, or the shipped camera 'wide'.")]


@camera_app.command(epilog="Example: orion camera new camera.toml")
def new(path: Annotated[Path, typer.Argument(metavar="FILE", help="TOML file to write.")]) -> None:
    """Write a commented camera file to start from.

    Every key is explained in it. Refuses a file that exists.
    """
    from orion_triage.errors import OrionError
    from orion_triage.imagery.camera import shipped_text
    from orion_triage.safe.files import write_text

    if path.exists():
        raise OrionError(f"{path} exists.", "Name a file that does not exist yet.")
    write_text(path, shipped_text("example"))
    messages().print(f"camera new: {path}", soft_wrap=True)
    messages().print(f"next: {shlex.join(['orion', 'camera', 'check', str(path)])}", soft_wrap=True)


@camera_app.command(epilog="Example: orion camera check camera.toml\n\nExample: orion camera check wide --json")
def check(camera: CameraArgument, as_json: JsonOption = False) -> None:
    """Check a camera file, and show what follows from it.

    Lists every mistake with its line. Exits with status 1 if there are any.
    """
    from rich.table import Table

    from orion_triage.imagery.camera import in_words, load_camera

    found = load_camera(camera)
    if as_json:
        typer.echo(json.dumps(found.model_dump(mode="json"), indent=2))
        return
    table = Table("key", "value", "meaning", title=f"Camera {found.name}")
    for row in in_words(found):
        table.add_row(*row)
    output().print(table)
    messages().print(f"next: {shlex.join(['orion', 'camera', 'preview', camera, 'FOLDER'])}", soft_wrap=True)


@camera_app.command(
    epilog="Example: orion camera preview camera.toml runs/tiny/dataset\n\n"
    "Example: orion camera preview wide my-frames --out sheet.png --frames 4"
)
def preview(
    camera: CameraArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of pictures, or of a dataset.")],
    out: Annotated[Path, typer.Option("--out", help="PNG file to write.")] = Path("camera.png"),
    frames: Annotated[int, typer.Option("--frames", min=1, max=64, help="Pictures on the sheet.")] = 6,
    assignments: SetOption = [],  # noqa: B006
) -> None:
    """Draw pictures before and after a camera, whole and at the pixel.

    Spreads the pictures over the folder. The camera sees each as it would in a
    dataset: the values of its ranges come from the picture's name.
    """
    from orion_triage.errors import OrionError
    from orion_triage.imagery.camera import load_camera
    from orion_triage.imagery.camera_sheet import pictures_in, sheet
    from orion_triage.safe.files import write_bytes

    seen = load_camera(camera)
    if out.suffix.lower() != ".png":
        raise typer.BadParameter("name a PNG file.", param_hint=f"'{out}'")
    if out.is_file() and out.resolve().is_relative_to(folder.resolve()):
        raise OrionError(f"{out} is one of the pictures.", "Name a file outside the folder with --out.")
    paths = pictures_in(folder, frames)
    with progress_bar() as progress:
        picture = sheet(paths, seen, progress, _stretch(folder, assignments))
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_bytes(out, data.getvalue())
    messages().print(f"camera preview: {len(paths)} pictures  ->  {out}", soft_wrap=True)


@camera_app.command(
    epilog="Example: orion camera fit downlink --like runs/tiny/dataset\n\n"
    "Example: orion camera fit downlink --like my-tiles --out camera.toml --json"
)
def fit(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Unlabelled frames of the camera.")],
    like: Annotated[
        Path, typer.Option("--like", help="Pictures of the same kinds of scenes: those that a model is trained on.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Camera file to write.")] = Path("camera.toml"),
    resize: Annotated[
        bool, typer.Option("--resize", help="Accept frames of other sizes: crop to a square and scale.")
    ] = False,
    assignments: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Estimate the camera through which pictures would look like frames.

    Compares light, colour, contrast and spectra of the two folders. Ranges are
    90 % intervals of what these frames can say. Says what was assumed. Frames of
    more than 8 bits need --set dataset.stretch_low=BLACK and
    --set dataset.stretch_high=WHITE, as for a dataset.
    """
    from orion_triage.errors import OrionError
    from orion_triage.imagery.camera_fit import fit as fitted
    from orion_triage.imagery.camera_fit import measure, summary, to_toml
    from orion_triage.imagery.camera_sheet import MOST_FITTED, frames_of, pictures_in
    from orion_triage.safe.files import write_text

    if out.exists():
        raise OrionError(f"{out} exists.", "Name a file that does not exist yet with --out.")
    measured = {}
    with progress_bar() as progress:
        for name, path, stretch in (("frames", folder, _stretch(folder, assignments)), ("pictures", like, None)):
            paths = pictures_in(path, MOST_FITTED)
            measured[name] = measure(frames_of(paths, resize=resize, stretch=stretch, progress=progress))
    found = fitted(measured["frames"], measured["pictures"], "fitted")
    write_text(out, to_toml(found))
    measurements: dict[str, Any] = {name: summary(one) for name, one in measured.items()}
    if as_json:
        measurements |= {"camera": found.camera.model_dump(mode="json")}
        measurements |= {"estimates": found.estimates, "residual": found.residual, "notes": found.notes}
        typer.echo(json.dumps(measurements, indent=2))
        return
    from rich.table import Table

    table = Table("", "frames", "mean RGB", "spread RGB", "slope", "clipped", title="On linear values")
    for name, of in measurements.items():
        colours = [" ".join(f"{value:.3f}" for value in of[key]) for key in ("mean", "spread")]
        table.add_row(name, str(of["frames"]), *colours, f"{of['spectrum_slope']:.2f}", f"{of['clipped_share']:.1%}")
    output().print(table)
    for line in to_toml(found).splitlines():
        typer.echo(line)
    messages().print(f"camera fit  ->  {out}", soft_wrap=True)
    messages().print(f"next: {shlex.join(['orion', 'camera', 'preview', str(out), str(like)])}", soft_wrap=True)


def _stretch(folder: Path, assignments: list[str]) -> Any:
    """The stretch of these pictures that the settings name, or None; other settings are refused."""
    from orion_triage.imagery.stretch import stretch_of
    from orion_triage.settings import load_settings

    if others := [one for one in assignments if not one.strip().startswith("dataset.stretch_")]:
        raise typer.BadParameter(
            "only dataset.stretch_low, stretch_high and stretch_samples count here.", param_hint=others[0]
        )
    return stretch_of(load_settings("tiny", [*assignments, f"dataset.folder={json.dumps(str(folder))}"]).dataset)
