/** Shape, length, seed and number of videos. */

import {randomSeed} from "./api.js";
import {h, iconButton, labelled, select, setOptions, setText, setValue, show} from "./dom.js";
import {draft, setDraft} from "./draft.js";
import {ASPECTS, BUDGETS, parseSize, recipeSize, sizeFor} from "./size.js";
import {store} from "./state.js";
import {lengthOf} from "./windows.js";

const MAX_VARIATIONS = 8;

/** Builds the fields. */
export function mountShape(root) {
	root.append(
		h("div", {class: "row fields"}, aspectField(), areaField(), sizeField()),
		shapeNote(),
		h("div", {class: "row fields"}, secondsField(), framesField(), fpsField()),
		lengthNote(),
		h("div", {class: "row fields"}, seedField(), variationsField())
	);
}

function aspectField() {
	const node = select([], {onchange: () => setAspect(node.value)});
	const update = () => {
		const [width, height] = recipeSize(store.get().model);
		const sizes = Object.keys(ASPECTS).map((name) => [name, name]);
		setOptions(node, [
			["recipe", `recipe (${width}×${height})`],
			...sizes,
			["image", "as the image"],
			["own", "own size"]
		]);
		setValue(node, draft.get().aspect);
	};
	draft.subscribe(["aspect"], update);
	store.subscribe(["model"], update);
	return labelled("Shape", node);
}

function setAspect(aspect) {
	const {area, size, aspect: before} = draft.get();
	const [width, height] = recipeSize(store.get().model);
	const current =
		before === "own" ? size : sizeFor(ASPECTS[before] ?? width / height, area ?? width * height).join("x");
	setDraft(aspect === "own" ? {aspect, size: current} : {aspect});
}

function areaField() {
	const node = select([], {onchange: () => setDraft({area: node.value === "" ? null : Number(node.value)})});
	const field = labelled("Pixels", node);
	const update = () => {
		const {aspect, area} = draft.get();
		show(field, !["own", "image"].includes(aspect));
		const [width, height] = recipeSize(store.get().model);
		const options = BUDGETS.map((share) => {
			const pixels = Math.round(share * width * height);
			const size = sizeFor(ASPECTS[aspect] ?? width / height, pixels).join("×");
			return [share === 1 ? "" : String(pixels), share === 1 && aspect === "recipe" ? `${width}×${height}` : size];
		});
		const isOther = area !== null && !options.some(([value]) => value === String(area));
		setOptions(
			node,
			isOther ? [...options, [String(area), sizeFor(ASPECTS[aspect] ?? width / height, area).join("×")]] : options
		);
		setValue(node, area ?? "");
	};
	draft.subscribe(["aspect", "area"], update);
	store.subscribe(["model"], update);
	return field;
}

function sizeField() {
	const node = h("input", {
		type: "text",
		inputmode: "text",
		placeholder: "704x480",
		onfocus: () => node.select(),
		oninput: () => {
			node.setCustomValidity(parseSize(node.value) === null ? "Two numbers, such as 704x480." : "");
			setDraft({size: parseSize(node.value)?.join("x") ?? node.value});
		}
	});
	const field = labelled("Width x height", node);
	draft.subscribe(["aspect", "size"], ({aspect, size}) => {
		show(field, aspect === "own");
		setValue(node, size);
	});
	return field;
}

/** Says what the server makes of shape and length, where it is not what was asked for. */
function shapeNote() {
	const node = h("p", {class: "hint"});
	store.subscribe(["plan"], ({plan}) => {
		const answer = plan?.answer;
		const isCropped = answer?.sampled_size != null && answer.sampled_size !== answer.size;
		const isOfImage = answer != null && draft.get().aspect === "image";
		setText(
			node,
			isCropped
				? `Sampled at ${answer.sampled_size}, then cropped to ${answer.size}.`
				: isOfImage
					? `That is ${answer.size}.`
					: ""
		);
	});
	return node;
}

function lengthNote() {
	const node = h("p", {class: "hint"});
	store.subscribe(["plan"], ({plan}) => {
		const answer = plan?.answer;
		const isTrimmed = answer?.sampled_frames != null && answer.sampled_frames !== answer.num_frames;
		setText(
			node,
			isTrimmed
				? `Sampled with ${answer.sampled_frames} frames, as lengths are 8k + 1, then cut to ${answer.num_frames}.`
				: ""
		);
	});
	return node;
}

function numberField(name, props, write) {
	const node = h("input", {
		type: "number",
		inputmode: "decimal",
		...props,
		oninput: () => write(node.value === "" ? null : node.valueAsNumber)
	});
	return [labelled(name, node), node];
}

function secondsField() {
	const [field, node] = numberField("Seconds", {min: 0.1, step: "any"}, (seconds) => {
		const {fps} = lengthOf(draft.get(), store.get().model);
		// As many frames as last so long: with one more, the first frame, lengths are 8k + 1 at the usual frame rates.
		setDraft({frames: seconds === null ? null : Math.max(1, Math.round(seconds * fps))});
	});
	follow(node, ({frames, fps}) => Math.round((100 * frames) / fps) / 100);
	return field;
}

function framesField() {
	const [field, node] = numberField("Frames", {min: 1, step: 1}, (frames) => setDraft({frames}));
	follow(node, ({frames}) => frames);
	return field;
}

function fpsField() {
	const [field, node] = numberField("Per second", {min: 1, max: 240, step: "any"}, (fps) => setDraft({fps}));
	follow(node, ({fps}) => fps);
	return field;
}

/** Shows a figure of the draft's length: what is left to the recipe stands there in grey. */
function follow(node, figure) {
	const update = () => {
		const state = draft.get();
		const length = lengthOf(state, store.get().model);
		const isOwn = node.max === "240" ? state.fps !== null : state.frames !== null;
		setValue(node, isOwn ? figure(length) : "");
		node.placeholder = String(figure(length));
	};
	draft.subscribe(["frames", "fps"], update);
	store.subscribe(["model"], update);
}

function seedField() {
	const node = h("input", {
		type: "text",
		inputmode: "numeric",
		placeholder: "new each time",
		oninput: () => setDraft({seed: node.value.trim() === "" ? null : node.value.trim()})
	});
	draft.subscribe(["seed"], ({seed}) => setValue(node, seed));
	const dice = iconButton("dice", "Choose a seed, and keep it", () => setDraft({seed: String(randomSeed())}));
	return labelled("Seed", h("span", {class: "row"}, node, dice));
}

function variationsField() {
	const options = Array.from({length: MAX_VARIATIONS}, (_, index) => [String(index + 1), String(index + 1)]);
	const node = select(options, {onchange: () => setDraft({variations: Number(node.value)})});
	draft.subscribe(["variations"], ({variations}) => setValue(node, variations));
	return labelled("Variations", node);
}
