/** The queue: what is made, what waits, and what failed. The same rows in every tab of every browser. */

import {call} from "./api.js";
import {button, count, h, iconButton, setText, show, syncList, titleOf} from "./dom.js";
import {previewPath, showImage, thumbnailPath} from "./images.js";
import {cancelVideo, deleteVideos, describeStage, editVideo, retryVideo} from "./jobs.js";
import {findActive, findFailed, store} from "./state.js";
import {selectVideo} from "./tabs.js";
import {loadPlaces, showError} from "./sync.js";

const MOST_FAILED = 20;
let dragged = null;

/** Builds the queue. */
export function mountQueue(root) {
	const list = h("ol", {class: "rows"});
	const failed = h("ol", {class: "rows"});
	const none = h("p", {class: "hint"}, "Nothing waits.");
	const pause = button(
		"",
		() => {
			const {paused} = store.get().queue;
			call("POST", `/v1/queue/${paused ? "resume" : "pause"}`)
				.then((queue) => store.set({queue}))
				.catch(showError);
		},
		{class: "small"}
	);
	const heading = h("h2", {}, "Queue");
	const summary = h("summary", {});
	const clear = button("Clear", () => deleteVideos(findFailed(store.get())), {class: "small quiet"});
	const notMade = h("details", {}, summary, failed, clear);
	root.append(h("div", {class: "row between"}, heading, pause), none, list, notMade);
	store.subscribe(["videos", "queue", "system"], (state) => {
		const active = findActive(state);
		const lost = findFailed(state).slice(0, MOST_FAILED);
		setText(heading, active.length > 0 ? `Queue · ${active.length}` : "Queue");
		setText(pause, state.queue.paused ? "Resume" : "Pause");
		show(pause, state.system?.is_admin !== false && (active.length > 0 || state.queue.paused));
		show(none, active.length === 0);
		show(notMade, lost.length > 0);
		setText(summary, `Not made · ${lost.length}`);
		syncList(
			list,
			active,
			(video) => video.id,
			createRow,
			(row, video) => row.update(video, active)
		);
		syncList(
			failed,
			lost,
			(video) => video.id,
			createFailed,
			(row, video) => row.update(video)
		);
		root.classList.toggle("nothing", active.length === 0 && lost.length === 0);
	});
}

function createRow({id}) {
	const image = h("img", {alt: ""});
	const prompt = h("span", {class: "one-line"});
	const stage = h("span", {class: "hint one-line"});
	const bar = h("progress", {max: 100, "aria-label": "Progress"});
	const open = h(
		"button",
		{type: "button", class: "open", onclick: () => selectVideo(id)},
		image,
		h("span", {class: "text"}, prompt, stage, bar)
	);
	const up = iconButton("up", "Move up", () => moveBy(id, -1));
	const down = iconButton("down", "Move down", () => moveBy(id, 1));
	const others = button("Only this", () => cancelOthers(id), {
		class: "small quiet",
		title: "Cancel all others that wait"
	});
	const row = h(
		"li",
		{class: "video"},
		open,
		up,
		down,
		others,
		iconButton("close", "Cancel", () => cancelVideo(id))
	);
	makeDraggable(row, id);
	row.update = (video, active) => {
		const isWaiting = video.status === "queued";
		const waiting = active.filter((other) => other.status === "queued");
		setText(prompt, titleOf(video));
		setText(stage, describeStage(video));
		show(bar, !isWaiting);
		bar.value = video.progress;
		row.draggable = isWaiting;
		show(up, isWaiting && waiting.length > 1);
		show(down, isWaiting && waiting.length > 1);
		up.disabled = waiting[0]?.id === id;
		down.disabled = waiting.at(-1)?.id === id;
		show(others, waiting.filter((other) => other.id !== id).length > 0);
		const preview = previewPath(video);
		if (preview !== null) showImage(image, preview);
		else if (video.request.conditions?.length || video.request.input_video) showImage(image, thumbnailPath(`${id}/0`));
	};
	return row;
}

function createFailed({id}) {
	const prompt = h("span", {class: "one-line"});
	const reason = h("span", {class: "hint"});
	const find = () => store.get().videos.get(id);
	const row = h(
		"li",
		{class: "video failed"},
		h(
			"button",
			{type: "button", class: "open", onclick: () => selectVideo(id)},
			h("span", {class: "text"}, prompt, reason)
		),
		button("Again", () => retryVideo(find()), {class: "small"}),
		button("Edit", () => editVideo(find()), {class: "small"}),
		iconButton("trash", "Delete", () => deleteVideos([find()]))
	);
	row.update = (video) => {
		row.classList.toggle("cancelled", video.error?.code === "cancelled");
		setText(prompt, titleOf(video));
		setText(reason, describeStage(video));
	};
	return row;
}

function findWaiting() {
	return findActive(store.get()).filter((video) => video.status === "queued");
}

/** Moves a video by places, among those of its priority; the server says where that cannot be. */
function moveBy(id, by) {
	const waiting = findWaiting();
	const from = waiting.findIndex((video) => video.id === id);
	const before = by < 0 ? waiting[from - 1] : waiting[from + 2];
	move(id, before?.id ?? null);
}

function move(id, before) {
	if (before === id) return;
	call("POST", `/v1/videos/${id}/move`, {body: before === null ? {} : {before}})
		.then(loadPlaces)
		.catch(showError);
}

function cancelOthers(id) {
	const others = findWaiting().filter((video) => video.id !== id);
	if (others.length > 0) Promise.all(others.map((video) => cancelVideo(video.id)));
}

function makeDraggable(row, id) {
	row.addEventListener("dragstart", (event) => {
		dragged = id;
		event.dataTransfer.effectAllowed = "move";
		event.dataTransfer.setData("text/plain", id);
	});
	row.addEventListener("dragend", () => (dragged = null));
	row.addEventListener("dragover", (event) => {
		if (dragged !== null && dragged !== id && row.draggable) event.preventDefault();
	});
	row.addEventListener("drop", (event) => {
		if (dragged === null) return;
		event.preventDefault();
		const waiting = findWaiting().map((video) => video.id);
		const isDown = waiting.indexOf(dragged) < waiting.indexOf(id);
		move(dragged, isDown ? (waiting[waiting.indexOf(id) + 1] ?? null) : id);
	});
}

/** Returns what the queue holds, in a few words. */
export function describeQueue(state) {
	const number = findActive(state).length;
	if (state.queue.paused) return number > 0 ? `${number} in the queue, paused` : "queue paused";
	return number === 0 ? "queue empty" : `${count(number, "video").replace(/ videos?$/, "")} in the queue`;
}
