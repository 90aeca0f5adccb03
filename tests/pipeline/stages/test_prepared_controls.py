"""Controls: in-context sampling against diffusers' transformer in a plain loop, and refusals before any computation."""

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
from kadr.media.prepare import prepare_image
from kadr.media.writer import VideoWriter
from kadr.models.lora_layers import merge_loras
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.pipeline.metadata import video_metadata
from kadr.pipeline.progress import ignore_progress
from kadr.pipeline.stages.control_networks import NETWORK_FILES, build_map_renderers, fetch_networks
from kadr.pipeline.stages.encode import Media
from kadr.pipeline.stages.prepared_frames import OpenedMedia
from kadr.planning.workload import build_workload
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

SIGMAS = (1.0, 0.8, 0.35)
REQUEST = Request(
    prompt="a red circle",
    negative_prompt="blue sea",
    size=Size(128, 64),
    frames=17,
    fps=24,
    sigmas=SIGMAS,
    guidance=1.0,
    image_noise=0.15,
)
KEYFRAME = 8  # pixel frame of the keyframe


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Writes clips of a moving square that gets brighter from frame to frame."""
    folder = tmp_path_factory.mktemp("clips")

    def clip(frames: int) -> str:
        path = folder / f"{frames} frames.mp4"
        if not path.exists():
            pixels = np.full((frames, 64, 128, 3), 20, np.uint8)
            for frame in range(frames):
                pixels[frame, 16:48, 2 * frame : 2 * frame + 32] = 60 + 4 * frame
            with VideoWriter(path, Size(128, 64), 24) as writer:
                writer.write(pixels)
        return str(path)

    return clip


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes in-context LoRAs with a reference factor in their header, or without one."""
    folder = tmp_path_factory.mktemp("loras")

    def write(factor: str | None = None) -> Path:
        metadata = {} if factor is None else {REFERENCE_DOWNSCALE_KEY: factor}
        return lora_files.write_lora_file(folder / f"{factor}.safetensors", lora_files.block_pairs(), metadata=metadata)

    return write


@pytest.fixture(scope="module")
def opened(home: Path, lora: Callable[..., Path]) -> Callable[..., Engine]:
    """Opens engines with an in-context LoRA of a factor and strength, each once."""
    engines: dict[Any, Engine] = {}

    def engine(factor: str | None = None, strength: float = 0.0) -> Engine:
        key = factor, strength
        if key not in engines:
            loras = [(lora(factor), strength)]
            engines[key] = Engine.open(home / MODEL_FILE, device="cpu", loras=loras, prompt_cache=False)
        return engines[key]

    return engine


# --- the oracle ----------------------------------------------------------------------------------------------------


class Oracle:
    """In-context sampling with the official VAE and diffusers' transformer in a plain loop.

    All tokens are concatenated, with a sigma and a position each. The LoRA is merged into the weights.
    """

    def __init__(self, engine: Engine, lora: Path, strength: float) -> None:
        self.engine = engine
        transformer = build_random(lambda: Transformer(transformer_config()), 1)  # as `write_model` builds it
        merge_loras(transformer, [LoraFile.open(lora).load()], [strength])
        self.transformer = diffusers_transformer(transformer)
        self.vae = official_vae(build_random(lambda: VAE(vae_config("0.9.5")), 2))

    def latents(self, pixels: Tensor) -> Tensor:
        """(1, 3, F, H, W) -> (1, C, f, h, w)."""
        return normalize_latents(self.vae.encode(pixels).latent_dist.mode(), self.vae, True)

    def velocity(self, prompt: Any, tokens: Tensor, sigma: Tensor, positions: Tensor) -> Tensor:
        return self.transformer(
            tokens,
            encoder_hidden_states=prompt.embeddings,
            encoder_attention_mask=prompt.mask.float(),
            timestep=sigma * 1000,
            video_coords=positions[None],
            return_dict=False,
        )[0]

    def denoise(
        self,
        request: Request,
        noise: Tensor,
        references: list[Tensor],
        factor: int,
        images: dict[int, Tensor],
        *,
        guide: Tensor | None = None,
        stream: str = "",
        sigmas: tuple[float, ...] = SIGMAS,
    ) -> Tensor:
        """Samples latents (1, C, f, h, w).

        Args:
            references: pixels of each reference.
            images: frame -> pixels of an image that conditions it with strength 1.
            guide: latents appended with strength 1 at the first frames.
            stream: prefix of the names of all noise streams.
        """
        texts = [request.prompt, request.negative_prompt or ""]
        with self.engine.start(request, stages=("text",), prompts=texts) as generation:
            prompts = generation.prompt_encoder.encode(generation.modules, ignore_progress)
        tokens, positions = to_tokens(noise), latent_positions(noise.shape[2:])
        clean, strength = tokens.clone(), torch.zeros(tokens.shape[1])
        for frame, pixels in images.items():
            image_tokens = to_tokens(self.latents(pixels))
            count = image_tokens.shape[1]
            if frame == 0:
                clean[:, :count], strength[:count] = image_tokens, 1
            else:
                clean, strength = torch.cat([clean, image_tokens], 1), torch.cat([strength, torch.ones(count)])
                positions = torch.cat([positions, latent_positions((1, *noise.shape[3:]), first=frame)], 1)
        if guide is not None:
            guide_tokens = to_tokens(guide)
            clean = torch.cat([clean, guide_tokens], 1)
            strength = torch.cat([strength, torch.ones(guide_tokens.shape[1])])
            positions = torch.cat([positions, latent_positions(guide.shape[2:])], 1)
        reference_latents = [self.latents(pixels) for pixels in references]
        reference_tokens = torch.cat([tokens[:, :0], *(to_tokens(latents) for latents in reference_latents)], 1)
        scale = torch.tensor([1, factor, factor])[:, None]
        reference_positions = (scale * latent_positions(latents.shape[2:]) for latents in reference_latents)
        positions = torch.cat([positions, *reference_positions], 1)
        count, x = clean.shape[1], clean
        streams, is_conditioned = NoiseStreams(request.seed), strength.bool()[None, :, None]
        for index, (sigma, next_sigma) in enumerate(pairwise([*sigmas, 0.0])):
            noisy = clean + 0.15 * sigma**2 * streams.draw(f"{stream}condition {index}", clean.shape)
            x = torch.where(is_conditioned, noisy, x)
            token_sigmas = torch.cat(
                [torch.minimum(torch.tensor(sigma), 1 - strength), torch.zeros(reference_tokens.shape[1])]
            )[None]
            all_tokens = torch.cat([x, reference_tokens], 1)
            velocity = self.velocity(prompts[0], all_tokens, token_sigmas, positions)[:, :count]
            cfg_scale = request.guidance.cfg_scale if isinstance(request.guidance, Guidance) else 1
            if cfg_scale > 1:
                uncond = self.velocity(prompts[1], all_tokens, token_sigmas, positions)[:, :count]
                velocity = uncond + cfg_scale * (velocity - uncond)
            x = torch.where(is_conditioned, x, x - (sigma - next_sigma) * velocity)
        frames, height, width = noise.shape[2:]
        return x[:, : frames * height * width].transpose(1, 2).unflatten(2, (frames, height, width))


@pytest.fixture(scope="module")
def oracle(opened: Callable[..., Engine], lora: Callable[..., Path]) -> Callable[..., Oracle]:
    """Builds oracles by the factor of their LoRA, at strength 0.7, each once."""
    oracles: dict[str | None, Oracle] = {}

    def find(factor: str | None) -> Oracle:
        if factor not in oracles:
            oracles[factor] = Oracle(opened(factor, 0.7), lora(factor), 0.7)
        return oracles[factor]

    return find


def to_tokens(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def latent_positions(shape: tuple[int, ...], *, first: int = 0) -> Tensor:
    """Returns (3, N): seconds, pixels down and pixels right of every latent, in row-major order; causal, 24 fps."""
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


def halve_size(frames: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(frame).resize((64, 32))) for frame in frames])


CASES: dict[str, dict[str, Any]] = {
    "ready": {},
    "edges": {"kinds": ("canny",)},
    "two controls": {"kinds": ("ready", "canny")},
    "guidance": {"guidance": 3.0},
    "prompts in one batch": {"guidance": 3.0, "guidance_batch": True},
    "with a first frame": {"image_frames": (0,)},
    "with a first frame and a keyframe, guided": {"image_frames": (0, KEYFRAME), "guidance": 3.0},
    "half the size": {"factor": 2, "size": Size(128, 64)},
    "half the size, edges, with a first frame and a keyframe": {
        "factor": 2,
        "kinds": ("canny",),
        "image_frames": (0, KEYFRAME),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_latents_equal_diffusers_transformer_in_a_plain_loop(
    name: str,
    opened: Callable[..., Engine],
    oracle: Callable[..., Oracle],
    clips: Callable[..., str],
    image_condition: Condition,
    parity: Callable[[str, str, str, float], float],
) -> None:
    case = dict(CASES[name])
    kinds, frames, factor = case.pop("kinds", ("ready",)), case.pop("image_frames", ()), case.pop("factor", 1)
    lora_factor = None if factor == 1 else str(factor)
    conditions = tuple(replace(image_condition, frame=frame) for frame in frames)
    controls = tuple(Control(clips(17), kind=kind) for kind in kinds)
    request = replace(REQUEST, conditions=conditions, controls=controls, seed=3, **case)
    noise = randn(1, CHANNELS, 3, 2, 4, seed=8)
    engine = opened(lora_factor, 0.7)
    clip = read_video(clips(17)).frames
    clip = clip if factor == 1 else halve_size(clip)
    edges = np.stack([canny_edges(frame) for frame in clip])
    references = [as_pixels(edges if kind == "canny" else clip) for kind in kinds]
    images = {frame: prepare_image(image_condition.media, Size(128, 64), 29) for frame in frames}
    expected = oracle(lora_factor).denoise(replace(request, image_crf=29), noise, references, factor, images)
    latents = engine.denoise(request, noise=noise)
    size = "the video's size" if factor == 1 else "half the size"
    assert parity("control", f"reference of {size}", "diffusers", relative_error(latents, expected)) <= 5e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KadrWarning)  # an in-context LoRA without a control
        assert relative_error(engine.denoise(replace(request, controls=()), noise=noise), expected) > 1e-2


def test_reference_tokens_are_clean_at_the_video_s_positions() -> None:
    latents = randn(1, 4, 2, 2, 2)
    reference_tokens = ReferenceTokens.from_latents([latents], fps=24, causal=True)
    assert torch.equal(reference_tokens.positions, token_positions(LatentGrid(2, 2, 2), fps=24, causal=True))
    tokens, sigma = reference_tokens.append_to(randn(2, 6, 4), torch.tensor([[0.9], [0.4]]))
    assert tokens.shape == (2, 14, 4)
    assert torch.equal(tokens[1, 6:], to_tokens(latents)[0])
    assert sigma[:, :6].unique(dim=1).tolist() == [[pytest.approx(0.9)], [pytest.approx(0.4)]]
    assert not sigma[:, 6:].any()


def test_smaller_reference_covers_the_same_pixels_and_times() -> None:
    small = ReferenceTokens.from_latents([randn(1, 4, 3, 1, 2)], fps=24, causal=True, downscale=2).positions
    large = token_positions(LatentGrid(3, 2, 4), fps=24, causal=True).unflatten(1, (3, 2, 4))
    assert torch.equal(small, large[:, :, ::2, ::2].flatten(1))


# --- what a control does not change----------------------------------------------------------------------------------


def test_a_control_changes_no_noise(
    opened: Callable[..., Engine],
    clips: Callable[..., str],
    image_condition: Condition,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn, original_draw = [], NoiseStreams.draw

    def draw(self: NoiseStreams, name: str, shape: Any) -> Tensor:
        drawn.append((name, tuple(shape)))
        return original_draw(self, name, shape)

    monkeypatch.setattr(NoiseStreams, "draw", draw)
    request = replace(
        REQUEST,
        sampler="euler_stochastic",
        conditions=(image_condition, replace(image_condition, frame=KEYFRAME, strength=0.5)),
    )
    opened().denoise(request)
    drawn_without_control = list(drawn)
    drawn.clear()
    opened().denoise(replace(request, controls=(Control(clips(17)),)))
    assert drawn == drawn_without_control
    assert {name for name, _ in drawn} >= {"initial", "keyframe 1", "condition 0", "stochastic 2"}


def test_guidance_sums_exclude_reference_tokens(
    opened: Callable[..., Engine], clips: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []
    original_combine = guiding.combine

    def combine(predictions: Any, step_guidance: Any, guidance: Any, tokens: Tensor, sigma: Tensor) -> Tensor:
        shapes.extend(tensor.shape for tensor in (*predictions, tokens))
        return original_combine(predictions, step_guidance, guidance, tokens, sigma)

    monkeypatch.setattr(guiding, "combine", combine)
    guidance = Guidance(cfg_scale=3.0, stg_scale=1.0, rescale=0.7, skip_blocks=(1,), cfg_star=True)
    latents = opened().denoise(replace(REQUEST, guidance=guidance, controls=(Control(clips(17)),)))
    assert set(shapes) == {(1, 3 * 2 * 4, CHANNELS)}
    assert latents.isfinite().all()


@pytest.mark.parametrize("cache", [StepCache("first-block", threshold=0.5), StepCache("taylor")], ids=str)
def test_step_cache_works_with_a_control(
    cache: StepCache, opened: Callable[..., Engine], clips: Callable[..., str]
) -> None:
    small = {"size": Size(64, 64), "frames": 9, "sigmas": None, "steps": 10}
    request = replace(REQUEST, controls=(Control(clips(9)),), **small)
    full = opened().denoise(request)
    assert 0 < relative_error(opened().denoise(replace(request, cache=cache)), full) < 0.5
    unused = replace(cache, threshold=0.0) if cache.threshold is not None else replace(cache, interval=1)
    assert relative_error(opened().denoise(replace(request, cache=unused)), full) < 1e-6


# --- passes ----------------------------------------------------------------------------------------------------------

TWO_PASSES = replace(
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
    resolved = engine.resolve(replace(TWO_PASSES, controls=(Control(clips(17)),)))
    assert [resolved_pass.size for resolved_pass in resolved.passes] == [Size(64, 32), Size(128, 64)]
    workload = build_workload(resolved, prompt_tokens=(), tokens_to_encode=())
    assert workload.encode_grids == ((LatentGrid(3, 1, 2),), (LatentGrid(3, 2, 4),))
    with engine.start(resolved, stages=("encode",)) as generation:
        encoded = generation.encode_media()
    assert [[latents.shape[2:] for latents in inputs.reference_latents] for inputs in encoded] == [
        [(3, 1, 2)],
        [(3, 2, 4)],
    ]
    noise = randn(1, CHANNELS, 3, 1, 2)
    plain = engine.denoise(TWO_PASSES, noise=noise)
    controlled = engine.denoise(replace(TWO_PASSES, controls=(Control(clips(17)),)), noise=noise)
    assert controlled.shape == plain.shape
    assert relative_error(controlled, plain) > 1e-2


def test_half_rate_first_pass_reads_every_second_control_frame(
    home: Path, clips: Callable[..., str], lora: Callable[..., Path], tmp_path: Path
) -> None:
    upscaler = write_random_upscaler(tmp_path / "up.safetensors", upscales_space=False, upscales_time=True)
    engine = Engine.open(home / MODEL_FILE, device="cpu", upscaler=upscaler, loras=[lora()], prompt_cache=False)
    request = replace(TWO_PASSES, controls=(Control(clips(17)),), size=Size(64, 64))
    first, second = (media.controls[0] for media in engine.resolve(request).media)
    assert list(first.frame_indices) == list(range(0, 17, 2))
    assert list(second.frame_indices) == list(range(17))
    assert engine.denoise(request).shape[2] == 3


# --- windows ---------------------------------------------------------------------------------------------------------

SIZE = Size(128, 64)
LONG = replace(REQUEST, frames=41, windows=Windows(frames=17, overlap=8, adain=0.0), seed=4)  # windows at 0, 16, 32


def sample_windows(
    request: Request, oracle: Oracle, clip: np.ndarray, *, has_control: bool, first_sigma: float | None
) -> Tensor:
    """Samples a long video with the oracle: each window from its own frames of the clip.

    Args:
        has_control: the clip is the reference.
        first_sigma: sigma at which sampling starts from the clip; None: it starts from pure noise.
    """
    streams, windows, latents = NoiseStreams(request.seed), [], None
    sigmas = SIGMAS if first_sigma is None else tuple(sigma for sigma in SIGMAS if sigma <= first_sigma)
    for index, first in enumerate((0, 16, 32)):
        prefix, pixels = f"window {index + 1} " * (index > 0), as_pixels(clip[first : first + 17])
        count = (pixels.shape[2] - 1) // 8 + 1
        noise = streams.draw(f"{prefix}initial", (1, CHANNELS, count, 2, 4))
        if first_sigma is not None:
            frames = [prepare_image(frame, SIZE, 0, SIZE, resize=True) for frame in clip[first : first + 17]]
            noise = sigmas[0] * noise + (1 - sigmas[0]) * oracle.latents(torch.cat(frames, 2))
        guide = None if latents is None else latents[:, :, -1:]
        references = [pixels] * has_control
        latents = oracle.denoise(request, noise, references, 1, {}, guide=guide, stream=prefix, sigmas=sigmas)
        windows.append(latents if index == 0 else latents[:, :, 1:])
    return torch.cat(windows, dim=2)


@pytest.mark.parametrize("case", ["control", "input video", "both"])
def test_each_window_follows_its_own_frames_as_diffusers_does(
    case: str,
    opened: Callable[..., Engine],
    oracle: Callable[..., Oracle],
    clips: Callable[..., str],
    parity: Callable[[str, str, str, float], float],
) -> None:
    has_control, strength = case != "input video", 0.8 if case != "control" else None
    clip, path = read_video(clips(41)).frames, clips(41)
    fields: dict[str, Any] = {"controls": (Control(path),)} if has_control else {}
    if strength is not None:
        fields |= {"input_video": path, "denoise_strength": strength, "image_crf": 0}
    request = replace(LONG, **fields)
    expected = sample_windows(request, oracle(None), clip, has_control=has_control, first_sigma=strength)
    latents = opened(None, 0.7).denoise(request)
    assert latents.shape == expected.shape == (1, CHANNELS, 6, 2, 4)
    assert parity("control", "windows", "diffusers", relative_error(latents, expected)) <= 5e-6


def test_window_reads_the_frames_that_it_samples(opened: Callable[..., Engine], clips: Callable[..., str]) -> None:
    request = replace(LONG, frames=44, controls=(Control(clips(44)),), input_video=clips(44), denoise_strength=0.8)
    pass_media = opened().resolve(request).media
    expected = [[*range(17)], [*range(16, 33)], [*range(32, 44), *[43] * 5]]
    assert [[*media.controls[0].media.frame_indices] for media in pass_media] == expected
    input_videos = [media.input_video for media in pass_media if media.input_video is not None]
    assert [[*video.media.frame_indices] for video in input_videos] == expected


def test_long_video_with_a_control_resumes_where_it_was_interrupted(
    opened: Callable[..., Engine], clips: Callable[..., str], output_folder: Path
) -> None:
    request = replace(LONG, controls=(Control(clips(41), kind="canny"),), input_video=clips(41), denoise_strength=0.8)
    engine, reports = opened(), list[Progress]()

    class Interrupted(Exception):
        pass

    def interrupt(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.window == (3, 3):
            raise Interrupted

    whole = engine.write(request, output_folder / "whole.mp4")
    with pytest.raises(Interrupted):
        engine.write(request, output_folder / "cut.mp4", watch=interrupt)
    resumed = engine.write(request, output_folder / "cut.mp4", resume=True, watch=reports.append)
    assert torch.equal(resumed.latents, whole.latents)
    assert max(report.of for report in reports if report.stage == "encode") == 2  # inputs of the last window only


def test_a_plan_counts_the_control_of_each_window(opened: Callable[..., Engine], clips: Callable[..., str]) -> None:
    large = replace(LONG, size=Size(512, 512))
    plain, controlled = opened().plan(large), opened().plan(replace(large, controls=(Control(clips(41)),)))
    assert (
        controlled.stage("denoise").placement.workspace_bytes > 1.4 * plain.stage("denoise").placement.workspace_bytes
    )
    assert controlled.stage("denoise").placement.window_count == 3
    reason = "encode: the transformer also sees reference tokens of controls: 768 beside a window's 768"
    assert reason in controlled.reasons()


# --- lengths, ranges, images -----------------------------------------------------------------------------------------


def source_indices(control: ResolvedControl) -> list[int]:
    """Returns the indices of the frames taken from the clip, from the brightness of the square."""
    return [round((float(frame.max()) - 60) / 4) for frame in OpenedMedia([control.media]).frames(control.media)]


@pytest.mark.parametrize(
    ("clip", "frame_range", "frames", "expected"),
    [
        (17, None, 17, [*range(17)]),
        (20, None, 20, [*range(20), 19, 19, 19, 19, 19]),  # sampled at 25: the last is repeated
        (20, (3, None), 17, [*range(3, 20)]),
        (20, (-9, None), 9, [*range(11, 20)]),
        (20, (2, 11), 9, [*range(2, 11)]),
    ],
)
def test_control_frames_match_video_frames_one_by_one(
    clip: int, frame_range: tuple[int, int] | None, frames: int, expected: list[int], clips: Callable[..., str]
) -> None:
    (control,) = resolve_controls((Control(clips(clip), frame_range=frame_range),), frames)
    assert source_indices(control) == expected


def test_longer_control_clip_is_trimmed_with_a_warning(clips: Callable[..., str]) -> None:
    with pytest.warns(KadrWarning, match="is longer than the 9 frames of the video; only the first 9 are followed"):
        (control,) = resolve_controls((Control(clips(25)),), 9)
    assert source_indices(control) == [*range(9)]


def test_image_controls_a_video_of_one_frame(opened: Callable[..., Engine], image_condition: Condition) -> None:
    request = replace(REQUEST, frames=1, controls=(Control(image_condition.media),))
    assert relative_error(opened().denoise(request), opened().denoise(replace(request, controls=()))) > 1e-3


# --- refusals and warnings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("control", "fields", "expected_texts", "kind"),
    [
        ({}, {"frames": 25}, ["has 17 frames", "the video has 25", "Ask for 17 or fewer"], RequestError),
        ({"frame_range": (4, 12)}, {}, ["17 frames, 8 of them in the frame range", "Ask for 8 or fewer"], RequestError),
        ({"frame_range": (20, None)}, {}, ["0 of them in the frame range", "Choose another range"], RequestError),
        ({"media": "photo"}, {}, ["is an image", "17 frames", "Give a clip"], RequestError),
        ({"media": "gone.mp4"}, {}, ["gone.mp4", "no such file"], MediaError),
        ({"media": "text.mp4"}, {}, ["text.mp4", "cannot be read as a video"], MediaError),
        ({"media": "thin.mp4"}, {"size": Size(2000, 32)}, ["thin.mp4 is 2x64"], MediaError),
    ],
    ids=["short", "a short range", "an empty range", "an image", "absent", "not a clip", "too small"],
)
def test_unusable_control_is_refused_before_any_load(
    control: dict[str, Any],
    fields: dict[str, Any],
    expected_texts: list[str],
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
    for method in (
        engine_without_weights.generate,
        engine_without_weights.plan,
        lambda request: engine_without_weights.write(request, output_folder / "a.mp4"),
    ):
        with pytest.raises(kind) as caught:
            method(request)
        assert all(text in str(caught.value) for text in expected_texts), str(caught.value)
    assert list(output_folder.iterdir()) == []
    with pytest.raises(kind, match=re.escape(expected_texts[0])):
        Engine.open(engine_without_weights.spec.checkpoint.path).dry_run(request)


@pytest.mark.parametrize(
    ("kind", "module", "extra"),
    [("canny", "cv2", "control"), ("depth", "onnxruntime", "depth"), ("pose", "rtmlib", "pose")],
)
def test_control_kind_without_its_library_is_refused_before_any_load(
    kind: str,
    module: str,
    extra: str,
    engine_without_weights: Engine,
    clips: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RequestError, match=re.escape(f"pip install 'kadr[{extra}]'")):
        engine_without_weights.generate(replace(REQUEST, controls=(Control(clips(17), kind=kind),)))


def test_sides_that_reference_downscale_does_not_divide_are_refused(
    opened: Callable[..., Engine], clips: Callable[..., str]
) -> None:
    request = replace(REQUEST, size=Size(160, 64), controls=(Control(clips(17)),))
    with pytest.raises(
        RequestError, match=r"2 times smaller .* pass 1 is sampled at 160x64: .* multiples of 64\. Ask for 192x64"
    ):
        opened("2", 0.7).plan(request)
    loras = [(opened("2", 0.7).spec.loras.entries[0].path, 0.7)]
    dry = Engine.open(opened("2").spec.checkpoint.path, loras=loras)
    with pytest.raises(RequestError, match=r"multiples of 64\. Ask for 192x64"):
        dry.dry_run(request)


def test_lora_at_strength_0_does_not_set_the_reference_size(
    home: Path, opened: Callable[..., Engine], lora: Callable[..., Path], clips: Callable[..., str]
) -> None:
    request = replace(REQUEST, controls=(Control(clips(17)),))
    both = Engine.open(home / MODEL_FILE, device="cpu", loras=[(lora(), 0.7), lora("2")], prompt_cache=False)
    alone = opened(None, 0.7).denoise(request)
    # Not equal bit for bit: the ranks of all LoRAs are one matmul, and a wider one may add up in another order.
    assert relative_error(both.denoise(replace(request, lora_strengths=(0.7, 0.0))), alone) < 1e-5
    assert relative_error(both.denoise(request), alone) > 1e-3


def test_loras_with_different_reference_sizes_are_refused(
    home: Path, lora: Callable[..., Path], clips: Callable[..., str]
) -> None:
    engine = Engine.open(home / MODEL_FILE, device="cpu", loras=[lora("2"), lora("3"), lora()], prompt_cache=False)
    with pytest.raises(RequestError, match=r"controls of different sizes: .*2\.safetensors 2, .*3\.safetensors 3"):
        engine.plan(replace(REQUEST, controls=(Control(clips(17)),)))
    dry = Engine.open(home / MODEL_FILE, loras=[lora("2"), lora("3")])
    with pytest.raises(RequestError, match="controls of different sizes"):
        dry.dry_run(replace(REQUEST, controls=(Control(clips(17)),)))
    with pytest.warns(KadrWarning, match="trained to follow a reference is given, but no control"):
        engine.plan(REQUEST)


def test_one_lora_s_reference_factor_counts_if_others_name_none(home: Path, lora: Callable[..., Path]) -> None:
    engine = Engine.open(home / MODEL_FILE, device="cpu", loras=[lora(), lora("2")], prompt_cache=False)
    assert engine.spec.loras.reference_downscale() == 2


def test_control_without_a_lora_gives_a_warning(
    engine: Engine, opened: Callable[..., Engine], clips: Callable[..., str]
) -> None:
    request = replace(REQUEST, controls=(Control(clips(17)),))
    with pytest.warns(KadrWarning, match="a control is given, but no LoRA"):
        engine.plan(request)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened().plan(request)
        engine.plan(REQUEST)


def test_plan_counts_the_control_and_gives_the_reason(opened: Callable[..., Engine], clips: Callable[..., str]) -> None:
    large = replace(REQUEST, size=Size(512, 512))
    plain, controlled = opened().plan(large), opened().plan(replace(large, controls=(Control(clips(17)),)))
    assert (
        controlled.stage("denoise").placement.workspace_bytes > 1.8 * plain.stage("denoise").placement.workspace_bytes
    )
    assert controlled.stage("denoise").placement.seconds > 1.8 * plain.stage("denoise").placement.seconds
    assert controlled.reasons() == [
        "encode: the transformer also sees reference tokens of controls: 768 beside the video's 768"
    ]


def test_metadata_stores_the_absolute_path_of_a_control(
    opened: Callable[..., Engine], clips: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(clips(17))
    monkeypatch.chdir(path.parent)
    request = replace(REQUEST, controls=(Control(path.name, kind="canny", frame_range=(0, 17)),))
    stored = Request.from_json(video_metadata(opened().spec, opened().resolve(request))["request"])
    assert stored.controls == (Control(str(path), kind="canny", frame_range=(0, 17)),)
    assert stored.media_paths() == (path,)


# --- networks for control maps --------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serves a hub with networks of a few nodes under the names of the real ones."""
    person = [(160.0, 160.0, 480.0, 480.0, 0)]
    files = (
        onnx_files.write_depth_model(tmp_path / "depth.onnx"),
        onnx_files.write_person_detector(tmp_path / "people.onnx", person),
        onnx_files.write_pose_model(tmp_path / "joints.onnx", {0: (144.0, 100.0), 5: (194.0, 200.0), 6: (94.0, 200.0)}),
    )
    names = [(repo, name) for repo, repo_files in NETWORK_FILES.values() for name in repo_files]
    with serve_fake_hub(monkeypatch, tmp_path / "cache") as hub:
        for (repo, name), file in zip(names, files, strict=True):
            hub.repos.setdefault(repo, {})[name] = file.read_bytes()
        yield hub


@pytest.mark.parametrize("kind", ["depth", "pose"])
def test_network_is_fetched_and_run_once_for_all_passes(
    kind: str, remote: FakeHub, home: Path, clips: Callable[..., str], lora: Callable[..., Path], tmp_path: Path
) -> None:
    upscaler = write_random_upscaler(tmp_path / "up.safetensors")
    engine = Engine.open(home / MODEL_FILE, device="cpu", upscaler=upscaler, loras=[lora()], prompt_cache=False)
    short = replace(TWO_PASSES, frames=9)
    request, reports = replace(short, controls=(Control(clips(9), kind=kind),)), list[Progress]()
    controlled = engine.denoise(request, watch=reports.append)
    assert [report.step for report in reports if report.stage == "control"] == [*range(10)]
    stages = [report.stage for report in reports]
    assert stages.index("control") < stages.index("encode")
    assert sorted(name for name, _ in remote.sent_files) == sorted(NETWORK_FILES[kind][1])
    by_the_clip_itself = engine.denoise(replace(short, controls=(Control(clips(9)),)))
    assert relative_error(controlled, by_the_clip_itself) > 1e-4
    remote.is_silent = True
    assert torch.equal(engine.denoise(request), controlled)


def test_encoded_depth_map_is_bright_where_the_network_says_near(
    remote: FakeHub, opened: Callable[..., Engine], clips: Callable[..., str]
) -> None:
    resolved = opened().resolve(replace(REQUEST, controls=(Control(clips(17), kind="depth"),)))
    (control,), (prepared,) = resolved.controls, Media(resolved).prepared_controls.values()
    frames = OpenedMedia([control.media]).frames(control.media)
    networks = fetch_networks(resolved.controls)
    (map_renderer,) = build_map_renderers(resolved.controls, [frames], networks, ignore_progress)
    control = replace(prepared, map_renderer=map_renderer)
    chunks = torch.cat(list(control.chunks(8, device=torch.device("cpu"), dtype=torch.float32)), dim=2)
    assert chunks.shape == (1, 3, 17, 64, 128)
    assert chunks[0, :, 0, 24:40, 4:28].mean() < chunks[0, :, 16, 24:40, 36:60].mean()  # the square gets redder
    assert chunks[0, :, 0, 24:40, 40:].max() < -0.8  # the farthest depth of the clip is black
    assert chunks.max() > 0.7  # resizing overshoots at sharp edges


def test_network_that_cannot_be_fetched_is_an_error_before_any_load(
    engine_without_weights: Engine, clips: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("kadr.pipeline.stage_access.warn_control_lora_mismatch", lambda request, **kwargs: None)
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


def test_control_map_is_rendered_chunk_by_chunk_on_demand(
    clips: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(REQUEST, frames=25, controls=(Control(clips(25), kind="canny"),))
    (prepared,) = Media(Engine.open("demo", device="cpu").resolve(request)).prepared_controls.values()
    assert isinstance(prepared.frames, ClipReader)
    sizes = [chunk.shape[2] for chunk in prepared.chunks(8, device=torch.device("cpu"), dtype=torch.float32)]
    assert sizes == [8, 8, 8, 1]
