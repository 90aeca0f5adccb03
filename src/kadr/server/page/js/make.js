/** Sends what is in the composer to the queue. Nothing typed is lost, and nothing is made twice, whatever the network does. */

import {call, randomKey, randomSeed} from "./api.js";
import {toBody} from "./body.js";
import {announce, button, count, h, setText} from "./dom.js";
import {clearDraft, draft, setDraft} from "./draft.js";
import {putVideos, store} from "./state.js";
import {loadPlaces} from "./sync.js";
import {selectVideo} from "./tabs.js";
import {toast} from "./toast.js";

const RETRIES = 4;
let closeError = () => {}; // the message about what was sent last, which a change makes stale

/** Builds the button. */
export function mountMake(root) {
	const node = button("Make", make, {class: "main", id: "make"});
	const keys = h("kbd", {}, "Ctrl Enter");
	const clear = button("Clear", () => toast("The form is cleared.", {action: ["Undo", undoTo(clearDraft())]}), {
		class: "quiet"
	});
	root.append(h("div", {class: "row"}, node, keys, h("span", {class: "grow"}), clear));
	draft.subscribe(Object.keys(draft.get()), () => closeError());
	draft.subscribe(["variations"], ({variations}) => setText(node, variations > 1 ? `Make ${variations}` : "Make"));
	store.subscribe(
		["connection", "model"],
		({connection, model}) => (node.disabled = connection !== "live" || model === null)
	);
	addEventListener("keydown", (event) => {
		if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
			event.preventDefault();
			if (!node.disabled) make();
		}
	});
}

function undoTo(before) {
	return () => setDraft(before);
}

async function make() {
	const node = document.getElementById("make");
	if (node.getAttribute("aria-busy") === "true") return;
	node.setAttribute("aria-busy", "true");
	const {model} = store.get();
	const state = draft.get();
	closeError();
	const empty = state.parts.find((part) => part.prompt.trim() === "");
	if (empty !== undefined) {
		closeError = toast("Write what happens in that part, or remove it.", {isError: true});
		document.getElementById(`part-${empty.key}`)?.focus();
		return node.removeAttribute("aria-busy");
	}
	try {
		for (const [index, seed] of listSeeds(state).entries()) {
			const video = await submit(toBody(state, model, seed));
			putVideos([video]);
			if (index === 0) selectVideo(video.id);
		}
		announce(`${count(state.variations, "video")} in the queue`);
		loadPlaces();
	} catch (error) {
		if (error.status !== 401) closeError = toast(error.message, {isError: true});
	}
	return node.removeAttribute("aria-busy");
}

/** Returns a seed for each variation: one after the other from that of the draft, or new ones. */
function listSeeds({seed, variations}) {
	if (seed !== null && !/^-?\d+$/.test(seed)) return [seed]; // the server says what is wrong with it
	const first = seed === null ? randomSeed() : Number(seed);
	if (!Number.isSafeInteger(first))
		throw new Error(`The page takes seeds up to ${Number.MAX_SAFE_INTEGER}; kadr generate takes longer ones.`);
	return Array.from({length: variations}, (_, index) => first + index);
}

/** Submits a video. The key makes sending it again safe where the answer was lost. */
export async function submit(body) {
	const headers = {"idempotency-key": randomKey()};
	for (let attempt = 1; ; attempt += 1) {
		try {
			return await call("POST", "/v1/videos", {body, headers});
		} catch (error) {
			if (error.status !== 0 || attempt === RETRIES) throw error;
			await new Promise((resolve) => setTimeout(resolve, 500 * attempt));
		}
	}
}
