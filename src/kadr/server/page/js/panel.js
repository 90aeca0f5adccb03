/** All settings of the video on the stage, and what can be done with it. */

import {call} from "./api.js";
import {button, formatDate, h, iconButton, setText, show, titleOf} from "./dom.js";
import {deleteVideos, describeStage, downloadVideo, editVideo, retryVideo, setFavorite, varyVideo} from "./jobs.js";
import {continueVideo} from "./media.js";
import {showError} from "./sync.js";
import {store} from "./state.js";
import {toast} from "./toast.js";

const HIDDEN = ["prompt", "priority"];

/** Builds the panel. */
export function mountPanel() {
	const prompt = h("p", {class: "said"});
	const facts = h("p", {class: "hint"});
	const notices = h("ul", {class: "notices", "aria-label": "Notices"});
	const list = h("dl", {});
	const star = iconButton("star", "Favourite: it never expires", () => setFavorite(shown, !shown.favorite));
	const compare = iconButton("compare", "Compare with another video of the gallery", () => toggleCompare(shown));
	const done = [
		button("Continue", () => continueVideo(shown), {title: "Make a video that goes on where this one ends"}),
		star,
		compare,
		iconButton("download", "Download", () => downloadVideo(shown))
	];
	const actions = h(
		"div",
		{class: "row wrap"},
		button("Edit settings", () => editVideo(shown), {title: "Bring its settings into the composer"}),
		button("Make again", () => retryVideo(shown), {title: "The same video, with the same seed"}),
		button("Another seed", () => varyVideo(shown), {title: "Make it again with another seed"}),
		done,
		iconButton("trash", "Delete", () => deleteVideos([shown]))
	);
	const copies = h(
		"div",
		{class: "row wrap"},
		button("Copy as a command", () => copyCommand(shown), {class: "small"}),
		button("Copy as JSON", () => copy(JSON.stringify(shown.request, null, 2), "The settings are copied."), {
			class: "small"
		})
	);
	const details = h("details", {}, h("summary", {}, "All settings"), list, copies);
	const node = h("div", {class: "about"}, prompt, facts, notices, actions, details);
	let shown = null;

	node.show = (video) => {
		show(node, video !== null);
		if (video === null) return;
		const isSame = shown?.id === video.id;
		shown = video;
		setText(prompt, titleOf(video));
		setText(facts, describeFacts(video));
		show(notices, video.notices.length > 0);
		notices.replaceChildren(...video.notices.map((text) => h("li", {}, text)));
		for (const action of done) show(action, video.status === "completed");
		star.setAttribute("aria-pressed", String(video.favorite === true));
		compare.setAttribute("aria-pressed", String(store.get().compared !== null));
		if (!isSame) list.replaceChildren(...describeSettings(video.request));
	};
	return node;
}

function describeFacts(video) {
	const size = video.size.replace("x", "×");
	const expires = video.expires_at ? `kept until ${formatDate(video.expires_at)}` : null;
	const parts = [
		formatDate(video.created_at),
		size,
		`${video.num_frames} frames at ${video.fps}`,
		`seed ${video.seed}`
	];
	return [
		...parts,
		video.model,
		video.status === "completed" ? describeStage(video) : null,
		expires,
		video.owner && `by ${video.owner}`
	]
		.filter(Boolean)
		.join(" · ");
}

function describeSettings(request) {
	const isSaid = ([name, value]) =>
		!HIDDEN.includes(name) && value !== false && !(name.startsWith("skip") && value === 0);
	const shown = Object.entries(request).filter(isSaid);
	return shown.flatMap(([name, value]) => [
		h("dt", {}, name.replaceAll("_", " ")),
		h("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value))
	]);
}

function toggleCompare(video) {
	const {compared} = store.get();
	if (compared !== null) return store.set({compared: null});
	store.set({compared: video.id});
	return toast("Now choose the video to compare it with in the gallery.", {
		action: ["Stop", () => store.set({compared: null})]
	});
}

async function copyCommand(video) {
	try {
		const {command} = await call("GET", `/v1/videos/${video.id}/command`);
		await copy(command, "The command is copied.");
	} catch (error) {
		showError(error);
	}
}

/** Copies a text. On http the browser has no clipboard for pages, but an old command. */
async function copy(text, message) {
	if (navigator.clipboard) await navigator.clipboard.writeText(text).catch(() => copyByCommand(text));
	else copyByCommand(text);
	toast(message);
}

function copyByCommand(text) {
	const field = h("textarea", {class: "unseen"});
	field.value = text;
	document.body.append(field);
	field.select();
	document.execCommand("copy");
	field.remove();
}
