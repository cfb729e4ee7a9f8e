"""A cluster that is not there is one line, soon."""

from __future__ import annotations

import pytest

from pipelines.cluster import reach
from pipelines.errors import RunFailed
from tests.conftest import free_port


def test_an_address_where_nobody_answers_is_named_at_once() -> None:
    with pytest.raises(RunFailed, match=r"--address 127.0.0.1:\d+: no Ray cluster answers there .*check host and port"):
        reach(f"127.0.0.1:{free_port()}")


@pytest.mark.parametrize("address", [None, "auto", "local"])
def test_other_addresses_are_left_to_ray(address: str | None) -> None:
    reach(address)
