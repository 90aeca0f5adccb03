"""The node pack of integrations/comfyui keeps ComfyUI's contract, in a stand-in of its loader and its validation."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.comfy_standin import PACK, WIDGET_TYPES, Comfy, accepts, installed, widget_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
NODES = ("KadrModel", "KadrLora", "KadrImageCondition", "KadrClipCondition", "KadrControl", "KadrGenerate")
# Loads the pack as ComfyUI does, in a process where nothing else is imported.
LOAD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", {str(PACK / "__init__.py")!r})
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
"""
FAKE_FOLDERS = """
import types
folders = sys.modules["folder_paths"] = types.ModuleType("folder_paths")
folders.folder_names_and_paths, folders.models_dir = {}, "models"
folders.get_filename_list = lambda kind: []
"""


@pytest.fixture
def comfy(tmp_path: Path) -> Iterator[Comfy]:
    host = Comfy(tmp_path)
    (host.input / "example.png").write_bytes(b"")
    with installed(host):
        host.load()
        yield host


def run_python(code: str, *flags: str) -> str:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True).stdout


def test_loading_the_pack_loads_neither_torch_nor_kadr():
    code = LOAD + "print(sorted({'torch', 'kadr', 'numpy', 'PIL', 'comfy', 'folder_paths'} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_listing_the_inputs_does_not_load_torch():
    listing = "[node.INPUT_TYPES() for node in pack.NODE_CLASS_MAPPINGS.values()]; print('torch' in sys.modules)"
    assert run_python(LOAD + FAKE_FOLDERS + listing).strip() == "False"


def test_without_kadr_nodes_are_drawn_and_a_run_says_how_to_install_it():
    run = """
for node in pack.NODE_CLASS_MAPPINGS.values(): node.INPUT_TYPES()
print(pack.NODE_CLASS_MAPPINGS["KadrModel"].INPUT_TYPES()["required"]["model"][0])
try: pack.NODE_CLASS_MAPPINGS["KadrGenerate"]().generate(None, prompt="")
except ImportError as error: print(error)
"""
    drawn, message = run_python(LOAD + FAKE_FOLDERS + run, "-I", "-S").splitlines()
    assert drawn == "['demo']"
    assert message.startswith("kadr is not installed in ComfyUI's Python. Install it there: ")
    assert message.endswith(" -m pip install kadr")


def test_mappings_name_the_same_nodes(comfy: Comfy):
    pack = comfy.load()
    assert tuple(pack.NODE_CLASS_MAPPINGS) == NODES == tuple(pack.NODE_DISPLAY_NAME_MAPPINGS)
    assert len(set(pack.NODE_DISPLAY_NAME_MAPPINGS.values())) == len(NODES)


@pytest.mark.parametrize("name", NODES)
def test_a_node_declares_what_comfyui_reads(comfy: Comfy, name: str):
    node = comfy.nodes[name]
    inputs = node.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional"}
    declared = {**inputs["required"], **inputs.get("optional", {})}
    assert len(declared) == sum(map(len, inputs.values()))
    for kind, *rest in declared.values():
        options = rest[0] if rest else {}
        assert isinstance(options, dict)
        assert json.loads(json.dumps([kind, options])) == [kind, options]  # /object_info sends it
        if isinstance(kind, list):
            assert all(isinstance(choice, str) for choice in kind)
        elif kind in WIDGET_TYPES:
            assert options["default"] == max(options["default"], options.get("min", options["default"]))
            assert options["default"] == min(options["default"], options.get("max", options["default"]))
        else:
            assert kind in {"IMAGE", "KADR_MODEL", "KADR_CONDITIONS", "KADR_CONTROLS"}
    assert accepts(getattr(node, node.FUNCTION), list(declared))
    assert accepts(getattr(node, "IS_CHANGED", lambda **_: None), list(declared))
    assert all(isinstance(item, str) for item in node.RETURN_TYPES)
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) > 0
    assert (node.CATEGORY, bool(node.DESCRIPTION)) == ("kadr", True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_workflow_is_valid_and_the_same_in_both_formats(comfy: Comfy, path: Path):
    saved, workflow = (
        json.loads(path.read_text("utf-8")),
        json.loads((path.parent / "api" / path.name).read_text("utf-8")),
    )
    assert comfy.validate(workflow) == []
    assert to_api_format(comfy, saved) == workflow


def to_api_format(comfy: Comfy, saved: dict[str, Any]) -> dict[str, Any]:
    """Returns a workflow as the page saves it in the format of the API, as the page sends it."""
    links = {link[0]: [str(link[1]), link[2]] for link in saved["links"]}
    for number, source, slot, target, target_slot, kind in saved["links"]:
        nodes = {node["id"]: node for node in saved["nodes"]}
        assert number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][target_slot]["link"] == number
        assert kind == nodes[source]["outputs"][slot]["type"] == comfy.nodes[nodes[source]["type"]].RETURN_TYPES[slot]
    workflow = {}
    for node in saved["nodes"]:
        names = widget_names(comfy.nodes[node["type"]])
        values = dict(zip(names, node["widgets_values"], strict=False))
        assert set(names) == set(values), f"{node['type']} has other widgets now"
        values.pop("control_after_generate", None)
        linked = {item["name"]: links[item["link"]] for item in node["inputs"] if item["link"] is not None}
        workflow[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
    return workflow


def test_links_of_other_types_and_values_out_of_range_are_refused(comfy: Comfy):
    workflow = json.loads((PACK / "example_workflows" / "api" / "kadr_image_to_video.json").read_text("utf-8"))

    def errors_with(node: str, **inputs: Any) -> list[str]:
        changed = copy.deepcopy(workflow)
        changed[node]["inputs"].update(inputs)
        return comfy.validate(changed)

    assert errors_with("2", conditions=["5", 0]) == ["KadrGenerate.conditions takes KADR_CONDITIONS and is given IMAGE"]
    assert errors_with("2", model=["6", 0]) == ["KadrGenerate.model takes KADR_MODEL and is given KADR_CONDITIONS"]
    assert errors_with("2", seed=-1) == ["KadrGenerate.seed is -1, below 0"]
    assert errors_with("1", quant="int3") == ["KadrModel.quant is 'int3', which is not in the list"]
    assert errors_with("6", strength=1.5) == ["KadrImageCondition.strength is 1.5, above 1.0"]
    assert errors_with("2", speed=2) == ["KadrGenerate has no input speed"]


def test_files_of_comfyuis_folders_are_listed_with_gguf(comfy: Comfy, tmp_path: Path):
    (comfy.models / "checkpoints" / "ltxv.safetensors").touch()
    (comfy.models / "checkpoints" / "old.ckpt").touch()
    (comfy.models / "diffusion_models" / "sub").mkdir()
    (comfy.models / "diffusion_models" / "sub" / "ltxv-Q8_0.gguf").touch()
    (comfy.models / "loras" / "style.safetensors").touch()
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "t5.safetensors").touch()
    sys.modules["folder_paths"].folder_names_and_paths["text_encoders"][0].append(str(tmp_path / "extra"))
    inputs = comfy.nodes["KadrModel"].INPUT_TYPES()
    models = inputs["required"]["model"][0]
    assert {"demo", "ltxv-13b-0.9.8-dev", "ltxv.safetensors", "sub/ltxv-Q8_0.gguf"} <= set(models)
    assert "old.ckpt" not in models
    assert inputs["optional"]["text_encoder"][0] == ["auto", "t5.safetensors"]
    assert "style.safetensors" in comfy.nodes["KadrLora"].INPUT_TYPES()["required"]["lora"][0]


def test_the_registrys_file_names_the_pack_and_what_it_needs():
    project = tomllib.loads((PACK / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["name"] == "comfyui-kadr"
    assert [item.partition(">")[0] for item in project["project"]["dependencies"]] == ["kadr"]
    assert project["tool"]["comfy"]["DisplayName"] == "kadr"
