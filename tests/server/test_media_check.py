"""Facts of an upload that its clients are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from kadr.media.writer import VideoWriter
from kadr.server.inputs.media_check import CLIP, MediaLimits, read_facts
from kadr.shapes import Size


def test_settings_of_a_video_do_not_tell_where_the_server_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "still.png").touch()
    metadata = {"request": {"conditions": [{"media": str(tmp_path / "still.png")}]}}
    with VideoWriter(tmp_path / "upload.mp4", Size(64, 64), 24, metadata=metadata) as writer:
        writer.write(np.zeros((1, 64, 64, 3), np.uint8))
    stored = read_facts(tmp_path / "upload.mp4", CLIP, MediaLimits()).metadata
    assert str(tmp_path) not in stored
    assert json.loads(stored)["request"]["conditions"] == [{"media": "./still.png"}]
