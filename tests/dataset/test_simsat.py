"""dataset/simsat.py: real HTTP against a server that has SimSat's habits, and every fault that was seen or feared."""

import io
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from orion_triage.dataset.catalogue import Target, load_catalogue
from orion_triage.dataset.sources import simsat
from orion_triage.dataset.sources.simsat import SimSat
from orion_triage.dataset.sources.source import Absent, ImagerySource, Picture, Shot
from orion_triage.errors import OrionError
from orion_triage.mission.prompt import Coordinates
from tests.conftest import structured_picture
from tests.dataset.simsat_server import KEY, Place, SimSatServer, serve

ATTEMPTS = 3
READ_SECONDS = 1.0  # where a server stalls on purpose; elsewhere a busy machine has a minute to answer


@pytest.fixture(scope="session")
def jpegs() -> list[bytes]:
    """A picture of 2560x2560, as SimSat sends them, and seven small ones: to decode it takes as long as fifteen."""
    made = []
    for seed, size in enumerate((2560, *7 * (640,))):
        buffer = io.BytesIO()
        structured_picture(seed).resize((size, size), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=80)
        made.append(buffer.getvalue())
    return made


@pytest.fixture
def server(jpegs: list[bytes]) -> Iterator[SimSatServer]:
    with serve(jpegs) as running:
        yield running


def source(server: SimSatServer, cache: Path, **changes: Any) -> SimSat:
    fast = {"requests_per_second": 1000, "read_seconds": 60.0, "attempts": ATTEMPTS, "backoff_seconds": 0.01}
    return SimSat(**{"url": server.url, "cache": cache, **fast, **changes})


def place(number: int) -> Place:
    return (round(-170.25 + 7.5 * number, 2), round(60.1 - 2.5 * number, 2))


def shot(where: Place, name: str = "") -> Shot:
    return Shot(Target(name or f"place_{where[0]}_{where[1]}", "LOW", "ocean_water", Coordinates(*where), "Nothing."))


def shots(count: int) -> list[Shot]:
    return [shot(place(number)) for number in range(count)]


def where(one: Shot) -> Place:
    return one.place.lon, one.place.lat


def assert_whole(cache: Path, server: SimSatServer, expected: Sequence[Place]) -> None:
    """The cache has the pictures of these places, byte by byte as they were sent, and nothing else but its lock."""
    files = [path.read_bytes() for path in cache.iterdir() if path.name != ".lock"]
    assert sorted(files) == sorted(server.picture(one) for one in expected)


class Case(NamedTuple):
    """A place's faults, and what comes of it."""

    faults: Iterator[str]
    outcome: str
    requests: int
    words: str = ""


def cases() -> dict[str, Case]:
    def once(fault: str) -> Case:
        return Case(iter([fault]), "picture", 2)

    def forever(fault: str, words: str) -> Case:
        return Case(repeat(fault), "failed", ATTEMPTS, words)

    def at_once(fault: str, words: str, outcome: str = "failed") -> Case:
        return Case(iter([fault]), outcome, 1, words)

    # No five places in a row without a whole answer: that is another test.
    return {
        "good": Case(iter(()), "picture", 1),
        "not visible": at_once("not visible", "not visible from the satellite", "not visible"),
        "empty once": once("empty"),
        "empty twice": Case(iter(["empty", "empty"]), "picture", 3),
        "empty forever": forever("empty", "the place is visible, but SimSat has no picture"),
        "bare empty": forever("bare empty", "the reply has no metadata, and SimSat has no picture"),
        "none": forever("picture that is none", "SimSat has no picture"),
        "bare picture": Case(repeat("bare picture"), "picture", 1),
        "500 once": once("500"),
        "500 forever": forever("500", "HTTP 500: the answer of a scripted 500 (last of 3 attempts)"),
        "502 once": once("502"),
        "429 forever": forever("429", "HTTP 429"),
        "three different": Case(iter(["500", "truncated", "empty"]), "failed", 3, "SimSat has no picture"),
        "404": at_once("404", "HTTP 404: the answer of a scripted 404."),
        "422": at_once("422", "HTTP 422"),
        "elsewhere": at_once("elsewhere", "/other?access_token=..., which is not followed"),
        "stall once": once("stall"),
        "stall forever": forever("stall", "the reply timed out"),
        "stall midway": once("stall midway"),
        "announces more once": once("announces more"),
        "announces more forever": forever("announces more", "the connection broke"),
        "announces less once": once("announces less"),
        "announces less forever": forever("announces less", "the picture is damaged"),
        "reset once": once("reset"),
        "reset forever": forever("reset", "the connection broke"),
        "reset midway": once("reset midway"),
        "truncated once": once("truncated"),
        "truncated forever": forever("truncated", "the picture is damaged"),
        "page": forever("page", "not PNG, JPEG or TIFF"),
        "huge": at_once("huge", "more than 32,000,000 bytes"),
        "key": forever("key", "static/0,0,14/1280x1280@2x?access_token=... (Caused by"),
        "last": Case(iter(()), "picture", 1),
    }


def test_every_fault_has_its_outcome_its_words_and_its_number_of_requests(server: SimSatServer, tmp_path: Path) -> None:
    table = cases()
    asked = [shot(place(number), name) for number, name in enumerate(table)]
    server.scripts = {where(one): table[one.name].faults for one in asked}
    answers = list(source(server, tmp_path / "cache", read_seconds=READ_SECONDS).pictures(asked))

    outcomes = {
        one.name: "picture" if isinstance(answer, Picture) else answer.outcome
        for one, answer in zip(asked, answers, strict=True)
    }
    assert outcomes == {name: case.outcome for name, case in table.items()}
    counts = server.counts()
    assert {one.name: counts[where(one)] for one in asked} == {name: case.requests for name, case in table.items()}
    for one, answer in zip(asked, answers, strict=True):
        if isinstance(answer, Picture):
            assert answer.data == server.picture(where(one))
            assert not answer.cached
        else:
            assert answer.why.startswith(f"{one.name} (lon {one.place.lon:g}, lat {one.place.lat:g}): ")
            assert table[one.name].words in answer.why
            assert KEY not in answer.why
    assert server.strays == []
    got = [one for one in asked if table[one.name].outcome == "picture"]
    assert_whole(tmp_path / "cache", server, [where(one) for one in got])

    before = len(server.requests)
    again = list(source(server, tmp_path / "cache").pictures(got))
    assert len(server.requests) == before
    assert [(answer.data, answer.cached) for answer in again if isinstance(answer, Picture)] == [
        (server.picture(where(one)), True) for one in got
    ]


def test_the_satellite_stands_straight_above_and_the_scale_follows(server: SimSatServer, tmp_path: Path) -> None:
    as_protocol: ImagerySource = source(server, tmp_path)
    [equator, north] = as_protocol.pictures([shot((10.5, 0.0)), shot((-20.0, 60.0))])
    [higher] = source(server, tmp_path, altitude_km=750).pictures([shot((-20.0, 60.0))])
    assert isinstance(equator, Picture)
    assert isinstance(north, Picture)
    assert isinstance(higher, Picture)
    assert equator.metres_per_pixel == pytest.approx(11.3, abs=0.05)
    assert north.metres_per_pixel == pytest.approx(11.3 / 2, abs=0.03)
    assert higher.metres_per_pixel == pytest.approx(11.3 * 1.5 / 2, abs=0.04)
    assert server.requests[1].question == {
        "lon_target": -20.0,
        "lat_target": 60.0,
        "lon_satellite": -20.0,
        "lat_satellite": 60.0,
        "alt_satellite": 500.0,
    }
    assert [request.question["alt_satellite"] for request in server.requests] == [500, 500, 750]


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client sleeps, which it does: a clock beside it would measure the machine, too."""
    seconds: list[float] = []
    sleep = time.sleep

    def noted(wanted: float) -> None:
        seconds.append(wanted)
        sleep(wanted)

    monkeypatch.setattr(simsat.time, "sleep", noted)
    return seconds


def test_no_second_sees_more_requests_than_allowed_retries_included(
    server: SimSatServer, tmp_path: Path, sleeps: list[float]
) -> None:
    server.scripts = {place(2): iter(["500", "empty"])}
    patient = source(server, tmp_path, requests_per_second=4)
    for group in (shots(4), shots(7)[4:]):
        assert all(isinstance(answer, Picture) for answer in patient.pictures(group))
    assert sum(sleeps) < 2.1  # not more than is needed: 2 if answers took no time
    times = [request.monotonic_seconds for request in server.requests]
    assert len(times) == 9
    assert min(later - sooner for sooner, later in zip(times, times[4:], strict=False)) >= 1


def test_pauses_double_and_are_jittered_by_the_seed(server: SimSatServer, tmp_path: Path, sleeps: list[float]) -> None:
    server.scripts = {place(0): repeat("500")}
    patient = source(server, tmp_path, attempts=5, backoff_seconds=0.04, longest_wait_seconds=0.2, seed=3)
    list(patient.pictures(shots(1)))
    jitter = random.Random(3)
    expected = [min(0.2, 0.04 * 2**n * jitter.uniform(0.5, 1)) for n in range(4)]
    assert expected[3] == 0.2
    assert sleeps == [pytest.approx(pause) for pause in expected]


@pytest.mark.parametrize(
    ("fault", "least", "most"),
    [
        ("429 after 0.5", 0.5, 0.5),
        ("503 after date 2", 0.01, 2),
        ("429 after 86400", 2, 2),
        ("429 after ages", 0.005, 0.01),
    ],
)
def test_retry_after_is_honoured_within_a_cap(
    server: SimSatServer, tmp_path: Path, sleeps: list[float], fault: str, least: float, most: float
) -> None:
    server.scripts = {place(0): iter([fault])}
    [answer] = source(server, tmp_path, longest_wait_seconds=2).pictures(shots(1))
    assert isinstance(answer, Picture)
    [pause] = sleeps
    assert least <= pause <= most


def test_a_server_that_is_not_there_stops_at_the_first_place(tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        absent = SimSat(url=url, cache=tmp_path, backoff_seconds=0.01)
        with pytest.raises(OrionError) as caught:
            next(absent.pictures(shots(3)))
    assert f"SimSat at {url} does not answer" in caught.value.message
    assert "refused" in caught.value.message
    assert "last of 4 attempts" in caught.value.message
    assert str(tmp_path) in caught.value.fix


def test_a_place_at_which_the_server_hangs_does_not_stop_the_others(server: SimSatServer, tmp_path: Path) -> None:
    server.scripts = {place(0): repeat("stall")}
    first, second = source(server, tmp_path, attempts=1, read_seconds=READ_SECONDS).pictures(shots(2))
    assert isinstance(first, Absent)
    assert isinstance(second, Picture)


@pytest.mark.parametrize("kind", ["drip", "drip of headers"])
def test_an_answer_that_never_ends_is_given_up_though_it_never_pauses(
    server: SimSatServer, tmp_path: Path, kind: str
) -> None:
    server.scripts = {place(0): repeat(kind)}
    [answer] = source(server, tmp_path, attempts=1, read_seconds=0.5).pictures(shots(1))
    assert isinstance(answer, Absent)
    assert "the reply timed out" in answer.why  # after a minute the server would have hung up


def answers_until_error(source: SimSat, asked: Sequence[Shot]) -> tuple[list[Picture | Absent], OrionError | None]:
    answers = []
    try:
        for answer in source.pictures(asked):
            answers.append(answer)
    except OrionError as error:
        return answers, error
    return answers, None


def test_an_outage_midway_stops_and_the_same_command_goes_on(server: SimSatServer, tmp_path: Path) -> None:
    server.scripts = {place(4): iter(["stop"])}
    answers, error = answers_until_error(source(server, tmp_path), shots(12))
    assert [type(answer) for answer in answers] == [Picture] * 4 + [Absent] * 4
    assert error is not None
    assert f"SimSat at {server.url} does not answer. {shots(9)[8].name}" in error.message
    assert "refused" in error.message
    assert "the 4 places before it" in error.message
    assert_whole(tmp_path, server, [place(number) for number in range(4)])
    assert server.counts() == {place(number): 1 for number in range(5)}

    server.start()
    answers, error = answers_until_error(source(server, tmp_path), shots(12))
    assert error is None
    assert [isinstance(answer, Picture) and answer.cached for answer in answers] == [True] * 4 + [False] * 8
    assert_whole(tmp_path, server, [place(number) for number in range(12)])
    assert server.counts() == {place(number): 1 + (number == 4) for number in range(12)}


@pytest.mark.parametrize("fault", ["500", "429", "reset"])
def test_five_places_in_a_row_without_the_server_stop_and_four_do_not(
    server: SimSatServer, tmp_path: Path, fault: str
) -> None:
    server.scripts = {place(number): repeat(fault) for number in (0, 1, 2, 3, 5, 6, 7, 8)}
    answers, error = answers_until_error(source(server, tmp_path / "a", attempts=2), shots(10))
    assert error is None
    assert [isinstance(answer, Picture) for answer in answers] == [number in (4, 9) for number in range(10)]
    server.scripts[place(4)] = repeat(fault)
    answers, error = answers_until_error(source(server, tmp_path / "b", attempts=2), shots(10))
    assert error is not None
    assert len(answers) == 4


def test_places_without_imagery_are_no_outage(server: SimSatServer, tmp_path: Path) -> None:
    server.scripts = {place(number): repeat("empty") for number in range(7)}
    answers = list(source(server, tmp_path).pictures(shots(8)))
    assert [isinstance(answer, Picture) for answer in answers] == [False] * 7 + [True]


def test_a_spoilt_picture_is_fetched_again(server: SimSatServer, tmp_path: Path) -> None:
    list(source(server, tmp_path).pictures(shots(3)))
    one, two, three = sorted(tmp_path.glob("*.jpeg"))
    one.write_bytes(one.read_bytes()[:10_000])
    two.write_bytes(b"")
    (tmp_path / f".{three.name}.x1y2z3").write_bytes(b"half a pic")  # as a killed process leaves it
    spoilt = {place for place in server.counts() if server.picture(place) != three.read_bytes()}
    answers = list(source(server, tmp_path).pictures(shots(3)))
    assert sum(isinstance(answer, Picture) and answer.cached for answer in answers) == 1
    assert server.counts() == {place(number): 1 + (place(number) in spoilt) for number in range(3)}
    assert_whole(tmp_path, server, [place(number) for number in range(3)])


def test_a_spoilt_picture_does_not_stay_when_no_other_comes(server: SimSatServer, tmp_path: Path) -> None:
    list(source(server, tmp_path).pictures(shots(1)))
    [path] = tmp_path.glob("*.jpeg")
    path.write_bytes(path.read_bytes()[:10_000])
    server.scripts = {place(0): repeat("truncated")}
    [answer] = source(server, tmp_path).pictures(shots(1))
    assert isinstance(answer, Absent)
    assert_whole(tmp_path, server, [])


def test_the_cache_knows_places_not_names_and_servers_by_their_address(
    server: SimSatServer, jpegs: list[bytes], tmp_path: Path
) -> None:
    list(source(server, tmp_path).pictures([shot((0.0, 5.0), "old_name")]))
    [renamed] = source(server, tmp_path).pictures([shot((-0.0, 5.0), "new_name")])
    assert isinstance(renamed, Picture)
    assert renamed.cached
    with serve(jpegs[::-1]) as other:
        [picture] = source(other, tmp_path).pictures([shot((0.0, 5.0), "old_name")])
    assert isinstance(picture, Picture)
    assert not picture.cached


def test_what_cannot_go_well_is_refused_before_any_request(server: SimSatServer, tmp_path: Path) -> None:
    with pytest.raises(OrionError, match="place_1~2: SimSat has only one picture per place"):
        source(server, tmp_path).pictures([shot((1.0, 1.0), "place_1"), Shot(shot((1.0, 1.0), "place_1").target, 2)])
    running = source(server, tmp_path / "shared").pictures(shots(2))
    next(running)
    with pytest.raises(OrionError, match="another run is fetching into"):
        next(source(server, tmp_path / "shared").pictures(shots(2)))
    running = iter(())
    assert len(list(source(server, tmp_path / "shared").pictures(shots(2)))) == 2
    asked = len(server.requests)
    (tmp_path / "file").write_text("")
    with pytest.raises(OrionError, match="cannot be used as the cache"):
        next(source(server, tmp_path / "file").pictures(shots(1)))
    assert len(server.requests) == asked


@pytest.mark.parametrize(
    "url",
    [
        "localhost:9005",
        "ftp://localhost/",
        "file:///etc/passwd",
        "http://",
        "http://[",
        "http://h:99999",
        "",
        "http://h/?a=b",
    ],
)
def test_an_address_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(OrionError, match="SimSat's address"):
        SimSat(url=url, cache=tmp_path)


FETCH = """
import sys
from pathlib import Path
from orion_triage.dataset.catalogue import load_catalogue
from orion_triage.dataset.sources.simsat import SimSat
from orion_triage.dataset.sources.source import Shot

url, cache = sys.argv[1:]
list(SimSat(url=url, cache=Path(cache)).pictures([Shot(target) for target in load_catalogue()[:2]]))
"""


@pytest.mark.parametrize("dies", [True, False])
def test_a_picture_of_which_half_could_be_written_is_none(jpegs: list[bytes], tmp_path: Path, dies: bool) -> None:
    cache = tmp_path / "cache"
    # Past 100 kB the kernel kills the process in the middle of a write, or (as with a full disk) refuses the rest.
    limit = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    limit += "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n" if dies else ""
    with serve(jpegs[:1]) as server:
        command = [sys.executable, "-c", limit + FETCH, server.url, str(cache)]
        stopped = subprocess.run(command, capture_output=True, text=True, check=False)
        assert stopped.returncode == (-signal.SIGXFSZ if dies else 1)
        assert dies or "the picture cannot be written to" in stopped.stderr
        assert [path.stat().st_size for path in cache.iterdir() if path.name != ".lock"] == [100_000] * dies
        assert not list(cache.glob("*.jpeg"))
        list(source(server, cache).pictures(asked := [Shot(target) for target in load_catalogue()[:2]]))
        assert_whole(cache, server, [where(one) for one in asked])
