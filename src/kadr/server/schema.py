"""Bodies and answers of the API, as its OpenAPI description shows them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from kadr.jobs.job import MAX_PRIORITY
from kadr.request.inputs import MAX_CLIP_FRAMES
from kadr.sampling.settings import MAX_STEPS

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
    strength: _Number | None = Field(None, description="1 by default; 0 is off.")
    second_strength: _Number | None = Field(None, description="Strength in the second of two passes.")


class VideoSettings(StrictBody):
    """All that a request for a video can say besides its prompt. The model's recipe fills in what is left out."""

    model: StrictStr | None = Field(None, description="A name of GET /v1/models; by default the server's first one.")
    seconds: StrictStr | _Number | None = Field(None, description="Length, instead of num_frames.")
    size: StrictStr | None = Field(None, description='Width and height in pixels, such as "704x480"; or "auto".')
    width: int | None = Field(None, description="In pixels; with height, instead of size.")
    height: int | None = Field(None, description="In pixels; with width, instead of size.")
    num_frames: int | None = Field(None, description="Number of frames.")
    frames: int | None = Field(None, description="The same as num_frames.")
    fps: _Number | None = Field(None, description="Frames per second.")
    seed: int | None = Field(None, description="0 by default. The same seed gives the same noise on every device.")
    num_inference_steps: int | None = Field(None, description="Denoising steps.")
    steps: int | None = Field(None, description="The same as num_inference_steps.")
    guidance_scale: _Number | None = Field(None, description="CFG scale; 1 is off.")
    guidance: _Number | _Object | None = Field(None, description="CFG scale, or all fields of a Guidance.")
    negative_prompt: StrictStr | None = Field(
        None, max_length=MAX_PROMPT_CHARACTERS, description="What to guide away from, where guidance is above 1."
    )
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
    denoise_strength: _Number | None = Field(
        None, description="Between 0 and 1: how much of input_video changes; 0.75 by default."
    )
    lora: StrictStr | LoraReference | None = Field(None, description="One LoRA.")
    loras: list[LoraReference | StrictStr] | None = Field(
        None, max_length=MAX_ITEMS, description="LoRAs, by their names or with strengths."
    )
    sigmas: list[_Number] | None = Field(
        None, max_length=MAX_STEPS + 1, description="The schedule itself, decreasing from at most 1, instead of steps."
    )
    skip_initial: int | None = Field(None, description="Steps left out at the front of the schedule.")
    skip_final: int | None = Field(None, description="Steps left out at its back.")
    guidance_batch: bool | None = Field(None, description="Evaluate both predictions of guidance in one batch.")
    sampler: StrictStr | None = Field(None, description="euler, euler_stochastic or res_2s.")
    cache: StrictStr | _Object | None = Field(
        None, description="Step caching, faster with other frames: first-block or taylor, or all fields of a StepCache."
    )
    tone_map: _Number | None = Field(None, description="0 to 1: compresses extremes of the latents before decoding.")
    multi_scale: bool | None = Field(None, description="Sample at a smaller size first, and refine in a second pass.")
    second_pass: _Object | None = Field(None, description="Fields of a Pass: settings of the second pass.")
    downscale_factor: _Number | None = Field(None, description="Of width and height in the first of two passes.")
    windows: _Object | None = Field(None, description="Fields of a Windows: samples a long video window by window.")
    image_noise: _Number | None = Field(None, description="Noise added to clean condition images at each step.")
    image_crf: int | None = Field(None, description="H.264 quality that images are compressed with first; 0 is off.")
    decode_timestep: _Number | None = Field(None, description="Timestep that the decoder is conditioned on.")
    decode_noise: _Number | None = Field(None, description="Share of noise mixed into the latents before decoding.")
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="A higher one goes first.")
    extra_params: _Object | None = Field(None, description="Further fields of this object.")


class CreateVideo(VideoSettings):
    """A request for a video."""

    prompt: StrictStr = Field(max_length=MAX_PROMPT_CHARACTERS, description="What to show.")


class RemixVideo(StrictBody):
    """A request for a video again, with another prompt and the same seed."""

    prompt: StrictStr = Field(max_length=MAX_PROMPT_CHARACTERS, description="What to show instead.")


class EditVideo(CreateVideo):
    """A request for a video made from another one."""

    video: MediaReference | StrictStr | None = Field(None, description="The video: a file in multipart, or its id.")


class ExtendVideo(CreateVideo):
    """A request for a video that goes on where another one ends; `seconds` is the length that is added."""

    video: MediaReference | StrictStr | None = Field(None, description="The video: a file in multipart, or its id.")


class MoveVideo(StrictBody):
    """A new place in the queue."""

    before: StrictStr | None = Field(None, description="Id of the video to go before; null: to the end.")


class FavoriteVideo(StrictBody):
    """A choice: the video is a favourite, or not."""

    favorite: StrictBool = Field(description="true: it never expires, neither by age nor for want of room.")


class VideoError(BaseModel):
    """The reason why a video failed."""

    code: str = Field(description="A word for programs; see the errors of videos.")
    message: str = Field(description="A line for people.")


class VideoMedium(BaseModel):
    """An image or clip that a video was made with."""

    id: str = Field(description="What requests name it by: the video's id, a slash, and its number from 0.")
    kind: Literal["image", "clip"]
    width: int = Field(description="In pixels, upright.")
    height: int = Field(description="In pixels, upright.")
    frames: int | None = Field(None, description="Of a clip.")
    fps: float | None = Field(None, description="Of a clip.")


class VideoJob(BaseModel):
    """A video, from the moment it is accepted."""

    id: str = Field(description='"video_" and 32 hexadecimal digits.')
    object: Literal["video"] = "video"
    model: str = Field(description="Name of the model; the real one also where sora-2 was asked for.")
    status: Literal["queued", "in_progress", "completed", "failed"] = Field(
        description='A cancelled video is failed, with the code "cancelled".'
    )
    progress: int = Field(ge=0, le=100, description="Percent, in time by the plan; 100 once it is completed.")
    created_at: int = Field(description="Seconds since 1970, as all times.")
    completed_at: int | None = Field(None, description="null unless it is completed.")
    expires_at: int | None = Field(None, description="When it is deleted; null where the server keeps it.")
    prompt: str = Field(description="As it was sent.")
    seconds: str = Field(description='Real length, such as "5.04".')
    size: str = Field(description='Width and height in pixels, such as "704x480".')
    error: VideoError | None = Field(None, description="null unless it failed; a cancelled one has the code cancelled.")
    remixed_from_video_id: str | None = Field(None, description="The video that it is a remix, edit or extension of.")
    num_frames: int = Field(description="Frames of the file.")
    fps: float = Field(description="Frames per second.")
    seed: int = Field(description="Of its noise.")
    seq: int = Field(description="Number of the last change, rising: an answer with a lower one is older.")
    queue_position: int | None = Field(None, description="Place from 1, about; null unless it is queued.")
    stage: str | None = Field(
        None,
        description="load (the model is opened, fetched or loaded, at the beginning or between two stages), preview, "
        "text, control, encode, denoise, upscale, refine or decode; null unless it is in progress.",
    )
    step: int | None = Field(None, description="Of the stage, from 0.")
    steps: int | None = Field(None, description="Number of steps of the stage.")
    eta_seconds: float | None = Field(None, description="Seconds until it is completed, estimated.")
    notices: list[str] = Field(default_factory=list, description="What was degraded on the way, and why.")
    url: str | None = Field(None, description="Address of the file for a while, without a token; once completed.")
    thumbnail_url: str | None = Field(None, description="Address of its first frame, as JPEG.")
    preview_url: str | None = Field(None, description="Address of the newest preview; while it is in progress.")
    inference_time_s: float | None = Field(None, description="Seconds that the worker took; once completed.")
    priority: int = Field(0, description="A higher one goes first.")
    favorite: bool = Field(False, description="It never expires.")
    owner: str | None = Field(None, description="Name of its token; only admins see it.")
    media: list[VideoMedium] = Field(default_factory=list, description="Images and clips of its request, in its order.")
    request: dict[str, Any] = Field(description="All settings, as POST /v1/videos takes them.")


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[VideoJob]
    first_id: str | None = Field(None, description="Id of the first one; null where the page is empty.")
    last_id: str | None = Field(None, description="Id of the last one, for after.")
    has_more: bool = Field(False, description="Others follow.")


class VideoCommand(BaseModel):
    """A video as a command line."""

    command: str = Field(description="`kadr generate ...`, quoted for a POSIX shell.")
    media: list[str] = Field(description="Names in it that stand for the video's media, in their order: put yours.")
    notes: list[str] = Field(description="What the command cannot say, a sentence for each.")


class DeletedVideo(BaseModel):
    """A video that is no more."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Upload(BaseModel):
    """An image or clip that was uploaded."""

    id: str = Field(description='"upload_" and 32 hexadecimal digits.')
    object: Literal["upload"] = "upload"
    kind: Literal["image", "clip"] = Field(description="As its content tells, whatever it is called.")
    width: int = Field(description="In pixels.")
    height: int = Field(description="In pixels.")
    frames: int | None = Field(None, description="Of a clip, as its header tells.")
    fps: float | None = Field(None, description="Of a clip.")
    bytes: int = Field(description="Size of the file.")
    sha256: str = Field(description="Of the file, in hexadecimal digits.")
    created_at: int = Field(description="When it was sent.")
    expires_at: int = Field(description="When it is deleted.")
    settings: dict[str, Any] | None = Field(
        None, description="Of a video that kadr made: all that makes it again, as POST /v1/videos takes it."
    )
    missing: list[str] = Field(
        default_factory=list, description="What those settings lack, because it is not on this server."
    )


class UploadFrame(StrictBody):
    """A frame of a clip or video to upload as an image."""

    media: StrictStr = Field(description="Id of a clip or a completed video, or VIDEO/N: the N-th medium of a video.")
    frame: int = Field(
        ge=-MAX_CLIP_FRAMES,
        le=MAX_CLIP_FRAMES,
        description="From 0; a negative one counts from the end.",
    )


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
    """A model of the server."""

    id: str = Field(description="The name that requests use.")
    object: Literal["model"] = "model"
    created: int = Field(0, description="Always 0.")
    owned_by: str = Field("kadr", description="Always kadr.")
    is_default: bool = Field(False, description="Requests that name none use it.")


class DescribedModel(ServedModel):
    """A model of the server, with what its headers and the registry tell. What is unknown is null."""

    release: str | None = Field(None, description="Name of its release; null for an unreleased model.")
    is_demo: bool = Field(False, description="It comes with kadr, to try it.")
    is_distilled: bool | None = Field(None, description="It was distilled to few steps; null for an unreleased model.")
    words: list[str] | None = Field(
        None, description="All that a model of few words was trained with; null for one that knows the whole language."
    )
    max_prompt_tokens: int | None = Field(None, description="Tokens of a prompt that it reads, with the last one.")
    max_frames_at_once: int | None = Field(
        None, description="Frames of the longest videos that it was trained with; longer ones are better in windows."
    )
    defaults: _Object | None = Field(
        None, description="What a request with only a prompt resolves to, in fields of POST /v1/videos."
    )
    recipe: _Object | None = Field(None, description="Where the defaults come from, with both of its passes.")


class ModelList(BaseModel):
    """The models of the server."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class ServedLora(BaseModel):
    """A LoRA of the server."""

    id: str = Field(description="The name that requests use.")
    object: Literal["lora"] = "lora"


class LoraList(BaseModel):
    """The LoRAs of the server."""

    object: Literal["list"] = "list"
    data: list[ServedLora]


class PlannedPrompt(BaseModel):
    """A prompt as the model reads it."""

    text: str = Field(description="The prompt, without space around it.")
    tokens: int | None = Field(
        description="Of the whole text, with the end of the sequence; null where the tokenizer is not on disk."
    )
    max_tokens: int = Field(description="As many as the model reads.")
    num_characters_read: int | None = Field(
        description="Unicode code points of the text before the first word that is cut; null with tokens."
    )
    unknown_words: list[str] = Field(description="Those that a model of few words was not trained with.")


class VideoPlan(BaseModel):
    """Memory and time that a video would take."""

    fits: bool = Field(description="false: memory is too small for it.")
    message: str = Field(description="Memory and time in a line; where it does not fit, why, and what would.")
    model: str = Field(description="Name of the model.")
    size: str = Field(description="Of the video.")
    num_frames: int = Field(description="Of the video.")
    fps: float = Field(description="Of the video.")
    seconds: str = Field(description="Length of the video.")
    sampled_size: str = Field(description="Sides of size, rounded up to multiples of 32; cropped to it at the end.")
    sampled_frames: int = Field(description="num_frames, rounded up to 8k+1; cut to it at the end.")
    num_passes: int = Field(description="1 or 2.")
    windows: list[list[int]] = Field(
        description="Frames that each window adds: the first one, and the one after the last. The last of prompts is "
        "that of all further windows. Empty where the video is sampled at once."
    )
    prompts: list[PlannedPrompt] = Field(description="One for each prompt of windows; without windows a single one.")
    suggestion: dict[str, Any] | None = Field(
        None, description="Fields of POST /v1/videos with which it would fit; null where it fits, or nothing would."
    )
    peak_bytes: int | None = Field(None, description="Of memory.")
    estimated_seconds: float | None = Field(None, description="To make it.")
    estimated_seconds_range: list[float] | None = Field(None, description="At best and at worst.")
    bytes_to_fetch: int | None = Field(None, description="Of models that are not on disk.")
    reasons: list[str] = Field(default_factory=list, description="Why it is done that way.")
    warnings: list[str] = Field(default_factory=list, description="What would differ from the request.")


class QueueState(BaseModel):
    """The queue as a client sees it: its own jobs, or for an admin everyone's."""

    paused: bool = Field(description="No further video begins.")
    queued: int = Field(description="Videos that wait.")
    in_progress: int = Field(description="Videos that are made now.")
    completed: int = Field(description="Videos that are done.")
    failed: int = Field(description="Videos that failed or were cancelled.")
    problem: str | None = Field(None, description="Why no job begins; null where nothing is wrong.")


class SystemState(BaseModel):
    """The server as a client sees it: its device, its disk, its bounds, and who the client is."""

    version: str = Field(description="Of kadr.")
    device: str = Field(description="cpu or mps, or the name of the GPU; of the first worker.")
    memory_bytes: int = Field(description="Of the device; for the CPU, no more than a container's limit.")
    memory_used_bytes: int | None = Field(
        description="Of a GPU, by any program; else what the server and its workers have in memory. null where the GPU "
        "does not tell."
    )
    disk_free_bytes: int | None = Field(description="Of the disk with the data; null where it cannot be read.")
    is_disk_low: bool = Field(description="At most 2 GB more are free than jobs need to begin.")
    max_queued: int = Field(description="Videos of this client that may wait.")
    max_upload_bytes: int = Field(description="Of one file.")
    models: int = Field(description="Number of models.")
    is_admin: bool = Field(description="This client sees and changes everyone's videos, and the queue.")
    client: str | None = Field(description="Name of this client's token; null on a server without tokens.")
    needs_token: bool = Field(description="Clients of this server need a token.")


class StartSelftest(StrictBody):
    """A request to test a model."""

    model: StrictStr | None = Field(None, description="A name of GET /v1/models; by default the server's first one.")


class SelftestStage(BaseModel):
    """A stage of a self-test that ended."""

    name: str = Field(description="Name of the stage.")
    verdict: Literal["pass", "fail", "not run"] = Field(description="What became of it.")
    problem: str = Field("", description="What failed, or why it was not run.")


class SelftestStatus(BaseModel):
    """The self-test in progress, or the last one."""

    status: Literal["none", "in_progress", "completed", "failed"] = Field(
        description="completed: every stage passed. failed: one did not, or the test ended with an error."
    )
    model: str | None = Field(None, description="Name of the model.")
    stages: list[SelftestStage] = Field(
        default_factory=list, description="Stages that ended: name, verdict (`pass`, `fail` or `not run`) and problem."
    )
    report: str | None = Field(None, description="Text to paste into an issue, once it ended.")


class Health(BaseModel):
    """The state of the server: alive, and ready to make videos or not."""

    alive: bool = Field(default=True, description="The server answers.")
    ready: bool = Field(description="A worker is ready, and nothing is wrong with the disk.")
    workers_ready: int = Field(description="Workers that make a video or could.")
    workers: int = Field(description="All workers.")
    paused: bool = Field(description="No further video begins.")
    problem: str | None = Field(None, description="Why no video begins; null where nothing is wrong.")
    version: str = Field(description="Of kadr.")


class Alive(BaseModel):
    """The server answers."""

    alive: bool = True


class ApiErrorBody(BaseModel):
    """An error. message: for people; code: for programs; param: the field it is about."""

    message: str = Field(description="A line for people.")
    type: str = Field(description="The kind of error, as OpenAI names it.")
    param: str | None = Field(description="The field or parameter it is about.")
    code: str | None = Field(description="A word for programs.")


class ErrorEnvelope(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ApiErrorBody
