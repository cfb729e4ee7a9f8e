"""All doors by name."""

from __future__ import annotations

from tests.fuzz import job_door, output_door, table_door
from tests.fuzz.harness import Door
from tests.fuzz.image_door import HOLDER_DOOR, PICTURE_DOOR

DOORS: dict[str, Door] = {
    door.name: door for door in (job_door.DOOR, table_door.DOOR, PICTURE_DOOR, HOLDER_DOOR, output_door.DOOR)
}
