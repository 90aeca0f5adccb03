/** What can be done with a video, from the stage, the queue and the gallery alike. */

import {call, local, randomSeed} from "./api.js";
import {ask} from "./dialog.js";
import {count, formatTime, titleOf} from "./dom.js";
import {submit} from "./make.js";
import {restoreSettings} from "./media.js";
import {dropVideo, putVideos, store} from "./state.js";
import {searchGallery, showError} from "./sync.js";
import {selectVideo, showTab} from "./tabs.js";
import {doLater} from "./toast.js";

const DOUBLE_CLICK_MS = 700; // the second click would meet the video that came into its place
let lastDelete = -DOUBLE_CLICK_MS;
const STAGES = {
	load: "loading the model",
	preview: "preparing previews",
	text: "reading the prompt",
	control: "drawing the control clip",
	encode: "encoding images",
	denoise: "denoising",
	upscale: "upscaling",
	refine: "refining",
	decode: "decoding"
};

/** Returns what happens to a video, in a few words. */
export function describeStage(video) {
	if (video.status === "queued")
		return video.queue_position ? `number ${video.queue_position} in the queue` : "in the queue";
	if (video.status === "failed")
		return video.error?.code === "cancelled" ? "cancelled" : `failed: ${video.error?.message ?? ""}`;
	if (video.status === "completed")
		return video.inference_time_s ? `made in ${formatTime(video.inference_time_s)}` : "completed";
	const steps = video.steps > 1 ? ` ${Math.min((video.step ?? 0) + 1, video.steps)} of ${video.steps}` : "";
	return `${STAGES[video.stage] ?? "loading the model"}${steps}`;
}

/** Makes a video again. seed: another one. */
export async function retryVideo(video, seed = video.seed) {
	try {
		const made = await submit({...video.request, seed});
		putVideos([made]);
		selectVideo(made.id);
	} catch (error) {
		showError(error);
	}
}

/** Makes a video again with another seed. */
export function varyVideo(video) {
	return retryVideo(video, randomSeed());
}

/** Brings the settings of a video into the composer. */
export function editVideo(video) {
	restoreSettings(video.request, {media: video.media ?? [], name: `"${video.prompt.slice(0, 40)}"`});
	showTab("make");
	document.getElementById("prompt").focus();
}

/** Makes a video a favourite, which never expires, or no longer one. */
export async function setFavorite(video, favorite) {
	try {
		putVideos([await call("POST", `/v1/videos/${video.id}/favorite`, {body: {favorite}})]);
	} catch (error) {
		showError(error);
	}
}

/** Cancels a video. */
export function cancelVideo(id) {
	return call("POST", `/v1/videos/${id}/cancel`).catch(showError);
}

/** Deletes videos, in ten seconds unless it is undone. A favourite is asked about first. */
export async function deleteVideos(list) {
	if (performance.now() - lastDelete < DOUBLE_CLICK_MS) return;
	const stars = list.filter((video) => video.favorite).length;
	const isSure =
		stars === 0 ||
		(await ask(`Delete ${count(stars, "favourite")}?`, [
			["yes", "Delete"],
			["", "Keep"]
		]));
	if (!isSure) return;
	lastDelete = performance.now();
	const name = list.length === 1 ? `"${titleOf(list[0]).slice(0, 40)}" is` : `${list.length} videos are`;
	const {gallery, selected} = store.get();
	for (const video of list) dropVideo(video.id);
	const run = () => list.forEach((video) => call("DELETE", `/v1/videos/${video.id}`).catch(showError));
	const undo = () => {
		putVideos(list);
		store.set({selected, gallery: {...store.get().gallery, ids: gallery.ids}});
		searchGallery({});
	};
	doLater(`${name} deleted.`, run, undo);
}

/** Downloads the file of a video. */
export function downloadVideo(video) {
	const link = document.createElement("a");
	link.href = local(video.url);
	link.download = `${
		video.prompt
			.replace(/[^\p{L}\p{N}]+/gu, "-")
			.slice(0, 60)
			.replace(/^-|-$/g, "") || "video"
	}-${video.seed}.mp4`;
	link.click();
}
