/** The timeline: the length of the video, with the images and clips that it must show. */

import {button, formatLength, h, setText, show, syncList} from "./dom.js";
import {draft, patchKeyframe, removeKeyframe} from "./draft.js";
import {showImage, thumbnailPath} from "./images.js";
import {openKeyframe} from "./keyframe.js";
import {LAST, chooseFiles, describeMedium, takeFiles} from "./media.js";
import {store} from "./state.js";
import {lengthOf} from "./windows.js";

const STEP = 8; // a clip that does not begin the video begins at a multiple of this
const DRAG_PIXELS = 4; // less is a tap

/** Builds the timeline. */
export function mountTimeline(root) {
	const track = h("div", {class: "track", "aria-label": "Timeline", role: "group"});
	const hint = h("p", {class: "hint"}, "Images and clips to show: drop them here, or anywhere.");
	const end = h("span", {});
	const add = (label, frame, text) =>
		button(text, () => chooseFiles((files) => takeFiles(files, frame), {multiple: frame === null}), {
			class: "small",
			title: label
		});
	const buttons = h(
		"div",
		{class: "row"},
		add("Choose the first image", 0, "+ First"),
		add("Choose the last image", LAST, "+ Last"),
		add("Choose images and clips to show", null, "+ Keyframe")
	);
	const scale = h("div", {class: "row between scale"}, h("span", {}, "0 s"), buttons, end);
	root.append(h("div", {class: "timeline"}, track, hint), scale);
	takeDrops(track);
	const update = () => {
		const state = draft.get();
		const {frames, fps} = lengthOf(state, store.get().model);
		setText(end, `${formatLength(frames / fps)} s`);
		show(hint, state.keyframes.length === 0);
		const sorted = [...state.keyframes].sort((a, b) => frameOf(a, frames) - frameOf(b, frames));
		syncList(
			track,
			sorted,
			({key}) => key,
			createItem,
			(node, item) => updateItem(node, item, frames)
		);
	};
	draft.subscribe(["keyframes", "frames", "fps"], update);
	store.subscribe(["model"], update);
}

/** Returns the frame at which an item begins: counted from the start. */
export function frameOf(item, frames) {
	const length = item.kind === "clip" ? Math.min(item.frames ?? 1, frames) : 1;
	if (item.frame < 0) return Math.max(0, frames + item.frame - length + 1);
	return Math.min(item.frame, frames - 1);
}

function createItem(item) {
	const node = h("button", {
		type: "button",
		class: `item ${item.kind}`,
		"aria-haspopup": "dialog",
		onkeydown: (event) => moveByKey(event, item.key)
	});
	node.append(h("img", {alt: "", draggable: "false"}), h("span", {class: "frame"}));
	drag(node, item.key);
	return node;
}

function updateItem(node, item, frames) {
	showImage(node.firstChild, thumbnailPath(item.media)); // another one may have the key of one that is gone
	node.className = `item ${item.kind}`;
	const first = frameOf(item, frames);
	const length = item.kind === "clip" ? Math.min(item.frames ?? 1, frames - first) : 1;
	const last = Math.max(1, frames - 1);
	// An image stands with its own width within the track; a clip is as long as it lasts.
	node.style.left = item.kind === "clip" ? `${(100 * first) / frames}%` : `calc((100% - 44px) * ${first / last})`;
	node.style.width = item.kind === "clip" ? `max(44px, ${(100 * length) / frames}%)` : "44px";
	const where = item.frame === LAST ? "last frame" : first === 0 ? "first frame" : `frame ${first + 1}`;
	node.setAttribute("aria-label", `${describeMedium(item)}: ${where}, strength ${item.strength}. Arrow keys move it.`);
	node.title = `${describeMedium(item)}\n${where}, strength ${item.strength}`;
	setText(node.lastChild, item.frame === LAST ? "end" : first === 0 ? "start" : String(first + 1));
}

function moveByKey(event, key) {
	const item = findItem(key);
	const {frames} = lengthOf(draft.get(), store.get().model);
	const step = item.kind === "clip" ? STEP : event.shiftKey ? STEP : 1;
	const at = frameOf(item, frames);
	const moves = {ArrowLeft: at - step, ArrowRight: at + step, Home: 0, End: frames - 1};
	if (event.key === "Delete" || event.key === "Backspace") removeKeyframe(key);
	else if (event.key in moves) moveTo(key, moves[event.key]);
	else return;
	event.preventDefault();
}

/** Moves an item to a frame: within the video, a clip to a multiple of 8; at the end it stays there. */
export function moveTo(key, frame) {
	const item = findItem(key);
	const {frames} = lengthOf(draft.get(), store.get().model);
	if (item.kind === "clip") {
		const latest = Math.max(0, Math.floor((frames - 1) / STEP) * STEP);
		patchKeyframe(key, {frame: Math.min(Math.max(0, Math.round(frame / STEP) * STEP), latest)});
	} else {
		patchKeyframe(key, {frame: frame >= frames - 1 && frames > 1 ? LAST : Math.max(0, Math.round(frame))});
	}
}

function findItem(key) {
	return draft.get().keyframes.find((item) => item.key === key);
}

/** Lets a pointer move an item; a tap opens its settings. */
function drag(node, key) {
	let start = null;
	node.addEventListener("pointerdown", (event) => {
		if (event.button !== 0) return;
		start = {x: event.clientX, isMoved: false, offset: event.clientX - node.getBoundingClientRect().left};
		node.setPointerCapture(event.pointerId);
	});
	node.addEventListener("pointermove", (event) => {
		if (start === null || (!start.isMoved && Math.abs(event.clientX - start.x) < DRAG_PIXELS)) return;
		start.isMoved = true;
		node.classList.add("dragged");
		const track = node.parentElement.getBoundingClientRect();
		const {frames} = lengthOf(draft.get(), store.get().model);
		const isClip = findItem(key).kind === "clip";
		const width = isClip ? track.width : track.width - 44;
		moveTo(key, ((event.clientX - start.offset - track.left) / width) * (isClip ? frames : frames - 1));
	});
	const finish = () => {
		node.classList.remove("dragged");
		setTimeout(() => (start = null)); // after the click that ends it
	};
	node.addEventListener("pointerup", finish);
	node.addEventListener("pointercancel", finish);
	node.addEventListener("click", () => start?.isMoved || openKeyframe(key));
}

/** Puts files that are dropped on the track where they are dropped. */
function takeDrops(track) {
	track.addEventListener("drop", (event) => {
		const files = [...event.dataTransfer.files];
		if (files.length === 0) return;
		event.preventDefault();
		event.stopPropagation();
		document.body.classList.remove("dropping");
		const {left, width} = track.getBoundingClientRect();
		const {frames} = lengthOf(draft.get(), store.get().model);
		const frame = Math.round(((event.clientX - left) / width) * (frames - 1));
		takeFiles(files, frame >= frames - 1 ? LAST : frame < frames * 0.04 ? 0 : frame);
	});
	track.addEventListener("dragover", (event) => event.preventDefault());
}
