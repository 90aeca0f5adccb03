/** Follows `GET /v1/events`: through fetch, since an EventSource cannot send a token. */

import {asError, authorization} from "./api.js";

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 8000;
const SILENCE_MS = 40_000; // the server sends a comment every 15 seconds

/**
 * Follows events for ever, and comes back after each gap with the id of the last one.
 *
 * onEvent(kind, data): for each event. onState("live" | "lost"): when the stream begins or has ended.
 * Returns a function that connects again at once.
 */
export function followEvents(onEvent, onState) {
	let lastId = null;
	let wait = FIRST_WAIT_MS;
	let wake = () => {};
	let controller = null;

	async function followOnce() {
		controller = new AbortController();
		let timer = setTimeout(() => controller.abort(), SILENCE_MS);
		const headers = {...authorization(), ...(lastId === null ? {} : {"last-event-id": lastId})};
		try {
			const response = await fetch("/v1/events", {headers, signal: controller.signal, cache: "no-store"});
			if (!response.ok) throw await asError(response);
			wait = FIRST_WAIT_MS;
			onState("live");
			const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
			let text = "";
			for (;;) {
				const {value, done} = await reader.read();
				if (done) return;
				clearTimeout(timer);
				timer = setTimeout(() => controller.abort(), SILENCE_MS);
				const blocks = (text + value).split("\n\n");
				text = blocks.pop();
				for (const block of blocks) take(block);
			}
		} finally {
			clearTimeout(timer);
		}
	}

	function take(block) {
		const fields = {};
		for (const line of block.split("\n")) {
			const colon = line.indexOf(": ");
			if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
		}
		if (fields.event === undefined) return;
		lastId = fields.id ?? lastId;
		onEvent(fields.event, JSON.parse(fields.data));
	}

	async function run() {
		for (;;) {
			try {
				await followOnce();
			} catch (error) {
				if (error.name !== "AbortError" && error.name !== "TypeError" && error.status === undefined)
					console.error(error);
			}
			onState("lost");
			await new Promise((resolve) => {
				wake = resolve;
				setTimeout(resolve, wait);
			});
			wait = Math.min(2 * wait, LONGEST_WAIT_MS);
		}
	}

	run();
	return () => {
		wait = FIRST_WAIT_MS;
		controller?.abort();
		wake();
	};
}
