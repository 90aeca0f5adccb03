"""Controls: reference videos beside the video's tokens, against diffusers' transformer in a plain loop, and what is
refused before it costs anything."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ltx_video.models.autoencoders.vae_encode import normalize_latents
from PIL import Image
from torch import Tensor

from kadr import Condition, Control, Engine, KadrWarning, Progress, Request, Size
from kadr.checkpoints.lora.file import REFERENCE_DOWNSCALE_KEY, LoraFile
from kadr.errors import CheckpointError, KadrError, MediaError, RequestError
from kadr.media.clip import ClipReader, read_video
from kadr.media.control_maps import canny_edges
from kadr.media.image import prepare_image
from kadr.media.writer import VideoWriter
from kadr.models.lora_layers import merge_loras
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.pipeline.dry_run import DryRunEngine
from kadr.pipeline.progress import ignore_progress
from kadr.pipeline.stages.control_networks import NETWORK_FILES, build_map_renderers, fetch_networks
from kadr.pipeline.stages.prepared_controls import prepare_control
from kadr.pipeline.stages.text import PromptEncoder
from kadr.request.resolved_controls import ResolvedControl, resolve_controls
from kadr.request.windows import Windows
from kadr.sampling import guidance as guiding
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.positions import token_positions
from kadr.sampling.reference_tokens import ReferenceTokens
from kadr.sampling.settings import Guidance, Pass
from kadr.sampling.step_cache import StepCache
from kadr.shapes import LatentGrid
from tests import lora_files, onnx_files
from tests.fakehub import FakeHub, serve_fake_hub
from tests.oracles import diffusers_transformer, official_vae, randn, relative_error
from tests.tiny_models import CHANNELS, MODEL_FILE, build_random, transformer_config, vae_config, write_random_upscaler

LEVELS = (1.0, 0.8, 0.35)
REQUEST = Request(
    prompt="a red circle",
    negative_prompt="blue sea",
    size=Size(128, 64),
    frames=17,
    fps=24,
    sigmas=LEVELS,
    guidance=1.0,
    image_noise=0.15,
)
AT = 8  # pixel frame of the keyframe


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Clips of a square that moves, and gets brighter from frame to frame."""
    folder = tmp_path_factory.mktemp("clips")

    def clip(frames: int) -> str:
        path = folder / f"{frames} frames.mp4"
        if not path.exists():
            made = np.full((frames, 64, 128, 3), 20, np.uint8)
            for frame in range(frames):
                made[frame, 16:48, 2 * frame : 2 * frame + 32] = 60 + 4 * frame
            with VideoWriter(path, Size(128, 64), 24) as writer:
                writer.write(made)
        return str(path)

    return clip


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """In-context LoRAs, with a factor in their header or none."""
    folder = tmp_path_factory.mktemp("loras")

    def made(factor: str | None = None) -> Path:
        metadata = {} if factor is None else {REFERENCE_DOWNSCALE_KEY: factor}
        return lora_files.write_lora_file(folder / f"{factor}.safetensors", lora_files.block_pairs(), metadata=metadata)

    return made


@pytest.fixture(scope="module")
def opened(home: Path, lora: Callable[..., Path]) -> Callable[..., Engine]:
    """An engine with an in-context LoRA of that factor, and that strength."""
    made: dict[Any, Engine] = {}

    def engine(factor: str | None = None, strength: float = 0.0) -> Engine:
        key = factor, strength
        if key not in made:
            loras = [(lora(factor), strength)]
            made[key] = Engine.open(home / MODEL_FILE, device="cpu", loras=loras, prompt_cache=False)
        return made[key]

    return engine


# --- the oracle ----------------------------------------------------------------------------------------------------


class Oracle:
    """In-context sampling with the official VAE and diffusers' transformer: tokens side by side, a level and a place
    for each, in a plain loop. The LoRA is added to the weights."""

    def __init__(self, engine: Engine, lora: Path, strength: float) -> None:
        self.engine = engine
        transformer = build_random(lambda: Transformer(transformer_config()), 1)  # as `tiny.write` sows them
        merge_loras(transformer, [LoraFile.open(lora).load()], [strength])
        self.transformer = diffusers_transformer(transformer)
        self.vae = official_vae(build_random(lambda: VAE(vae_config("0.9.5")), 2))

    def latents(self, pixels: Tensor) -> Tensor:
        """(1, 3, F, H, W) -> (1, C, f, h, w)."""
        return normalize_latents(self.vae.encode(pixels).latent_dist.mode(), self.vae, True)

    def velocity(self, text: Any, tokens: Tensor, level: Tensor, where: Tensor) -> Tensor:
        return self.transformer(
            tokens,
            encoder_hidden_states=text.embeddings,
            encoder_attention_mask=text.mask.float(),
            timestep=level * 1000,
            video_coords=where[None],
            return_dict=False,
        )[0]

    def denoise(
        self,
        request: Request,
        noise: Tensor,
        references: list[Tensor],
        factor: int,
        shown: dict[int, Tensor],
        *,
        guide: Tensor | None = None,
        stream: str = "",
        levels: tuple[float, ...] = LEVELS,
    ) -> Tensor:
        """references: pixels of each; shown: frame -> pixels of a picture that is held there with strength 1; guide:
        latents that are held beside the first frames; stream: before the names of all noise."""
        texts = PromptEncoder(self.engine.components, [request.prompt, request.negative_prompt or ""]).encode(
            ignore_progress
        )
        tokens, where = flat(noise), places(noise.shape[2:])
        given, held = tokens.clone(), torch.zeros(tokens.shape[1])
        for frame, pixels in shown.items():
            made = flat(self.latents(pixels))
            count = made.shape[1]
            if frame == 0:
                given[:, :count], held[:count] = made, 1
            else:
                given, held = torch.cat([given, made], 1), torch.cat([held, torch.ones(count)])
                where = torch.cat([where, places((1, *noise.shape[3:]), first=frame)], 1)
        if guide is not None:
            given, held = torch.cat([given, flat(guide)], 1), torch.cat([held, torch.ones(flat(guide).shape[1])])
            where = torch.cat([where, places(guide.shape[2:])], 1)
        context = [self.latents(pixels) for pixels in references]
        clean = torch.cat([tokens[:, :0], *(flat(one) for one in context)], 1)
        spread = torch.tensor([1, factor, factor])[:, None]
        where = torch.cat([where, *(spread * places(one.shape[2:]) for one in context)], 1)
        count, x, path = given.shape[1], given, [*levels, 0.0]
        streams, still = NoiseStreams(request.seed), held.bool()[None, :, None]
        for index, (now, then) in enumerate(pairwise(path)):
            shake = given + 0.15 * now**2 * streams.draw(f"{stream}condition {index}", given.shape)
            x = torch.where(still, shake, x)
            level = torch.cat([torch.minimum(torch.tensor(now), 1 - held), torch.zeros(clean.shape[1])])[None]
            seen = torch.cat([x, clean], 1)
            made = self.velocity(texts[0], seen, level, where)[:, :count]
            scale = request.guidance.cfg_scale if isinstance(request.guidance, Guidance) else 1
            if scale > 1:
                without = self.velocity(texts[1], seen, level, where)[:, :count]
                made = without + scale * (made - without)
            x = torch.where(still, x, x - (now - then) * made)
        frames, height, width = noise.shape[2:]
        return x[:, : frames * height * width].transpose(1, 2).unflatten(2, (frames, height, width))


@pytest.fixture(scope="module")
def oracle(opened: Callable[..., Engine], lora: Callable[..., Path]) -> Callable[..., Oracle]:
    """By the factor of its LoRA, at strength 0.7."""
    made: dict[str | None, Oracle] = {}

    def find(factor: str | None) -> Oracle:
        if factor not in made:
            made[factor] = Oracle(opened(factor, 0.7), lora(factor), 0.7)
        return made[factor]

    return find


def flat(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def places(shape: tuple[int, ...], *, first: int = 0) -> Tensor:
    """Seconds, pixels down and pixels right of every latent, frame by frame, row by row; causal, at 24 a second."""
    rows = [
        ((max(8 * frame - 7, 0) + first) / 24, 32 * row, 32 * column)
        for frame in range(shape[0])
        for row in range(shape[1])
        for column in range(shape[2])
    ]
    return torch.tensor(rows, dtype=torch.float32).T


def as_pixels(frames: np.ndarray) -> Tensor:
    """uint8 (F, H, W, 3) -> (1, 3, F, H, W)."""
    return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None].float() / 255 * 2 - 1


def halved(frames: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(frame).resize((64, 32))) for frame in frames])


CASES: dict[str, dict[str, Any]] = {
    "ready": {},
    "edges": {"kinds": ("canny",)},
    "two controls": {"kinds": ("ready", "canny")},
    "guidance": {"guidance": 3.0},
    "prompts in one batch": {"guidance": 3.0, "guidance_batch": True},
    "with a first frame": {"shown": (0,)},
    "with a first frame and a keyframe, guided": {"shown": (0, AT), "guidance": 3.0},
    "half the size": {"factor": 2, "size": Size(128, 64)},
    "half the size, edges, with a first frame and a keyframe": {"factor": 2, "kinds": ("canny",), "shown": (0, AT)},
}


@pytest.mark.parametrize("name", CASES)
def test_latents_are_those_of_diffusers_transformer_in_a_plain_loop(
    name: str,
    opened: Callable[..., Engine],
    oracle: Callable[..., Oracle],
    clips: Callable[..., str],
    image_condition: Condition,
    parity: Callable[[str, str, str, float], float],
) -> None:
    case = dict(CASES[name])
    kinds, frames, factor = case.pop("kinds", ("ready",)), case.pop("shown", ()), case.pop("factor", 1)
    said = None if factor == 1 else str(factor)
    shown = tuple(replace(image_condition, frame=frame) for frame in frames)
    controls = tuple(Control(clips(17), kind=kind) for kind in kinds)
    request = replace(REQUEST, conditions=shown, controls=controls, seed=3, **case)
    noise = randn(1, CHANNELS, 3, 2, 4, seed=8)
    engine = opened(said, 0.7)
    film = read_video(clips(17)).frames
    film = film if factor == 1 else halved(film)
    traced = np.stack([canny_edges(frame) for frame in film])
    references = [as_pixels(traced if kind == "canny" else film) for kind in kinds]
    pictures = {frame: prepare_image(image_condition.media, Size(128, 64), 29) for frame in frames}
    expected = oracle(said).denoise(replace(request, image_crf=29), noise, references, factor, pictures)
    made = engine.denoise(request, noise=noise)
    size = "the video's size" if factor == 1 else "half the size"
    assert parity("control", f"reference of {size}", "diffusers", relative_error(made, expected)) <= 5e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KadrWarning)  # a LoRA that waits for a reference is warned of
        assert relative_error(engine.denoise(replace(request, controls=()), noise=noise), expected) > 1e-2


def test_tokens_of_a_context_are_clean_and_stand_where_the_videos_do() -> None:
    latents = randn(1, 4, 2, 2, 2)
    context = ReferenceTokens.from_latents([latents], fps=24, causal=True)
    assert torch.equal(context.positions, token_positions(LatentGrid(2, 2, 2), fps=24, causal=True))
    tokens, level = context.append_to(randn(2, 6, 4), torch.tensor([[0.9], [0.4]]))
    assert tokens.shape == (2, 14, 4)
    assert torch.equal(tokens[1, 6:], flat(latents)[0])
    assert level[:, :6].unique(dim=1).tolist() == [[pytest.approx(0.9)], [pytest.approx(0.4)]]
    assert not level[:, 6:].any()


def test_a_smaller_context_covers_the_same_pixels_at_the_same_times() -> None:
    small = ReferenceTokens.from_latents([randn(1, 4, 3, 1, 2)], fps=24, causal=True, downscale=2).positions
    large = token_positions(LatentGrid(3, 2, 4), fps=24, causal=True).unflatten(1, (3, 2, 4))
    assert torch.equal(small, large[:, :, ::2, ::2].flatten(1))


# --- what a control leaves alone -------------------------------------------------------------------------------------


def test_a_control_changes_no_noise(
    opened: Callable[..., Engine], clips: Callable[..., str], image_condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_before, real = [], NoiseStreams.draw

    def draw(self: NoiseStreams, name: str, shape: Any) -> Tensor:
        drawn_before.append((name, tuple(shape)))
        return real(self, name, shape)

    monkeypatch.setattr(NoiseStreams, "draw", draw)
    request = replace(REQUEST, stochastic=True, conditions=(image_condition, replace(image_condition, frame=AT, strength=0.5)))
    opened().denoise(request)
    without = list(drawn_before)
    drawn_before.clear()
    opened().denoise(replace(request, controls=(Control(clips(17)),)))
    assert drawn_before == without
    assert {name for name, _ in without} >= {"initial", "keyframe 1", "condition 0", "stochastic 2"}


def test_guidance_sums_over_the_tokens_of_the_video_alone(
    opened: Callable[..., Engine], clips: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    real = guiding.combine

    def combine(said: Any, strengths: Any, guidance: Any, tokens: Tensor, level: Tensor) -> Tensor:
        seen.extend(one.shape for one in (*said, tokens))
        return real(said, strengths, guidance, tokens, level)

    monkeypatch.setattr(guiding, "combine", combine)
    guidance = Guidance(cfg_scale=3.0, stg_scale=1.0, rescale=0.7, skip_blocks=(1,), cfg_star=True)
    made = opened().denoise(replace(REQUEST, guidance=guidance, controls=(Control(clips(17)),)))
    assert set(seen) == {(1, 3 * 2 * 4, CHANNELS)}
    assert made.isfinite().all()


@pytest.mark.parametrize("cache", [StepCache("first-block", threshold=0.5), StepCache("taylor")], ids=str)
def test_steps_are_cached_beside_a_control(
    cache: StepCache, opened: Callable[..., Engine], clips: Callable[..., str]
) -> None:
    small = {"size": Size(64, 64), "frames": 9, "sigmas": None, "steps": 10}
    request = replace(REQUEST, controls=(Control(clips(9)),), **small)
    full = opened().denoise(request)
    assert 0 < relative_error(opened().denoise(replace(request, cache=cache)), full) < 0.5
    none = replace(cache, threshold=0.0) if cache.threshold is not None else replace(cache, interval=1)
    assert relative_error(opened().denoise(replace(request, cache=none)), full) < 1e-6


# --- passes ----------------------------------------------------------------------------------------------------------

TWO = replace(
    REQUEST,
    multi_scale=True,
    downscale_factor=0.5,
    second_pass=Pass(sigmas=(0.9, 0.4), guidance=Guidance(cfg_scale=1.0)),
    guidance=Guidance(cfg_scale=1.0),
    fps=24.0,
)


def test_each_pass_sees_the_control_at_its_own_size(
    home: Path, clips: Callable[..., str], lora: Callable[..., Path], tmp_path: Path
) -> None:
    upscaler = write_random_upscaler(tmp_path / "up.safetensors")
    engine = Engine.open(home / MODEL_FILE, device="cpu", upscaler=upscaler, loras=[lora()], prompt_cache=False)
    generation = engine._create_generation(replace(TWO, controls=(Control(clips(17)),)), ignore_progress)
    assert [plan.size for plan in generation.passes] == [Size(64, 32), Size(128, 64)]
    assert generation.build_workload().encode_grids == ((LatentGrid(3, 1, 2),), (LatentGrid(3, 2, 4),))
    assert [[one.shape[2:] for one in each.reference_latents] for each in generation.encode_media()] == [
        [(3, 1, 2)],
        [(3, 2, 4)],
    ]
    noise = randn(1, CHANNELS, 3, 1, 2)
    plain = engine.denoise(TWO, noise=noise)
    led = engine.denoise(replace(TWO, controls=(Control(clips(17)),)), noise=noise)
    assert led.shape == plain.shape
    assert relative_error(led, plain) > 1e-2


def test_a_first_pass_of_every_second_frame_sees_every_second_frame_of_the_control(
    home: Path, clips: Callable[..., str], lora: Callable[..., Path], tmp_path: Path
) -> None:
    upscaler = write_random_upscaler(tmp_path / "up.safetensors", upscales_space=False, upscales_time=True)
    engine = Engine.open(home / MODEL_FILE, device="cpu", upscaler=upscaler, loras=[lora()], prompt_cache=False)
    request = replace(TWO, controls=(Control(clips(17)),), size=Size(64, 64))
    first, second = (one.controls[0] for one in engine._create_generation(request, ignore_progress).media.pass_inputs)
    assert list(first.frame_indices) == list(range(0, 17, 2))
    assert list(second.frame_indices) == list(range(17))
    assert engine.denoise(request).shape[2] == 3


# --- windows ---------------------------------------------------------------------------------------------------------

SIZE = Size(128, 64)
LONG = replace(REQUEST, frames=41, windows=Windows(frames=17, overlap=8, adain=0.0), seed=4)  # windows at 0, 16, 32


def windowed(request: Request, oracle: Oracle, film: np.ndarray, *, led: bool, begun: float | None) -> Tensor:
    """What a long video is to be: each window by the oracle, from its own frames of the clip.

    Args:
        led: the clip is the reference.
        begun: the level at which it starts from the clip; None: it starts from noise alone.
    """
    streams, made, latents = NoiseStreams(request.seed), [], None
    levels = LEVELS if begun is None else tuple(level for level in LEVELS if level <= begun)
    for number, first in enumerate((0, 16, 32)):
        name, pixels = f"window {number + 1} " * (number > 0), as_pixels(film[first : first + 17])
        count = (pixels.shape[2] - 1) // 8 + 1
        noise = streams.draw(f"{name}initial", (1, CHANNELS, count, 2, 4))
        if begun is not None:
            start = torch.cat([prepare_image(one, SIZE, 0, SIZE, resize=True) for one in film[first : first + 17]], 2)
            noise = levels[0] * noise + (1 - levels[0]) * oracle.latents(start)
        guide = None if latents is None else latents[:, :, -1:]
        references = [pixels] * led
        latents = oracle.denoise(request, noise, references, 1, {}, guide=guide, stream=name, levels=levels)
        made.append(latents if number == 0 else latents[:, :, 1:])
    return torch.cat(made, dim=2)


@pytest.mark.parametrize("case", ["control", "video to start from", "both"])
def test_each_window_follows_its_own_frames_as_diffusers_transformer_does(
    case: str,
    opened: Callable[..., Engine],
    oracle: Callable[..., Oracle],
    clips: Callable[..., str],
    parity: Callable[[str, str, str, float], float],
) -> None:
    led, begun = case != "video to start from", 0.8 if case != "control" else None
    film, path = read_video(clips(41)).frames, clips(41)
    fields: dict[str, Any] = {"controls": (Control(path),)} if led else {}
    if begun is not None:
        fields |= {"input_video": path, "denoise_strength": begun, "image_crf": 0}
    request = replace(LONG, **fields)
    expected = windowed(request, oracle(None), film, led=led, begun=begun)
    made = opened(None, 0.7).denoise(request)
    assert made.shape == expected.shape == (1, CHANNELS, 6, 2, 4)
    assert parity("control", "windows", "diffusers", relative_error(made, expected)) <= 5e-6


def test_a_window_sees_the_frames_that_it_makes(opened: Callable[..., Engine], clips: Callable[..., str]) -> None:
    request = replace(LONG, frames=44, controls=(Control(clips(44)),), input_video=clips(44), denoise_strength=0.8)
    shown = opened()._create_generation(request, ignore_progress).media.pass_inputs
    expected = [[*range(17)], [*range(16, 33)], [*range(32, 44), *[43] * 5]]
    assert [[*one.controls[0].frames.frame_indices] for one in shown] == expected
    assert [[*one.input_video.frames.frame_indices] for one in shown if one.input_video is not None] == expected


def test_a_long_video_that_is_led_goes_on_where_it_was_cut_off(
    opened: Callable[..., Engine], clips: Callable[..., str], output_folder: Path
) -> None:
    request = replace(LONG, controls=(Control(clips(41), kind="canny"),), input_video=clips(41), denoise_strength=0.8)
    engine, told = opened(), list[Progress]()

    class Cut(Exception):
        pass

    def cut(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.window == (3, 3):
            raise Cut

    whole = engine.write(request, output_folder / "whole.mp4")
    with pytest.raises(KadrError):
        engine.write(request, output_folder / "cut.mp4", watch=cut)
    made = engine.write(request, output_folder / "cut.mp4", resume=True, watch=told.append)
    assert torch.equal(made.latents, whole.latents)
    assert max(report.of for report in told if report.stage == "encode") == 2  # of the last window alone


def test_a_plan_counts_the_control_of_each_window(opened: Callable[..., Engine], clips: Callable[..., str]) -> None:
    large = replace(LONG, size=Size(512, 512))
    plain, led = opened().plan(large), opened().plan(replace(large, controls=(Control(clips(41)),)))
    assert led.stage("denoise").placement.workspace_bytes > 1.4 * plain.stage("denoise").placement.workspace_bytes
    assert led.stage("denoise").placement.window_count == 3
    assert "encode: the transformer works on tokens of controls, too: 768 beside a window's 768" in led.reasons()


# --- lengths, parts, pictures ----------------------------------------------------------------------------------------


def brightness(followed: ResolvedControl) -> list[int]:
    """Which frames of its clip were taken, told by how bright the square is."""
    return [round((float(frame.max()) - 60) / 4) for frame in followed.read_frames()]


@pytest.mark.parametrize(
    ("clip", "part", "frames", "taken"),
    [
        (17, None, 17, [*range(17)]),
        (20, None, 20, [*range(20), 19, 19, 19, 19, 19]),  # made at 25: the last is repeated
        (20, (3, None), 17, [*range(3, 20)]),
        (20, (-9, None), 9, [*range(11, 20)]),
        (20, (2, 11), 9, [*range(2, 11)]),
    ],
)
def test_frames_are_followed_one_by_one(
    clip: int, part: tuple[int, int] | None, frames: int, taken: list[int], clips: Callable[..., str]
) -> None:
    (followed,) = resolve_controls(replace(REQUEST, frames=frames, controls=(Control(clips(clip), frame_range=part),)))
    assert brightness(followed) == taken


def test_a_longer_clip_is_cut_with_a_warning(clips: Callable[..., str]) -> None:
    with pytest.warns(KadrWarning, match="goes on after the 9 frames of the video; the first 9 are followed"):
        (followed,) = resolve_controls(replace(REQUEST, frames=9, controls=(Control(clips(25)),)))
    assert brightness(followed) == [*range(9)]


def test_a_picture_leads_a_video_of_one_frame(opened: Callable[..., Engine], image_condition: Condition) -> None:
    request = replace(REQUEST, frames=1, controls=(Control(image_condition.media),))
    assert relative_error(opened().denoise(request), opened().denoise(replace(request, controls=()))) > 1e-3


# --- what is refused and what is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("control", "fields", "says", "kind"),
    [
        ({}, {"frames": 25}, ["has 17 frames", "the video has 25", "Ask for 17 or fewer"], RequestError),
        ({"frame_range": (4, 12)}, {}, ["17 frames, 8 of them taken", "Ask for 8 or fewer"], RequestError),
        ({"frame_range": (20, None)}, {}, ["0 of them taken", "Take another part"], RequestError),
        ({"media": "photo"}, {}, ["is a picture", "17 frames", "Give a clip"], RequestError),
        ({"media": "gone.mp4"}, {}, ["gone.mp4", "no such file"], MediaError),
        ({"media": "text.mp4"}, {}, ["text.mp4", "cannot be read as a video"], MediaError),
        ({"media": "thin.mp4"}, {"size": Size(2000, 32)}, ["thin.mp4 is 2x64"], MediaError),
    ],
    ids=["short", "a short part", "an empty part", "a picture", "absent", "no clip", "too small"],
)
def test_what_cannot_lead_a_video_is_refused_before_anything_is_loaded(
    control: dict[str, Any],
    fields: dict[str, Any],
    says: list[str],
    kind: type[KadrError],
    engine_without_weights: Engine,
    clips: Callable[..., str],
    image_condition: Condition,
    output_folder: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "text.mp4").write_text("no clip")
    with VideoWriter(tmp_path / "thin.mp4", Size(2, 64), 24) as writer:
        writer.write(np.zeros((17, 64, 2, 3), np.uint8))
    name = control.get("media")
    media = clips(17) if name is None else image_condition.media if name == "photo" else str(tmp_path / name)
    request = replace(REQUEST, controls=(Control(**{**control, "media": media}),), **fields)
    for make in (engine_without_weights.generate, engine_without_weights.plan, lambda asked: engine_without_weights.write(asked, output_folder / "a.mp4")):
        with pytest.raises(kind) as caught:
            make(request)
        assert all(what in str(caught.value) for what in says), str(caught.value)
    assert list(output_folder.iterdir()) == []
    with pytest.raises(kind, match=re.escape(says[0])):
        DryRunEngine.open(engine_without_weights.components.checkpoint.path).run(request)


@pytest.mark.parametrize(
    ("kind", "module", "extra"),
    [("canny", "cv2", "control"), ("depth", "onnxruntime", "depth"), ("pose", "rtmlib", "pose")],
)
def test_a_kind_whose_library_is_absent_is_refused_before_anything_is_loaded(
    kind: str, module: str, extra: str, engine_without_weights: Engine, clips: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RequestError, match=re.escape(f"pip install 'kadr[{extra}]'")):
        engine_without_weights.generate(replace(REQUEST, controls=(Control(clips(17), kind=kind),)))


def test_sides_that_a_smaller_reference_does_not_divide_are_refused(
    opened: Callable[..., Engine], clips: Callable[..., str]
) -> None:
    request = replace(REQUEST, size=Size(160, 64), controls=(Control(clips(17)),))
    with pytest.raises(
        RequestError, match=r"2 times smaller .* pass 1 is made at 160x64: .* multiples of 64\. Ask for 192x64"
    ):
        opened("2", 0.7).plan(request)
    loras = [(opened("2", 0.7).components.loras.entries[0].path, 0.7)]
    dry = DryRunEngine.open(opened("2").components.checkpoint.path, loras=loras)
    with pytest.raises(RequestError, match=r"multiples of 64\. Ask for 192x64"):
        dry.run(request)


def test_a_lora_at_strength_0_says_nothing_of_the_size_of_references(
    home: Path, opened: Callable[..., Engine], lora: Callable[..., Path], clips: Callable[..., str]
) -> None:
    request = replace(REQUEST, controls=(Control(clips(17)),))
    both = Engine.open(home / MODEL_FILE, device="cpu", loras=[(lora(), 0.7), lora("2")], prompt_cache=False)
    assert torch.equal(both.denoise(replace(request, lora_strengths=(0.7, 0.0))), opened(None, 0.7).denoise(request))
    assert relative_error(both.denoise(request), opened(None, 0.7).denoise(request)) > 1e-3


def test_loras_that_want_references_of_other_sizes_are_refused(
    home: Path, lora: Callable[..., Path], clips: Callable[..., str]
) -> None:
    engine = Engine.open(home / MODEL_FILE, device="cpu", loras=[lora("2"), lora("3"), lora()], prompt_cache=False)
    with pytest.raises(RequestError, match=r"references of other sizes: .*2\.safetensors 2, .*3\.safetensors 3"):
        engine.plan(replace(REQUEST, controls=(Control(clips(17)),)))
    dry = DryRunEngine.open(home / MODEL_FILE, loras=[lora("2"), lora("3")])
    with pytest.raises(RequestError, match="references of other sizes"):
        dry.run(replace(REQUEST, controls=(Control(clips(17)),)))
    with pytest.warns(KadrWarning, match="trained to follow a reference, and no control"):
        engine.plan(REQUEST)


def test_a_factor_of_one_lora_counts_beside_others_that_name_none(home: Path, lora: Callable[..., Path]) -> None:
    engine = Engine.open(home / MODEL_FILE, device="cpu", loras=[lora(), lora("2")], prompt_cache=False)
    assert engine.components.loras.reference_downscale() == 2


def test_a_control_without_a_lora_is_warned_of(
    engine: Engine, opened: Callable[..., Engine], clips: Callable[..., str]
) -> None:
    request = replace(REQUEST, controls=(Control(clips(17)),))
    with pytest.warns(KadrWarning, match="a control is given, and no LoRA"):
        engine.plan(request)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened().plan(request)
        engine.plan(REQUEST)


def test_a_plan_counts_the_control_and_tells_it(opened: Callable[..., Engine], clips: Callable[..., str]) -> None:
    large = replace(REQUEST, size=Size(512, 512))
    plain, led = opened().plan(large), opened().plan(replace(large, controls=(Control(clips(17)),)))
    assert led.stage("denoise").placement.workspace_bytes > 1.8 * plain.stage("denoise").placement.workspace_bytes
    assert led.stage("denoise").placement.seconds > 1.8 * plain.stage("denoise").placement.seconds
    assert led.reasons() == ["encode: the transformer works on tokens of controls, too: 768 beside the video's 768"]


def test_a_video_remembers_its_control_by_its_whole_path(
    opened: Callable[..., Engine], clips: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(clips(17))
    monkeypatch.chdir(path.parent)
    request = replace(REQUEST, controls=(Control(path.name, kind="canny", frame_range=(0, 17)),))
    made = Request.from_json(opened().metadata(request)["request"])
    assert made.controls == (Control(str(path), kind="canny", frame_range=(0, 17)),)
    assert made.media_paths() == (path,)


# --- networks that find what a control shows ------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with networks of a few nodes, by the names of the real ones."""
    person = [(160.0, 160.0, 480.0, 480.0, 0)]
    files = (
        onnx_files.write_depth_model(tmp_path / "depth.onnx"),
        onnx_files.write_person_detector(tmp_path / "people.onnx", person),
        onnx_files.write_pose_model(tmp_path / "joints.onnx", {0: (144.0, 100.0), 5: (194.0, 200.0), 6: (94.0, 200.0)}),
    )
    names = [(repo, name) for repo, found in NETWORK_FILES.values() for name in found]
    with serve_fake_hub(monkeypatch, tmp_path / "cache") as hub:
        for (repo, name), file in zip(names, files, strict=True):
            hub.repos.setdefault(repo, {})[name] = file.read_bytes()
        yield hub


@pytest.mark.parametrize("kind", ["depth", "pose"])
def test_a_network_is_fetched_once_and_goes_through_the_clip_once_for_all_passes(
    kind: str, remote: FakeHub, home: Path, clips: Callable[..., str], lora: Callable[..., Path], tmp_path: Path
) -> None:
    upscaler = write_random_upscaler(tmp_path / "up.safetensors")
    engine = Engine.open(home / MODEL_FILE, device="cpu", upscaler=upscaler, loras=[lora()], prompt_cache=False)
    short = replace(TWO, frames=9)
    request, told = replace(short, controls=(Control(clips(9), kind=kind),)), list[Progress]()
    led = engine.denoise(request, watch=told.append)
    assert [report.step for report in told if report.stage == "control"] == [*range(10)]
    assert [report.stage for report in told].index("control") < [report.stage for report in told].index("encode")
    assert sorted(name for name, _ in remote.sent_files) == sorted(NETWORK_FILES[kind][1])
    assert (
        relative_error(led, engine.denoise(replace(short, controls=(Control(clips(9)),)))) > 1e-4
    )  # the clip as it is
    remote.is_silent = True
    assert torch.equal(engine.denoise(request), led)


def test_depth_that_is_encoded_is_bright_where_the_network_says_near(
    remote: FakeHub, opened: Callable[..., Engine], clips: Callable[..., str]
) -> None:
    generation = opened()._create_generation(
        replace(REQUEST, controls=(Control(clips(17), kind="depth"),)), ignore_progress
    )
    (way,) = build_map_renderers(
        generation.media.resolved_controls, fetch_networks(generation.media.resolved_controls), ignore_progress
    )
    seen = replace(generation.media.pass_inputs[0].controls[0], map_renderer=way)
    chunks = torch.cat(list(seen.chunks(8, device=torch.device("cpu"), dtype=torch.float32)), dim=2)
    assert chunks.shape == (1, 3, 17, 64, 128)
    assert chunks[0, :, 0, 24:40, 4:28].mean() < chunks[0, :, 16, 24:40, 36:60].mean()  # the square gets redder
    assert chunks[0, :, 0, 24:40, 40:].max() < -0.8  # what is farthest in the clip is black
    assert chunks.max() > 0.7  # what is sharp overshoots where it is resized, and nothing else is nearer


def test_a_network_that_cannot_be_fetched_is_told_before_anything_is_loaded(
    engine_without_weights: Engine, clips: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("kadr.pipeline.engine.warn_control_lora_mismatch", lambda request, **given: None)
    with pytest.raises(
        CheckpointError, match=r"onnx/model\.onnx of onnx-community.*already shows the depth needs no network"
    ):
        engine_without_weights.generate(replace(REQUEST, controls=(Control(clips(17), kind="depth"),)))


def test_a_plan_fetches_no_network(
    opened: Callable[..., Engine], clips: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    plan = opened().plan(replace(REQUEST, controls=(Control(clips(17), kind="depth"),)))
    assert plan.stage("encode").placement.seconds > 0
    assert not (tmp_path / "empty").exists()


def test_a_reference_is_drawn_when_it_is_asked_for_and_not_kept(
    clips: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (followed,) = resolve_controls(replace(REQUEST, frames=25, controls=(Control(clips(25), kind="canny"),)))
    assert isinstance(followed.frames, ClipReader)
    generation = Engine.open("demo", device="cpu").resolve_passes(replace(REQUEST, frames=25))
    seen = prepare_control(followed, replace(REQUEST, frames=25), generation[0])
    sizes = [chunk.shape[2] for chunk in seen.chunks(8, device=torch.device("cpu"), dtype=torch.float32)]
    assert sizes == [8, 8, 8, 1]
