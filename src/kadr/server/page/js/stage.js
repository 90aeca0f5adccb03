/** The stage: the video that is selected, or its preview while it is made. */

import {announce, button, formatTime, h, iconButton, setText, show} from "./dom.js";
import {imageUrl, previewPath} from "./images.js";
import {cancelVideo, describeStage, editVideo, retryVideo} from "./jobs.js";
import {mountPlayer} from "./player.js";
import {mountPanel} from "./panel.js";
import {isEmptyServer} from "./welcome.js";
import {findActive, store} from "./state.js";

/** Builds the stage. */
export function mountStage(root) {
	const empty = h("div", {class: "empty"});
	const work = mountWork();
	const player = mountPlayer();
	const failure = h("div", {class: "empty"});
	const panel = mountPanel();
	root.append(h("div", {class: "screen"}, empty, work, player, failure), panel);
	store.subscribe(["selected", "videos", "gallery", "connection", "compared"], () => {
		const video = findSelected();
		const status = video?.status ?? "none";
		root.dataset.video = video?.id ?? "";
		show(empty, video === null);
		show(work, ["queued", "in_progress"].includes(status));
		show(player, status === "completed");
		show(failure, status === "failed");
		if (video === null) showEmpty(empty);
		else if (status === "failed") showFailure(failure, video);
		else if (status === "completed") player.show(video);
		else work.show(video);
		if (status !== "completed") player.stop();
		panel.show(video);
	});
}

/** Returns the video on the stage: the one that is selected, else one that is made, else the newest. */
function findSelected() {
	const {selected, videos, gallery} = store.get();
	if (videos.has(selected)) return videos.get(selected);
	const [active] = findActive(store.get()).filter((video) => video.status === "in_progress");
	return active ?? videos.get(gallery.ids[0]) ?? null;
}

function showEmpty(node) {
	const isFirst = isEmptyServer();
	const isDemo = store.get().model?.words != null;
	const about = isDemo
		? "This is the demo model: it draws one coloured shape on a plain background, in seconds. Start the server with another model for real videos: kadr serve --model NAME."
		: "The more you describe, the better: subject, motion, camera, light.";
	const lines = isFirst ? ["Say what the video shows, and make it.", about] : [];
	node.replaceChildren(...lines.map((line, index) => h(index === 0 ? "h2" : "p", {}, line)));
}

function showFailure(node, video) {
	if (node.dataset.id === video.id) return;
	node.dataset.id = video.id;
	const isCancelled = video.error?.code === "cancelled";
	node.replaceChildren(
		h("h2", {}, isCancelled ? "Cancelled" : "It could not be made"),
		h("p", {}, isCancelled ? "" : (video.error?.message ?? "")),
		h(
			"div",
			{class: "row"},
			isCancelled ? null : button("Change its settings", () => editVideo(video), {class: "main"}),
			button(isCancelled ? "Make it after all" : "Try again", () => retryVideo(video), {
				class: isCancelled ? "main" : ""
			})
		)
	);
}

/** Builds what is shown while a video waits or is made. */
function mountWork() {
	const image = h("img", {class: "view", alt: "Preview of the video"});
	const still = matchMedia("(prefers-reduced-motion: reduce)").matches ? h("canvas", {class: "view"}) : null;
	const bar = h("progress", {max: 100, "aria-label": "Progress"});
	const line = h("p", {});
	const cancel = iconButton("close", "Cancel this video", () => cancelVideo(shown));
	const node = h("div", {class: "work"}, still ?? image, h("div", {class: "row status"}, line, bar, cancel));
	let shown = null;
	let preview = null;
	let tenth = 0;
	node.show = (video) => {
		if (video.id !== shown) {
			[shown, preview, tenth] = [video.id, null, 0];
			image.removeAttribute("src");
			node.classList.remove("previewed");
		}
		bar.value = video.progress;
		const left = video.eta_seconds != null ? `, ${formatTime(video.eta_seconds)} left` : "";
		setText(line, describeStage(video) + left);
		if (Math.floor(video.progress / 10) > tenth) {
			tenth = Math.floor(video.progress / 10);
			announce(`${describeStage(video)}, ${10 * tenth} percent`);
		}
		const newest = previewPath(video);
		if (newest !== null && newest !== preview) {
			preview = newest;
			showPreview(newest);
		}
	};

	async function showPreview(path) {
		try {
			const url = await imageUrl(path);
			if (path !== preview) return;
			if (still === null) image.src = url;
			else await drawStill(still, url);
			node.classList.add("previewed");
			node.dataset.preview = path.split("=")[1];
		} catch {
			// the video is finished, and its preview gone
		}
	}
	return node;
}

/** Draws the first frame of a moving image, for those who do not want motion. */
async function drawStill(canvas, url) {
	const bitmap = await createImageBitmap(await (await fetch(url)).blob());
	Object.assign(canvas, {width: bitmap.width, height: bitmap.height});
	canvas.getContext("2d").drawImage(bitmap, 0, 0);
}
