"""The server, once a session, and a user's folders on it, for every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.remote.place import Place, make_dataset, make_repository
from tests.remote.sshd import Server, running_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def place(server: Server, tmp_path: Path) -> Iterator["Place"]:
    server.wire.leave_alone()
    server.trust("host")
    yield Place(server, tmp_path / "here", server.home / tmp_path.name)
    server.kill_sessions()
    for tool in server.tools.iterdir():
        tool.unlink()


@pytest.fixture
def prepared(place: Place) -> Place:
    make_repository(place.source)
    make_dataset(place.local_data, 1)
    return place
