/** The video that this one is made from, and the clip that it follows; shown where there is one. */

import {h, iconButton, select, setText, setValue, show} from "./dom.js";
import {draft, setDraft} from "./draft.js";
import {showImage, thumbnailPath} from "./images.js";

const KINDS = [
	["ready", "follow as it is"],
	["canny", "follow its edges"],
	["depth", "follow its depth"],
	["pose", "follow its poses"]
];

/** Builds both rows. */
export function mountSource(root) {
	root.append(row("source", "Made from", strengthField()), row("control", "Follows", kindField()));
}

function row(name, text, field) {
	const image = h("img", {alt: ""});
	const label = h("span", {class: "grow"});
	const node = h(
		"div",
		{class: "row medium"},
		image,
		label,
		field,
		iconButton("close", `Remove the video that this one ${text.toLowerCase()}`, () => setDraft({[name]: null}))
	);
	draft.subscribe([name], (state) => {
		const medium = state[name];
		show(node, medium !== null);
		if (medium === null) return;
		showImage(image, thumbnailPath(medium.media));
		setText(label, `${text} ${medium.name}`);
		field.update(medium);
	});
	return node;
}

function strengthField() {
	const output = h("output", {});
	const range = h("input", {
		type: "range",
		min: 0.05,
		max: 0.95,
		step: 0.05,
		"aria-label": "How much of it changes",
		title: "How much of it changes",
		oninput: () => setDraft({source: {...draft.get().source, strength: Number(range.value)}})
	});
	const node = h("span", {class: "row"}, range, output);
	node.update = ({strength}) => {
		setValue(range, strength);
		setText(output, `${Math.round(100 * strength)} % changes`);
	};
	return node;
}

function kindField() {
	const node = select(KINDS, {
		"aria-label": "What of the clip is followed",
		onchange: () => setDraft({control: {...draft.get().control, controlKind: node.value}})
	});
	node.update = ({controlKind}) => setValue(node, controlKind);
	return node;
}
