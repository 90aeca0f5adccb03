"""A minimal program that generates the demo's video with diffusers: `... FOLDER PROMPT DEVICE OUTPUT`."""

import sys

import av
import torch
from diffusers import LTXPipeline


def main(folder: str, prompt: str, device: str, output: str) -> None:
    pipeline = LTXPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    frames = pipeline(
        prompt=prompt,
        negative_prompt="",
        width=128,
        height=128,
        num_frames=25,
        frame_rate=24,
        num_inference_steps=24,
        guidance_scale=3.0,
        decode_timestep=0.05,
        decode_noise_scale=0.025,
        max_sequence_length=256,
        output_type="np",
    ).frames[0]
    with av.open(output, "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        for frame in (frames * 255).round().astype("uint8"):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
