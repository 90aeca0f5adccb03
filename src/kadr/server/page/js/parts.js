/** Parts of a long video, each with a prompt of its own. An edge lies where a window begins, and drags from one to another. */

import {button, formatLength, h, iconButton, setText, show, syncList} from "./dom.js";
import {draft, setDraft} from "./draft.js";
import {promptField} from "./prompt.js";
import {store} from "./state.js";
import {lengthOf, windowsOf} from "./windows.js";

/** Builds the parts. */
export function mountParts(root) {
	const bar = h("div", {class: "parts", role: "group", "aria-label": "Parts of the video"});
	const list = h("div", {});
	const add = button("+ Another prompt for what comes later", addPart, {class: "small"});
	const note = h("p", {class: "hint"});
	root.append(bar, list, h("div", {class: "row"}, add), note);
	const update = () => {
		const state = draft.get();
		const windows = windowsOf(state, store.get().model);
		const canSplit = windowsOf({...state, more: {...state.more, windowed: "true"}}, store.get().model).spans.length > 1;
		const parts = windows === null ? [] : usable(state.parts, windows.spans.length);
		show(bar, parts.length > 0);
		add.title = canSplit ? "" : "Make the video longer first";
		add.disabled = !canSplit || findFree(state.parts, windows?.spans.length ?? 0) === null;
		const lost = state.parts.length - parts.length;
		setText(
			note,
			lost > 0 ? "The video is too short for its last prompts; a longer one shows them." : windowsNote(windows)
		);
		if (windows !== null) drawBar(bar, parts, windows);
		syncList(
			list,
			state.parts,
			(part) => part.key,
			createPart,
			(node, part) => node.refresh(part, windows)
		);
	};
	draft.subscribe(["parts", "frames", "fps", "more"], update);
	store.subscribe(["model", "plan"], update);
}

function windowsNote(windows) {
	return windows === null ? "" : `Sampled in ${windows.spans.length} windows that overlap, one after the other.`;
}

function usable(parts, numWindows) {
	return parts.filter((part) => part.window < numWindows);
}

/** Returns the first window in the middle of the longest stretch that can be parted, or null. */
function findFree(parts, numWindows) {
	const edges = [0, ...parts.map((part) => part.window), Math.max(numWindows, 2)];
	let best = null;
	for (let index = 1; index < edges.length; index += 1) {
		const [from, to] = [edges[index - 1], edges[index]];
		if (to - from >= 2 && (best === null || to - from > best.length))
			best = {length: to - from, middle: Math.floor((from + to) / 2)};
	}
	return best?.middle ?? null;
}

function addPart() {
	const state = draft.get();
	const windows = windowsOf({...state, more: {...state.more, windowed: "true"}}, store.get().model);
	const window = findFree(state.parts, windows.spans.length);
	if (window === null) return;
	const key = 1 + Math.max(0, ...state.parts.map((part) => part.key));
	const parts = [...state.parts, {key, prompt: "", window}].sort((a, b) => a.window - b.window);
	setDraft({parts});
	requestAnimationFrame(() => document.getElementById(`part-${key}`)?.focus());
}

function createPart(part) {
	const {key} = part;
	const find = () => draft.get().parts.find((other) => other.key === key);
	const field = promptField({
		id: `part-${key}`,
		label: "Then",
		rows: 2,
		get: () => find()?.prompt ?? "",
		set: (prompt) => patchPart(key, {prompt}),
		check: () => {
			const text = find()?.prompt.trim();
			return store.get().plan?.answer?.prompts?.find((prompt) => prompt.text === text) ?? null;
		}
	});
	const from = h("span", {class: "grow"});
	const node = h(
		"div",
		{class: "partial"},
		field,
		h(
			"div",
			{class: "row"},
			from,
			iconButton("back", "Begin this part earlier", () => moveEdge(key, -1)),
			iconButton("forward", "Begin this part later", () => moveEdge(key, 1)),
			iconButton("close", "Remove this prompt", () =>
				setDraft({parts: draft.get().parts.filter((other) => other !== find())})
			)
		)
	);
	node.refresh = (current, windows) => {
		field.update();
		const {fps} = lengthOf(draft.get(), store.get().model);
		const span = windows?.spans[current.window];
		setText(from, span === undefined ? "after the end" : `from ${formatLength(span[0] / fps)} s on`);
	};
	return node;
}

function patchPart(key, patch) {
	setDraft({parts: draft.get().parts.map((part) => (part.key === key ? {...part, ...patch} : part))});
}

/** Moves the beginning of a part by windows, between its neighbours. */
function moveEdge(key, by) {
	const state = draft.get();
	const index = state.parts.findIndex((part) => part.key === key);
	const lowest = (state.parts[index - 1]?.window ?? 0) + 1;
	const windows = windowsOf(state, store.get().model);
	const highest = (state.parts[index + 1]?.window ?? windows?.spans.length ?? 2) - 1;
	const window = Math.max(lowest, Math.min(highest, state.parts[index].window + by));
	if (window !== state.parts[index].window) patchPart(key, {window});
}

/** Draws the parts in the proportions of the video, with edges that drag and follow the arrow keys. */
function drawBar(bar, parts, {spans}) {
	const total = spans.at(-1)[1];
	const percent = (part) => (100 * spans[part.window][0]) / total;
	const create = (part) => {
		const {key} = part;
		const node = h("button", {type: "button", class: "edge", role: "slider", "aria-label": "Where this part begins"});
		node.addEventListener("keydown", (event) => {
			const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
			if (by !== undefined) (event.preventDefault(), moveEdge(key, by));
		});
		node.addEventListener("pointerdown", (event) => node.setPointerCapture(event.pointerId));
		node.addEventListener(
			"pointermove",
			(event) => node.hasPointerCapture(event.pointerId) && dragTo(bar, key, event.clientX)
		);
		return node;
	};
	syncList(
		bar,
		parts,
		(part) => part.key,
		create,
		(node, part) => {
			node.style.left = `${percent(part)}%`;
			node.setAttribute("aria-valuenow", part.window);
			node.setAttribute("aria-valuemin", 1);
			node.setAttribute("aria-valuemax", spans.length - 1);
			node.setAttribute("aria-valuetext", `window ${part.window + 1} of ${spans.length}`);
		}
	);
}

function dragTo(bar, key, x) {
	const {spans} = windowsOf(draft.get(), store.get().model);
	const {left, width} = bar.getBoundingClientRect();
	const frame = ((x - left) / width) * spans.at(-1)[1];
	const nearest = spans.reduce(
		(best, span, window) => (Math.abs(span[0] - frame) < Math.abs(spans[best][0] - frame) ? window : best),
		0
	);
	const part = draft.get().parts.find((other) => other.key === key);
	moveEdge(key, nearest - part.window);
}
