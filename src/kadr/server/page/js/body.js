/** Turns the draft into the body of a request, and the settings of a video into a draft. */

import {emptyDraft} from "./draft.js";
import {findSize} from "./size.js";
import {partsOf, windowsOf} from "./windows.js";

/** The composer's own fields under "more": name in the API -> how its text is read. */
const READERS = {
	num_inference_steps: readNumber,
	sigmas: readNumbers,
	negative_prompt: (text) => text,
	sampler: (text) => text,
	multi_scale: (text) => text === "true",
	downscale_factor: readNumber,
	cache: (text) => text,
	tone_map: readNumber,
	image_crf: readNumber,
	image_noise: readNumber,
	decode_timestep: readNumber,
	decode_noise: readNumber,
	priority: readNumber
};
const GUIDANCE = ["cfg_scale", "stg_scale", "rescale"];

/** Returns the body of `POST /v1/videos` that a draft stands for. seed: of this variation. */
export function toBody(draft, model, seed) {
	const {more} = draft;
	const body = {...draft.extra, prompt: joinPrompts(draft, model), seed};
	if (draft.model !== null) body.model = draft.model;
	const size = findSize(draft, model);
	if (size !== null) body.size = size;
	if (draft.frames !== null) body.num_frames = draft.frames;
	if (draft.fps !== null) body.fps = draft.fps;
	if (draft.keyframes.length > 0) body.conditions = draft.keyframes.map(toCondition);
	if (draft.control !== null) {
		const {media, controlKind, extra} = draft.control;
		body.controls = [...(body.controls ?? []), {...extra, media, kind: controlKind}];
	}
	if (draft.source !== null) {
		body.input_video = draft.source.media;
		body.denoise_strength = draft.source.strength;
	}
	if (draft.loras.length > 0) body.loras = draft.loras;
	for (const [name, read] of Object.entries(READERS)) if (more[name] !== undefined) body[name] = read(more[name]);
	const guidance = readGroup(more, GUIDANCE);
	if (Object.keys(guidance).length > 0) body.guidance = {...asObject(body.guidance), ...guidance};
	const windows = windowsOf(draft, model);
	if (windows !== null) body.windows = {...body.windows, ...windows.settings};
	return body;
}

/**
 * Returns a draft with the settings of a video, as its `request` has them. media: facts of each medium that
 * the settings name, as the API lists them. served: the model of the server, where it is known. What the composer has no field
 * for is kept as it is.
 */
export function fromSettings(settings, media = [], served = null) {
	const {prompt, model, size, num_frames, frames, fps, seed, conditions, controls, input_video, loras, ...rest} =
		settings;
	const {denoise_strength, guidance, windows, seconds, ...others} = rest;
	const facts = new Map(media.map((medium) => [medium.id, medium]));
	const draft = {...emptyDraft(), model: model ?? null, prompt: prompt ?? "", extra: {}};
	if (size !== undefined) Object.assign(draft, {aspect: size === "auto" ? "image" : "own", size});
	draft.frames = num_frames ?? frames ?? (seconds && fps ? Math.round(seconds * fps) : null);
	draft.fps = fps ?? null;
	draft.seed = seed === undefined ? null : String(seed);
	draft.keyframes = (conditions ?? []).map((item, index) => fromCondition(item, index + 1, facts));
	const [control, ...controlsLeft] = controls ?? [];
	if (control !== undefined) {
		const {media: reference, kind, ...extra} = control;
		draft.control = {media: reference, controlKind: kind ?? "ready", name: nameOf(reference), extra};
	}
	if (controlsLeft.length > 0) draft.extra.controls = controlsLeft;
	if (input_video !== undefined) {
		draft.source = {media: input_video, name: nameOf(input_video), strength: denoise_strength ?? 0.75};
	}
	draft.loras = (loras ?? []).map((lora) => (typeof lora === "string" ? {name: lora} : lora));
	takeGuidance(draft, guidance);
	takeWindows(draft, windows);
	for (const [name, value] of Object.entries({num_inference_steps: others.steps, ...others})) {
		if (value === undefined || name === "steps") continue;
		const isField = name in READERS && typeof value !== "object" && !(name === "priority" && value === 0);
		if (name === "sigmas") draft.more.sigmas = value.join(", ");
		else if (isField) draft.more[name] = String(value);
		else if (name !== "priority") draft.extra[name] = value;
	}
	if (windows === undefined && windowsOf(draft, served) !== null) draft.more.windowed = "false";
	return draft;
}

/** Returns the prompts of the windows in one text, as the API takes them. */
function joinPrompts(draft, model) {
	const windows = windowsOf(draft, model);
	return windows === null ? draft.prompt : windows.prompts.join(" | ");
}

function toCondition({media, frame, strength, extra}) {
	return {...extra, media, frame, strength};
}

function fromCondition(item, key, facts) {
	const {media, frame = 0, strength = 1, ...extra} = item;
	const {kind = "image", frames = null, width = null, height = null} = facts.get(media) ?? {};
	return {key, media, kind, frames, width, height, name: nameOf(media), frame, strength, extra};
}

function takeGuidance(draft, guidance) {
	if (guidance === undefined || guidance === null) return;
	const fields = typeof guidance === "number" ? {cfg_scale: guidance} : guidance;
	for (const [name, value] of Object.entries(fields)) {
		if (GUIDANCE.includes(name) && typeof value === "number") draft.more[name] = String(value);
		else draft.extra.guidance = {...draft.extra.guidance, [name]: value};
	}
}

function takeWindows(draft, windows) {
	if (windows === undefined || windows === null) return;
	const {frames, overlap, ...others} = windows;
	draft.more.windowed = "true";
	if (frames !== undefined) draft.more.window_frames = String(frames);
	if (overlap !== undefined) draft.more.window_overlap = String(overlap);
	if (Object.keys(others).length > 0) draft.extra.windows = others;
	const prompts = draft.prompt.split("|").map((text) => text.trim());
	draft.prompt = prompts[0];
	draft.parts = partsOf(prompts);
}

function readGroup(more, names) {
	const set = names.filter((name) => more[name] !== undefined);
	return Object.fromEntries(set.map((name) => [name, readNumber(more[name])]));
}

function asObject(guidance) {
	return typeof guidance === "object" && guidance !== null ? guidance : {};
}

/** Returns a number, or the text itself where it is none: the server says what is wrong with it. */
function readNumber(text) {
	const number = Number(String(text).replace(",", "."));
	return String(text).trim() === "" || Number.isNaN(number) ? text : number;
}

function readNumbers(text) {
	return text
		.split(/[\s,;]+/)
		.filter((part) => part !== "")
		.map(readNumber);
}

function nameOf(reference) {
	return reference.startsWith("upload_") ? "upload" : "of a video";
}
