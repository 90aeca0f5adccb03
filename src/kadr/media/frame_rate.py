"""Frame rates as files state them: a decimal such as 29.97 means the rate of television that it abbreviates."""

from __future__ import annotations

from fractions import Fraction

from kadr.errors import MediaError
from kadr.quoting import show

MAX_FILE_FPS = 1000
NTSC_DIVISOR = 1001  # rates of television are thousands over it: 24000/1001, 30000/1001, 60000/1001
NTSC_RATES = {rate: Fraction(rate * 1000, NTSC_DIVISOR) for rate in (12, 15, 24, 30, 48, 60, 90, 120, 240)}
NTSC_TOLERANCE = 0.005  # a decimal this close to such a rate abbreviates it: 23.976, and 23.98 too


def exact_fps(fps: float | Fraction, max_fps: int = MAX_FILE_FPS) -> Fraction:
    """Returns the frame rate of a file: 23.976, 29.97, 59.94 and their kin are thousands over 1001.

    Other whole numbers and ratios over at most 1001 are kept exactly.

    Raises:
        MediaError: it is no rate, or above what the format can say.
    """
    try:
        number = Fraction(0 if isinstance(fps, bool) else fps)
    except (TypeError, ValueError, OverflowError):
        number = Fraction(0)
    rate = _ntsc_rate(number) or number.limit_denominator(NTSC_DIVISOR)
    if not 0 < rate <= max_fps:
        raise MediaError(f"fps is {show(fps)}; it must be a number above 0 and at most {max_fps}, such as 24 or 29.97.")
    return rate


def _ntsc_rate(number: Fraction) -> Fraction | None:
    """Returns the rate of television that a decimal with two or three places abbreviates; None where it is none."""
    rate = NTSC_RATES.get(round(number * NTSC_DIVISOR / 1000))
    return rate if rate is not None and abs(rate - number) <= NTSC_TOLERANCE else None
