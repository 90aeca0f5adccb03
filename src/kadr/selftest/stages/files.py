"""Files: checksums where the hub's are known, and configs that only released weights have."""

from __future__ import annotations

from collections.abc import Iterator

from kadr.checkpoints.verify import ABSENT, DAMAGED, verify_files
from kadr.models.transformer import TRANSFORMER_2B
from kadr.selftest.result import Check, none_of
from kadr.selftest.subject import Subject


def check_files(subject: Subject) -> Iterator[Check]:
    """Compares files of the hub's cache with its checksums; other files have no record that kadr knows.

    RoPE's constants are those of every released transformer (reference: ltx-video.md, 2): a file may state others, and
    no tensor would show it.
    """
    releases = {item.release.name: item.release for item in subject.spec.components if item.release is not None}
    results = [
        result
        for release in releases.values()
        if release.repo is not None
        for result in verify_files(release.repo, release.file_patterns)
        if result.state != ABSENT  # opened from elsewhere, or not fetched
    ]
    yield Check("files compared with the hub's checksums", len(results))
    yield none_of("damaged files", [result.name for result in results if result.state == DAMAGED])
    config = subject.spec.transformer_config
    yield Check("RoPE theta", config.rope_theta, TRANSFORMER_2B.rope_theta, TRANSFORMER_2B.rope_theta)
    expected = TRANSFORMER_2B.rope_max_positions
    wrong = [str(value) for value in config.rope_max_positions if value not in expected]
    yield none_of("RoPE positions that no released model has", wrong)
