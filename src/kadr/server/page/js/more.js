/** Everything else a request can say, folded. What is left to the recipe stands there in grey. */

import {button, h, iconButton, labelled, select, setOptions, setText, setValue, show, syncList} from "./dom.js";
import {draft, setDraft, setMore} from "./draft.js";
import {chooseFiles, uploadMedium} from "./media.js";
import {store} from "./state.js";

const YES_NO = [
	["", "recipe"],
	["true", "yes"],
	["false", "no"]
];
const AUTOMATIC = [
	["", "as the length needs"],
	["true", "yes"],
	["false", "no"]
];
const SAMPLERS = [
	["", "recipe"],
	["euler", "Euler"],
	["euler_stochastic", "Euler, stochastic"],
	["res_2s", "RES 2S"]
];
const CACHES = [
	["", "off"],
	["first-block", "first block"],
	["taylor", "Taylor"]
];

/** Fields: name in the API, label, what kind of field, and what the recipe has. */
const FIELDS = [
	["negative_prompt", "Negative prompt", "text", (recipe) => recipe.negative_prompt],
	[
		"num_inference_steps",
		"Steps",
		"number",
		(recipe, defaults) => defaults.num_inference_steps ?? recipe.first_pass.steps
	],
	["sigmas", "Sigmas, instead of steps", "text", (recipe) => recipe.first_pass.sigmas?.join(", ")],
	["cfg_scale", "Guidance (CFG)", "number", (recipe) => listed(recipe.first_pass.guidance.cfg_scale)],
	["stg_scale", "STG", "number", (recipe) => listed(recipe.first_pass.guidance.stg_scale)],
	["rescale", "Rescaling of guidance", "number", (recipe) => listed(recipe.first_pass.guidance.rescale)],
	["sampler", "Sampler", SAMPLERS],
	["multi_scale", "Second pass at full size", YES_NO],
	["downscale_factor", "Size of the first pass", "number", (recipe) => recipe.downscale_factor],
	["windowed", "Sample window by window", AUTOMATIC],
	["window_frames", "Frames of a window", "number", (recipe) => recipe.frames],
	["window_overlap", "Overlap of windows", "number", () => "24"],
	["cache", "Step cache: faster, other frames", CACHES],
	["image_crf", "Compression of images first (CRF)", "number", () => ""],
	["image_noise", "Noise on images", "number", (recipe) => recipe.image_noise],
	["decode_timestep", "Timestep of the decoder", "number", (recipe) => recipe.decode_timestep],
	["decode_noise", "Noise of the decoder", "number", (recipe) => recipe.decode_noise],
	["tone_map", "Tone mapping", "number", (recipe) => recipe.first_pass.tone_map],
	["priority", "Priority in the queue", "number", () => "0"]
];

/** Builds the fold. */
export function mountMore(root) {
	const changed = h("span", {class: "changed"});
	const summary = h("summary", {}, "More: recipe, LoRAs, control ", changed);
	const fields = h(
		"div",
		{class: "grid"},
		FIELDS.map(([name, text, kind, recipe]) => moreField(name, text, kind, recipe))
	);
	root.append(h("details", {class: "more"}, summary, fields, loraFields(), controlButton(), extraField()));
	draft.subscribe(["more", "loras", "control", "extra"], ({more, loras, extra}) => {
		const number = Object.keys(more).length + loras.length + Object.keys(extra).length;
		setText(changed, number > 0 ? `· ${number} changed` : "");
	});
}

function moreField(name, text, kind, recipe = () => "") {
	const isSelect = Array.isArray(kind);
	const write = () => setMore(name, field.value.trim() === "" ? null : field.value);
	const field = isSelect
		? select(kind, {onchange: write})
		: h("input", {type: "text", inputmode: kind === "number" ? "decimal" : "text", oninput: write});
	const back = iconButton("undo", `Put back: ${text}`, () => setMore(name, null));
	const node = labelled(text, h("span", {class: "row"}, field, back));
	draft.subscribe(["more"], ({more}) => {
		setValue(field, more[name]);
		if (more[name] === undefined && document.activeElement !== field) field.value = "";
		node.classList.toggle("own", more[name] !== undefined);
		back.hidden = more[name] === undefined;
	});
	if (!isSelect) {
		store.subscribe(["model"], ({model}) => {
			field.placeholder = model?.recipe ? String(recipe(model.recipe, model.defaults ?? {}) ?? "") : "";
		});
	}
	return node;
}

/** Returns a value of the recipe as text; one that changes from step to step is a list. */
function listed(value) {
	return Array.isArray(value) ? value.join(", ") : value;
}

function loraFields() {
	const list = h("div", {});
	const add = select([], {
		"aria-label": "Add a LoRA",
		onchange: () => {
			if (add.value !== "") setDraft({loras: [...draft.get().loras, {name: add.value, strength: 1}]});
			add.value = "";
		}
	});
	const node = h("fieldset", {}, h("legend", {}, "LoRAs"), list, add);
	const update = () => {
		const {loras} = store.get();
		show(node, loras.length > 0 || draft.get().loras.length > 0);
		setOptions(add, [["", "Add a LoRA"], ...loras.map((name) => [name, name])]);
		syncList(
			list,
			draft.get().loras,
			(lora) => lora.name,
			loraRow,
			(row, lora) => row.update(lora)
		);
	};
	draft.subscribe(["loras"], update);
	store.subscribe(["loras"], update);
	return node;
}

function loraRow({name}) {
	const change = (patch) =>
		setDraft({loras: draft.get().loras.map((lora) => (lora.name === name ? {...lora, ...patch} : lora))});
	const strength = h("input", {
		type: "number",
		step: 0.05,
		"aria-label": `Strength of ${name}`,
		oninput: () => Number.isFinite(strength.valueAsNumber) && change({strength: strength.valueAsNumber})
	});
	const remove = () => setDraft({loras: draft.get().loras.filter((lora) => lora.name !== name)});
	const node = h(
		"div",
		{class: "row"},
		h("span", {class: "grow"}, name),
		strength,
		iconButton("close", `Remove ${name}`, remove)
	);
	node.update = (lora) => setValue(strength, lora.strength ?? 1);
	return node;
}

function controlButton() {
	const take = async ([file]) => {
		const medium = file && (await uploadMedium(file));
		if (medium) setDraft({control: {media: medium.media, name: medium.name, controlKind: "canny", extra: {}}});
	};
	const change = async ([file]) => {
		const medium = file && (await uploadMedium(file));
		if (medium) setDraft({source: {media: medium.media, name: medium.name, strength: 0.75}});
	};
	return h(
		"div",
		{class: "row wrap"},
		button("Follow a clip (control)", () => chooseFiles(take), {class: "small", title: "Needs an in-context LoRA"}),
		button("Change a video", () => chooseFiles(change), {class: "small"})
	);
}

/** Fields of the API that the composer has no field for: they came with the settings of a video. */
function extraField() {
	const text = h("code", {});
	const node = h(
		"div",
		{class: "row"},
		h("span", {class: "grow"}, "Also: ", text),
		iconButton("close", "Leave these fields out", () => setDraft({extra: {}}))
	);
	draft.subscribe(["extra"], ({extra}) => {
		show(node, Object.keys(extra).length > 0);
		setText(text, JSON.stringify(extra));
	});
	return node;
}
