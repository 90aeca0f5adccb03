"""`kadr rerun`: makes a video again from the request stored in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kadr.cli import run
from kadr.cli.flags import options
from kadr.cli.output_path import reserve_output
from kadr.cli.stdout_video import STDOUT, check_stdout, hidden_video
from kadr.cli.terminal.errors import print_stderr
from kadr.cli.terminal.preview import open_preview
from kadr.errors import CheckpointError, MediaError
from kadr.media.encoders.formats import FORMATS_BY_SUFFIX, Encoding
from kadr.quoting import quote, show
from kadr.request.request import Request, refuse_missing_media
from kadr.schema import upgrade_video_metadata
from kadr.spec.locate import find_release_on_disk
from kadr.validation import is_number, is_path_or_none

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine

_STORED_PATHS = ("model", "vae", "text_encoder", "second_model", "spatial_upscaler", "temporal_upscaler")
_STORED_TEXTS = ("model_name", "release", "device", "dtype", "quant")
RERUN_EPILOG = (
    "On the same machine and device the frames are the same; other machines, devices and versions may round "
    "differently."
)
File = Annotated[Path, typer.Argument(metavar="FILE", help="A video or image that kadr made.", show_default=False)]


def rerun(
    file: File,
    output: options.RerunOutput = None,
    seed: options.RerunSeed = None,
    model: options.Model = None,
    release: options.Release = None,
    device: options.RerunDevice = None,
    resume: options.Resume = False,
    codec: options.Codec = None,
    crf: options.Crf = None,
    keep_audio: options.KeepAudio = False,
    no_metadata: options.NoMetadata = False,
    preview: options.Preview = False,
    json: options.Json = False,
) -> None:
    """Make a video again from its file.

    A file that kadr made stores its request. Prints the path of the new video.
    """
    record = read_video_metadata(file)
    request = _parse_request(record, seed)
    refuse_missing_media(request)
    encoding = Encoding(codec, crf, keep_audio, not no_metadata)
    with _reserve(request, file, output, encoding, resume=resume, as_json=json) as reserved_path:
        engine = reopen_engine(record, model, device, release=release)
        run.write_video(
            engine,
            request,
            reserved_path,
            as_json=json,
            resume=resume,
            kernels=record.get("kernels"),
            preview=open_preview() if preview else None,
            encoding=encoding,
            to_stdout=output == STDOUT,
        )


@contextmanager
def _reserve(
    request: Request, file: Path, output: Path | None, encoding: Encoding, *, resume: bool, as_json: bool
) -> Iterator[Path]:
    """Reserves the path of the new video; see `reserve_output`. Numbered images are made again as an .mp4."""
    with ExitStack() as stack:
        if output == STDOUT:
            check_stdout(resume=resume, as_json=as_json)
            output = stack.enter_context(hidden_video())
        form = FORMATS_BY_SUFFIX.get(file.suffix.lower())
        is_frame = form is not None and form.is_image and request.frames != 1
        beside = file.with_suffix(".mp4") if is_frame or form is None else file
        yield stack.enter_context(reserve_output(request, output, beside=beside, resume=resume, encoding=encoding))


def _parse_request(record: Mapping[str, Any], seed: int | None) -> Request:
    """Returns the request that a video stores, with another seed where one is given."""
    request = Request.from_json(record["request"])
    return request if seed is None else replace(request, seed=seed)


def read_video_metadata(file: Path) -> dict[str, Any]:
    """Returns the metadata that kadr stored in the file, upgraded to the current schemas.

    Raises:
        MediaError: it is not a video, not one that kadr made, or one that a newer kadr made.
        RequestError: its request is of a newer kadr.
    """
    from kadr.media.clip import read_metadata

    record = upgrade_video_metadata(read_metadata(file), file)
    if not isinstance(record.get("request"), dict):
        raise MediaError(f"{file} stores no request. Only a video that `kadr generate` wrote can be made again.")
    check_stored_model(record, file)
    return record


def check_stored_model(record: Mapping[str, Any], file: Path) -> None:
    """Refuses metadata whose model, components or LoRAs are not what kadr stores.

    Raises:
        MediaError: the metadata were changed.
    """
    loras = record.get("loras", ())
    wrong = [name for name in _STORED_TEXTS if not isinstance(record.get(name), str | None)]
    wrong += [name for name in _STORED_PATHS if not is_path_or_none(record.get(name))]
    if not isinstance(loras, list | tuple) or not all(map(_is_stored_lora, loras)):
        wrong.append("loras")
    if wrong:
        values = ", ".join(f"{name} = {quote(record.get(name))}" for name in wrong)
        raise MediaError(f"{file} stores {values}, which kadr does not write: its metadata were changed.")


def _is_stored_lora(lora: Any) -> bool:
    """Returns whether an entry of the metadata is a LoRA with a path and its strengths."""
    return (
        isinstance(lora, Mapping)
        and is_path_or_none(lora.get("path"))
        and lora.get("path") is not None
        and is_number(lora.get("strength"))
        and (lora.get("second_strength", 0) is None or is_number(lora.get("second_strength")))
    )


def reopen_engine(
    record: Mapping[str, Any], model: str | None, device: str | None, *, release: str | None = None
) -> Engine:
    """Opens the engine that made the video, unless a model or a device is named.

    Args:
        release: of a model that is named by a path; the video's own has the release that the video states.

    Raises:
        CheckpointError: a file of the model is no longer there.
    """
    _warn_of_other_version(record.get("version"))
    components = _second_pass_components(record)
    recipe: dict[str, Any] = {} if release is None else {"release": release}
    if model is None:
        model = _find_model(record)
        recipe = recipe or _stored_recipe(record, model)
        components |= {"text_encoder": _find_text_encoder(record), "vae": _find_vae(record, model)}
    device = device or str(record.get("device", "auto"))
    engine_options: dict[str, Any] = {name: str(record[name]) for name in ("dtype", "quant") if record.get(name)}
    engine_options |= _lora_options(record)
    if record.get("compile_transformer") and device.startswith("cuda"):
        engine_options["compile_transformer"] = True
    return run.open_engine(model, **components, **recipe, device=device, **engine_options)


def _stored_recipe(record: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Returns the release or the recipe of the video's own model if that is a file, as keywords of `Engine.open`."""
    from kadr.models.registry import RELEASES_BY_NAME, Recipe

    if model in RELEASES_BY_NAME or "release" not in record:
        return {}
    # The request of a video states all settings, so a model of no known release needs no recipe.
    return {"recipe": Recipe()} if record["release"] is None else {"release": record["release"]}


def _warn_of_other_version(version: object) -> None:
    """Warns that the frames may differ if another version of kadr made the video."""
    from kadr.version import __version__

    if version != __version__:
        print_stderr(f"warning: made with kadr {show(version)}, and this is {__version__}; the frames may differ")


def _second_pass_components(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns model and upscalers of the second pass, as keywords of `Engine.open`."""
    components: dict[str, Any] = {}
    if path := record.get("second_model"):
        components["second_model"] = _find_component("second model", path)
    kinds = ("spatial", "temporal")
    upscalers = [
        _find_component(f"{kind} upscaler", path) for kind in kinds if (path := record.get(f"{kind}_upscaler"))
    ]
    return components | ({"upscaler": upscalers} if upscalers else {})


def _lora_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the LoRAs, as keywords of `Engine.open`."""
    engine_options: dict[str, Any] = {name: True for name in ("lora_partial", "merge_loras") if record.get(name)}
    loras = [(_lora(lora), lora["strength"], lora["second_strength"]) for lora in record.get("loras", ())]
    return engine_options | ({"loras": loras} if loras else {})


def _lora(stored: Mapping[str, Any]) -> str:
    """Returns the LoRA's file or name; warns if the file is not the one that the video was made with."""
    from kadr.checkpoints.lora.file import lora_sha256  # loads torch

    file = _find_component("LoRA", stored["path"])
    if Path(file).exists() and "sha256" in stored and lora_sha256(file) != stored["sha256"]:
        print_stderr(f"warning: {file} is not the file that the video was made with; the frames will differ")
    return file


def _find_component(role: str, path: str) -> str:
    """Returns the file that was used, or its registry name if it has moved."""
    from kadr.models.registry import RELEASES

    file_name = Path(path).name
    names = [entry.name for entry in RELEASES if file_name == f"{entry.file_stem}.safetensors"]
    return names[0] if names and not Path(path).exists() else str(_require_existing(role, path, remedy=""))


def _find_model(record: Mapping[str, Any]) -> str:
    """Returns the file that made the video; its registry name if that means the same file, or the file has moved."""
    from kadr.models.registry import RELEASES_BY_NAME

    path, release = str(record.get("model", "")), RELEASES_BY_NAME.get(str(record.get("model_name", "")))
    if release is not None:
        file_on_disk = find_release_on_disk(release)
        if not Path(path).exists() or (file_on_disk is not None and file_on_disk.resolve() == Path(path).resolve()):
            return release.name
    return str(_require_existing("model", path))


def _find_vae(record: Mapping[str, Any], model: str) -> Path | None:
    """Returns the VAE's file; None, for the model's own, if both are the same or a released one has moved."""
    from kadr.models.registry import RELEASES_BY_NAME

    path, release = record.get("vae"), RELEASES_BY_NAME.get(model)
    has_moved = release is not None and release.vae is not None and not (path and Path(path).exists())
    return None if has_moved or path == record.get("model") else _require_existing("VAE", path)


def _find_text_encoder(record: Mapping[str, Any]) -> Path | None:
    """Returns the text encoder's folder; None, for the model's own, if a released model's has moved."""
    from kadr.models.registry import RELEASES_BY_NAME

    path = record.get("text_encoder")
    if record.get("model_name") in RELEASES_BY_NAME and not (path and Path(path).exists()):
        print_stderr(
            f"warning: the text encoder is no longer at {path}; the one that belongs to {record['model_name']} is used"
        )
        return None
    return _require_existing("text encoder", path)


def _require_existing(role: str, path: str | None, remedy: str = ", or name a model with --model") -> Path:
    if not path or not Path(path).exists():
        raise CheckpointError(f"the {role} was {path}, which is no longer there. Put it back{remedy}.")
    return Path(path)
