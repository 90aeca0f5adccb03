/** The one store of what the server has said; components read it and are called when it changes. */

/** Returns a store: an object that is replaced, never changed, and tells its subscribers which keys are new. */
export function createStore(initial) {
	let state = initial;
	let changed = null;
	const listeners = new Set();
	function flush() {
		const keys = changed;
		changed = null;
		for (const listener of [...listeners]) if (listener.keys.some((key) => keys.has(key))) listener.run(state);
	}
	return {
		get: () => state,
		set(patch) {
			const keys = Object.keys(patch).filter((key) => !Object.is(state[key], patch[key]));
			if (keys.length === 0) return;
			state = {...state, ...patch};
			if (changed === null) {
				changed = new Set();
				queueMicrotask(flush);
			}
			for (const key of keys) changed.add(key);
		},
		/** Calls run(state) now, and whenever one of the keys has changed. */
		subscribe(keys, run) {
			listeners.add({keys, run});
			run(state);
		}
	};
}

const SELECTED = "kadr.selected";

/**
 * videos: id -> video, as `GET /v1/videos/ID` shows it, and `previewed`, the number of its newest preview.
 * selected: id of the video on the stage. compared: id of the one that is wiped against it.
 * gallery: ids in its order, and what it is searched for.
 * connection: "starting", "live" or "lost".
 */
export const store = createStore({
	videos: new Map(),
	queue: {paused: false, problem: null},
	system: null,
	models: [],
	model: null,
	loras: [],
	selected: sessionStorage.getItem(SELECTED),
	compared: null,
	gallery: {ids: [], hasMore: false, isLoading: true, query: "", favorite: false},
	connection: "starting",
	isTokenAsked: false,
	plan: null
});

store.subscribe(["selected"], ({selected}) => sessionStorage.setItem(SELECTED, selected ?? ""));

/** Takes a video as the server shows it, unless a newer state of it is known. */
export function putVideos(list) {
	const videos = new Map(store.get().videos);
	for (const video of list) {
		const known = videos.get(video.id);
		if (known === undefined || video.seq >= known.seq) videos.set(video.id, {...known, ...video});
	}
	store.set({videos});
}

/** Changes fields of a video that is known, by an event that is not older than what is known. */
export function patchVideo(id, seq, patch) {
	const known = store.get().videos.get(id);
	if (known === undefined || seq < known.seq) return;
	store.set({videos: new Map(store.get().videos).set(id, {...known, ...patch, seq})});
}

/** Forgets a video. */
export function dropVideo(id) {
	const state = store.get();
	const videos = new Map(state.videos);
	videos.delete(id);
	const gallery = {...state.gallery, ids: state.gallery.ids.filter((other) => other !== id)};
	const gone = (other) => (other === id ? null : other);
	store.set({videos, gallery, selected: gone(state.selected), compared: gone(state.compared)});
}

/** Returns videos that are not finished, in the order in which they are made. */
export function findActive({videos}) {
	const active = [...videos.values()].filter((video) => ["in_progress", "queued"].includes(video.status));
	const place = (video) => (video.status === "in_progress" ? 0 : (video.queue_position ?? 1e9));
	return active.sort((a, b) => place(a) - place(b) || a.created_at - b.created_at);
}

/** Returns videos that failed or were cancelled, newest first. */
export function findFailed({videos}) {
	return [...videos.values()].filter((video) => video.status === "failed").sort((a, b) => b.created_at - a.created_at);
}
