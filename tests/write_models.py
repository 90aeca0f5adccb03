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
OFFICIAL_TEST = "tests/pipeline/test_recipes.py::test_a_released_recipe_gives_the_official_latents"
FP8_TEST = "tests/pipeline/test_recipes.py::test_an_fp8_twin_has_the_recipe_of_the_model_it_was_made_from"
# What is tested of the models that are bundled, and of each kind of part.
BUNDLED_TESTS = {
    "demo": "tests/golden/test_demo.py::test_the_demo_shows_what_unseen_captions_say",
    "demo-distilled": (
        "tests/golden/test_demo.py::test_six_steps_without_guidance_obey_nine_tenths_as_often_as_the_long_run"
    ),
}
LORA_TEST = "tests/checkpoints/lora/test_file.py::test_a_released_lora_is_read_whole_and_fits_the_13b_model"
UPSCALER_TEST = "tests/models/test_upscaler.py::test_it_computes_what_the_other_implementations_do"
COMPONENT_TESTS = {
    "demo-upscaler": "tests/golden/test_demo.py::test_two_passes_are_sharper_than_the_first_resized",
    "demo-lora-teal": (
        "tests/golden/test_loras.py::test_what_is_called_red_is_teal_at_strength_1_between_at_a_half_and_red_at_0"
    ),
    "demo-ic-lora-canny": "tests/golden/test_loras.py::test_outlines_lie_on_those_of_the_clip_that_is_followed",
    "t5-v1.1-xxl": "tests/models/test_t5.py::test_it_equals_transformers_in_float32",
    "t5-v1.1-xxl-q8-gguf": (
        "tests/checkpoints/gguf/test_gguf.py::"
        "test_a_text_encoder_of_llama_cpp_opens_with_its_sizes_its_weights_and_its_tokenizer"
    ),
}


def model_table() -> str:
    """The released models."""
    head = ("name", "transformer", "VAE", "text encoder", "upscaler", "recipe", "test")
    return doc_tables.markdown_table(head, map(_model_row, MODEL_RELEASES))


def component_table() -> str:
    """The parts that models need."""
    rest = [released for released in RELEASES if released not in MODEL_RELEASES]
    of_kind = {LORA: LORA_TEST}
    tests = {part: COMPONENT_TESTS.get(part.name, of_kind.get(part.kind, UPSCALER_TEST)) for part in rest}
    rows = [(f"`{part.name}`", part.kind, f"`{test}`") for part, test in tests.items()]
    return doc_tables.markdown_table(("name", "kind", "test"), rows)


def recipe_table() -> str:
    """The passes of each recipe."""
    head = ("recipe", "pass", "steps or levels", "guidance", "STG", "rescale", "disturbed blocks", "at levels", "more")
    named = {name_of_recipe(model.recipe): model.recipe for model in MODEL_RELEASES}
    return doc_tables.markdown_table(head, [row for name, recipe in named.items() for row in _pass_rows(name, recipe)])


TABLES: dict[str, Callable[[], str]] = {"models": model_table, "parts": component_table, "recipes": recipe_table}


def name_of_recipe(recipe: Recipe) -> str:
    """The first model that has a recipe, which is called by its name."""
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
    first, second = ("first", "second") if recipe.multi_scale else ("only", "second, if asked for")
    given = {first: recipe.first_pass, second: recipe.second_pass, "only, if asked for": recipe.single_pass}
    for told, settings in given.items():
        if settings is not None:
            yield (
                f"`{name}`",
                told,
                _format_steps(settings),
                *_guidance_cells(settings.guidance),
                _format_extras(settings),
            )


def _format_steps(settings: Pass) -> str:
    if settings.sigmas is not None:
        return _format(settings.sigmas)
    left_out = {"first": settings.skip_initial, "last": settings.skip_final}
    return f"{settings.steps} steps" + "".join(f", the {which} {n} left out" for which, n in left_out.items() if n)


def _guidance_cells(guidance: Guidance) -> tuple[str, ...]:
    blocks = guidance.skip_blocks or ()
    lists = [_format(each) for each in blocks if isinstance(each, tuple)]
    blocks_told = " / ".join(each or "none" for each in lists) or _format(blocks)
    values = (guidance.cfg_scale, guidance.stg_scale, guidance.rescale)
    return *(_format(value) for value in values), blocks_told or "–", _format(guidance.sigmas)


def _format_extras(settings: Pass) -> str:
    said = {
        "fresh noise at every step": settings.stochastic,
        "CFG-star": settings.guidance.cfg_star,
        f"tone map {settings.tone_map}": settings.tone_map,
    }
    return ", ".join(name for name, holds in said.items() if holds) or "–"


def _format(value: object) -> str:
    if value is None:
        return "–"
    return ", ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else f"{value:g}"


if __name__ == "__main__":
    for name, made in TABLES.items():
        doc_tables.write_table(PAGE, name, made())
    print(PAGE)
