"""LoRA files: every key format gives the same layers, and errors name what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kadr.checkpoints.lora.file import LoraFile, is_lora
from kadr.errors import CheckpointError, KadrWarning
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B
from tests import lora_files, tiny_models
from tests.lora_files import (
    ATTENTION,
    FEED_FORWARD,
    NAMINGS,
    OUTER_LAYERS,
    RANK,
    block_pairs,
    comfy,
    diffusers,
    kohya,
    write_lora_file,
)

ADAPTED_LAYERS = {
    f"blocks.{block}.{kind}_attention.{projection}"
    for block in (0, 1)
    for kind in ("self", "cross")
    for projection in ("q", "k", "v", "out")
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_key_format_gives_the_same_layers_and_weights(naming: str, file: Path) -> None:
    pairs = block_pairs()
    lora = LoraFile.open(write_lora_file(file, pairs, NAMINGS[naming]))
    assert lora.layers.keys() == ADAPTED_LAYERS
    formats = {"diffusers, with the adapter's name": "diffusers", "lycoris": "kohya", "Comfy, down and up": "Comfy"}
    assert lora.key_format == formats.get(naming, naming)
    weights = lora.load()["blocks.1.cross_attention.out"]
    down, up = pairs["transformer_blocks.1.attn2.to_out.0"]
    assert torch.equal(weights.down, down)
    assert torch.equal(weights.up, up)
    assert weights.scale == 1.0


@pytest.mark.parametrize("naming", [diffusers, comfy, kohya])
def test_layers_around_the_blocks_have_names_of_either_layout(
    naming: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    renamed = {"patchify_proj": "proj_in", "adaln_single.linear": "time_embed.linear", "proj_out": "proj_out"}
    single = LoraFile.open(write_lora_file(tmp_path / "a.safetensors", lora_files.outer_pairs(), naming))
    folder = {renamed[name]: pair for name, pair in lora_files.outer_pairs().items()}
    assert single.layers.keys() == {"proj_in", "adaln_linear", "proj_out"}
    assert (
        LoraFile.open(write_lora_file(tmp_path / "b.safetensors", folder, naming)).layers.keys() == single.layers.keys()
    )


def test_alpha_is_read_from_a_tensor_then_the_config_then_the_rank(tmp_path: Path) -> None:
    pairs = block_pairs(ATTENTION[:1])

    def scale(name: str, **options: object) -> float:
        path = write_lora_file(tmp_path / f"{name}.safetensors", pairs, **options)  # type: ignore[arg-type]
        lora = LoraFile.open(path)
        return lora.layers["blocks.1.self_attention.q"].scale

    assert scale("plain") == 1.0
    assert scale("tensor", alpha=2.0) == 2.0 / RANK
    assert scale("config", config={"r": RANK, "lora_alpha": 8}, naming=diffusers) == 8 / RANK
    assert scale("stable", config={"lora_alpha": 8, "use_rslora": True}, naming=diffusers) == 8 / RANK**0.5
    with_pattern = {"lora_alpha": 8, "alpha_pattern": {"transformer_blocks.1.attn1.to_q": 12}}
    assert scale("pattern", config=with_pattern, naming=diffusers) == 12 / RANK
    assert scale("both", config={"lora_alpha": 8}, alpha=2.0, naming=diffusers) == 2.0 / RANK


def test_a_peft_folder_is_read_with_its_config(tmp_path: Path) -> None:
    write_lora_file(tmp_path / "adapter_model.safetensors", block_pairs(), lora_files.peft)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 2 * RANK}))
    assert is_lora(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert {layer.scale for layer in LoraFile.open(path).layers.values()} == {2.0}


@pytest.mark.parametrize("key", ["use_dora", "lora_bias"])
def test_an_adapter_that_is_more_than_pairs_is_refused(key: str, file: Path) -> None:
    write_lora_file(file, block_pairs(), diffusers, config={"lora_alpha": 4, key: True})
    with pytest.raises(CheckpointError, match=f"{key} = True"):
        LoraFile.open(file)


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.transformer_blocks.0.attn3.to_q.lora_A.weight",  # a module that does not exist
        "diffusion_model.transformer_blocks.0.attn1.q_norm.lora_A.weight",  # one that is not a matrix
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",  # of a text encoder
        "diffusion_model.transformer_blocks.0.attn1.to_q.diff_b",
        "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",  # there twice, under two prefixes
        "epoch",
    ],
)
def test_an_unexpected_key_is_refused_or_left_out_with_a_warning(key: str, file: Path) -> None:
    write_lora_file(file, block_pairs(), extra_tensors={key: torch.zeros(RANK, 64)})
    with pytest.raises(CheckpointError, match="1 of the 33 tensors") as refused:
        LoraFile.open(file)
    assert key in str(refused.value)
    assert "lora_partial" in str(refused.value)
    with pytest.warns(KadrWarning, match="left out") as warned:
        lora = LoraFile.open(file, allow_partial=True)
    assert key in str(warned[0].message)
    assert lora.layers.keys() == ADAPTED_LAYERS
    assert lora.unexpected_keys == (key,)


@pytest.mark.parametrize("allow_partial", [False, True])
@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("diffusion_model.transformer_blocks.0.attn1.to_q.dora_scale", "DoRA"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector", "DoRA"),
        ("base_model.model.transformer_blocks.0.attn1.to_q.lora_magnitude_vector.default.weight", "DoRA"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_B.bias", "a LoRA with biases"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.lora_mid.weight", "LoCon with a matrix between"),
        ("lycoris_transformer_blocks_0_attn1_to_q.hada_w1_a", "LoHa"),
        ("lycoris_transformer_blocks_0_attn1_to_q.lokr_w2", "LoKr"),
    ],
)
def test_unsupported_adapters_are_refused_even_with_allow_partial(
    key: str, kind: str, allow_partial: bool, file: Path
) -> None:
    """Without these tensors it would run, with wrong results."""
    write_lora_file(file, block_pairs(), extra_tensors={key: torch.zeros(RANK, 64)})
    with pytest.raises(CheckpointError, match=f"is {kind} ") as refused:
        LoraFile.open(file, allow_partial=allow_partial)
    assert key in str(refused.value)
    assert is_lora(file)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"lora_alpha": None}, "is None, not a number"),
        ({"lora_alpha": "x"}, "is 'x', not a number"),
        ({"lora_alpha": [1]}, "not a number"),
        ({"lora_alpha": 4, "alpha_pattern": {"attn1.(": 4}}, "alpha_pattern of its config cannot be read"),
        ({"lora_alpha": 4, "alpha_pattern": {"to_q": "q"}}, "is 'q', not a number"),
        ({"lora_alpha": 4, "alpha_pattern": [1]}, "alpha_pattern of its config cannot be read"),
    ],
)
def test_an_invalid_adapter_config_is_refused_with_its_value(config: dict, error: str, file: Path) -> None:
    with pytest.raises(CheckpointError, match=error):
        LoraFile.open(write_lora_file(file, block_pairs(), diffusers, config=config))


@pytest.mark.parametrize("text", ["[1, 2]", "null", "5", "{"])
def test_an_unreadable_adapter_config_is_refused(text: str, tmp_path: Path) -> None:
    write_lora_file(tmp_path / "adapter_model.safetensors", block_pairs(), lora_files.peft)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="the adapter's config cannot be read"):
        LoraFile.open(tmp_path)


def test_headers_that_overflow_the_parser_are_refused(file: Path) -> None:
    for text in ("[" * 100_000, '{"lora_alpha": 1' + "0" * 400 + "}"):
        with pytest.raises(CheckpointError, match=r"config cannot be read|not a number"):
            LoraFile.open(write_lora_file(file, block_pairs(), diffusers, metadata={"lora_adapter_metadata": text}))
    name = f"diffusion_model.transformer_blocks.{'9' * 5000}.attn1.to_q.lora_A.weight"
    with pytest.raises(CheckpointError, match="belong to no layer"):
        LoraFile.open(write_lora_file(file, block_pairs(), extra_tensors={name: torch.zeros(RANK, 64)}))


@pytest.mark.parametrize("alpha", [torch.zeros(0), torch.tensor([1.0, 2.0]), torch.tensor(float("nan"))])
def test_an_alpha_that_is_not_one_finite_number_is_refused(alpha: torch.Tensor, file: Path) -> None:
    name = "diffusion_model.transformer_blocks.0.attn1.to_q.alpha"
    with pytest.raises(CheckpointError, match=r"alpha of .*blocks\.0\.attn1\.to_q is .*not a number"):
        LoraFile.open(write_lora_file(file, block_pairs(), extra_tensors={name: alpha}))


@pytest.mark.parametrize("initialization", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_an_adapter_whose_base_was_changed_is_refused(initialization: str, file: Path) -> None:
    with pytest.raises(CheckpointError, match=f"init_lora_weights = '{initialization}'"):
        LoraFile.open(
            write_lora_file(
                file, block_pairs(), diffusers, config={"lora_alpha": 4, "init_lora_weights": initialization}
            )
        )
    LoraFile.open(
        write_lora_file(file, block_pairs(), diffusers, config={"lora_alpha": 4, "init_lora_weights": "gaussian"})
    )


def test_peft_keys_without_a_config_give_a_warning(file: Path) -> None:
    with pytest.warns(KadrWarning, match=r"no adapter_config\.json with alpha; alpha defaults to the rank"):
        LoraFile.open(write_lora_file(file, block_pairs(), lora_files.peft))


def test_rank_0_and_convolutions_are_refused(file: Path) -> None:
    name = "transformer_blocks.0.attn1.to_q"
    with pytest.raises(CheckpointError, match=r"0x64 and .* is 64x0; .* at least 1"):
        LoraFile.open(write_lora_file(file, {name: (torch.zeros(0, 64), torch.zeros(64, 0))}))
    with pytest.raises(CheckpointError, match=r"4x64x3x3 .*the layers of this family are matrices"):
        LoraFile.open(write_lora_file(file, {name: (torch.zeros(4, 64, 3, 3), torch.zeros(64, 4, 1, 1))}))


def test_a_lora_is_recognized_whatever_its_file_name(tmp_path: Path) -> None:
    assert is_lora(write_lora_file(tmp_path / "lora", block_pairs()))
    (tmp_path / "notes.txt").write_text("no weights")
    assert not is_lora(tmp_path / "notes.txt")


@pytest.mark.parametrize("base_model", ["LTX-2", "ltx2-19b-dev", "Lightricks/LTX-2.3", "ltx_2"])
def test_a_header_that_names_ltx2_is_believed(base_model: str, file: Path) -> None:
    """LTX-2's video layers are as wide as those of the 13B model, and have the same names."""
    for key in ("base_model", "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name"):
        with pytest.raises(CheckpointError, match="LTX-2, another family"):
            LoraFile.open(write_lora_file(file, block_pairs(), metadata={key: base_model}))
    LoraFile.open(
        write_lora_file(file, block_pairs(), metadata={"description": f"It does not work with {base_model}."})
    )
    for other in ("ltxv-2b-0.9.8-distilled", "ltx-2b", "LTX-Video 0.9.7", "ltx_2024-05-01"):
        LoraFile.open(write_lora_file(file, block_pairs(), metadata={"base_model": other}))


@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_lora_for_ltx2_is_refused_by_its_keys(allow_partial: bool, file: Path) -> None:
    name = "diffusion_model.transformer_blocks.0.audio_attn1.to_q.lora_A.weight"
    write_lora_file(file, block_pairs(), extra_tensors={name: torch.zeros(RANK, 64)})
    with pytest.raises(CheckpointError, match="LTX-2, another family"):
        LoraFile.open(file, allow_partial=allow_partial)


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_a_pair_is_refused(half: int, file: Path) -> None:
    pairs = block_pairs()
    removed_key = comfy("transformer_blocks.1.attn1.to_k")[half]
    write_lora_file(file, pairs)
    from safetensors.torch import load_file, save_file

    save_file({name: tensor for name, tensor in load_file(file).items() if name != removed_key}, file)
    with pytest.raises(CheckpointError, match="not the other half") as refused:
        LoraFile.open(file, allow_partial=True)
    assert comfy("transformer_blocks.1.attn1.to_k")[1 - half] in str(refused.value)


def test_halves_of_different_ranks_are_refused_with_their_shapes(file: Path) -> None:
    pairs = block_pairs(ATTENTION[:1])
    down, up = pairs["transformer_blocks.0.attn1.to_q"]
    write_lora_file(file, pairs | {"transformer_blocks.0.attn1.to_q": (down[:3], up)})
    with pytest.raises(CheckpointError, match=r"3x64 and .* is 64x4"):
        LoraFile.open(file)


def test_a_model_and_other_files_are_not_loras(tmp_path: Path, file: Path) -> None:
    home = tiny_models.write_model(tmp_path / "home")
    assert not is_lora(home / tiny_models.MODEL_FILE)
    with pytest.raises(CheckpointError, match="not a LoRA for LTX-Video"):
        LoraFile.open(home / tiny_models.MODEL_FILE)
    with pytest.raises(CheckpointError, match="folder without a LoRA"):
        LoraFile.open(home)
    with pytest.raises(CheckpointError, match="does not exist"):
        LoraFile.open(tmp_path / "none.safetensors")


def test_a_lora_of_another_width_is_refused_with_the_size_it_fits(file: Path) -> None:
    wide = LoraFile.open(write_lora_file(file, block_pairs(ATTENTION[:1], width=4096, num_layers=1)))
    assert wide.model_size == "13B"
    problem = r"1 of its 1 layers are of other widths, such as diffusion_model\.transformer_blocks\.0\.attn1\.to_q"
    widths = "2048 in and 2048 out in the model, 4096 in and 4096 out in the LoRA"
    for check in (wide.check_fits, wide.without_missing_layers):
        with pytest.raises(CheckpointError, match=f"{problem}: {widths}.*fits a 13B model"):
            check(TRANSFORMER_2B, Path("model.safetensors"))


def test_a_lora_for_more_blocks_is_refused_or_cut_to_the_model(file: Path) -> None:
    deep, model = (
        LoraFile.open(write_lora_file(file, block_pairs(ATTENTION[:1], num_layers=3))),
        Path("model.safetensors"),
    )
    problem = r"1 of its 3 layers are not in the model, such as diffusion_model\.transformer_blocks\.2\.attn1\.to_q"
    with pytest.raises(CheckpointError, match=rf"{problem} \(the model has 2 blocks\).*or pass lora_partial"):
        deep.check_fits(tiny_models.transformer_config(), model)
    with pytest.warns(KadrWarning, match=r"1 of the 3 layers of .* are left out: .*blocks\.2\.attn1\.to_q\."):
        fitting = deep.without_missing_layers(tiny_models.transformer_config(), model)
    assert fitting.layers.keys() == {f"blocks.{block}.self_attention.q" for block in (0, 1)}
    assert fitting.load().keys() == fitting.layers.keys()
    all_missing = replace(deep, layers={name: layer for name, layer in deep.layers.items() if ".2." in name})
    with pytest.raises(CheckpointError, match="1 of its 1 layers are not in the model"):
        all_missing.without_missing_layers(tiny_models.transformer_config(), model)


# Headers of the released files: naming, targets of each block, rank, and whether all layers around the blocks too.
RELEASED = {
    "distilled": (comfy, (*ATTENTION, *FEED_FORWARD), 1, True),
    "canny and depth": (comfy, (*ATTENTION, *FEED_FORWARD), 1, False),
    "pose, for diffusers": (diffusers, ATTENTION, 3, False),
    "detailer": (comfy, (*ATTENTION, *FEED_FORWARD), 2, False),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_lora_is_read_whole_and_fits_the_13b_model(name: str, file: Path) -> None:
    """With the keys and widths of the released files, at a lower rank."""
    naming, targets, rank, has_outer_layers = RELEASED[name]
    pairs = block_pairs(targets, num_layers=48, rank=rank, width=4096)
    if has_outer_layers:
        pairs |= {
            name: (torch.ones(1, inputs), torch.ones(outputs, 1)) for name, (inputs, outputs) in OUTER_LAYERS.items()
        }
        assert len(pairs) == 974 // 2  # tensors of the released file
    lora = LoraFile.open(write_lora_file(file, pairs, naming))
    assert (lora.model_size, len(lora.layers), lora.unexpected_keys) == ("13B", len(pairs), ())
    lora.check_fits(TRANSFORMER_13B, Path("model.safetensors"))


def test_values_that_are_not_finite_are_refused_on_load(file: Path) -> None:
    pairs = block_pairs(ATTENTION[:1])
    pairs["transformer_blocks.1.attn1.to_q"][1][3, 1] = float("nan")
    lora = LoraFile.open(write_lora_file(file, pairs))
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn1\.to_q\.lora_B\.weight has values that are not finite"):
        lora.load()


def test_a_lora_describes_itself(file: Path) -> None:
    write_lora_file(
        file,
        block_pairs((*ATTENTION, *FEED_FORWARD)),
        alpha=2.0,
        metadata={"reference_downscale_factor": "2", "ss_tag": "x"},
    )
    description = LoraFile.open(file).describe()
    assert (
        description.key_format,
        description.model_size,
        description.num_adapted_layers,
        description.num_adapted_blocks,
    ) == (
        "Comfy",
        None,
        20,
        2,
    )
    assert (description.ranks, description.alphas, description.scales, description.reference_downscale) == (
        (RANK,),
        (2.0,),
        (2.0 / RANK,),
        2,
    )
    assert description.target_counts == {
        **{f"{kind}_attention.{projection}": 2 for kind in ("self", "cross") for projection in ("q", "k", "v", "out")},
        "feed_forward.up": 2,
        "feed_forward.down": 2,
    }
    assert description.num_parameters == 2 * RANK * (8 * 128 + 2 * 320)
    assert description.metadata["ss_tag"] == "x"


@pytest.mark.parametrize("factor", ["0", "1.5", "nan", "1e400", "two"])
def test_a_reference_downscale_factor_that_is_not_whole_is_refused(factor: str, file: Path) -> None:
    write_lora_file(file, block_pairs(), metadata={"reference_downscale_factor": factor})
    lora = LoraFile.open(file)
    with pytest.raises(CheckpointError, match="reference_downscale_factor"):
        _ = lora.reference_downscale
    description = lora.describe()  # without a control it runs, so it can be looked at
    assert (description.reference_downscale, description.metadata["reference_downscale_factor"]) == (None, factor)
