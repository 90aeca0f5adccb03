/** Files that are dropped or pasted anywhere on the page. */

import {takeFiles} from "./media.js";

/** Takes files from all of the page. */
export function takeDropsAndPastes() {
	const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
	addEventListener("dragover", (event) => {
		if (!hasFiles(event)) return;
		event.preventDefault();
		document.body.classList.add("dropping");
	});
	addEventListener("dragleave", (event) => {
		if (event.relatedTarget === null) document.body.classList.remove("dropping");
	});
	addEventListener("drop", (event) => {
		document.body.classList.remove("dropping");
		if (!hasFiles(event) || event.defaultPrevented) return;
		event.preventDefault(); // the browser would leave the page for the file
		takeFiles([...event.dataTransfer.files]);
	});
	addEventListener("paste", (event) => {
		const files = [...(event.clipboardData?.files ?? [])];
		if (files.length === 0) return;
		event.preventDefault();
		takeFiles(files);
	});
}
