/** The plan line: time and memory of what is in the composer, and what would fit where that does not. */

import {call} from "./api.js";
import {toBody} from "./body.js";
import {button, count, debounce, formatBytes, formatTime, h, setText, show} from "./dom.js";
import {draft, setDraft} from "./draft.js";
import {store} from "./state.js";

const PAUSE_MS = 300;
let controller = null;

const ask = debounce(async () => {
	const {model, connection, isTokenAsked} = store.get();
	if (model === null || connection !== "live" || isTokenAsked) return;
	controller?.abort();
	controller = new AbortController();
	const {signal} = controller;
	try {
		const answer = await call("POST", "/v1/plan", {body: toBody(draft.get(), model, readSeed()), signal});
		store.set({plan: {answer, problem: null}});
	} catch (error) {
		if (!signal.aborted && error.status !== 0) store.set({plan: {answer: null, problem: error}});
	}
}, PAUSE_MS);

/** Returns the seed of the draft, or 0: a plan does not depend on it. */
function readSeed() {
	const {seed} = draft.get();
	return /^-?\d{1,300}$/.test(seed ?? "0") ? Number(seed ?? 0) : (seed ?? 0);
}

/** Builds the line. */
export function mountPlan(root) {
	const line = h("p", {class: "plan", id: "plan", role: "status"});
	const warnings = h("ul", {class: "warnings"});
	const fix = button("", () => applySuggestion(store.get().plan.answer.suggestion), {class: "small"});
	root.append(line, fix, warnings);
	draft.subscribe([...Object.keys(draft.get())], () => ask());
	store.subscribe(["model", "connection"], () => ask());
	store.subscribe(["plan"], ({plan}) => {
		const isBad = plan !== null && (plan.problem !== null || !plan.answer.fits);
		line.classList.toggle("bad", isBad);
		setText(line, plan === null ? "" : plan.problem !== null ? plan.problem.message : describe(plan.answer));
		const suggestion = plan?.answer?.suggestion ?? null;
		show(fix, suggestion !== null);
		if (suggestion !== null) setText(fix, `Use what fits: ${describeSuggestion(suggestion)}`);
		warnings.replaceChildren(...(plan?.answer?.warnings ?? []).map((text) => h("li", {}, text)));
	});
}

/** Returns a plan in a line: "about 46 s, 5.1 GB". */
export function describe(plan) {
	// The ways out are in the words of the command line: the button has what they say.
	if (!plan.fits)
		return plan.suggestion === null ? plan.message : plan.message.replace(/ (This|These) would fit.*/s, "");
	const {variations} = draft.get();
	const time = formatTime(plan.estimated_seconds * variations);
	const fetch = plan.bytes_to_fetch > 0 ? `, after a download of ${formatBytes(plan.bytes_to_fetch)}` : "";
	const each = variations > 1 ? ` for ${variations} videos` : "";
	return `About ${time}${each}, ${formatBytes(plan.peak_bytes)} of memory${fetch}. ${plan.size}, ${plan.seconds} s.`;
}

function describeSuggestion({size, num_frames, windows, ...others}) {
	const parts = [size?.replace("x", "×"), num_frames && count(num_frames, "frame"), windows && "window by window"];
	return [...parts, ...Object.entries(others).map(([name, value]) => `${name} ${value}`)].filter(Boolean).join(", ");
}

function applySuggestion({size, num_frames, windows, ...others}) {
	const {more, extra} = draft.get();
	const patch = {extra: {...extra, ...others}};
	if (size) Object.assign(patch, {aspect: "own", size});
	if (num_frames) patch.frames = num_frames;
	if (windows) {
		const own = {windowed: "true"};
		if (windows.frames) own.window_frames = String(windows.frames);
		if (windows.overlap) own.window_overlap = String(windows.overlap);
		patch.more = {...more, ...own};
	}
	setDraft(patch);
}
