/** Windows of a long video: which frames each one samples, and which prompt it is shown. As `Windows` in kadr. */

const STEP = 8; // frames of a latent frame
const MIN_WINDOW = STEP + 1;
const DEFAULT_OVERLAP = 24;
const AUTOMATIC = 2.2; // times the recipe's length: models were trained with up to about twice of it

/** Rounds a number of frames up to the form 8k+1. */
function snapFrames(frames) {
	return Math.ceil((frames - 1) / STEP) * STEP + 1;
}

/** Returns the frames, and frames per second, of a draft: its own, or those of the model's recipe. */
export function lengthOf(draft, model) {
	return {frames: draft.frames ?? model?.recipe?.frames ?? 121, fps: draft.fps ?? model?.recipe?.fps ?? 24};
}

/**
 * Returns the windows of a draft, or null where it is sampled at once: {spans, settings, prompts}.
 *
 * spans: [first, end) frames that each window adds. settings: fields of the API. prompts: of the windows, up to the
 * last one that has a prompt of its own.
 */
export function windowsOf(draft, model) {
	const {frames} = lengthOf(draft, model);
	const chosen = draft.more.windowed;
	const recipe = model?.recipe?.frames ?? 121;
	const isWindowed = chosen === undefined ? draft.parts.length > 0 || frames > AUTOMATIC * recipe : chosen === "true";
	if (!isWindowed) return null;
	const settings = {};
	const own = (name) => Number.parseInt(draft.more[name], 10) || null;
	if (own("window_frames")) settings.frames = own("window_frames");
	if (own("window_overlap")) settings.overlap = own("window_overlap");
	const spans = findSpans(frames, settings.frames ?? recipe, settings.overlap);
	return {spans, settings, prompts: listPrompts(draft, spans.length)};
}

function findSpans(frames, windowFrames, ownOverlap) {
	const length = (snapFrames(Math.max(windowFrames, MIN_WINDOW)) - 1) / STEP + 1;
	const twoThirds = Math.floor(Math.floor((((length - 1) * STEP + 1) * 2) / 3) / STEP);
	const overlap = ownOverlap ? ownOverlap / STEP : Math.min(DEFAULT_OVERLAP / STEP, Math.max(1, twoThirds));
	const total = (snapFrames(frames) - 1) / STEP + 1;
	const stride = Math.max(1, length - overlap);
	const spans = [];
	for (let start = 0; start < Math.max(total - overlap, 1); start += stride) {
		const first = start === 0 ? 0 : (start + overlap - 1) * STEP + 1;
		spans.push([first, Math.min((Math.min(start + length, total) - 1) * STEP + 1, frames)]);
	}
	return spans;
}

function listPrompts({prompt, parts}, numWindows) {
	if (parts.length === 0) return [prompt];
	const usable = parts.filter((part) => part.window < numWindows);
	const prompts = [];
	let text = prompt;
	for (let window = 0; window <= (usable.at(-1)?.window ?? 0); window += 1) {
		text = usable.find((part) => part.window === window)?.prompt.trim() || text; // one that is still empty goes on as before
		prompts.push(text.replaceAll("|", " ").trim());
	}
	return prompts;
}

/** Returns parts from the prompts of all windows, one after the other: equal neighbours are one. */
export function partsOf(prompts) {
	return prompts
		.map((prompt, window) => ({key: window, prompt, window}))
		.filter(({prompt, window}) => window > 0 && prompt !== prompts[window - 1]);
}
