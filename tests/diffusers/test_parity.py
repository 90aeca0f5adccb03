"""With a generator, the door's latents and frames are those of diffusers' own pipelines, to 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kadr.diffusers
from tests.diffusers.conftest import OPTIONS, Oracle, generator, noise_clip, noise_image
from tests.lora_files import block_pairs, diffusers, write_lora_file
from tests.oracles import relative_error

TOLERANCE = 1e-5


def assert_same(oracle: Any, door: Any, **options: Any) -> None:
    """Compares the latents of both pipelines, and the frames decoded with noise."""
    settings = {**OPTIONS, **options}
    latents = {}
    for name, pipeline in (("oracle", oracle), ("door", door)):
        latents[name] = pipeline(**settings, generator=generator(), output_type="latent").frames
    assert relative_error(latents["door"], latents["oracle"]) < TOLERANCE
    frames = [
        pipeline(
            **settings, generator=generator(), output_type="np", decode_timestep=0.05, decode_noise_scale=0.025
        ).frames
        for pipeline in (oracle, door)
    ]
    assert frames[0].shape == frames[1].shape
    assert np.abs(frames[0] - frames[1]).max() < 1e-4


@pytest.mark.parametrize("kind", ["folder", "shifted_folder"])
def test_text_to_video_equals_diffusers(kind: str, oracle: Oracle, door: Oracle, request: Any) -> None:
    folder = request.getfixturevalue(kind)
    pipelines = (build("LTXPipeline", folder) for build in (oracle, door))
    assert_same(*pipelines, guidance_scale=3.0, guidance_rescale=0.6)


def test_image_to_video_equals_diffusers(folder: Path, oracle: Oracle, door: Oracle) -> None:
    pipelines = (build("LTXImageToVideoPipeline", folder) for build in (oracle, door))
    assert_same(*pipelines, image=noise_image(1), guidance_scale=3.0)


def conditions(of: Any) -> list[Any]:
    """Returns an image at frame 0, a clip of 9 frames at 8, and an image that is not kept whole."""
    return [
        of(image=noise_image(1), frame_index=0),
        of(video=noise_clip(9), frame_index=8),
        of(image=noise_image(2), frame_index=13, strength=0.6),
    ]


def test_conditions_equal_diffusers(folder: Path, oracle: Oracle, door: Oracle) -> None:
    import diffusers.pipelines.ltx.pipeline_ltx_condition as reference

    theirs, ours = (build("LTXConditionPipeline", folder) for build in (oracle, door))
    settings = {**OPTIONS, "output_type": "latent", "num_frames": 33}
    expected = theirs(conditions=conditions(reference.LTXVideoCondition), generator=generator(), **settings).frames
    latents = ours(conditions=conditions(kadr.diffusers.LTXVideoCondition), generator=generator(), **settings).frames
    assert relative_error(latents, expected) < TOLERANCE


def test_conditions_of_an_image_decode_as_in_diffusers(folder: Path, oracle: Oracle, door: Oracle) -> None:
    pipelines = (build("LTXConditionPipeline", folder) for build in (oracle, door))
    assert_same(*pipelines, image=noise_image(1), timesteps=[1000, 909, 725, 0], num_inference_steps=4)


def test_second_pass_from_latents_equals_diffusers(folder: Path, oracle: Oracle, door: Oracle) -> None:
    latents = torch.randn(1, 8, 3, 2, 3, generator=generator(9))
    pipelines = (build("LTXConditionPipeline", folder) for build in (oracle, door))
    assert_same(*pipelines, latents=latents, denoise_strength=0.7, image_cond_noise_scale=0.0)


@pytest.mark.parametrize("is_fused", [False, True])
def test_lora_equals_diffusers(is_fused: bool, folder: Path, oracle: Oracle, door: Oracle, tmp_path: Path) -> None:
    path = write_lora_file(tmp_path / "style.safetensors", block_pairs(), diffusers)
    pipelines = [build("LTXPipeline", folder) for build in (oracle, door)]
    for pipeline in pipelines:
        pipeline.load_lora_weights(str(path), adapter_name="style")
        pipeline.set_adapters(["style"], adapter_weights=[0.7])
        if is_fused:
            pipeline.fuse_lora(lora_scale=0.5)
    assert_same(*pipelines, guidance_scale=3.0)


def test_two_loras_equal_diffusers(folder: Path, oracle: Oracle, door: Oracle, tmp_path: Path) -> None:
    pipelines = [build("LTXConditionPipeline", folder) for build in (oracle, door)]
    for pipeline in pipelines:
        for number in range(2):
            path = write_lora_file(tmp_path / f"{number}.safetensors", block_pairs(seed=number), diffusers)
            pipeline.load_lora_weights(str(path), adapter_name=f"style {number}".replace(" ", "_"))
    options = {**OPTIONS, "output_type": "latent"}
    expected, latents = (pipeline(**options, generator=generator()).frames for pipeline in pipelines)
    assert relative_error(latents, expected) < TOLERANCE
    for pipeline in pipelines:
        pipeline.set_adapters(["style_0", "style_1"], [0.4, 0.8])
    expected, latents = (pipeline(**options, generator=generator()).frames for pipeline in pipelines)
    assert relative_error(latents, expected) < TOLERANCE


def test_bfloat16_is_as_near_to_float32_as_diffusers_own(folder: Path, oracle: Oracle, door: Oracle) -> None:
    options = {**OPTIONS, "output_type": "latent", "image": noise_image(1)}
    exact, theirs, ours = (
        build("LTXConditionPipeline", folder, dtype)(**options, generator=generator()).frames
        for build, dtype in ((oracle, torch.float32), (oracle, torch.bfloat16), (door, torch.bfloat16))
    )
    assert relative_error(ours, exact) < 1.2 * relative_error(theirs, exact)


def test_several_videos_equal_diffusers(folder: Path, oracle: Oracle, door: Oracle) -> None:
    latents = [
        build("LTXPipeline", folder)(
            **OPTIONS, num_videos_per_prompt=2, generator=generator(), output_type="latent"
        ).frames
        for build in (oracle, door)
    ]
    assert relative_error(latents[1], latents[0]) < TOLERANCE


def test_one_generator_for_each_video_equals_diffusers(folder: Path, oracle: Oracle, door: Oracle) -> None:
    latents = [
        build("LTXImageToVideoPipeline", folder)(
            **{**OPTIONS, "prompt": ["a red circle", "the sea"], "negative_prompt": ["birds", "birds"]},
            image=[noise_image(1), noise_image(2)],
            generator=[generator(1), generator(2)],
            output_type="latent",
        ).frames
        for build in (oracle, door)
    ]
    assert relative_error(latents[1], latents[0]) < TOLERANCE
