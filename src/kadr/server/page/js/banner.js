/** Bars on top of the page: the server is gone, it wants a token, its disk is full. */

import {button, formatBytes, h, labelled, show} from "./dom.js";
import {setToken} from "./api.js";
import {store} from "./state.js";
import {startAgain} from "./sync.js";

const PATIENCE_MS = 1200; // a server that comes back sooner was hardly gone

/** Builds the bars. */
export function mountBanners(root) {
	const gone = bar(
		"The server cannot be reached. Nothing you typed is lost; the page tries again by itself. ",
		button("Try now", startAgain, {class: "small"})
	);
	const problem = bar("", null);
	const paused = bar("The queue is paused: videos wait until it is resumed.", null);
	const token = tokenBar();
	root.append(gone, token, problem, paused);
	let timer = 0;
	store.subscribe(["connection", "isTokenAsked"], ({connection, isTokenAsked}) => {
		clearTimeout(timer);
		show(token, isTokenAsked);
		if (isTokenAsked) token.querySelector("input").focus();
		if (connection !== "lost" || isTokenAsked) show(gone, false);
		else timer = setTimeout(() => show(gone, true), PATIENCE_MS);
	});
	store.subscribe(["queue", "system"], ({queue, system}) => {
		const low = system?.is_disk_low
			? `The server's disk is nearly full: ${formatBytes(system.disk_free_bytes)} are free. Delete videos, or tell its operator.`
			: null;
		const text = queue.problem ? `No video is made: ${queue.problem}.` : low;
		show(problem, text !== null);
		problem.firstChild.textContent = text ?? "";
		show(paused, queue.paused);
	});
}

function bar(text, action) {
	return h("div", {class: "banner", role: "alert", hidden: true}, h("span", {}, text), action);
}

function tokenBar() {
	const field = h("input", {type: "password", autocomplete: "current-password", required: true});
	const form = h(
		"form",
		{class: "banner", hidden: true},
		labelled("This server asks for a token", field),
		h("button", {class: "small"}, "Enter")
	);
	form.addEventListener("submit", (event) => {
		event.preventDefault();
		setToken(field.value.trim());
		field.value = "";
		startAgain();
	});
	return form;
}
