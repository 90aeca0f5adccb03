/** The head of the page: the model, the machine, and the queue. */

import {button, formatMemory, h, iconButton, select, setOptions, setText, setValue} from "./dom.js";
import {openHelp} from "./help.js";
import {draft, setDraft} from "./draft.js";
import {describeQueue} from "./queue.js";
import {store} from "./state.js";
import {showTab} from "./tabs.js";

/** Builds the head. */
export function mountHeader(root) {
	const model = select([], {"aria-label": "Model", onchange: () => setDraft({model: model.value})});
	const machine = h("span", {class: "machine hint"});
	const queue = button("", () => showTab("queue"), {class: "quiet", id: "queue-link"});
	root.append(
		model,
		h("span", {class: "grow"}),
		machine,
		queue,
		iconButton("menu", "About this server, keys, self-test", openHelp)
	);
	const update = () => {
		const {models} = store.get();
		setOptions(
			model,
			models.map((name) => [name, name])
		);
		setValue(model, draft.get().model);
	};
	draft.subscribe(["model"], update);
	store.subscribe(["models"], update);
	store.subscribe(["system"], ({system}) => {
		if (system === null) return;
		setText(machine, `${system.device} · ${formatMemory(system)}`);
	});
	store.subscribe(["videos", "queue"], (state) => setText(queue, describeQueue(state)));
}

/** Builds the tabs of a phone. */
export function mountTabs(root) {
	const tabs = [
		["make", "Make"],
		["queue", "Queue"],
		["gallery", "Gallery"]
	].map(([name, text]) =>
		button(text, () => showTab(name), {"data-tab": name, "aria-current": String(name === "make")})
	);
	root.append(...tabs);
	store.subscribe(["videos"], (state) => {
		const number = [...state.videos.values()].filter((video) =>
			["queued", "in_progress"].includes(video.status)
		).length;
		setText(tabs[1], number > 0 ? `Queue · ${number}` : "Queue");
	});
}
