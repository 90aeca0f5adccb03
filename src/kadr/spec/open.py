"""Opens a model by names or paths: everything that can be known of it without fetching or loading."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.lora.file import LoraFile
from kadr.checkpoints.predict import predict_lora, predict_text_encoder
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError, KadrWarning, RequestError
from kadr.memory.device import explain_cudnn, explain_dtype, pick_device, pick_dtype
from kadr.models.registry import LORA, Recipe, Release
from kadr.quant.weight_formats import NONE, check_weight_format
from kadr.quoting import quote
from kadr.spec.known_release import require_known_recipe, warn_unknown_second_release
from kadr.spec.locate import (
    MODEL,
    SECOND_MODEL,
    TEXT_ENCODER_ROLE,
    TOKENIZER_ROLE,
    UPSCALER_ROLE,
    ModelComponent,
    fetch_release,
    locate,
    with_stated_release,
)
from kadr.spec.lora import Lora
from kadr.spec.loras import Loras, parse_loras
from kadr.spec.model import (
    ModelSpec,
    SpecOptions,
    open_checkpoint,
    order_upscalers,
    require_components,
    require_matching_text_encoder,
)
from kadr.spec.model_folders import ModelFolders
from kadr.spec.offload import check_offload
from kadr.spec.options import check_compile, refuse_merging, resolve_weight_format
from kadr.spec.origins import find_text_encoder, locate_vae
from kadr.spec.tokenizer import add_tokenizer, fetch_tokenizer
from kadr.validation import check_path


def open_spec(options: SpecOptions) -> ModelSpec:
    """Opens a model by its headers. What is not on disk is predicted from the registry, and nothing is fetched.

    Raises:
        RequestError: unknown name, device, dtype, weight format or offload mode.
        CheckpointError: a path does not exist; a file is damaged, incomplete or not of the LTX-Video family; or two
            components do not fit each other.
    """
    _check_types(options)
    device = pick_device(options.device)
    pick_dtype(options.dtype, device, 0)
    compile_transformer = check_compile(options.compile_transformer, device)
    check_weight_format(options.quant or NONE)
    check_offload(options.offload)
    folders = ModelFolders.open(options.models_dirs)
    loras = parse_loras(options.loras)
    lora_components = [replace(locate(lora.path, LORA, folders), strengths=lora.pass_strengths()) for lora in loras]
    model = with_stated_release(locate(options.model, MODEL, folders), options.release)
    checkpoint = open_checkpoint(model)
    model = replace(model, release=model.release or checkpoint.info.release)
    release = model.release
    vae = locate_vae(options.vae, model, checkpoint, folders)
    vae_checkpoint = checkpoint if vae is None else open_checkpoint(vae, known_release=False)
    require_components(checkpoint, vae_checkpoint)
    if release is None and options.recipe is None:
        require_known_recipe(checkpoint)
    second = None if options.second_model is None else locate(options.second_model, SECOND_MODEL, folders)
    second_checkpoint = checkpoint if second is None else open_checkpoint(second)
    require_components(second_checkpoint, vae_checkpoint)
    if second is not None:
        second = replace(second, release=second.release or second_checkpoint.info.release)
        warn_unknown_second_release(second, second_checkpoint)
    second_release = None if second is None else second.release
    transformers = (checkpoint, second_checkpoint)
    opened_loras = _open_loras(options, loras, lora_components, transformers)
    upscalers = [locate(name, UPSCALER_ROLE, folders) for name in _upscaler_names(options)]
    given_upscalers = order_upscalers([open_checkpoint(item) for item in upscalers], checkpoint)
    for late in (vae_checkpoint, *given_upscalers.values()):
        late.account_late_components()
    text_encoder = find_text_encoder(options.text_encoder, model, checkpoint, release, folders)
    text_encoder_checkpoint, tokenizer = add_tokenizer(_open_text_encoder(text_encoder))
    for transformer in transformers:
        require_matching_text_encoder(text_encoder_checkpoint, transformer)
    parameters = _count_parameters((*transformers, vae_checkpoint))
    choice = resolve_weight_format(options.quant, transformers, device)
    notices = tuple(
        filter(None, (choice.notice, explain_dtype(options.dtype, device, parameters), explain_cudnn(device)))
    )
    for notice in notices:
        warnings.warn(KadrWarning(notice, topic="device"), stacklevel=3)
    first_recipe = options.recipe or (release.recipe if release else Recipe())
    first = (model.name, release)
    components = (model, second, *upscalers, text_encoder, tokenizer, vae, *lora_components)
    return ModelSpec(
        options=options,
        components=tuple(item for item in components if item is not None),
        release=release,
        recipe=with_second_model(first_recipe, second_release),
        transformer_checkpoints=transformers,
        text_encoder_checkpoint=text_encoder_checkpoint,
        vae_checkpoint=vae_checkpoint,
        given_upscalers=given_upscalers,
        names_and_releases=(first, first if second is None else (second.name, second_release)),
        loras=opened_loras,
        device=device,
        dtype=pick_dtype(options.dtype, device, parameters),
        quant=choice.name,
        offload=options.offload,
        compile_transformer=compile_transformer,
        notices=notices,
    )


def with_second_model(recipe: Recipe, second_model: Release | None) -> Recipe:
    """Returns the recipe with the second pass of another model's recipe, if that has one."""
    if second_model is None or second_model.recipe.second_pass is None:
        return recipe
    return replace(recipe, second_pass=second_model.recipe.second_pass, multi_scale=True)


def _check_types(options: SpecOptions) -> None:
    """Refuses paths that are not paths, and a recipe that is not a `Recipe`."""
    check_path("model", options.model)
    for name in ("text_encoder", "vae", "second_model"):
        if getattr(options, name) is not None:
            check_path(name, getattr(options, name))
    if not isinstance(options.upscaler, str | Path | list | tuple):
        raise RequestError(f"upscaler is {quote(options.upscaler)}; it must be a name, a path, or a list of them.")
    for upscaler in _upscaler_names(options):
        check_path("upscaler", upscaler)
    if not isinstance(options.release, str | None):
        raise RequestError(f"release is {quote(options.release)}; it must be the name of a released model, or None.")
    if not isinstance(options.recipe, Recipe | None):
        raise RequestError(f"recipe is {quote(options.recipe)}; it must be a Recipe, or None for the model's own.")


def _upscaler_names(options: SpecOptions) -> Sequence[str | Path]:
    """Returns the upscalers that were named, one or several."""
    return [options.upscaler] if isinstance(options.upscaler, str | Path) else options.upscaler


def _open_text_encoder(component: ModelComponent) -> TextEncoderCheckpoint:
    if component.path is not None:
        return TextEncoderCheckpoint.open(component.path)
    return predict_text_encoder(component.known_release)


def _open_loras(
    options: SpecOptions,
    loras: Sequence[Lora],
    components: Sequence[ModelComponent],
    transformers: tuple[Checkpoint, Checkpoint],
) -> Loras:
    files = tuple(_open_lora(component, allow_partial=options.lora_partial) for component in components)
    opened = Loras(tuple(loras), files, options.lora_partial, options.merge_loras and bool(loras))
    opened = opened.fit_to(transformers)
    if opened.is_merged:
        refuse_merging(transformers)
    return opened


def _open_lora(component: ModelComponent, *, allow_partial: bool) -> LoraFile:
    if component.path is not None:
        return LoraFile.open(component.path, allow_partial=allow_partial)
    return predict_lora(component.known_release)


def _count_parameters(checkpoints: Sequence[Checkpoint]) -> int:
    by_path = {checkpoint.path: checkpoint for checkpoint in checkpoints}
    return sum(source.num_parameters for opened in by_path.values() for source in opened.sources.values())


def fetch_spec(spec: ModelSpec, *, has_two_passes: bool) -> ModelSpec:
    """Returns the model with everything that a generation opens on disk; fetches what is not.

    The text encoder comes last: the others may be refused before its gigabytes are fetched.

    Raises:
        CheckpointError: a file cannot be fetched, or is not what the registry says.
    """
    absent = [item for item in spec.required_components(has_two_passes=has_two_passes) if item.path is None]
    if not absent:
        return spec
    for is_text_encoder in (False, True):
        for component in absent:
            if (component.role == TEXT_ENCODER_ROLE) != is_text_encoder:
                continue
            if component.role == TOKENIZER_ROLE:
                fetch_tokenizer(spec.text_encoder_checkpoint)
            else:
                fetch_release(component.known_release)
        spec = open_spec(spec.options)
        if has_two_passes:
            spec.upscalers(has_two_passes=True)
    absent = [item for item in spec.required_components(has_two_passes=has_two_passes) if item.path is None]
    if absent:
        raise CheckpointError(
            f"{absent[0].name} was fetched, and is not in the hub's cache. Fetch it with `kadr models pull "
            f"{absent[0].name}`."
        )
    return spec
