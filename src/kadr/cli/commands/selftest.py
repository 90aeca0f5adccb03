"""`kadr selftest`: tests a model, its files and this device, stage by stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kadr.cli import run
from kadr.cli.flags import options, parse
from kadr.cli.flags.request import check_execution
from kadr.cli.terminal.errors import print_stderr, print_stdout
from kadr.cli.terminal.output import print_lines
from kadr.errors import KadrError

SELFTEST_EPILOG = (
    "Paste the report into an issue: it has versions, the device, checksums and figures, and names no folder. Exits "
    "with 1 if a stage fails."
)
TestedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name of `kadr models`, a .safetensors, a .gguf or a diffusers folder.",
        show_default=False,
    ),
]
Lora = Annotated[
    list[str] | None, options.flag("--lora", "NAME|PATH", "Also test a LoRA on this model; may be repeated.")
]
TextEncoder = Annotated[Path | None, options.flag("--text-encoder", "NAME|PATH", "T5 text encoder of the model.")]
Vae = Annotated[Path | None, options.flag("--vae", "NAME|PATH", "Take the VAE from this checkpoint.")]
Upscaler = Annotated[
    list[str] | None, options.flag("--upscaler", "NAME|PATH", "Latent upscaler of the model; may be given twice.")
]
Device = Annotated[str, options.flag("--device", "auto|cpu|cuda|mps", "Device to test; auto picks the fastest.")]
Dtype = Annotated[str, options.flag("--dtype", "auto|bfloat16|float32", "Dtype to compute in; auto suits the device.")]
Quant = Annotated[
    str, options.flag("--quant", "none|auto|int8|fp8|Q8_0|...", "Also quantize the transformer's weights.")
]
Offload = Annotated[str, options.flag("--offload", "auto|none|stages|blocks", "As for `kadr generate`.")]


def selftest(
    model: TestedModel,
    lora: Lora = None,
    release: options.Release = None,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    upscaler: Upscaler = None,
    models_dir: options.ModelsDir = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = "none",
    offload: Offload = "auto",
    as_json: options.Json = False,
) -> None:
    """Test a model on this device: its files, each network, kernels and placements.

    Encodes, denoises and decodes a drawn clip whose right answers are known, and compares every figure with the limits
    of a healthy model. Prints a report; progress goes to stderr.
    """
    check_execution(device, dtype, quant, offload)
    engine = run.open_engine(
        model,
        loras=[parse.lora(text) for text in lora or ()],
        release=release,
        text_encoder=text_encoder,
        vae=vae,
        upscaler=upscaler or (),
        models_dirs=models_dir or (),
        device=device,
        dtype=dtype,
        quant=quant,
        offload=offload,
        prompt_cache=False,
    )
    from kadr.selftest.progress import progress_line
    from kadr.selftest.report import report_lines
    from kadr.selftest.run import run_selftest

    report = run_selftest(engine, end=lambda result: print_stderr(progress_line(result)))
    if as_json:
        print_stdout(json.dumps({**report.to_json(), "report": "\n".join(report_lines(report))}))
    else:
        print_lines(report_lines(report))
    if not report.passed:
        failed = report.failed_stages
        raise KadrError(f"{len(failed)} of {len(report.stages)} stages failed: {', '.join(failed)}. See the report.")
