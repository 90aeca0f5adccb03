/** Brings what the server has into the store: first of all, after a gap, and as events tell. */

import {call} from "./api.js";
import {draft} from "./draft.js";
import {followEvents} from "./events.js";
import {announce, debounce, titleOf} from "./dom.js";
import {toast} from "./toast.js";
import {dropVideo, findActive, patchVideo, putVideos, store} from "./state.js";

const PAGE = 20;
const SYSTEM_MS = 5000;
let reconnect = () => {};

/** Starts to follow the server. */
export function startSync() {
	reconnect = followEvents(takeEvent, takeState);
	draft.subscribe(["model"], ({model}) => loadModel(model));
	setInterval(
		() => document.visibilityState === "visible" && store.get().connection === "live" && loadSystem(),
		SYSTEM_MS
	);
}

/** Asks for everything again, with the token that was given. */
export function startAgain() {
	store.set({isTokenAsked: false});
	reconnect();
}

function takeState(connection) {
	store.set({connection});
}

function takeEvent(kind, data) {
	if (kind === "ready" || kind === "reset") {
		if (kind === "reset" || store.get().models.length === 0) loadAll().catch(showError);
	} else if (kind === "job") takeVideo(data);
	else if (kind === "progress") patchVideo(data.id, data.seq, {...data, status: "in_progress"});
	else if (kind === "preview") patchVideo(data.id, data.seq, {previewed: data.seq});
	else if (kind === "notice") {
		const notices = store.get().videos.get(data.id)?.notices ?? [];
		patchVideo(data.id, data.seq, {notices: [...notices, data.message]});
	} else if (kind === "deleted") dropVideo(data.id);
	else if (kind === "queue") store.set({queue: {...store.get().queue, paused: data.paused, problem: data.problem}});
}

function takeVideo(video) {
	const {videos, gallery} = store.get();
	const known = videos.get(video.id);
	if (known !== undefined && video.seq < known.seq) return;
	putVideos([video]);
	if (video.status === "completed" && !gallery.ids.includes(video.id) && isSearchedFor(video, gallery)) {
		store.set({gallery: {...gallery, ids: [video.id, ...gallery.ids]}});
	}
	if (known?.status === "in_progress" && video.status === "completed") announce(`The video is made: ${titleOf(video)}`);
	if (known?.status !== video.status || known?.priority !== video.priority) loadPlaces();
}

function isSearchedFor(video, {query, favorite}) {
	const prompt = video.prompt.toLowerCase();
	return (
		(!favorite || video.favorite) &&
		query
			.toLowerCase()
			.split(/\s+/)
			.every((word) => prompt.includes(word))
	);
}

async function loadAll() {
	const [models, loras, queue] = await Promise.all([
		call("GET", "/v1/models"),
		call("GET", "/v1/loras"),
		call("GET", "/v1/queue"),
		loadSystem()
	]);
	store.set({models: models.data.map(({id}) => id), loras: loras.data.map(({id}) => id), queue});
	const known = models.data.some(({id}) => id === draft.get().model);
	if (!known) draft.set({model: models.data.find((model) => model.is_default)?.id ?? models.data[0]?.id ?? null});
	else loadModel(draft.get().model);
	const active = await loadActive();
	const failed = await call("GET", "/v1/videos?status=failed&limit=20");
	store.set({videos: new Map()}); // what is no longer there is forgotten
	putVideos([...active, ...failed.data]);
	await searchGallery({});
	await loadSelected();
}

/** Looks for the video on the stage; where there is none, the one in progress or the newest stays there. */
async function loadSelected() {
	const {selected, videos, gallery} = store.get();
	if (selected && !videos.has(selected)) {
		await call("GET", `/v1/videos/${selected}`).then(
			(video) => putVideos([video]),
			() => store.set({selected: null})
		);
	} else if (!selected) store.set({selected: (findActive(store.get())[0]?.id ?? gallery.ids[0]) || null});
}

async function loadActive() {
	const [running, waiting] = await Promise.all([
		call("GET", "/v1/videos?status=in_progress&limit=100"),
		call("GET", "/v1/videos?status=queued&limit=100&order=asc")
	]);
	let page = waiting;
	while (page.has_more) {
		page = await call("GET", `/v1/videos?status=queued&limit=100&order=asc&after=${page.last_id}`);
		waiting.data.push(...page.data);
	}
	return [...running.data, ...waiting.data];
}

/** Asks for the places in the queue, which change for all when one changes. */
export const loadPlaces = debounce(() => {
	if (findActive(store.get()).some((video) => video.status === "queued"))
		loadActive()
			.then(putVideos)
			.catch(() => {});
}, 200);

async function loadModel(name) {
	if (name === null) return;
	store.set({model: null});
	try {
		const model = await call("GET", `/v1/models/${encodeURIComponent(name)}`);
		if (draft.get().model === name) store.set({model});
	} catch (error) {
		showError(error);
	}
}

async function loadSystem() {
	try {
		store.set({system: await call("GET", "/v1/system")});
	} catch {
		// the banner says that the server is gone
	}
}

/** Searches the gallery, from its beginning. changes: of the query or of the choice of favourites. */
export async function searchGallery(changes) {
	const gallery = {...store.get().gallery, ...changes, ids: [], hasMore: false, isLoading: true};
	store.set({gallery});
	await loadPage(gallery, null);
}

/** Loads the next page of the gallery. */
export async function loadMore() {
	const {gallery} = store.get();
	if (gallery.isLoading || !gallery.hasMore) return;
	store.set({gallery: {...gallery, isLoading: true}});
	await loadPage(gallery, gallery.ids.at(-1));
}

async function loadPage({query, favorite}, after) {
	const words = new URLSearchParams({status: "completed", limit: PAGE});
	if (query.trim() !== "") words.set("query", query.trim());
	if (favorite) words.set("favorite", "true");
	if (after) words.set("after", after);
	try {
		const page = await call("GET", `/v1/videos?${words}`);
		const {gallery} = store.get();
		if (gallery.query !== query || gallery.favorite !== favorite) return; // another search was begun meanwhile
		putVideos(page.data);
		const ids = [...new Set([...gallery.ids, ...page.data.map((video) => video.id)])];
		store.set({gallery: {...gallery, ids, hasMore: page.has_more, isLoading: false}});
	} catch (error) {
		store.set({gallery: {...store.get().gallery, isLoading: false}});
		showError(error);
	}
}

/** Shows an error that nobody else does. */
export function showError(error) {
	if (error.status !== 0 && error.status !== 401) toast(error.message, {isError: true});
}
