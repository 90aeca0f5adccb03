/** The settings of an image or clip of the timeline. */

import {button, h, labelled} from "./dom.js";
import {openPanel} from "./dialog.js";
import {draft, patchKeyframe, removeKeyframe} from "./draft.js";
import {showImage, thumbnailPath} from "./images.js";
import {describeMedium} from "./media.js";
import {store} from "./state.js";
import {frameOf, moveTo} from "./timeline.js";
import {lengthOf} from "./windows.js";

/** Opens the settings of an item. */
export function openKeyframe(key) {
	const item = draft.get().keyframes.find((other) => other.key === key);
	const {frames} = lengthOf(draft.get(), store.get().model);
	const image = h("img", {alt: "", class: "large"});
	showImage(image, thumbnailPath(item.media));
	const frame = h("input", {
		type: "number",
		min: 1,
		max: frames,
		step: item.kind === "clip" ? 8 : 1,
		value: frameOf(item, frames) + 1,
		onchange: () => moveTo(key, Number(frame.value) - 1)
	});
	const output = h("output", {}, String(item.strength));
	const strength = h("input", {
		type: "range",
		min: 0.05,
		max: 1,
		step: 0.05,
		value: item.strength,
		oninput: () => {
			output.textContent = strength.value;
			patchKeyframe(key, {strength: Number(strength.value)});
		}
	});
	const go = (text, at) => button(text, () => ((frame.value = at + 1), moveTo(key, at)), {class: "small"});
	const dialog = openPanel(
		describeMedium(item),
		image,
		labelled("Frame at which it is shown, from 1", frame),
		h("div", {class: "row"}, go("Start", 0), item.kind === "clip" ? null : go("End", frames - 1)),
		labelled("Strength: 1 keeps it as it is", h("span", {class: "row"}, strength, output)),
		button("Remove it", () => (removeKeyframe(key), dialog.close()), {class: "danger"})
	);
	return dialog;
}
