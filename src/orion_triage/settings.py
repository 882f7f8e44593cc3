"""Settings: one strict model per stage, filled from a preset's TOML file and `--set stage.key=value`.

The defaults are the mission document's two tables for the 1.6B model. A preset with other values gives the reason
beside each value, and `overrides` lists the differences for the report.
"""

import json
import tomllib
from collections.abc import Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationError, model_validator

from orion_triage.errors import OrionError
from orion_triage.mission.load import load_mission
from orion_triage.mission.mission import Mission, Strict, default_mission
from orion_triage.safe.reading import LARGEST_JSON_BYTES, read_text, shown

# Limits: larger values cannot be computed, and numbers can have more digits than Python prints.
Count = Annotated[int, Field(gt=0, lt=2**31)]
SomeShare = Annotated[float, Field(gt=0, le=1)]
CountOrZero = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

BackboneType = Literal["Q4_K_M", "Q3_K_M", "IQ4_XS", "Q4_0", "Q8_0"]
TowerType = Literal["F16", "Q8_0"]

FIRST_LOOK_SIZES = range(128, 512, 32)

StretchedSamples = Literal["uint16", "int16", "uint32", "int32", "float32", "float64"]
STRETCHED_SAMPLES: tuple[str, ...] = get_args(StretchedSamples)


class BaseSettings(Strict):
    """The base model that is fine-tuned."""

    # A Hub id (owner/name@revision), a local folder in the Hub's layout, or "orion-tiny".
    model: str = "LiquidAI/LFM2.5-VL-1.6B@919fde3d022e3f90a4716006f993938ee8c2eb97"
    frame_size: Literal[256, 384, 448, 512] = 512  # pixels; decoding, training, evaluation and flight share it


class DatasetSettings(Strict):
    """The places, their split and the imagery."""

    # Image source: synthetic tiles, a SimSat server, a STAC catalogue of Sentinel-2, or `folder`.
    source: Literal["synthetic", "simsat", "sentinel2", "directory"] = "synthetic"
    folder: str = ""  # of pictures with a table, or a dataset in the published layout: a folder or a Hub id
    catalogue: str = ""  # CSV, JSONL or GeoJSON of places; empty: the mission's, or the shipped one
    url: str = ""  # of the SimSat or STAC server; empty: the source's default
    metres_per_pixel: PositiveFloat = 10.0  # ground sample distance of a synthetic frame (Sentinel-2: 10)
    altitude_km: PositiveFloat = 500.0  # of SimSat's satellite; higher: more ground per frame, coarser pixels
    # Sentinel-2 scenes between these days; a fixed period gives the same scenes again.
    captured_from: date = date(2023, 1, 1)
    captured_to: date = date(2024, 12, 31)
    largest_cloud_share: float = Field(default=0.1, ge=0, le=1)  # of a Sentinel-2 frame; lower drops more places
    largest_missing_share: float = Field(default=0.05, ge=0, le=1)  # of places without a picture; more stop the build
    split_seed: Seed = 42
    imagery_seed: Seed = 7
    split_distance_km: PositiveFloat = 100.0  # no two splits have places closer than this
    # Stretch of a folder's pictures with more than 8 bits: the stored values that become black and white, the same in
    # all frames and in flight. Empty: only pictures of 8 bits are accepted. A higher `stretch_high` darkens all frames.
    stretch_low: float | None = None
    stretch_high: float | None = None
    stretch_samples: StretchedSamples | None = None  # the type of the stored values; empty: uint16 (12 and 16 bits)
    # A camera file, or "wide": the frames are as that camera would deliver them (docs/camera.md); empty: as they are.
    camera: str | None = None
    # Drawn tiles: the share that shows rough land, wild or worked (docs/camera.md), of the tiles of nature, cropland
    # and towns, and of the land around towns and installations; empty: none. More: closer to real frames, and harder
    # than the other tiles.
    rough_land: SomeShare | None = None
    # Number of test frames; 0: one per place. With synthetic imagery, a larger number draws several tiles per place,
    # which is less informative than more places.
    test_size: CountOrZero = 0

    @model_validator(mode="before")
    @classmethod
    def _folder_is_a_directory_source(cls, values: Any) -> Any:
        """A folder without a source implies source=directory."""
        if isinstance(values, dict) and values.get("folder") and "source" not in values:
            return values | {"source": "directory"}
        return values

    @model_validator(mode="after")
    def _source_and_folder_agree(self) -> Self:
        if (self.source == "directory") != bool(self.folder):
            raise ValueError("a folder (--dataset FOLDER) needs source=directory, and source=directory needs a folder")
        return self

    @model_validator(mode="after")
    def _stretch_has_two_limits(self) -> Self:
        if (self.stretch_low is None) != (self.stretch_high is None):
            raise ValueError("stretch_low and stretch_high need each other")
        if self.stretch_low is None or self.stretch_high is None:
            if self.stretch_samples:
                raise ValueError("stretch_samples needs stretch_low and stretch_high")
            return self
        if self.stretch_low >= self.stretch_high:
            raise ValueError(f"stretch_low={self.stretch_low:g} is not below stretch_high={self.stretch_high:g}")
        if self.source != "directory":
            raise ValueError("a stretch is for pictures of your own (--dataset FOLDER); other sources have 8 bits")
        return self


class FineTuneSettings(Strict):
    """QLoRA, with the values of the mission document's tables."""

    rank: Count = 16
    alpha: Count = 32
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    # Which modules get LoRA: "attention" is target_modules in language model and vision tower; "language-attention"
    # excludes the tower; "language-all" adds the language model's short-conv and feed-forward layers (four times the
    # parameters).
    scope: Literal["attention", "language-attention", "language-all"] = "attention"
    # Weights of the base in training: "nf4" is 4 bits (QLoRA); "16-bit" is unquantized (LoRA), which takes three times
    # the memory of the language model, has no rounding, and can be sharded over several GPUs (FSDP).
    base_weights: Literal["nf4", "16-bit"] = "nf4"
    micro_batch_size: Count = 1
    gradient_accumulation_steps: Count = 16
    learning_rate: PositiveFloat = 2e-4
    epochs: Count = 3
    optimizer: str = "paged_adamw_8bit"
    learning_rate_schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    # "auto": a GPU, or the CPU for a base below 100 M parameters; a larger one without a usable GPU is refused.
    device: Literal["auto", "gpu", "cpu"] = "auto"
    # "auto": bfloat16 on a GPU that has it (Ampere and later), float16 on an older one, float32 on a CPU. The mission
    # document says FP16, whose largest value is 65,504: gradients overflow, and steps are skipped.
    precision: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    gradient_checkpointing: bool = True
    # On one GPU: use the largest micro batch that fits the memory, up to the records of a step, and no gradient
    # checkpointing if that also fits. The records per step stay the same; micro_batch_size is the minimum.
    fill_gpu: bool = True
    # Train the two records of a frame (with and without coordinates) in one micro batch, which has to have an even
    # size, and compute once what they share: a quarter less time at the shipped base's size. A step then sees half as
    # many frames, and the validation loss of the shipped base ended higher.
    twins_together: bool = False
    # Stresses (docs/stress.md) under which half of the training frames are seen, others in each epoch, at any of the
    # three strengths; empty: none, as in the mission document. More of them: a model that survives more of what can go
    # wrong, and sees each frame less often as it is.
    augment: tuple[str, ...] | None = None
    # A camera file, or "wide" (docs/camera.md), through which half of the training frames are seen, others and with
    # other values of its ranges in each epoch; empty: none. Wider ranges: less that only the training frames' camera
    # explains, and more to learn in the same number of steps.
    camera: str | None = None
    # Share of the training prompts with coordinates that have those of another training place, others in each epoch;
    # empty: none, as in the mission document. Larger: less trust in coordinates, of which condition D shows the harm.
    wrong_coordinates: float | None = Field(default=None, ge=0, le=1)
    # Share of the training records whose reason is left empty; empty: none, as in the mission document. For a flight
    # that decides before it reasons (--verdict-only): a model that has never seen an answer without a reason may be far
    # worse there (docs/training.md). Larger: fewer reasons to learn from.
    empty_reasons: SomeShare | None = None
    # A run, or an adapter (folder or Hub id), with whose weights the training begins; empty: with new LoRA matrices.
    # Rank, scale and modules must be the same. Nothing of its optimizer is taken over.
    continue_from: str | None = None
    # A folder of labelled frames (docs/camera.md) that are trained beside the dataset's, in their eight orientations.
    frames: str | None = None
    # Share of the dataset's training frames that are trained beside `frames`; empty: all. Lower: a shorter training,
    # which forgets more of them.
    replay: float | None = Field(default=None, ge=0, le=1)
    seed: Seed = 42

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if self.replay == 0 and not self.frames:
            raise ValueError("replay=0 leaves nothing to train; it needs frames=FOLDER")
        return self

    @property
    def trains_tower(self) -> bool:
        return not self.scope.startswith("language")


class FuseSettings(Strict):
    """Merging the adapter into the 16-bit base."""

    dtype: Literal["float16", "bfloat16"] = "float16"
    check_records: Count = 24  # records on which the merge is compared with the adapter; fewer than 20 are too few


class QuantizeSettings(Strict):
    """llama.cpp's conversion and quantization."""

    # Of the language model. Q3_K_M is smaller and less exact; Q8_0 is twice as large. docs/quantization.md has measured
    # pairs.
    type: BackboneType = "Q4_K_M"
    # Of the vision tower. Q8_0 has two thirds of the size at 1.6B, and is not faster.
    tower: TowerType = "F16"
    # "task": an importance matrix from training records, image and text, says which weights have to be exact. It adds
    # one pass over 48 records (half an hour of CPU time at 1.6B); measure whether it helps before you fly it.
    calibrate: Literal["none", "task"] = "none"


class EvaluateSettings(Strict):
    """The four-condition protocol."""

    noise: Literal["gaussian", "uniform"] = "gaussian"  # image of condition C
    max_new_tokens: Count = 96  # longer than every reason of the catalogue; a longer answer is cut and unparsable
    batch_size: Count = 32  # answers generated at once; more is faster and takes more memory
    threads: Count | None = None  # of llama.cpp; empty: its default
    # Number of llama.cpp servers that share the questions, with one thread each unless `threads` is set. Empty: one per
    # core for a pair below 0.1 GB, whose threads would wait for each other; otherwise one.
    servers: Count | None = None


class VariantSettings(Strict):
    """Evaluations of the models between the base and the flight pair, to show which step loses accuracy."""

    all: bool = True  # five more evaluations; the report shows the effect of each step
    # Quantizations between F16 and that of the flight: any type of llama-quantize.
    quantizations: tuple[Annotated[str, Field(pattern=r"^(I|T)?Q[0-9][A-Z0-9_]*$")], ...] = ("Q8_0",)
    # Pixels of the frames of the variant first-look (`orion cascade --first first-look`): whole tokens of 32 pixels,
    # fewer than the camera's 512. Below 256 they cost no less: llama.cpp enlarges them to 64 tokens, LFM2-VL's least.
    first_look_size: int = Field(default=256, ge=min(FIRST_LOOK_SIZES), le=max(FIRST_LOOK_SIZES), multiple_of=32)
    parity_records: Count = 4  # records on which llama.cpp's F16 must give the same probabilities as transformers


class VerdictSettings(Strict):
    """What a model must show on the test frames before it flies; `orion verdict` alone reads it."""

    # Largest p-value of a paired difference that counts. Smaller: fewer models fly by chance, on more frames.
    significance: float = Field(default=0.05, gt=0, lt=1)
    # A model that cannot be this many points better than a baseline is not worth the seconds that it takes on board.
    smallest_gain_points: NonNegativeFloat = 5.0
    # Share of the commonest answer from which a model counts as giving one answer to everything.
    largest_share_of_one_answer: float = Field(default=0.9, gt=0, le=1)
    # Share of the frames to be sent or stored that may be dropped. The upper end of the 95 % interval counts: 10 %
    # takes 35 frames without a loss, or 53 with one. Smaller: fewer frames are lost for good, and more are needed to
    # show it.
    largest_irrecoverable_loss: float = Field(default=0.10, gt=0, le=1)
    # Share of the frames to be sent that are sent; the lower end of the interval counts. The others are stored.
    smallest_high_recall: float = Field(default=0.5, ge=0, lt=1)
    # Points of accuracy that the quantized model may lose; the lower end of the interval of the difference counts.
    largest_quantization_loss_points: PositiveFloat = 10.0
    # Test frames of each category. With 20 and no mistake, the error rate is below 16 % (95 % interval).
    smallest_frames_per_category: Count = 20
    # On the flight computer, with 'orion bench-frame'; empty: no limit.
    largest_seconds_per_frame: PositiveFloat | None = None
    # Share of the frames to be sent or stored that may be dropped under any stress of medium strength ('orion evaluate
    # --stress'); empty: stresses are reported, not judged. Smaller: a camera that degrades may lose less.
    largest_loss_under_stress: float | None = Field(default=None, gt=0, le=1)


class Settings(Strict):
    """All settings of a run."""

    preset: str = "tiny"
    base: BaseSettings = BaseSettings()
    dataset: DatasetSettings = DatasetSettings()
    fine_tune: FineTuneSettings = FineTuneSettings()
    fuse: FuseSettings = FuseSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    variants: VariantSettings = VariantSettings()
    mission: Mission = Field(default_factory=default_mission)
    verdict: VerdictSettings = VerdictSettings()


STAGES = ("base", "fine_tune", "fuse", "quantize", "evaluate", "variants")  # what a model is made and asked with


def preset_names() -> list[str]:
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files("orion_triage.presets").iterdir()
        if entry.name.endswith(".toml")
    )


def load_settings(preset: str = "tiny", assignments: Sequence[str] = (), mission: Path | None = None) -> Settings:
    """The settings of a preset (a shipped name or a TOML file) with `stage.key=value` assignments applied.

    `mission` is a mission file; without it, the mission is the preset's or the published one. Raises OrionError that
    lists all mistakes: unknown keys, wrong types, values out of range.
    """
    values, source = _read_preset(preset)
    values.setdefault("preset", Path(preset).stem if preset.endswith(".toml") else preset)
    return _filled(values, source, assignments, mission)


def changed(settings: Settings, assignments: Sequence[str], mission: Path | None = None) -> Settings:
    """The settings with `stage.key=value` assignments applied; raises OrionError as `load_settings` does."""
    return _filled(settings.model_dump(), "a changed setting", assignments, mission)


def _filled(values: dict[str, Any], source: str, assignments: Sequence[str], mission: Path | None) -> Settings:
    if mission:
        values["mission"] = load_mission(mission).model_dump()
    for assignment in assignments:
        _assign(values, assignment)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part)[:60] for part in problem['loc'] if part != 'int')}: {_describe(problem)}"
            for problem in error.errors()
        ]
        more = f"; and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise OrionError(
            f"{source} has {len(lines)} mistake{'s' if len(lines) > 1 else ''}: {'; '.join(lines[:20])}{more}.",
            "Run 'orion settings' to list every key with its value.",
        ) from None


def has_section(preset: str, section: str) -> bool:
    """Whether a preset sets anything in this section."""
    return section in _read_preset(preset)[0]


def _describe(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "there is no such key"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{problem['msg'].lower()} (got {shown(problem['input'])})"


def _read_preset(preset: str) -> tuple[dict[str, Any], str]:
    if preset.endswith(".toml"):
        try:
            text, source = read_text(Path(preset), LARGEST_JSON_BYTES), preset
        except FileNotFoundError:
            raise OrionError(f"{preset} does not exist.", "Pass the name of a preset or a TOML file.") from None
    elif preset in preset_names():
        text = (resources.files("orion_triage.presets") / f"{preset}.toml").read_text(encoding="utf-8")
        source = f"preset {preset}"
    else:
        raise OrionError(
            f"there is no preset {preset!r}.", f"Choose one of {', '.join(preset_names())}, or a .toml file."
        )
    try:
        return tomllib.loads(text), source
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or a number with too many digits
        raise OrionError(f"{source} is not TOML: {error}.", "Correct the line.") from None


def _assign(values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise OrionError(f"--set {shown(assignment)} is not stage.key=value.", "Write it like --set fine_tune.epochs=4")
    section = values.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise OrionError(
            f"--set {shown(assignment)}: {parts[0]} is not a stage.", "Run 'orion settings' to list the stages."
        )
    text = text.strip()
    if parts[1] in ("target_modules", "quantizations", "augment"):
        section[parts[1]] = [name.strip() for name in text.split(",") if name.strip()]
        return
    try:
        section[parts[1]] = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        section[parts[1]] = text  # a bare word is a string


def differences(settings: Settings, other: Settings, stages: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """`stage.key` -> (`other`'s value, that of `settings`), as in JSON, where they differ in these stages."""
    dumps = (one.model_dump(mode="json") for one in (other, settings))
    return _differing(*({stage: dump[stage] for stage in stages} for dump in dumps))


def as_assignment(key: str, value: Any) -> str:
    """The `stage.key=value` that `--set` takes."""
    return f"{key}={','.join(value) if isinstance(value, list) else json.dumps(value)}"


def overrides(settings: Settings) -> dict[str, tuple[Any, Any]]:
    """`stage.key` -> (default, value) for every setting that differs from the mission document's."""
    return _differing(*(one.model_dump() | {"mission": _in_short(one.mission)} for one in (Settings(), settings)))


def _differing(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`stage.key` -> (value before, value now) of dumped settings."""
    return {
        f"{stage}.{key}": (before[stage][key], value)
        for stage, section in now.items()
        if isinstance(section, dict)
        for key, value in section.items()
        if value != before[stage][key]
    }


def _in_short(mission: Mission) -> dict[str, Any]:
    """A mission's settings without the texts of the prompt."""
    kept = ("name", "image", "keys", "longest_reason", "blank", "unparsable", "costs")
    return {key: getattr(mission, key) for key in kept} | {
        "categories": mission.names,
        "values": mission.values,
        "prior": mission.prior,
    }
