/** Brings a section, or a video on the stage, into sight. */

import {store} from "./state.js";

/** Shows one of the sections: on a phone there is room for one. */
export function showTab(name) {
	document.body.dataset.tab = name;
	for (const tab of document.querySelectorAll("#tabs button")) {
		tab.setAttribute("aria-current", String(tab.dataset.tab === name));
	}
	const section = document.getElementById(name === "make" ? "composer" : name);
	section.scrollIntoView({block: "nearest"});
}

/** Puts a video on the stage, and the stage in sight. */
export function selectVideo(id) {
	store.set({selected: id});
	document.getElementById("stage").scrollIntoView({block: "start"});
}
