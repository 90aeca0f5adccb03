"""Animated GIF and WebP."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kadr.cancellation import check_cancelled
from kadr.media.encoders.encoder import FrameEncoder, Target
from kadr.media.encoders.tags import write_comment

WEBP_QUALITY = 90  # of 100
GIF_TIME_BASE = Fraction(1, 100)


class _StreamEncoder(FrameEncoder):
    """Encodes frames in RGB, one by one, by a codec of FFmpeg into a container."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._frames_encoded = 0
        self._container: Any = None

    def _open_stream(self, path: Path, form: str, codec: str, pix_fmt: str, options: dict[str, str]) -> None:
        """Creates a file. form, codec, pix_fmt: FFmpeg's names; options: of the container."""
        import av

        self._container = av.open(str(path.absolute()), "w", format=form, options=options)
        self._stream = self._container.add_stream(codec, rate=self.target.fps)
        self._stream.width, self._stream.height = self.target.size.width, self.target.size.height
        self._stream.pix_fmt = pix_fmt

    def encode(self, pixels: np.ndarray) -> None:
        """See `FrameEncoder.encode`."""
        import av

        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=self._stream.pix_fmt)
        frame.pts, frame.time_base = self._frames_encoded, 1 / self.target.fps
        self._container.mux(self._stream.encode(frame))
        self._frames_encoded += 1

    def _finish_stream(self) -> None:
        """Encodes what the codec holds back, and completes the file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def close(self) -> None:
        """See `FrameEncoder.close`."""
        if self._container is not None:
            with suppress(Exception):
                self._container.close()
        self.target.partial.unlink(missing_ok=True)


class WebPEncoder(_StreamEncoder):
    """Encodes an animated WebP. Only the compressed frames stay in memory until it is complete."""

    def open(self) -> None:
        """See `FrameEncoder.open`."""
        # In RGB: libwebp converts colours by the rules of WebP.
        self._open_stream(self.target.partial, "webp", "libwebp_anim", "bgra", {"loop": "0"})
        self._stream.codec_context.options = {"quality": str(WEBP_QUALITY)}

    def finish(self, comment: str | None) -> None:
        """See `FrameEncoder.finish`."""
        self._finish_stream()
        if comment is not None:
            write_comment(self.target.partial, comment)


class GifEncoder(_StreamEncoder):
    """Encodes an animated GIF with the 256 colours that suit its frames best.

    They are known only after the last frame, so frames go to a hidden file first, without loss, and not to memory.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._spool = target.partial.with_suffix(".frames.mkv")

    def open(self) -> None:
        """See `FrameEncoder.open`."""
        self.target.partial.touch()
        self._open_stream(self._spool, "matroska", "ffv1", "bgr0", {})

    def finish(self, comment: str | None) -> None:
        """See `FrameEncoder.finish`."""
        self._finish_stream()
        palette = _find_palette(self._spool)
        _write_gif(self._spool, palette, self.target.partial, self.target.fps)
        if comment is not None:
            write_comment(self.target.partial, comment)
        self._spool.unlink(missing_ok=True)

    def close(self) -> None:
        """See `FrameEncoder.close`."""
        super().close()
        self._spool.unlink(missing_ok=True)


def _find_palette(path: Path) -> Any:
    """Returns the 256 colours that suit all frames of a file, as a frame."""
    import av

    with av.open(str(path.absolute())) as source:
        graph = av.filter.Graph()
        stream = source.streams.video[0]
        nodes = [graph.add_buffer(template=stream), graph.add("palettegen", "reserve_transparent=0:stats_mode=full")]
        _link(graph, [*nodes, graph.add("buffersink")])
        for frame in source.decode(stream):
            check_cancelled()
            graph.push(frame)
        graph.push(None)
        return graph.pull()


def _write_gif(path: Path, palette: Any, output: Path, fps: Fraction) -> None:
    """Writes all frames of a file with these colours. A GIF counts time in hundredths of a second."""
    import av

    with av.open(str(path.absolute())) as source, av.open(str(output.absolute()), "w", format="gif") as target:
        stream, graph = source.streams.video[0], av.filter.Graph()
        frames = graph.add_buffer(template=stream)
        colours = graph.add_buffer(
            width=palette.width, height=palette.height, format=palette.format, time_base=stream.time_base
        )
        use, sink = graph.add("paletteuse", "dither=sierra2_4a:diff_mode=rectangle"), graph.add("buffersink")
        frames.link_to(use, 0, 0)
        colours.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        gif = target.add_stream("gif", rate=fps)
        gif.width, gif.height, gif.pix_fmt = stream.width, stream.height, "pal8"
        gif.codec_context.time_base = GIF_TIME_BASE
        palette.pts = 0
        colours.push(palette)
        colours.push(None)

        def write_ready() -> None:
            while True:
                try:
                    frame = sink.pull()
                except (av.error.BlockingIOError, av.error.EOFError):
                    return
                # Of the frame's number, not of the time before it: rounding does not add up.
                assert isinstance(frame, av.VideoFrame)
                frame.pts = round(Fraction(frame.time or 0) / GIF_TIME_BASE)
                frame.time_base = GIF_TIME_BASE
                target.mux(gif.encode(frame))

        for frame in source.decode(stream):
            check_cancelled()
            frames.push(frame)
            write_ready()
        frames.push(None)
        write_ready()
        target.mux(gif.encode(None))


def _link(graph: Any, nodes: list[Any]) -> None:
    for first, second in pairwise(nodes):
        first.link_to(second)
    graph.configure()
