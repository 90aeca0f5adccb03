/** Images and clips on their way into a video: files that are dropped, pasted or chosen, and frames of videos. */

import {fromSettings} from "./body.js";
import {call, upload} from "./api.js";
import {addKeyframe, clearDraft, draft, setDraft} from "./draft.js";
import {count, h} from "./dom.js";
import {ask} from "./dialog.js";
import {showError} from "./sync.js";
import {store} from "./state.js";
import {toast} from "./toast.js";
import {lengthOf} from "./windows.js";

export const LAST = -1; // frame of a keyframe that stays at the end
const MAX_NAME = 60;

/** Opens the system's choice of files. */
export function chooseFiles(take, {accept = "image/*,video/*,.mkv,.heic,.avif", multiple = false} = {}) {
	const input = h("input", {type: "file", accept, multiple, onchange: () => take([...input.files])});
	input.click();
}

/** Uploads a file and returns it as a medium of the draft, or null: then its reason is shown. */
export async function uploadMedium(file) {
	const close = toast(`Uploading ${shorten(file.name)}`, {seconds: 600});
	try {
		const stored = await upload(file, (share) =>
			close.say(`Uploading ${shorten(file.name)}: ${Math.round(100 * share)} %`)
		);
		return toMedium(stored, file.name);
	} catch (error) {
		toast(`${shorten(file.name)}: ${error.message}`, {isError: true});
		return null;
	} finally {
		close();
	}
}

/** Puts files where a person dropped them. frame: of the timeline; null: where there is room. */
export async function takeFiles(files, frame = null) {
	for (const file of files) {
		const medium = await uploadMedium(file);
		if (medium === null) continue;
		if (medium.settings || medium.missing.length > 0) await askWhatFor(medium, frame);
		else placeMedium(medium, frame);
	}
}

/** Puts a medium on the timeline, and says where. */
function placeMedium(medium, frame = null) {
	const place = frame ?? findRoom();
	const {keyframes, aspect, area} = draft.get();
	const fits = medium.kind === "image" && keyframes.length === 0 && aspect === "recipe" && area === null;
	if (fits) setDraft({aspect: "image"});
	addKeyframe(medium, medium.kind === "clip" && place > 0 ? Math.round(place / 8) * 8 : place);
	const where = place === 0 ? "start" : place === LAST ? "end" : `frame ${place + 1}`;
	toast(`${shorten(medium.name)} is shown at the ${where}.${fits ? " The video has its shape." : ""}`);
}

/** Restores the settings of a video in the composer. */
export function restoreSettings(settings, {media = [], missing = [], seed = undefined, name = "video"} = {}) {
	const before = draft.get();
	const restored = fromSettings(settings, media, store.get().model);
	if (seed !== undefined) restored.seed = seed;
	if (restored.model === null) restored.model = before.model;
	setDraft(restored);
	const lost = missing.length > 0 ? ` Not here: ${missing.join(", ")}.` : "";
	toast(`The settings of ${name} are in the form.${lost}`, {
		action: ["Undo", () => setDraft(before)],
		isError: missing.length > 0
	});
}

/** Makes a frame of a video or clip a keyframe of the next video. */
export async function useFrame(reference, frame, place, name) {
	try {
		const stored = await call("POST", "/v1/uploads/frame", {body: {media: reference, frame}});
		placeMedium(toMedium(stored, `frame ${frame + 1} of ${name || "a video"}`), place);
	} catch (error) {
		showError(error);
	}
}

/** Begins a draft that goes on where a video ends. */
export function continueVideo(video) {
	const before = clearDraft();
	const {frames} = lengthOf({frames: null, fps: null}, store.get().model);
	setDraft({
		prompt: video.prompt,
		aspect: "own",
		size: video.size,
		fps: video.fps,
		frames: video.num_frames + frames - 1
	});
	const [width, height] = video.size.split("x").map(Number);
	const name = shorten(video.prompt);
	addKeyframe({media: video.id, kind: "clip", frames: video.num_frames, width, height, name}, 0);
	toast("The video stands at the start of the timeline. Say what comes next, and make it.", {
		action: ["Undo", () => setDraft(before)]
	});
}

function toMedium(stored, name) {
	const {id, kind, frames, width, height, settings = null, missing = []} = stored;
	return {media: id, kind, frames, width, height, name: shorten(name), settings, missing};
}

async function askWhatFor(medium, frame) {
	const choices = [
		["restore", "Restore its settings"],
		["place", "Put it on the timeline"],
		["source", "Make it differently"]
	];
	const text = `${medium.name} was made with kadr.`;
	const choice = medium.settings ? await ask(text, choices) : "place";
	if (choice === "restore") restoreSettings(medium.settings, {missing: medium.missing, name: medium.name});
	else if (choice === "place") placeMedium(medium, frame);
	else if (choice === "source") setDraft({source: {media: medium.media, name: medium.name, strength: 0.75}});
}

/** Returns the first place of the start and the end that is free; else the middle. */
function findRoom() {
	const taken = draft.get().keyframes.map((item) => item.frame);
	if (!taken.includes(0)) return 0;
	if (!taken.includes(LAST)) return LAST;
	return Math.round((lengthOf(draft.get(), store.get().model).frames - 1) / 16) * 8;
}

/** Shortens a name to what fits a line. */
function shorten(name) {
	return name.length <= MAX_NAME ? name : `${name.slice(0, MAX_NAME - 1)}…`;
}

/** Returns a medium's facts for its tooltip. */
export function describeMedium({name, kind, width, height, frames}) {
	const size = width ? `, ${width}×${height}` : "";
	return `${name}${size}${kind === "clip" && frames ? `, ${count(frames, "frame")}` : ""}`;
}
