import numpy as np
import pytest

from orion_triage.dataset.catalogue import MORPHOLOGIES
from orion_triage.dataset.sources.synthetic import countryside
from orion_triage.dataset.sources.synthetic.canvas import Canvas
from orion_triage.dataset.sources.synthetic.draw import PAINTERS, SUBTYPES, draw_tile, tile_seed
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import is_blank


def test_every_morphology_of_the_catalogue_can_be_drawn() -> None:
    assert set(PAINTERS) == set(MORPHOLOGIES)


@pytest.mark.parametrize("morphology", sorted(PAINTERS))
def test_tiles_are_deterministic_and_differ_by_seed(morphology: str) -> None:
    first, again, other = (draw_tile(morphology, seed, metres_per_pixel=40, size=128) for seed in (5, 5, 6))
    assert first.image.size == (128, 128)
    assert first.image.tobytes() == again.image.tobytes() != other.image.tobytes()


def test_the_ground_sample_distance_is_a_parameter() -> None:
    near, far = (draw_tile("agriculture", 3, metres_per_pixel=m, size=256) for m in (5.0, 20.0))

    def roughness(tile) -> float:
        return float(np.abs(np.diff(np.asarray(tile.image.convert("L"), float), axis=1)).mean())

    assert roughness(far) > roughness(near)  # more field edges in view


def test_tile_statistics_are_those_of_real_frames() -> None:
    images = {name: draw_tile(name, tile_seed(1, f"{name}0")).image for name in PAINTERS}
    assert {image.size for image in images.values()} == {(512, 512)}
    assert {name for name, image in images.items() if is_blank(image)} <= {"ocean_water", "desert_ice_canopy"}
    tiles = [np.asarray(image, float) for image in images.values()]
    deviations = [tile.mean(axis=2).std() for tile in tiles]
    saturation = np.mean([((t.max(2) - t.min(2)) / np.maximum(t.max(2), 1)).mean() for t in tiles])
    assert 0.2 < saturation < 0.45  # real frames: 0.33
    assert 4 < min(deviations) < max(deviations) < 75  # real frames: 11..69, ocean below
    assert np.abs(np.mean(tiles, axis=(0, 1, 2)) - [93, 96, 75]).max() < 25


def test_water_and_buildings_are_measured() -> None:
    assert draw_tile("ocean_water", 1, metres_per_pixel=40, size=128).water_share > 0.95
    assert draw_tile("urban_grid", 1, metres_per_pixel=40, size=128).built_share > 0.5
    assert draw_tile("geological", 1, metres_per_pixel=40, size=128).built_share == 0


def test_a_tile_says_which_of_its_morphologys_scenes_it_shows() -> None:
    assert set(SUBTYPES) == set(PAINTERS)
    for morphology, subtypes in SUBTYPES.items():
        seen = {draw_tile(morphology, seed, metres_per_pixel=80, size=48).subtype for seed in range(12 * len(subtypes))}
        assert seen == set(subtypes), morphology


@pytest.mark.parametrize(
    ("wild", "worked"), [("hills", "valley_fields"), ("upland", "patchwork"), ("wetland", "clearings")]
)
def test_wild_and_worked_land_are_equally_rough(wild: str, worked: str) -> None:
    """Roughness must not tell them apart: a model that learned it answers by texture on real frames."""
    assert roughness(worked) == pytest.approx(roughness(wild), rel=0.6)


def test_rough_land_is_as_rough_as_real_frames() -> None:
    # 25 real frames: 6.8 grey levels in the middle, 4.4 to 9.0 in the middle half; air and optics take a third.
    assert 4 < np.mean([roughness(name) for name in ("hills", "upland", "wetland", "patchwork", "parcels")]) < 13


def roughness(name: str, tiles: int = 6) -> float:
    """Mean difference of neighbouring pixels in grey levels, the median over some tiles as they are drawn."""
    painters = {scene: painter for scenes in countryside.SCENES.values() for scene, painter in scenes.items()}
    values = []
    for seed in range(tiles):
        canvas = Canvas(np.random.default_rng(seed), 256, 10.0)
        painters[name](canvas)
        values.append(np.abs(np.diff(canvas.rgb.mean(axis=2), axis=1)).mean())
    return float(np.median(values))


def test_rough_land_is_drawn_where_it_is_asked_for() -> None:
    small = {"metres_per_pixel": 80, "size": 48}
    for morphology, scenes in countryside.SCENES.items():
        seen = {draw_tile(morphology, seed, rough_land=1.0, **small).subtype for seed in range(12 * len(scenes))}
        assert seen == set(scenes), morphology
    some = [draw_tile("town", seed, rough_land=0.5, **small).subtype for seed in range(40)]
    assert 10 < some.count("hamlets") < 30
    assert draw_tile("ocean_water", 3, rough_land=1.0, **small).image == draw_tile("ocean_water", 3, **small).image
    around = [draw_tile("mega_airport", seed, rough_land=1.0, **small) for seed in range(3)]
    plain = [draw_tile("mega_airport", seed, **small) for seed in range(3)]
    assert all(one.image != other.image for one, other in zip(around, plain, strict=True))
    assert {one.morphology for one in around} == {"mega_airport"}
    assert draw_tile("town", 3, rough_land=1.0, **small).image != draw_tile("town", 3, **small).image


def test_an_unknown_morphology_is_refused() -> None:
    with pytest.raises(OrionError, match="there is no morphology 'moon'"):
        draw_tile("moon", 1)


def test_seeds_depend_on_both_parts() -> None:
    assert len({tile_seed(s, n) for s in (1, 2) for n in ("a", "b")}) == 4
