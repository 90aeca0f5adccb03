"""Bodies and answers of the API, as its OpenAPI description shows them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from kadr.jobs.job import MAX_PRIORITY

MAX_PROMPT_CHARACTERS = 20_000
MAX_ITEMS = 64  # conditions, controls, LoRAs

_Number = float | int
_Object = dict[str, Any]


class StrictBody(BaseModel):
    """A body in which nothing is ignored: what is not a field is refused, and no value is turned into another."""

    model_config = ConfigDict(extra="forbid", strict=True)


class MediaReference(StrictBody):
    """An image or clip: exactly one of these."""

    file_id: StrictStr | None = Field(None, description="Id of an upload.")
    image_url: StrictStr | None = Field(None, description="A data: URL. The server fetches nothing.")
    id: StrictStr | None = Field(None, description="Id of a completed video.")


class LoraReference(StrictBody):
    """A LoRA of the server, with its strength."""

    name: StrictStr = Field(description="A name of GET /v1/loras.")
    strength: _Number | None = None
    second_strength: _Number | None = Field(None, description="Strength in the second of two passes.")


class VideoSettings(StrictBody):
    """All that a request for a video can say besides its prompt. The model's recipe fills in what is left out."""

    model: StrictStr | None = Field(None, description="A name of GET /v1/models; by default the server's first one.")
    seconds: StrictStr | _Number | None = Field(None, description="Length, instead of num_frames.")
    size: StrictStr | None = Field(None, description='Width and height in pixels, such as "704x480"; or "auto".')
    width: int | None = None
    height: int | None = None
    num_frames: int | None = Field(None, description="The same as frames.")
    frames: int | None = None
    fps: _Number | None = None
    seed: int | None = None
    num_inference_steps: int | None = Field(None, description="The same as steps.")
    steps: int | None = None
    guidance_scale: _Number | None = Field(None, description="CFG scale; 1 is off.")
    guidance: _Number | _Object | None = Field(None, description="CFG scale, or all fields of a Guidance.")
    negative_prompt: StrictStr | None = Field(None, max_length=MAX_PROMPT_CHARACTERS)
    input_reference: MediaReference | StrictStr | None = Field(
        None, description="Image or clip that the video begins with: a file in multipart, or a reference."
    )
    conditions: list[_Object] | None = Field(
        None, max_length=MAX_ITEMS, description="Images and clips to show; `media` of each is an id."
    )
    controls: list[_Object] | None = Field(
        None, max_length=MAX_ITEMS, description="Clips to follow; `media` of each is an id."
    )
    input_video: StrictStr | None = Field(None, description="Id of the clip to start from.")
    denoise_strength: _Number | None = None
    lora: StrictStr | LoraReference | None = Field(None, description="One LoRA.")
    loras: list[LoraReference | StrictStr] | None = Field(None, max_length=MAX_ITEMS)
    sigmas: list[_Number] | None = Field(None, max_length=10_000)
    skip_initial: int | None = None
    skip_final: int | None = None
    guidance_batch: bool | None = None
    sampler: StrictStr | None = None
    cache: StrictStr | _Object | None = None
    tone_map: _Number | None = None
    multi_scale: bool | None = None
    second_pass: _Object | None = None
    downscale_factor: _Number | None = None
    windows: _Object | None = Field(None, description="Fields of a Windows: samples a long video window by window.")
    image_noise: _Number | None = None
    image_crf: int | None = None
    decode_timestep: _Number | None = None
    decode_noise: _Number | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="A higher one goes first.")
    extra_params: _Object | None = Field(None, description="Further fields of this object.")


class CreateVideo(VideoSettings):
    """A request for a video."""

    prompt: StrictStr = Field(max_length=MAX_PROMPT_CHARACTERS)


class RemixVideo(StrictBody):
    """A request for a video again, with another prompt and the same seed."""

    prompt: StrictStr = Field(max_length=MAX_PROMPT_CHARACTERS)


class EditVideo(CreateVideo):
    """A request for a video made from another one."""

    video: MediaReference | StrictStr | None = Field(None, description="The video: a file in multipart, or its id.")


class ExtendVideo(CreateVideo):
    """A request for a video that goes on where another one ends; `seconds` is the length that is added."""

    video: MediaReference | StrictStr | None = Field(None, description="The video: a file in multipart, or its id.")


class MoveVideo(StrictBody):
    """A new place in the queue."""

    before: StrictStr | None = Field(None, description="Id of the video to go before; null: to the end.")


class VideoError(BaseModel):
    """The reason why a video failed."""

    code: str
    message: str


class VideoJob(BaseModel):
    """A video, from the moment it is accepted."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    seconds: str = Field(description='Real length, such as "5.04".')
    size: str
    error: VideoError | None = Field(None, description="null unless it failed; a cancelled one has the code cancelled.")
    remixed_from_video_id: str | None = None
    num_frames: int
    fps: float
    seed: int
    seq: int = Field(description="Number of the last change, rising: an answer with a lower one is older.")
    queue_position: int | None = Field(None, description="Videos that go first, about; null unless it is queued.")
    stage: str | None = None
    step: int | None = None
    steps: int | None = None
    eta_seconds: float | None = Field(None, description="Seconds until it is completed, estimated.")
    notices: list[str] = Field(default_factory=list, description="What was degraded on the way, and why.")
    url: str | None = Field(None, description="Address of the file for a while, without a token; once completed.")
    thumbnail_url: str | None = None
    preview_url: str | None = Field(None, description="Address of the newest preview; while it is in progress.")
    inference_time_s: float | None = None
    priority: int = 0
    owner: str | None = Field(None, description="Name of its token; only admins see it.")
    request: dict[str, Any] = Field(description="All settings, as POST /v1/videos takes them.")


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[VideoJob]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class DeletedVideo(BaseModel):
    """A video that is no more."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Upload(BaseModel):
    """An image or clip that was uploaded."""

    id: str
    object: Literal["upload"] = "upload"
    kind: Literal["image", "clip"]
    width: int
    height: int
    frames: int | None = Field(None, description="Of a clip, as its header tells.")
    fps: float | None = None
    bytes: int
    sha256: str
    created_at: int
    expires_at: int


class DeletedUpload(BaseModel):
    """An upload that is no more."""

    id: str
    object: Literal["upload.deleted"] = "upload.deleted"
    deleted: bool = True


class UploadList(BaseModel):
    """All uploads of a client."""

    object: Literal["list"] = "list"
    data: list[Upload]


class ServedModel(BaseModel):
    """A model of the server, with the recipe that fills in what a request leaves out."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "kadr"
    is_default: bool = False
    recipe: dict[str, Any] | None = Field(None, description="null where the model cannot be opened.")


class ModelList(BaseModel):
    """The models of the server."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class ServedLora(BaseModel):
    """A LoRA of the server."""

    id: str
    object: Literal["lora"] = "lora"


class LoraList(BaseModel):
    """The LoRAs of the server."""

    object: Literal["list"] = "list"
    data: list[ServedLora]


class VideoPlan(BaseModel):
    """Memory and time that a video would take."""

    fits: bool
    message: str = Field(description="Memory and time in a line; where it does not fit, why, and what would.")
    model: str
    size: str
    num_frames: int
    fps: float
    seconds: str
    peak_bytes: int | None = None
    estimated_seconds: float | None = None
    estimated_seconds_range: list[float] | None = None
    bytes_to_fetch: int | None = None
    reasons: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)


class QueueState(BaseModel):
    """The queue as a client sees it: its own jobs, or for an admin everyone's."""

    paused: bool
    queued: int
    in_progress: int
    completed: int
    failed: int
    problem: str | None = Field(None, description="Why no job begins; null where nothing is wrong.")


class Health(BaseModel):
    """The state of the server: alive, and ready to make videos or not."""

    alive: bool = True
    ready: bool
    workers_ready: int
    workers: int
    paused: bool
    problem: str | None = None
    version: str


class Alive(BaseModel):
    """The server answers."""

    alive: bool = True


class ApiErrorBody(BaseModel):
    """An error. message: for people; code: for programs; param: the field it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ApiErrorBody
