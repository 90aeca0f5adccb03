/** The draft: what the composer holds, kept at every change, so that a reload or a lost server loses nothing. */

import {createStore} from "./state.js";

const KEY = "kadr.draft";
const SCHEMA = 1;
const EMPTY = {
	model: null, // null: not chosen yet
	prompt: "", // of the whole video, or of its first part
	parts: [], // further prompts of a long video: {key, prompt, window}, window the number of its first one
	keyframes: [], // {key, media, kind, frames, width, height, name, frame, strength, extra}; frame -1: the last one
	aspect: "recipe",
	area: null, // pixels; null: as many as the recipe
	size: "", // of its own: "704x480"
	frames: null, // null: as many as the recipe
	fps: null,
	seed: null, // text; null: a new one each time
	variations: 1,
	control: null, // {media, kind, name, controlKind, extra}
	source: null, // {media, name, strength}: the video that this one is made from
	loras: [], // {name, strength, second_strength}
	more: {}, // name of a field of the API -> text of the composer's field
	extra: {} // further fields of the API that the composer has no field for
};

/** The store of the draft. */
export const draft = createStore(read());
draft.subscribe(Object.keys(EMPTY), write);

/** Changes the draft. */
export function setDraft(patch) {
	draft.set(patch);
}

/** Empties the draft, but for its model; returns the one that was there. */
export function clearDraft() {
	const before = draft.get();
	draft.set({...EMPTY, model: before.model});
	return before;
}

/** Returns an empty draft. */
export function emptyDraft() {
	return structuredClone(EMPTY);
}

/** Adds an image or clip to the timeline. medium: {media, kind, frames, width, height, name}. */
export function addKeyframe(medium, frame, more = {}) {
	const {keyframes} = draft.get();
	const key = 1 + Math.max(0, ...keyframes.map((item) => item.key));
	const others = keyframes.filter((item) => item.frame !== frame); // one at each frame
	draft.set({keyframes: [...others, {extra: {}, ...medium, key, frame, strength: 1, ...more}]});
	return key;
}

/** Changes one of the timeline. */
export function patchKeyframe(key, patch) {
	const keyframes = draft.get().keyframes.map((item) => (item.key === key ? {...item, ...patch} : item));
	draft.set({keyframes});
}

/** Takes one from the timeline. */
export function removeKeyframe(key) {
	draft.set({keyframes: draft.get().keyframes.filter((item) => item.key !== key)});
}

/** Sets a field of the recipe, or puts it back: text "" or null. */
export function setMore(name, text) {
	const more = {...draft.get().more};
	if (text === "" || text === null) delete more[name];
	else more[name] = text;
	draft.set({more});
}

// A tab has its own draft, in sessionStorage, which a reload keeps; a new tab begins with the newest one of all.
function read() {
	for (const storage of [sessionStorage, localStorage]) {
		try {
			const stored = JSON.parse(storage.getItem(KEY));
			if (stored?.schema === SCHEMA) return {...EMPTY, ...stored.draft};
		} catch {
			storage.removeItem(KEY);
		}
	}
	return {...EMPTY};
}

function write(state) {
	const text = JSON.stringify({schema: SCHEMA, draft: state});
	for (const storage of [sessionStorage, localStorage]) {
		try {
			storage.setItem(KEY, text);
		} catch {
			// a full or forbidden storage: the draft lives as long as the page
		}
	}
}
