"""Writes the tables of docs/reference/models.md that follow from the registry: `python -m tests.write_models`.

tests/contracts/test_documents.py holds the page to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kadr.models.registry import LORA, MODEL_RELEASES, RELEASES, Recipe, Release
from kadr.sampling.settings import Guidance, Pass
from tests import doc_tables

PAGE = doc_tables.DOCS / "reference" / "models.md"
SIZES = {28: "2B, 28 blocks", 48: "13B, 48 blocks"}
OFFICIAL_TEST = "tests/pipeline/test_recipes.py::test_recipe_of_a_release_gives_the_official_latents"
FP8_TEST = "tests/pipeline/test_recipes.py::test_fp8_release_has_the_recipe_of_its_bf16_release"
# Tests of the bundled models, and of each kind of component.
BUNDLED_TESTS = {
    "demo": "tests/golden/test_demo.py::test_demo_follows_held_out_captions",
    "demo-distilled": ("tests/golden/test_demo.py::test_distilled_demo_has_nine_tenths_of_the_prompt_adherence"),
}
LORA_TEST = "tests/checkpoints/lora/test_file.py::test_a_released_lora_is_read_whole_and_fits_the_13b_model"
UPSCALER_TEST = "tests/models/test_upscaler.py::test_upscaler_equals_official_and_diffusers"
COMPONENT_TESTS = {
    "demo-upscaler": "tests/golden/test_demo.py::test_two_passes_are_sharper_than_the_first_resized",
    "demo-lora-teal": ("tests/golden/test_loras.py::test_red_turns_teal_in_proportion_to_the_strength"),
    "demo-ic-lora-canny": "tests/golden/test_loras.py::test_outlines_match_those_of_the_control_clip",
    "t5-v1.1-xxl": "tests/models/test_t5.py::test_encoder_equals_transformers_in_fp32",
    "t5-v1.1-xxl-q8-gguf": (
        "tests/checkpoints/gguf/test_gguf.py::test_a_llama_cpp_text_encoder_opens_with_weights_and_tokenizer"
    ),
    "t5-v1.1-tokenizer": "tests/spec/test_tokenizer.py::test_a_missing_tokenizer_is_fetched_once_and_alone",
}


def model_table() -> str:
    """Returns the table of the released models."""
    head = ("name", "transformer", "VAE", "text encoder", "upscaler", "recipe", "test")
    return doc_tables.markdown_table(head, map(_model_row, MODEL_RELEASES))


def component_table() -> str:
    """Returns the table of the components that models need."""
    components = [release for release in RELEASES if release not in MODEL_RELEASES]
    test_by_kind = {LORA: LORA_TEST}
    tests = {
        component: COMPONENT_TESTS.get(component.name, test_by_kind.get(component.kind, UPSCALER_TEST))
        for component in components
    }
    rows = [(f"`{component.name}`", component.kind, f"`{test}`") for component, test in tests.items()]
    return doc_tables.markdown_table(("name", "kind", "test"), rows)


def recipe_table() -> str:
    """Returns the table of the passes of each recipe."""
    head = ("recipe", "pass", "steps or sigmas", "CFG", "STG", "rescale", "perturbed blocks", "at sigmas", "more")
    recipes = {name_of_recipe(model.recipe): model.recipe for model in MODEL_RELEASES}
    rows = [row for name, recipe in recipes.items() for row in _pass_rows(name, recipe)]
    return doc_tables.markdown_table(head, rows)


TABLES: dict[str, Callable[[], str]] = {"models": model_table, "components": component_table, "recipes": recipe_table}


def name_of_recipe(recipe: Recipe) -> str:
    """Returns the name of a recipe, which is that of the first model with it."""
    return next(model.name for model in MODEL_RELEASES if model.recipe == recipe)


def _model_row(model: Release) -> tuple[str, ...]:
    test = BUNDLED_TESTS.get(model.name) or (FP8_TEST if model.name.endswith("-fp8") else OFFICIAL_TEST)
    return (
        f"`{model.name}`",
        SIZES[model.num_layers] if model.num_layers else "small",
        model.vae_family or (f"that of `{model.vae}`" if model.vae else "its own"),
        f"`{model.text_encoder}`" if model.text_encoder else "its own",
        f"`{model.upscaler}`" if model.upscaler else "–",
        f"`{name_of_recipe(model.recipe)}`",
        f"`{test}`",
    )


def _pass_rows(name: str, recipe: Recipe) -> Iterator[tuple[str, ...]]:
    first, second = ("first", "second") if recipe.multi_scale else ("single", "second, on request")
    passes = {first: recipe.first_pass, second: recipe.second_pass, "single, on request": recipe.single_pass}
    for label, settings in passes.items():
        if settings is not None:
            yield (
                f"`{name}`",
                label,
                _format_steps(settings),
                *_guidance_cells(settings.guidance),
                _format_extras(settings),
            )


def _format_steps(settings: Pass) -> str:
    if settings.sigmas is not None:
        return _format(settings.sigmas)
    skipped = {"first": settings.skip_initial, "last": settings.skip_final}
    return f"{settings.steps} steps" + "".join(f", the {which} {n} skipped" for which, n in skipped.items() if n)


def _guidance_cells(guidance: Guidance) -> tuple[str, ...]:
    blocks = guidance.skip_blocks or ()
    lists = [_format(indices) for indices in blocks if isinstance(indices, tuple)]
    blocks_cell = " / ".join(indices or "none" for indices in lists) or _format(blocks)
    values = (guidance.cfg_scale, guidance.stg_scale, guidance.rescale)
    return *(_format(value) for value in values), blocks_cell or "–", _format(guidance.sigmas)


def _format_extras(settings: Pass) -> str:
    extras = {
        f"sampler `{settings.sampler}`": settings.sampler,
        "CFG-star": settings.guidance.cfg_star,
        f"tone map {settings.tone_map}": settings.tone_map,
    }
    return ", ".join(name for name, is_used in extras.items() if is_used) or "–"


def _format(value: object) -> str:
    if value is None:
        return "–"
    return ", ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else f"{value:g}"


if __name__ == "__main__":
    for name, table in TABLES.items():
        doc_tables.write_table(PAGE, name, table())
    print(PAGE)
