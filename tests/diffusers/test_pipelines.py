"""The door's arguments: the same as diffusers', and what it cannot do is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import kadr.diffusers
from kadr.diffusers.locate_model import REPOSITORIES, file_name, model_name
from kadr.diffusers.utils import export_to_video
from kadr.errors import KadrWarning, MediaError, RequestError
from kadr.media.clip import read_video
from kadr.models.registry import RELEASES_BY_NAME
from tests.diffusers.conftest import OPTIONS, Oracle, generator, noise_image
from tests.lora_files import block_pairs, write_lora_file

NAMES = ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline", "LTXLatentUpsamplePipeline")


@pytest.fixture(scope="module")
def pipeline(folder: Path, door: Oracle) -> Any:
    return door("LTXPipeline", folder)


def latents_of(pipeline: Any, **options: Any) -> torch.Tensor:
    return pipeline(**{**OPTIONS, "output_type": "latent", **options}).frames


@pytest.mark.parametrize("name", NAMES)
def test_a_call_has_the_arguments_and_defaults_of_diffusers(name: str) -> None:
    ours, theirs = (
        inspect.signature(getattr(package, name).__call__).parameters for package in (kadr.diffusers, diffusers)
    )
    assert list(ours) == list(theirs)
    for parameter in theirs.values():
        default, expected = ours[parameter.name].default, parameter.default
        assert (list(default) if isinstance(default, tuple) else default) == expected, parameter.name


def test_callback_changes_latents_and_interrupts_as_in_diffusers(folder: Path, oracle: Oracle, door: Oracle) -> None:
    """With a keyframe, whose tokens diffusers has before those of the video."""
    seen: list[list[torch.Tensor]] = []

    def callback(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen[-1] += [timestep, tensors["latents"].clone()]
        pipe._interrupt = step == 1
        return {"latents": tensors["latents"] * 1.1}

    latents = []
    for build in (oracle, door):
        seen.append([])
        pipe = build("LTXConditionPipeline", folder)
        latents.append(
            latents_of(pipe, image=noise_image(1), frame_index=8, generator=generator(), callback_on_step_end=callback)
        )
    assert len(seen[0]) == len(seen[1]) == 4
    for ours, theirs in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-5, atol=1e-5)


def test_callback_turns_guidance_off_in_the_middle(pipeline: Any) -> None:
    def callback(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    inputs = ["prompt_embeds"]
    changed = latents_of(
        pipeline, generator=generator(), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs
    )
    guided, unguided = (latents_of(pipeline, generator=generator(), guidance_scale=scale) for scale in (3.0, 1.0))
    assert not torch.allclose(changed, guided)
    assert not torch.allclose(changed, unguided)


def test_without_a_generator_torch_manual_seed_decides(pipeline: Any) -> None:
    latents = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        latents.append(latents_of(pipeline))
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])
    assert not torch.equal(latents[0], latents_of(pipeline)), "a second call makes another video"


def test_packed_latents_take_the_place_of_noise(pipeline: Any) -> None:
    from_generator = latents_of(pipeline, generator=generator())
    noise = torch.randn(1, 8, 3, 2, 3, generator=generator()).flatten(2).transpose(1, 2)
    assert torch.equal(latents_of(pipeline, latents=noise), from_generator)


def test_adapters_are_switched_by_name(folder: Path, door: Oracle, tmp_path: Path) -> None:
    pipe = door("LTXPipeline", folder)
    plain = latents_of(pipe, generator=generator())
    for number, name in enumerate(("first", "second")):
        path = write_lora_file(tmp_path / f"{name}.safetensors", block_pairs(seed=number))
        pipe.load_lora_weights(tmp_path, weight_name=path.name, adapter_name=name)
    assert pipe.get_active_adapters() == ["second"], "the last one acts alone, as in diffusers"
    pipe.set_adapters(["first", "second"], [1.0, 0.5])
    both = latents_of(pipe, generator=generator())
    pipe.set_adapters("second")
    second = latents_of(pipe, generator=generator())
    assert pipe.get_active_adapters() == ["second"]
    assert pipe.get_list_adapters() == {"transformer": ["first", "second"]}
    assert not torch.allclose(second, both)
    pipe.delete_adapters("first")
    torch.testing.assert_close(latents_of(pipe, generator=generator()), second, rtol=1e-5, atol=1e-5)
    pipe.disable_lora()
    assert torch.equal(latents_of(pipe, generator=generator()), plain)
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe, generator=generator()), plain)


def test_array_and_tensor_images_equal_those_of_diffusers(folder: Path, oracle: Oracle, door: Oracle) -> None:
    pixels = np.asarray(noise_image(1), dtype=np.float32) / 255
    for image in (pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        expected, latents = (
            latents_of(build("LTXImageToVideoPipeline", folder), image=image, generator=generator())
            for build in (oracle, door)
        )
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_repositories_and_links_are_names_of_the_registry() -> None:
    assert set(REPOSITORIES.values()) <= set(RELEASES_BY_NAME)
    assert model_name("Lightricks/LTX-Video-0.9.5") == "ltxv-2b-0.9.5"
    link = "https://huggingface.co/Lightricks/LTX-Video/blob/main/ltxv-2b-0.9.8-distilled.safetensors"
    assert file_name(link) == "ltxv-2b-0.9.8-distilled"


def test_steps_are_checked_against_no_list_of_distilled_sigmas() -> None:
    """diffusers' documentation rounds the sigmas of distilled models: 993 is none of theirs."""
    pipe = kadr.diffusers.LTXConditionPipeline.from_pretrained("demo-distilled", prompt_cache=False)
    pipe.set_progress_bar_config(disable=True)
    latents = latents_of(pipe, prompt="a red circle", timesteps=[1000, 993], guidance_scale=1.0)
    assert bool(latents.isfinite().all())


Refused = Callable[[Any, Any], object]
REFUSALS: dict[str, tuple[Refused, str]] = {
    "height": (lambda pipe, i2v: pipe("a", height=70), "height is 70; it must be a multiple of 32"),
    "frames": (lambda pipe, i2v: pipe("a", num_frames=0), "num_frames is 0"),
    "output type": (lambda pipe, i2v: pipe("a", output_type="mp4"), "output_type is 'mp4'"),
    "guidance": (lambda pipe, i2v: pipe("a", guidance_scale="3"), "guidance_scale is '3'"),
    "rescale": (lambda pipe, i2v: pipe("a", guidance_rescale=2), "guidance_rescale is 2"),
    "decode timesteps": (lambda pipe, i2v: pipe("a", decode_timestep=[0.1, 0.2]), "2 values for 1 prompts"),
    "no prompt": (lambda pipe, i2v: pipe(), "give a prompt or prompt_embeds"),
    "mask": (lambda pipe, i2v: pipe(prompt_embeds=torch.zeros(1, 8, 24)), "without prompt_attention_mask"),
    "generators": (lambda pipe, i2v: pipe("a", generator=[generator()] * 3), "3 generators are given for 1 videos"),
    "generator": (lambda pipe, i2v: pipe("a", generator=7), "it must be a torch.Generator"),
    "timesteps": (lambda pipe, i2v: pipe("a", timesteps=[900, 950]), "they must decrease"),
    "attention_kwargs": (lambda pipe, i2v: pipe("a", attention_kwargs={"gligen": 1}), "does not take gligen"),
    "tensor inputs": (
        lambda pipe, i2v: pipe("a", callback_on_step_end=print, callback_on_step_end_tensor_inputs=["timesteps"]),
        "callback_on_step_end_tensor_inputs has 'timesteps'",
    ),
    "callback of several": (
        lambda pipe, i2v: pipe(["a", "b"], callback_on_step_end=print),
        "callback_on_step_end is given for 2 videos",
    ),
    "latents": (lambda pipe, i2v: pipe("a", latents=torch.zeros(1, 8, 3, 2, 3)), "they must be packed tokens"),
    "latents of an image": (
        lambda pipe, i2v: i2v(image=noise_image(1), latents=torch.zeros(1)),
        "LTXConditionPipeline",
    ),
    "no image": (lambda pipe, i2v: i2v(prompt="a"), "no image is given"),
    "image": (lambda pipe, i2v: i2v(prompt="a", image="photo.png"), "it must be a Pillow image"),
    "device": (lambda pipe, i2v: pipe.to("cuda:3"), "CUDA_VISIBLE_DEVICES"),
    "dtype": (lambda pipe, i2v: pipe.to(torch.float16), "torch.bfloat16 or torch.float32"),
    "LoRA": (lambda pipe, i2v: pipe.set_adapters("style"), "no LoRA named 'style'"),
    "tensors of a LoRA": (lambda pipe, i2v: pipe.load_lora_weights({}), "a LoRA is given as tensors"),
    "LoRA repository": (lambda pipe, i2v: pipe.load_lora_weights("somebody/style"), "no release for somebody/style"),
    "repository": (lambda pipe, i2v: type(pipe).from_pretrained("somebody/LTX"), "Download it and pass its folder"),
    "component": (lambda pipe, i2v: type(pipe).from_pretrained("demo", transformer=1), "does not take transformer"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_door_cannot_do_is_refused_by_name(name: str, folder: Path, door: Oracle) -> None:
    use, message = REFUSALS[name]
    with pytest.raises(RequestError, match=message):
        use(door("LTXPipeline", folder), door("LTXImageToVideoPipeline", folder))


def test_callback_that_returns_other_prompt_embeds_is_refused(pipeline: Any) -> None:
    def callback(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"] * 2}

    with pytest.raises(RequestError, match="returned other prompt_embeds"):
        latents_of(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_latents_that_nothing_would_remain_of_are_warned_of(folder: Path, door: Oracle) -> None:
    pipe = door("LTXConditionPipeline", folder)
    with pytest.warns(KadrWarning, match="nothing of them remains"):
        latents_of(pipe, latents=torch.zeros(1, 8, 3, 2, 3))


def test_links_to_media_are_refused() -> None:
    from kadr.diffusers.utils import load_image, load_video

    for load in (load_image, load_video):
        with pytest.raises(MediaError, match="kadr opens no links"):
            load("https://example.org/image.png")


def test_exported_tensors_are_the_frames_of_arrays(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).random((2, 32, 64, 3), np.float32)
    for name, values in (("arrays.mkv", frames), ("tensors.mkv", torch.from_numpy(frames).movedim(-1, 1))):
        export_to_video(values, str(tmp_path / name), fps=24)
    arrays, tensors = (read_video(tmp_path / name).frames for name in ("arrays.mkv", "tensors.mkv"))
    assert arrays.shape == frames.shape
    assert np.array_equal(arrays, tensors)
