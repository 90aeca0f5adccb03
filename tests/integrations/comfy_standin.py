"""A stand-in of ComfyUI: its loader of node packs, its modules that packs use, its validation and its executor.

It does what ComfyUI 0.3.64 does with a pack of the first kind (NODE_CLASS_MAPPINGS), as far as kadr's nodes see it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
MODEL_FOLDERS = ("checkpoints", "diffusion_models", "text_encoders", "vae", "loras")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN")
Workflow = Mapping[str, Mapping[str, Any]]


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


class LoadImage:
    """Reads an image of the input folder, as ComfyUI's node of that name."""

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load"
    CATEGORY = "image"
    folder: Path

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": (sorted(path.name for path in cls.folder.iterdir()), {})}}

    def load(self, image: str) -> tuple[Any, Any]:
        pixels = np.asarray(Image.open(self.folder / image).convert("RGB"))
        return torch.from_numpy(pixels.astype(np.float32) / 255)[None], None


class CreateVideo:
    """Joins frames and their rate, as ComfyUI's node of that name."""

    RETURN_TYPES = ("VIDEO",)
    FUNCTION = "create"
    CATEGORY = "image/video"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        fps = {"default": 30.0, "min": 1.0, "max": 120.0}
        return {"required": {"images": ("IMAGE",), "fps": ("FLOAT", fps)}, "optional": {"audio": ("AUDIO",)}}

    def create(self, images: Any, fps: float, audio: None = None) -> tuple[Any]:
        return ((images, fps),)


class SaveVideo:
    """Keeps the video for the test."""

    RETURN_TYPES = ()
    FUNCTION = "save"
    CATEGORY = "image/video"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = {"filename_prefix": ("STRING", {"default": "video/ComfyUI"})}
        choices = {"format": (["auto", "mp4"],), "codec": (["auto", "h264"],)}
        return {"required": {"video": ("VIDEO",), **names, **choices}}

    def save(self, video: Any, filename_prefix: str, format: str, codec: str) -> dict[str, Any]:
        return {"ui": {"video": [video]}}


class Comfy:
    """A ComfyUI with folders of its own.

    Attributes:
        bar: what nodes said to the progress bar: (value, total, preview).
        log: what they asked of the memory, in order.
        is_interrupted: the stop button is pressed.
        stop_after: number of reports to the bar after which it is pressed; 0 for never.
        arguments: ComfyUI's own, of its command line.
        executed: ids of the nodes that ran, in order; the others were cached.
    """

    def __init__(self, home: Path) -> None:
        self.models, self.input, self.temp = home / "models", home / "input", home / "temp"
        for name in MODEL_FOLDERS:
            (self.models / name).mkdir(parents=True)
        self.input.mkdir()
        self.bar: list[tuple[float, float, Any]] = []
        self.log: list[str] = []
        self.executed: list[str] = []
        self.is_interrupted, self.stop_after = False, 0
        self.arguments = types.SimpleNamespace(preview_method="none", preview_size=512)
        self.nodes: dict[str, Any] = {"LoadImage": LoadImage, "CreateVideo": CreateVideo, "SaveVideo": SaveVideo}
        LoadImage.folder = self.input
        self._outputs: dict[Any, Any] = {}

    def modules(self) -> dict[str, types.ModuleType]:
        """Returns ComfyUI's modules that a pack may import."""
        folders = {name: ([str(self.models / name)], {".safetensors", ".ckpt"}) for name in MODEL_FOLDERS}
        paths = _module(
            "folder_paths",
            models_dir=str(self.models),
            folder_names_and_paths=folders,
            get_temp_directory=lambda: str(self.temp),
            get_filename_list=lambda kind: sorted(_files(*folders[kind])),
            get_full_path_or_raise=lambda kind, name: str(_files(*folders[kind])[name]),
        )
        methods = types.SimpleNamespace(NoPreviews="none", Auto="auto")
        modules = {
            "comfy": _module("comfy"),
            "comfy.utils": _module("comfy.utils", ProgressBar=self._progress_bar),
            "comfy.cli_args": _module("comfy.cli_args", args=self.arguments, LatentPreviewMethod=methods),
            "comfy.model_management": _module(
                "comfy.model_management",
                get_torch_device=lambda: torch.device("cpu"),
                unload_all_models=lambda: self.log.append("unload"),
                soft_empty_cache=lambda: self.log.append("empty cache"),
                processing_interrupted=lambda: self.is_interrupted,
                throw_exception_if_processing_interrupted=self._throw,
                InterruptProcessingException=Interrupted,
            ),
        }
        for name in ("utils", "cli_args", "model_management"):
            setattr(modules["comfy"], name, modules[f"comfy.{name}"])
        return {"folder_paths": paths, **modules}

    def _progress_bar(self, total: int, node_id: str | None = None) -> Any:
        def update_absolute(value: float, total: float | None = None, preview: Any = None) -> None:
            self.bar.append((value, bar.total if total is None else total, preview))
            self.is_interrupted = self.is_interrupted or len(self.bar) == self.stop_after

        bar = types.SimpleNamespace(total=total, update_absolute=update_absolute)
        return bar

    def _throw(self) -> None:
        if self.is_interrupted:
            self.is_interrupted = False
            raise Interrupted

    def load(self, folder: Path = PACK) -> types.ModuleType:
        """Loads a pack as ComfyUI does, and adds its nodes."""
        name = str(folder).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        self.nodes.update(module.NODE_CLASS_MAPPINGS)
        return module

    def validate(self, workflow: Workflow) -> list[str]:
        """Returns what ComfyUI would refuse in a workflow in the API's format, one line each."""
        if unknown := [node["class_type"] for node in workflow.values() if node["class_type"] not in self.nodes]:
            return [f"there is no node {name}" for name in unknown]
        if not self._output_ids(workflow):
            return ["there is no output"]
        return [error for node_id in workflow for error in self._validate_node(workflow, node_id)]

    def _validate_node(self, workflow: Workflow, node_id: str) -> Iterator[str]:
        node = workflow[node_id]
        inputs = self.nodes[node["class_type"]].INPUT_TYPES()
        for section in ("required", "optional"):
            for name, declared in inputs.get(section, {}).items():
                where = f"{node['class_type']}.{name}"
                if name in node["inputs"]:
                    yield from self._validate_value(workflow, where, declared, node["inputs"][name])
                elif section == "required":
                    yield f"{where} is missing"
        known = {*inputs.get("required", {}), *inputs.get("optional", {})}
        yield from (f"{node['class_type']} has no input {name}" for name in node["inputs"] if name not in known)

    def _validate_value(self, workflow: Workflow, where: str, declared: tuple[Any, ...], value: Any) -> Iterator[str]:
        kind, options = declared[0], declared[1] if len(declared) > 1 else {}
        if isinstance(value, list):
            source, slot = value
            given = self.nodes[workflow[source]["class_type"]].RETURN_TYPES[slot]
            if given != kind:
                yield f"{where} takes {kind} and is given {given}"
            return
        if isinstance(kind, list):
            if value not in kind:
                yield f"{where} is {value!r}, which is not in the list"
            return
        if kind not in WIDGET_TYPES:
            yield f"{where} takes a link"
            return
        number = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}[kind](value)
        if "min" in options and number < options["min"]:
            yield f"{where} is {value}, below {options['min']}"
        if "max" in options and number > options["max"]:
            yield f"{where} is {value}, above {options['max']}"

    def _output_ids(self, workflow: Workflow) -> list[str]:
        nodes = self.nodes
        return [key for key, node in workflow.items() if getattr(nodes[node["class_type"]], "OUTPUT_NODE", False)]

    def run(self, workflow: Workflow) -> list[Any]:
        """Executes a workflow in inference mode, and returns what each output node shows.

        Nodes whose inputs are those of the run before are cached.

        Raises:
            ValueError: the workflow is not valid.
        """
        if errors := self.validate(workflow):
            raise ValueError("\n".join(errors))
        self.executed.clear()
        used: dict[Any, Any] = {}
        with torch.inference_mode():
            shown = [self._execute(workflow, node_id, used)["ui"]["video"][0] for node_id in self._output_ids(workflow)]
        self._outputs = used
        return shown

    def _execute(self, workflow: Workflow, node_id: str, used: dict[Any, Any]) -> Any:
        signature = self._signature(workflow, node_id)
        if signature in self._outputs:
            used[signature] = self._outputs[signature]
        if signature not in used:
            node = workflow[node_id]
            inputs = {
                name: self._execute(workflow, value[0], used)[value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            }
            instance = self.nodes[node["class_type"]]()
            used[signature] = getattr(instance, instance.FUNCTION)(**inputs)
            self.executed.append(node_id)
        else:  # what it was made of stays cached too
            for value in workflow[node_id]["inputs"].values():
                if isinstance(value, list):
                    self._execute(workflow, value[0], used)
        return used[signature]

    def _signature(self, workflow: Workflow, node_id: str) -> Any:
        """Returns what a node's outputs depend on: its class, what IS_CHANGED says, and its inputs."""
        node = workflow[node_id]
        node_class, inputs = self.nodes[node["class_type"]], node["inputs"]
        constants = {name: None if isinstance(value, list) else value for name, value in inputs.items()}
        changed = node_class.IS_CHANGED(**constants) if hasattr(node_class, "IS_CHANGED") else False
        sources = [
            (name, (self._signature(workflow, value[0]), value[1]) if isinstance(value, list) else repr(value))
            for name, value in sorted(inputs.items())
        ]
        return node["class_type"], repr(changed), tuple(sources)


@contextmanager
def installed(comfy: Comfy) -> Iterator[None]:
    """Makes a ComfyUI's modules importable in the block, and forgets what was loaded in it."""
    before = set(sys.modules)
    sys.modules.update(comfy.modules())
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.startswith((str(PACK).replace(".", "_x_"), "comfy", "folder_paths")):
                del sys.modules[name]


def widget_names(node_class: Any) -> list[str]:
    """Returns the widgets of a node in the order in which a saved workflow has their values."""
    inputs = node_class.INPUT_TYPES()
    names = []
    for name, declared in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
        if isinstance(declared[0], list) or declared[0] in WIDGET_TYPES:
            names.append(name)
            if len(declared) > 1 and declared[1].get("control_after_generate"):
                names.append("control_after_generate")
    return names


def accepts(function: Any, names: list[str]) -> bool:
    """Returns whether a method takes these arguments by name."""
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return takes_any or set(names) <= {parameter.name for parameter in parameters}


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    return module


def _files(folders: list[str], suffixes: set[str]) -> dict[str, Path]:
    found = [(Path(folder), path) for folder in reversed(folders) for path in Path(folder).rglob("*")]
    return {path.relative_to(folder).as_posix(): path for folder, path in found if path.suffix in suffixes}
