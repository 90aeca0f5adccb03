/** Questions in a dialog of the browser's own: it holds the focus, and Escape closes it. */

import {button, h} from "./dom.js";

/** Asks a question. choices: [value, text], the first one stands out. Returns the value, or null. */
export function ask(text, choices) {
	const buttons = choices.map(([value, label], index) =>
		button(label, () => dialog.close(value), {class: index === 0 ? "main" : ""})
	);
	const dialog = h("dialog", {"aria-label": text}, h("p", {}, text), h("div", {class: "row wrap"}, buttons));
	return openDialog(dialog).then((value) => value || null);
}

/** Opens a dialog, and returns the value that it is closed with. */
function openDialog(dialog) {
	document.body.append(dialog);
	dialog.showModal();
	return new Promise((resolve) => {
		dialog.addEventListener("close", () => {
			dialog.remove();
			resolve(dialog.returnValue);
		});
		dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
	});
}

/** Opens a panel with a heading and a button to close it. */
export function openPanel(heading, ...content) {
	const close = button("Close", () => dialog.close(), {class: "quiet"});
	const dialog = h(
		"dialog",
		{class: "panel", "aria-label": heading},
		h("h2", {}, heading),
		...content,
		h("div", {class: "row end"}, close)
	);
	openDialog(dialog);
	return dialog;
}
