/** Short messages at the edge of the page; some can be undone for ten seconds. */

import {announce, button, h, iconButton, setText} from "./dom.js";

const SECONDS = 6;
const UNDO_SECONDS = 10;
const MOST = 4;

/** Shows a message. action: [text, function] of a button. isError: stays until it is closed.
 * Returns a function that closes it, whose `say` changes its text. */
export function toast(text, {action = null, isError = false, seconds = SECONDS} = {}) {
	const root = document.getElementById("toasts");
	const line = h("p", {}, text);
	const node = h("div", {class: isError ? "toast error" : "toast", role: isError ? "alert" : "group"}, line);
	const close = () => node.remove();
	close.say = (news) => setText(line, news);
	if (action !== null) {
		const [label, run] = action;
		node.append(button(label, () => (close(), run()), {class: "quiet"}));
	}
	node.append(iconButton("close", "Close the message", close));
	root.append(node);
	if (root.children.length > MOST) root.firstElementChild.remove();
	if (!isError) {
		announce(text);
		setTimeout(close, 1000 * seconds);
	}
	return close;
}

/** Does something in ten seconds, unless it is undone before. undo: puts back what the page shows. */
export function doLater(text, run, undo) {
	let isUndone = false;
	toast(text, {seconds: UNDO_SECONDS, action: ["Undo", () => ((isUndone = true), undo())]});
	const finish = () => {
		removeEventListener("pagehide", finish);
		clearTimeout(timer);
		if (!isUndone) run();
		isUndone = true;
	};
	const timer = setTimeout(finish, 1000 * UNDO_SECONDS);
	addEventListener("pagehide", finish); // whoever leaves the page has decided
}
