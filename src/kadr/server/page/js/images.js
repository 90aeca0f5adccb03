/** Images of the API, which an <img> cannot fetch where a token is needed. */

import {call, local, send} from "./api.js";
import {putVideos} from "./state.js";

const MOST = 300; // images that are kept
const kept = new Map(); // path -> promise of an address of the image in this page

/** Returns the address, in this page, of the image at a path. */
export function imageUrl(path) {
	let url = kept.get(path);
	if (url === undefined) {
		url = send("GET", path).then(async (response) => URL.createObjectURL(await response.blob()));
		kept.set(path, url);
		url.catch(() => kept.delete(path));
		if (kept.size > MOST) forget(kept.keys().next().value);
	}
	return url;
}

/** Shows an image of the API in an <img>; one that is not there any more is empty. */
export async function showImage(image, path) {
	if (image.dataset.path === path) return;
	image.dataset.path = path;
	try {
		const url = await imageUrl(path);
		if (image.dataset.path === path) image.src = url;
	} catch {
		if (image.dataset.path === path) delete image.dataset.path;
	}
}

/** Returns the path of a small image of a medium. frame: of a clip. */
export function thumbnailPath(reference, frame = 0) {
	return `/v1/thumbnails/${reference}${frame > 0 ? `?frame=${frame}` : ""}`;
}

/** Returns the path of the newest preview of a video, another one for each; null where there is none. */
export function previewPath({id, previewed, preview_url}) {
	const newest = previewed ?? (preview_url ? 0 : null);
	return newest === null ? null : `/v1/videos/${id}/preview?of=${newest}`;
}

/** Shows a signed file of a video in an <img> or <video>. A signature that has expired is replaced, once. */
export function showSigned(node, video, field) {
	const source = `${video.id}.${field}`;
	if (node.dataset.source === source || !video[field]) return;
	node.dataset.source = source;
	node.src = local(video[field]);
	node.onerror = async () => {
		node.onerror = null;
		try {
			const fresh = await call("GET", `/v1/videos/${video.id}`);
			putVideos([fresh]);
			if (node.dataset.source === source && fresh[field]) node.src = local(fresh[field]);
		} catch {
			// it was deleted: its event is on the way
		}
	};
}

function forget(path) {
	kept
		.get(path)
		.then((url) => URL.revokeObjectURL(url))
		.catch(() => {});
	kept.delete(path);
}
