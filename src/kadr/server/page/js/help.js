/** About the server, the keys, and the self-test. */

import {call} from "./api.js";
import {button, formatBytes, formatMemory, h, setText} from "./dom.js";
import {openPanel} from "./dialog.js";
import {draft} from "./draft.js";
import {store} from "./state.js";

const POLL_MS = 700;
const KEYS = [
	["Ctrl Enter", "make the video"],
	["← →", "frame by frame, on the stage; move, on the timeline"],
	["Space", "play or pause, on the stage"],
	["Delete", "take it from the timeline"]
];

/** Opens the panel. */
export function openHelp() {
	const {system, model} = store.get();
	const facts =
		system === null
			? []
			: [
					["kadr", system.version],
					["device", system.device],
					["memory", formatMemory(system)],
					["free on disk", system.disk_free_bytes === null ? null : formatBytes(system.disk_free_bytes)],
					["model", model?.id],
					["release", model?.release],
					["you", system.client || "everyone on this machine"]
				];
	const pairs = (list) =>
		list.filter(([, text]) => text).flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]);
	openPanel(
		"About this server",
		h("dl", {}, pairs(facts)),
		h("h3", {}, "Keys"),
		h("dl", {}, pairs(KEYS)),
		system?.is_admin === false ? null : selftest()
	);
}

/** Builds the self-test: a verdict for each stage, and a report for an issue. */
function selftest() {
	const list = h("ul", {class: "verdicts"});
	const line = h("p", {class: "hint", role: "status"}, "Tries the model's files, stages and kernels on this machine.");
	const report = h("textarea", {rows: 4, readonly: true, hidden: true, "aria-label": "Report"});
	const run = button("Self-test", start, {class: "small"});

	async function start() {
		run.disabled = true;
		try {
			let state = await call("POST", "/v1/selftest", {body: {model: draft.get().model}});
			for (show(state); state.status === "in_progress"; show(state)) {
				await new Promise((resolve) => setTimeout(resolve, POLL_MS));
				state = await call("GET", "/v1/selftest");
			}
		} catch (error) {
			setText(line, error.message);
		}
		run.disabled = false;
	}

	function show(state) {
		setText(
			line,
			{
				in_progress: "Testing: it takes about ten seconds, longer for a large model.",
				completed: "Everything is as it should be.",
				failed: "Something is wrong."
			}[state.status] ?? ""
		);
		list.replaceChildren(
			...(state.stages ?? []).map((stage) => h("li", {class: stage.verdict}, `${stage.verdict}: ${stage.name}`))
		);
		report.hidden = !state.report;
		report.value = state.report ?? "";
	}
	return h("section", {}, h("h3", {}, "Self-test"), line, list, report, run);
}
